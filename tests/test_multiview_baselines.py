"""The rivals on contrastive Gaussian sources, where what each can find is known."""

import pytest
import torch
from test_multiview import N, contrastive, normal, source

from audiosep.errors import UsageError
from audiosep.multiview_baselines import CLVMVAE, CPCA, CVAE, PCPCA, CLVMLinear, gaussian_em
from audiosep.multiview_start import View, fit_gaussians, posterior
from audiosep.operators import Matrix, Mixing


def complete(rows=1000, noise=0.1, mean=2.0):
    """Background along one axis, target along another one, all numbers seen."""
    axes = torch.linalg.qr(normal(N, N, seed=5))[0]
    views, truth = [], []
    for number, names in enumerate((("b",), ("b", "t"))):
        latent = normal(rows, 2, seed=70 + number)
        x = torch.stack((3 * latent[:, :1] * axes[0], mean + 2 * latent[:, 1:] * axes[1]), 1)[:, : len(names)]
        maps = torch.eye(N, dtype=torch.float64).expand(rows, len(names), -1, -1)
        views.append(View(names[-1], names, Matrix(maps)(x) + noise * normal(rows, N, seed=80), Matrix(maps), noise))
        truth.append(x)
    return views, truth[1], axes


def error(drawn, truth):
    return ((drawn[:, 1] - truth[:, 1]).square().mean() / truth[:, 1].var()).sqrt().item()


def test_full_linear_model_is_the_gaussian_one():
    """With as many latent dimensions as numbers the two models are the same, and so are their posteriors."""
    views = contrastive(1000)
    linear = CLVMLinear(*views, dims=N, laps=20)
    gaussian, _ = fit_gaussians(views, [source("a"), source("b")], 300)
    mean = posterior(views[1], gaussian)
    a = views[1].operator.matrix[:, 0]
    latent, _ = linear._posterior(a, views[1].y, True)
    found = latent[:, N:] @ linear.loadings[:, N : 2 * N].T + linear.loadings[:, -1]
    assert (found - mean[:, 1]).norm() / (mean[:, 1] - mean[:, 1].mean(0)).norm() < 0.1


def test_linear_rivals_find_the_targets_axis():
    views, truth, axes = complete()
    generator = torch.Generator().manual_seed(0)
    full = gaussian_em(views, [source("b"), source("t")])  # has five axes to find where there is one
    for rival, most in ((CLVMLinear(*views, dims=1), 0.2), (full, 0.5)):
        assert error(rival.draw(views[1], generator), truth) < most
        made = rival.prior(4000, generator)
        assert (made.mean(0) - 2).abs().max() < 0.2
        assert torch.cov(made.T).diagonal().sum() == pytest.approx(4.0, rel=0.15)
    cpca = CPCA(*views, dims=1)
    assert abs((cpca.axes[:, 0] @ axes[1]).item()) > 0.99
    assert error(cpca.draw(views[1], generator), truth) < 0.2


@pytest.mark.parametrize(("gamma", "found"), [(0.0, 0), (0.9, 1)])
def test_pcpca_turns_from_the_strongest_axis_to_the_targets_own(gamma, found):
    views, _, axes = complete(mean=0.0)  # it has one mean for both views
    pcpca = PCPCA(*views, dims=1, gamma=gamma, steps=300)
    axis = pcpca.loadings[:, 0] / pcpca.loadings[:, 0].norm()
    assert abs((axis @ axes[found]).item()) > 0.97


def test_variational_rivals_learn_to_tell_the_sources_apart():
    views, truth, _ = complete()
    generator = torch.Generator().manual_seed(0)
    for make, most in ((CLVMVAE, 0.35), (CVAE, 0.8)):
        before = error(make(*views, dims=2, width=32, steps=1).draw(views[1], generator), truth)
        after = error(make(*views, dims=2, width=32, steps=600, learning_rate=5e-3).draw(views[1], generator), truth)
        assert after < most < before, make


def test_sources_seen_through_different_matrices_are_refused():
    view = contrastive(4)[1]
    maps = view.operator.matrix.clone()
    maps[:, 1] *= 2
    with pytest.raises(UsageError, match="same matrix"):
        PCPCA(view, View("v", view.sources, view.y, Matrix(maps), 0.1), steps=1)
    with pytest.raises(UsageError, match="matrix per recording"):
        CPCA(view, View("v", ("a",), torch.zeros(4, 1, 5), Mixing(torch.ones(1, 1)), 0.1))
