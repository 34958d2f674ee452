"""Fast Gaussian processes against dense linear algebra, and posteriors against what was drawn from the prior."""

import time

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from scipy.linalg import toeplitz as dense
from scipy.stats import multivariate_normal

from audiosep.blind import compiled, gp, gp_vae, state_space, toeplitz
from audiosep.blind.gp_vae import GPPrior
from audiosep.blind.matching import coverage, mean_correlation
from audiosep.blind.posterior import _Spectra, gaussian_posterior, joint_smooth, leakage
from audiosep.errors import UsageError

LAG = np.arange(200)
COLUMNS = {
    "rbf": np.exp(-(LAG**2) / 2 / 12**2) + 1e-2 * (LAG == 0),
    "smooth": np.exp(-(LAG**2) / 2 / 12**2) + 1e-6 * (LAG == 0),
    "matern12": np.exp(-LAG / 5) + 0.1 * (LAG == 0),
    "wave": np.exp(-LAG / 50) * np.cos(0.4 * LAG) + 1e-3 * (LAG == 0),
}


@pytest.fixture(params=["compiled", "plain"])
def speed(request, monkeypatch):
    """Everything below holds with and without numba."""
    if request.param == "plain":
        monkeypatch.setattr(toeplitz, "compiled", lambda name: None)
        monkeypatch.setattr(gp, "compiled", lambda name: None)
        monkeypatch.setattr(compiled, "compiled", lambda name: None)
    else:
        pytest.importorskip("numba")


def draw(column, count, seed=0):
    factor = np.linalg.cholesky(dense(column))
    return np.random.default_rng(seed).standard_normal((count, len(column))) @ factor.T


@pytest.mark.parametrize("name", COLUMNS)
def test_inverse_is_that_of_the_dense_matrix(name, speed):
    column = COLUMNS[name]
    K = dense(column)
    exact = np.linalg.inv(K)
    s = draw(column, 2)
    inverse = toeplitz.Inverse.of(column)
    digits = 1e-6 if name == "smooth" else 1e-9
    assert inverse.logdet == pytest.approx(np.linalg.slogdet(K)[1], rel=digits)
    np.testing.assert_allclose(inverse.solve(s), np.linalg.solve(K, s.T).T, atol=digits * np.abs(exact).max())
    np.testing.assert_allclose(inverse.diagonal, np.diag(exact), rtol=digits)
    sums = [np.trace(exact, k) for k in LAG]
    np.testing.assert_allclose(inverse.diagonal_sums, sums, atol=digits * np.trace(exact))


def test_conjugate_gradients_agree_with_durbin(monkeypatch):
    column = np.exp(-(np.arange(3000) ** 2) / 2 / 9**2)
    column[0] += 1e-2
    short = toeplitz.Inverse.of(column)
    monkeypatch.setattr(toeplitz, "DURBIN_LIMIT", 1000)
    monkeypatch.setattr(toeplitz, "TAIL_ORDER", 1000)
    long = toeplitz.Inverse.of(column)
    np.testing.assert_allclose(long.x, short.x, atol=1e-9 * short.x[0])
    assert long.logdet == pytest.approx(short.logdet, abs=1e-6)


def test_matrices_that_are_not_positive_definite_are_named():
    with pytest.raises(UsageError, match="not positive definite"):
        toeplitz.Inverse.of(np.array([1.0, 2.0, 0.0]))


@pytest.mark.parametrize("kernel", gp.KERNELS)
def test_likelihood_and_gradient_are_those_of_a_cholesky_factor(kernel, speed):
    lag = torch.arange(80, dtype=torch.float64)
    s = torch.from_numpy(draw(COLUMNS["wave"][:80], 2)).requires_grad_()
    scale = torch.tensor([[3.0], [0.7]], dtype=torch.float64, requires_grad=True)
    frequency = torch.tensor([[0.05], [0.02]], dtype=torch.float64, requires_grad=True)

    def column():
        return gp.correlation(kernel, lag, scale, frequency) + 0.05 * (lag == 0)

    fast = gp.negative_log_likelihood(s, column())
    by = torch.autograd.grad((fast * torch.tensor([1.0, 2.0])).sum(), [s, scale, frequency])
    index = (lag[:, None] - lag).abs().long()
    K = column()[:, index]
    slow = -torch.distributions.MultivariateNormal(torch.zeros(80, dtype=torch.float64), K).log_prob(s)
    exact = torch.autograd.grad((slow * torch.tensor([1.0, 2.0])).sum(), [s, scale, frequency])
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=0)
    for mine, theirs in zip(by, exact):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kernel", state_space.ORDERS)
def test_state_space_likelihood_is_exact(kernel, speed):
    s = draw(COLUMNS["matern12"], 1)[0]
    process = gp.Process(kernel, 7.0, 0.0, 1.3, 0.2)
    exact = -multivariate_normal(np.zeros(200), dense(process.column(200, noise=True))).logpdf(s)
    inverse = state_space.StateSpace.of(kernel, 7.0, 1.3, 0.2, 200)
    assert inverse.negative_log_likelihood(s) == pytest.approx(exact, rel=1e-9)
    dense_inverse = np.linalg.inv(dense(process.column(200, noise=True)))
    np.testing.assert_allclose(inverse.solve(np.stack([s, s**2])), np.stack([s, s**2]) @ dense_inverse, atol=1e-9)
    np.testing.assert_allclose(inverse.diagonal, np.diag(dense_inverse), rtol=1e-9)


