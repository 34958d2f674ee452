"""Bent unmixings: exact densities, and the true sources as what is likeliest."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from audiosep.blind import SOBI, StrADiff, bent, gp
from audiosep.blind.bent import Map
from audiosep.blind.matching import mean_correlation


def waves(samples=300):
    t = np.arange(samples)
    S = np.stack([np.sin(0.05 * t), np.sin(0.4 * t) * (1 + 0.7 * np.sin(0.013 * t))], axis=1)
    return (S - S.mean(0)) / S.std(0)


def mixture(S):
    H = S @ np.array([[1.0, 0.8], [-0.6, 1.0]])
    X = (0.3 * H + 0.7 * np.tanh(2 * H)) @ np.array([[1.0, -0.5], [0.7, 1.0]])
    return (X - X.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(X.T))).T


def shaken(sources=2, hidden=4):
    torch.manual_seed(0)
    found = Map(torch.eye(sources) + 0.2 * torch.randn(sources, sources), "mlp", hidden).double()
    for parameter in found.bend.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return found


@pytest.mark.parametrize("mixing", ["linear", "mlp"])
def test_the_slope_is_that_of_automatic_differentiation(mixing):
    found = shaken() if mixing == "mlp" else Map(torch.randn(3, 2).double(), "linear", 1)
    x = torch.randn(5, 2, dtype=torch.float64)
    exact = torch.func.vmap(torch.func.jacrev(lambda row: found(row[None])[0]))(x)
    torch.testing.assert_close(found.slope(x), exact)


def test_the_density_is_that_of_the_whole_transformation():
    """The determinant of all T n outputs by all T n inputs, and dense covariances."""
    found, z = shaken(), torch.randn(6, 2, dtype=torch.float64)
    column = torch.exp(-torch.arange(6, dtype=torch.float64) / 3)
    column[0] += 0.1

    with torch.no_grad():
        scale, mean = found(z).std(0), found(z).mean(0)
        flat = torch.func.jacrev(lambda v: (found(v.reshape(6, 2)) / scale).ravel())(z.ravel())
        K = column[(torch.arange(6)[:, None] - torch.arange(6)).abs()]
        normal = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=torch.float64), K)
        exact = -normal.log_prob(((found(z) - mean) / scale).T).sum() - torch.linalg.slogdet(flat)[1]
        columns, side = torch.stack([column, column]), torch.linalg.det(found.slope(z)[0]).sign()
        assert (side * torch.linalg.det(found.slope(z)) > bent.FOLD * scale.prod()).all()
        torch.testing.assert_close(bent.negative_log_density(found, z, columns, side), exact)
        # Had the map the other side, all of it would be folded.
        volume = -side * torch.linalg.det(found.slope(z)) / scale.prod()
        added = (np.log(bent.FOLD) + volume / bent.FOLD - 1 - (-volume).log()).sum()
        torch.testing.assert_close(bent.negative_log_density(found, z, columns, -side), exact - added)


def test_the_true_sources_are_likelier_than_linear_ones_and_are_found():
    S = waves()
    z = mixture(S)
    linear = SOBI(2).unmix(z, np.random.RandomState(0))
    torch.manual_seed(0)
    start = Map(torch.from_numpy(linear), "mlp", 16).double()
    z = torch.from_numpy(z)
    found = bent.refined(start, z)
    before, after = (mean_correlation(m(z).detach().numpy(), S) for m in (start, found))
    assert before < 0.975
    assert after > 0.99
    np.testing.assert_allclose(found(z).std(0), 1)
    np.testing.assert_allclose(found(z).mean(0), 0, atol=1e-12)

    def misfit(sources):
        columns = [gp.fit(s, noise=0.01).column(len(s)) for s in sources.T]
        columns = torch.from_numpy(np.stack(columns) + 0.01 * np.eye(1, len(sources)))
        return float(gp.negative_log_likelihood(torch.from_numpy(sources.T.copy()), columns).sum())

    assert misfit(S) < misfit((z @ torch.from_numpy(linear).T).numpy()) - 300


def test_a_map_that_leaves_its_sources_is_not_taken(monkeypatch):
    start, z = shaken(), torch.randn(50, 2, dtype=torch.float64)

    def astray(encoder, *_):
        encoder.weight.data = encoder.weight.data.flip(0)
        for values in (encoder.bend[-1].weight, encoder.bend[-1].bias):
            values.data = values.data.flip(0)

    monkeypatch.setattr(bent, "_climb", astray)
    monkeypatch.setattr(bent, "LEVELS", (0.1,))
    kept = bent.refined(start, z)
    assert np.abs(np.corrcoef(kept(z).T, start(z).detach().T)[[0, 1], [2, 3]]) == pytest.approx([1, 1])


def test_the_last_step_of_an_estimator_takes_the_likeliest_unmixing():
    S = waves()
    X = mixture(S) + np.array([1.0, -2.0])
    found = StrADiff(2, mixing="mlp", max_iter=30, steps=3, tol=1.0, random_state=0).fit(X)
    assert mean_correlation(found.sources_, S) > 0.985
    assert mean_correlation(found.transform(X[50:250]), S[50:250]) > 0.98
    assert np.corrcoef(found.inverse_transform(found.sources_).ravel(), X.ravel())[0, 1] > 0.995
