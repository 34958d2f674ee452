"""A start of spectra per frame: the transform is orthogonal, and what is fitted and drawn is exact."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from audiosep.errors import UsageError
from audiosep.mdct import imdct, mdct
from audiosep.multiview_frames import Frames, fit_frames, posterior_of_frames
from audiosep.multiview_start import Gaussian, Source, Stage, View, posterior
from audiosep.operators import Mixing
from audiosep.schedules import ve

F = 16


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectra():
    """Source a is loud low or faint high, b has a bump in the middle."""
    f = torch.arange(F, dtype=torch.float64) / F
    low, high, bump = 4 * torch.exp(-8 * f), 0.3 * torch.exp(-8 * (1 - f)), torch.exp(-40 * (f - 0.5) ** 2)
    return {
        "a": Frames(torch.tensor([0.6, 0.4]).double(), torch.stack((low, high)) + 1e-3),
        "b": Frames(torch.tensor([0.5, 0.5]).double(), torch.stack((bump, 1e-3 * bump)) + 1e-4),
    }


def views(rows=40, frames=40, noise=0.02, gains=([[1.0]], [[1.0, 0.8], [0.5, -1.0]])):
    generator = torch.Generator().manual_seed(0)
    made, truth = [], []
    for names, a in zip((("a",), ("a", "b")), gains):
        x = torch.stack([spectra()[name].sample(rows, frames, generator) for name in names], 1)
        a = torch.tensor(a, dtype=torch.float64)
        y = a @ x + noise * torch.randn(rows, len(a), x.shape[-1], generator=generator, dtype=torch.float64)
        made.append(View(names[-1], names, y, Mixing(a), noise))
        truth.append(x)
    return made, truth


STAGES = [Stage(("a",), ("a",), 1), Stage(("b",), ("b",), 1)]


def test_transform_is_orthogonal_and_that_of_the_definition():
    x = normal(3, 5 * F)
    c = mdct(x, F)
    assert torch.allclose(imdct(c), x)
    assert torch.allclose(c.square().sum(), x.square().sum())
    n, k = np.arange(2 * F), 3
    window = np.sin(np.pi * (n + 0.5) / (2 * F))
    wave = np.sqrt(2 / F) * window * np.cos(np.pi / F * (n + (F + 1) / 2) * (k + 0.5))
    assert np.isclose(c[1, 2, k], wave @ x[1, 2 * F : 4 * F].numpy())


def test_spectra_are_recovered_and_likelihood_never_falls():
    sources = [Source(name, covariance="frames", frame=F, centred=True, components=2) for name in "ab"]
    found, curve = fit_frames(views()[0], sources, STAGES, 30)
    for name, known in spectra().items():
        order = found[name].spectra.sum(1).argsort(descending=True)
        wanted = known.spectra.sum(1).argsort(descending=True)
        ratio = found[name].spectra[order] / known.spectra[wanted]
        assert ratio[0].log().abs().max() < 0.4, name
        assert (found[name].weights[order] - known.weights[wanted]).abs().max() < 0.1
    for first in range(0, 90, 30):  # between splits
        assert all(after >= before - 1e-9 for before, after in pairwise(curve[first : first + 30]))


def test_one_spectrum_is_a_gaussian():
    known = {name: Frames(torch.ones(1).double(), frames.spectra[:1]) for name, frames in spectra().items()}
    view = views(2, 3)[0][1]
    waves = imdct(torch.eye(3 * F, dtype=torch.float64).view(-1, 3, F))  # rows are the basis
    gaussians = {
        name: Gaussian(torch.zeros(3 * F).double(), waves.T @ torch.diag(f.spectra[0].repeat(3)) @ waves)
        for name, f in known.items()
    }
    assert torch.allclose(posterior_of_frames(view, known), posterior(view, gaussians), atol=1e-9)
    many = View("", view.sources, view.y[:1].expand(12000, -1, -1), view.operator, 0.5)
    found = posterior_of_frames(many, known, torch.Generator().manual_seed(0)).flatten(1)
    exact = posterior(many, gaussians, torch.Generator().manual_seed(1)).flatten(1)
    found_covariance, covariance = torch.cov(found.T), torch.cov(exact.T)
    assert (found_covariance - covariance).norm() / covariance.norm() < 0.15
    assert (found.mean(0) - exact.mean(0)).abs().max() < 0.1
    x, t = normal(4, 3 * F), torch.full((4,), 1.0)
    schedule = ve(3, 0.1, 10.0)
    for name, frames in known.items():
        assert torch.allclose(
            frames.prior(schedule).denoise(x, t), gaussians[name].prior(schedule).denoise(x, t), atol=1e-9
        )


def test_samples_average_to_the_mean_and_choices_matter():
    (_, view), truth = views(30, 20, gains=([[1.0]], [[1.0, 1.0]]))
    mean = posterior_of_frames(view, spectra())
    generator = torch.Generator().manual_seed(0)
    drawn = sum(posterior_of_frames(view, spectra(), generator) for _ in range(60)) / 60
    error = (mean - truth[1]).square().mean()
    assert (drawn - mean).square().mean() < 0.05 * error
    one = {
        name: Frames(torch.ones(1).double(), (f.weights[:, None] * f.spectra).sum(0, keepdim=True))
        for name, f in spectra().items()
    }
    assert error < 0.6 * (posterior_of_frames(view, one) - truth[1]).square().mean()


def test_what_has_no_frames_is_refused():
    view = views(2, 3)[0][1]
    sources = [Source(name, covariance="frames", frame=F, centred=True) for name in "ab"]
    with pytest.raises(UsageError, match="all sources or none"):
        fit_frames([view], [sources[0], Source("b")], [], 1)
    with pytest.raises(UsageError, match="no frame of 64"):
        fit_frames([view], [Source(name, covariance="frames", frame=64, centred=True) for name in "ab"], [], 1)
    gaps = view.y.clone()
    gaps[0, 0, 3] = torch.nan
    with pytest.raises(UsageError, match="complete recordings"):
        fit_frames([View("b", view.sources, gaps, view.operator, 0.1)], sources, [], 1)
    with pytest.raises(UsageError, match="does not change over time"):
        fit_frames([View("b", view.sources, view.y, view.operator, torch.full((3 * F,), 0.1))], sources, [], 1)