@pytest.mark.parametrize("kernel", state_space.ORDERS)
def test_state_space_gradients_are_those_of_the_toeplitz_likelihood(kernel, speed):
    s = torch.from_numpy(draw(COLUMNS["matern12"], 2)).requires_grad_()
    log_scale = torch.tensor([1.0, 2.5], dtype=torch.float64, requires_grad=True)
    lag, weights = torch.arange(200, dtype=torch.float64), torch.tensor([1.0, -2.0])
    fast = state_space.negative_log_likelihood(s, log_scale, kernel, 0.03)
    column = gp.correlation(kernel, lag, log_scale.exp()[:, None]) + 0.03 * (lag == 0).double()
    slow = gp.negative_log_likelihood(s, column)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=0)
    mine, theirs = (torch.autograd.grad((v * weights).sum(), [s, log_scale]) for v in (fast, slow))
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-6, atol=1e-6)


def test_long_matern_recordings_cost_little_and_give_the_same(monkeypatch):
    """What the prior and the smoothing take where the kernel allows it: here 100,000 samples, and exactly."""
    pytest.importorskip("numba")
    prior, s = GPPrior(1, "matern32").double(), torch.randn(1, 100_000, dtype=torch.float64)
    process = gp.Process("matern32", 10.0, 0.0, 1.0, 0.5)
    gp.smooth(s[0, :100].numpy(), process)  # compiles
    start = time.process_time()
    fast, (mean, std) = prior.log_prob(s), gp.smooth(s[0].numpy(), process)
    assert time.process_time() - start < 1
    for module in (gp, gp_vae):
        monkeypatch.setattr(module, "compiled", lambda name: None)
    torch.testing.assert_close(fast, prior.log_prob(s), rtol=1e-9, atol=0)
    slow = gp.smooth(s[0].numpy(), process)
    np.testing.assert_allclose(mean, slow[0], atol=1e-9)
    np.testing.assert_allclose(std, slow[1], rtol=1e-6)


def test_smoothing_is_the_conditional_gaussian():
    process = gp.Process("matern32", 9.0, 0.03, 2.0, 0.3)
    y = np.random.default_rng(0).standard_normal(150)
    K = dense(process.column(150))
    gain = K @ np.linalg.inv(K + 0.3 * np.eye(150))
    mean, std = gp.smooth(y, process)
    np.testing.assert_allclose(mean, gain @ y, atol=1e-10)
    np.testing.assert_allclose(std**2, np.diag(K - gain @ K), atol=1e-10)


def left_besides(mean, covariance):
    """Deviation of the errors after those of the offset and of the scale of the mean are taken out."""
    U = np.linalg.qr(np.stack([np.ones(len(mean)), mean], axis=1))[0]
    kept = np.eye(len(mean)) - U @ U.T
    return np.sqrt(np.diag(kept @ covariance @ kept))


def test_joint_smoothing_is_the_conditional_gaussian():
    processes = (gp.Process("rbf", 4.0, 0.0, 1.0, 0.0), gp.Process("matern32", 20.0, 0.0, 1.0, 0.0))
    noise = np.array([[0.3, 0.2], [0.2, 0.4]])
    Y = np.random.default_rng(0).standard_normal((120, 2))
    K = np.zeros((240, 240))
    for j, process in enumerate(processes):
        K[j * 120 : (j + 1) * 120, j * 120 : (j + 1) * 120] = dense(process.column(120))
    gain = K @ np.linalg.inv(K + np.kron(noise, np.eye(120)))
    mean, std = joint_smooth(Y, noise, processes)
    np.testing.assert_allclose(mean.T.ravel(), gain @ Y.T.ravel(), atol=1e-5)  # up to the floor under the noise
    P = (K - gain @ K).reshape(2, 120, 2, 120)
    exact = np.stack([left_besides(mean[:, j], P[j, :, j]) for j in range(2)], axis=1)
    np.testing.assert_allclose(std[20:-20], exact[20:-20], rtol=0.02)
    np.testing.assert_allclose(std, exact, rtol=0.15)


def test_a_drawn_process_is_found_again():
    truth = gp.Process("rbf", 12.0, 0.0, 1.0, 0.1)
    s = draw(truth.column(1500, noise=True), 1)[0]
    found = gp.fit(s)
    assert found.kernel == "rbf"
    assert found.length_scale == pytest.approx(12, rel=0.15)
    assert found.noise == pytest.approx(0.1, rel=0.15)


def noisy_mixture(noise):
    kernels = [gp.Process("rbf", scale, 0.0, 1.0, noise=1e-6) for scale in (4.0, 12.0, 40.0)]
    S = np.concatenate([draw(p.column(1000, noise=True), 1, seed) for seed, p in enumerate(kernels)]).T
    rng = np.random.default_rng(5)
    A = np.linalg.qr(rng.standard_normal((5, 3)))[0] + 0.3 * rng.standard_normal((5, 3))
    return S, A, S @ A.T + noise**0.5 * rng.standard_normal((1000, 5))


def test_posterior_of_a_noisy_mixture():
    S, A, X = noisy_mixture(0.1)
    turned = A @ np.linalg.qr(np.eye(3) + 0.1 * np.random.default_rng(1).standard_normal((3, 3)))[0]
    before = mean_correlation((X - X.mean(0)) @ np.linalg.pinv(turned).T, S)
    found = gaussian_posterior(X - X.mean(0), turned)
    assert found.noise == pytest.approx(0.1, rel=0.1)
    assert before < 0.96
    assert mean_correlation(found.mean, S) > 0.98
    assert 0.9 < coverage(found.mean, found.std, S) < 0.99
    assert found.noisy
    assert not gaussian_posterior(S @ A.T, turned, refine=False).noisy


def test_of_rival_mixings_the_likelier_is_taken():
    _, A, X = noisy_mixture(0.01)
    wrong = A @ np.linalg.qr(np.eye(3) + 0.8 * np.random.default_rng(1).standard_normal((3, 3)))[0]
    for mixing, rival, taken in ((wrong, A, 0), (A, wrong, None)):
        found = gaussian_posterior(X - X.mean(0), mixing, rivals=[rival], refine=False)
        assert found.rival == taken
        np.testing.assert_array_equal(found.mixing, A)


def test_curvature_of_the_mixings_likelihood_is_that_of_automatic_differentiation(monkeypatch):
    monkeypatch.setattr("audiosep.blind.posterior.CURVATURE_NUMBERS", 100)  # several stretches
    rng = np.random.default_rng(0)
    X, mixing = rng.standard_normal((101, 3)), rng.standard_normal((3, 2))
    processes = gp.Process("rbf", 8.0, 0.0, 1.0, 0.0), gp.Process("matern12", 3.0, 0.1, 2.0, 0.0)
    spectra = _Spectra.of(X, processes, 0.3, 1.0)
    exact = torch.autograd.functional.hessian(spectra.negative_log_likelihood, torch.from_numpy(mixing))
    np.testing.assert_allclose(spectra.curvature(mixing), exact, rtol=1e-9, atol=1e-9)


def test_leaks_of_many_channels_are_found_in_seconds():
    rng = np.random.default_rng(0)
    X, mixing = rng.standard_normal((5000, 16)), rng.standard_normal((16, 16))
    processes = tuple(gp.Process("matern32", 2.0 + k, 0.0, 1.0, 0.0) for k in range(16))
    start = time.process_time()
    leaks = leakage(X, mixing, processes, 0.1)
    assert time.process_time() - start < 10
    assert (np.linalg.eigvalsh(leaks)[:, -1] > 0).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_white_sources_are_not_taken_for_noise(seed):
    """Whatever line they have by chance."""
    S = np.random.default_rng(seed).laplace(size=(800, 2))
    A = np.array([[1.0, 0.5], [-0.3, 1.0]])
    found = gaussian_posterior(S @ A.T, A)
    assert found.noise == 0
    np.testing.assert_allclose(found.mean, S, atol=1e-4)


@pytest.mark.parametrize("other", [gp.Process("matern12", 3.0, 0.25, 1.0, 1e-6), None], ids=["rough", "white"])
def test_one_rough_source_does_not_hide_the_noise_that_the_others_show(other):
    """Seen alone, a rough source in noise is as likely to be a rougher one without."""
    smooth = gp.Process("rbf", 8.0, 0.0, 1.0, 1e-6)
    S = np.random.default_rng(1).standard_normal((2000, 2))
    for k, process in enumerate((smooth, other)):
        if process is not None:
            S[:, k] = draw(process.column(2000, noise=True), 1, k)[0]
    A = np.array([[1.0, 0.5], [-0.3, 1.0]])
    X = S @ A.T + 0.2 * np.random.default_rng(5).standard_normal((2000, 2))
    found = gaussian_posterior(X - X.mean(0), A)
    assert found.noise == pytest.approx(0.04, rel=0.2)
    assert 0.88 < coverage(found.mean, found.std, S) < 0.99


def test_a_periodic_source_is_found_again():
    """A sawtooth in noise: its corners stay, where a process that is the same everywhere would blunt them."""
    t = np.arange(600)
    saw = 2 * ((t / 73.4) % 1) - 1
    observed = saw + 0.1 * np.random.default_rng(0).standard_normal(600)
    found = gp.fit(observed - observed.mean())
    assert found.kernel == "periodic12"
    assert 1 / found.frequency == pytest.approx(73.4, rel=2e-3)
    assert found.noise == pytest.approx(0.01, rel=0.3)
    mean, std = gp.smooth(observed - observed.mean(), found)
    left = mean - (saw - observed.mean())
    assert np.mean(left**2) < 0.4 * found.noise
    assert (np.abs(left) < 1.96 * std).mean() > 0.9
