"""Learning from views: exact expectation maximisation, what can be told apart, laps that resume, bad input."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from audiosep.backbones.mlp import MLP
from audiosep.errors import AudiosepError, UsageError
from audiosep.multiview import Plan, check, doubts, draw, indistinct, learn
from audiosep.multiview_start import (
    Gaussian,
    Mixture,
    Source,
    Stage,
    View,
    diagonal_and_low_rank,
    fit_gaussians,
    fit_mixtures,
    posterior,
    posterior_of_mixtures,
)
from audiosep.operators import Matrix, Mixing, Operator
from audiosep.prior import NormalPrior, Prior
from audiosep.schedules import ve

N, M = 5, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source(name, **options):
    torch.manual_seed(0)
    prior = Prior(MLP(N, width=32, depth=2), ve(50, 1e-2, 10.0), level=0.0, parameterization="edm")
    return Source(name, prior, **options)


def gaussians():
    """Two Gaussian sources in five numbers."""
    roots = normal(2, N, N, seed=1) / N**0.5
    covariances = roots @ roots.mT + 0.05 * torch.eye(N, dtype=torch.float64)
    return {name: Gaussian(mean, c) for name, mean, c in zip(("a", "b"), normal(2, N, seed=2), covariances)}


def contrastive(rows, noise=0.05):
    """View 1 with source a, view 2 with both; three numbers of each recording, through its own matrix."""
    views = []
    for number, names in enumerate((("a",), ("a", "b"))):
        maps = normal(rows, 1, M, N, seed=10 + number).expand(-1, len(names), -1, -1)
        x = torch.stack([sample(g, rows, 20 + number) for name, g in gaussians().items() if name in names], 1)
        y = Matrix(maps)(x) + noise * normal(rows, M, seed=30 + number)
        views.append(View(f"view {number + 1}", names, y, Matrix(maps), noise))
    return views


def sample(gaussian, rows, seed):
    seed += int(1000 * abs(gaussian.mean[0]))
    return gaussian.mean + normal(rows, N, seed=seed) @ torch.linalg.cholesky(gaussian.covariance).T


# The Gaussian start


def test_exact_em_recovers_both_sources_and_never_loses_likelihood():
    found, curve = fit_gaussians(contrastive(4096), [source("a"), source("b")], 300)
    for name, known in gaussians().items():
        error = (found[name].covariance - known.covariance).norm() / known.covariance.norm()
        assert error < {"a": 0.05, "b": 0.12}[name]
        assert (found[name].mean - known.mean).norm() / known.mean.norm() < 0.08
    assert all(after >= before - 1e-9 for before, after in pairwise(curve))
    assert curve[-1] > curve[0] + 1


def test_low_rank_start_is_a_diagonal_and_few_axes():
    found, curve = fit_gaussians(
        contrastive(500), [source("a", covariance="low_rank", rank=2), source("b", covariance="low_rank", rank=1)], 20
    )
    for name, rank in (("a", 2), ("b", 1)):
        covariance = found[name].covariance
        assert torch.allclose(diagonal_and_low_rank(covariance, rank, 3000), covariance, atol=1e-3)
        off = covariance - torch.diag(covariance.diagonal())
        assert off.abs().max() > 0.1  # and not the diagonal alone
    assert all(after >= before - 1e-5 for before, after in pairwise(curve))


def test_diagonal_and_low_rank_parts_are_found():
    loadings, diagonal = normal(8, 2, seed=7), 0.1 + normal(8, seed=8).square()
    known = loadings @ loadings.T + torch.diag(diagonal)
    assert torch.allclose(diagonal_and_low_rank(known, 2, 3000), known, atol=1e-3)
    root = normal(8, 8, seed=9)
    other = root @ root.T / 8 + 0.1 * torch.eye(8)

    def divergence(covariance):
        return (torch.linalg.solve(covariance, other).trace() + torch.logdet(covariance)).item()

    # Better than one variance in all directions, as in principal components, and better the longer.
    values, vectors = torch.linalg.eigh(other)
    values[:-2] = values[:-2].mean()
    laps = [divergence(diagonal_and_low_rank(other, 2, n)) for n in (1, 3, 10, 100)]
    assert divergence(vectors * values @ vectors.mT) > laps[0] > laps[1] > laps[2] > laps[3]


def stationary(rows=400, n=64, noise=0.01):
    f = torch.arange(n // 2 + 1, dtype=torch.float64) / n
    spectra = {"a": 1 / (1 + (f / 0.1) ** 4), "b": 0.3 + 1 / (1 + ((f - 0.3) / 0.05) ** 4)}
    views = []
    for number, gains in enumerate(([[1.0, 0.0]], [[1.0, 0.7], [0.5, -1.0]])):
        white = torch.fft.rfft(normal(rows, 2, n, seed=40 + number))
        x = torch.fft.irfft(white * torch.stack(list(spectra.values())).sqrt(), n=n)
        a = torch.tensor(gains, dtype=torch.float64)
        y = a @ x + noise * normal(rows, len(gains), n, seed=50 + number)
        views.append(View(f"view {number + 1}", ("a", "b"), y, Mixing(a), noise))
    return views, spectra


def test_spectra_are_recovered_and_agree_with_the_dense_way():
    views, spectra = stationary()
    sources = [source(name, covariance="stationary", centred=True) for name in spectra]
    found, curve = fit_gaussians(views, sources, 60)
    for name, spectrum in spectra.items():
        assert ((found[name].covariance - spectrum).norm() / spectrum.norm()) < 0.1
    assert all(after >= before - 1e-6 for before, after in pairwise(curve))
    # A mask that hides nothing sends it through the dense path: the same likelihood after the same laps.
    hidden = [View(v.name, v.sources, v.y.clone(), v.operator, v.noise) for v in views]
    hidden[0].y[0, 0, 5] = torch.nan
    other, _ = fit_gaussians([v.masked() for v in hidden], sources, 60)
    for name, spectrum in found.items():
        bins = torch.fft.rfft(other[name].covariance[0]).real
        assert (bins - spectrum.covariance).norm() / bins.norm() < 0.01


def test_a_run_keeps_spectra_of_several_sources(tmp_path):
    """Their means are all 0, but none shares its memory, which can't be written."""
    views, spectra = stationary(4, N)
    sources = [source(name, covariance="stationary", centred=True) for name in spectra]
    stages = [Stage(("a", "b"), ("view 1", "view 2"), 1)]
    first = next(learn(views, sources, stages, Plan(start_laps=2), tmp_path))
    again = next(learn(views, sources, stages, Plan(start_laps=2), tmp_path))
    assert torch.equal(first.samples["view 2"], again.samples["view 2"])


def test_noise_per_channel_is_the_same_number_written_out():
    views, spectra = stationary(50, 16)
    sources = [source(name, covariance="stationary", centred=True) for name in spectra]
    per_channel = [replace(v, noise=torch.full((v.y.shape[1], 1), v.noise, dtype=torch.float64)) for v in views]
    one, other = (fit_gaussians(each, sources, 5)[0] for each in (views, per_channel))
    drawn = [posterior(v, found) for v, found in ((views[1], one), (per_channel[1], other))]
    assert torch.allclose(drawn[0], drawn[1])
    # Noise that is given for every moment takes the dense path, to the same spectra.
    moments = [replace(v, noise=torch.full((16,), v.noise, dtype=torch.float64)) for v in views]
    dense, _ = fit_gaussians(moments, sources, 5)
    assert torch.allclose(
        torch.fft.rfft(dense["a"].covariance[0]).real, fit_gaussians(views, sources, 5)[0]["a"].covariance, rtol=0.1
    )


def test_both_starts_leave_out_what_was_not_observed():
    views, sources = contrastive(60), [source("a"), source("b")]
    for view in views:
        view.y[::3, 1] = torch.nan
    masked = [view.masked() for view in views]
    one, other = (fit_gaussians(each, sources, 5)[0] for each in (views, masked))
    assert all(torch.equal(one[name].covariance, other[name].covariance) for name in one)
    assert all(found.covariance.isfinite().all() for found in one.values())
    stages = [Stage(("a", "b"), ("view 1", "view 2"), 1)]
    first, second = (fit_mixtures(each, sources, stages, 2) for each in (views, masked))
    assert all(torch.equal(first[name].means, second[name].means) for name in first)
    assert all(found.means.isfinite().all() for found in first.values())


def test_posterior_is_that_of_jointly_gaussian_numbers():
    known, view = gaussians(), contrastive(3)[1]
    big = torch.block_diag(*[g.covariance for g in known.values()])
    mean = torch.cat([g.mean for g in known.values()])
    a = view.operator.matrix[0].movedim(0, 1).flatten(1)
    gain = big @ a.T @ torch.linalg.inv(a @ big @ a.T + view.noise**2 * torch.eye(M, dtype=torch.float64))
    exact = (mean + gain @ (view.y[0] - a @ mean)).view(2, N)
    assert torch.allclose(posterior(view, known)[0], exact, atol=1e-9)
    many = View("", view.sources, view.y[:1].expand(20_000, -1), Matrix(view.operator.matrix[0]), view.noise)
    drawn = posterior(many, known, torch.Generator().manual_seed(0)).flatten(1)
    covariance = big - gain @ a @ big
    assert (torch.cov(drawn.T) - covariance).norm() / covariance.norm() < 0.04


def test_what_is_missing_is_as_if_its_row_of_the_matrix_were_not_there():
    known, view = gaussians(), contrastive(4)[1]
    gaps = view.y.clone()
    gaps[:, 1] = torch.nan
    keep = [0, 2]
    fewer = View("", view.sources, view.y[:, keep], Matrix(view.operator.matrix[:, :, keep]), view.noise)
    assert torch.allclose(
        posterior(View("", view.sources, gaps, view.operator, view.noise), known), posterior(fewer, known)
    )


# Mixtures


def test_one_component_is_the_gaussian():
    views, sources = contrastive(300), [source("a"), source("b")]
    gaussian, _ = fit_gaussians(views, sources, 300)
    start = Stage(("a", "b"), ("view 1", "view 2"), 1)
    mixture = fit_mixtures(views, sources, [start], 1)
    again, _ = fit_gaussians(views, sources, 301)
    for name in gaussian:
        assert torch.allclose(mixture[name].covariances[0], again[name].covariance, rtol=1e-3, atol=1e-4)


def corners(rows, noise=0.02):
    """Two sources, each at one of a few corners, seen as in `contrastive`."""
    places = {"a": 2 * normal(3, N, seed=3), "b": 2 * normal(2, N, seed=4)}
    views, truth = [], []
    for number, names in enumerate((("a",), ("a", "b"))):
        make = torch.Generator().manual_seed(number)
        x = [places[n][torch.randint(len(places[n]), (rows,), generator=make)] for n in names]
        truth.append(torch.stack(x, 1) + 0.05 * normal(rows, len(names), N, seed=60 + number))
        maps = normal(rows, 1, M, N, seed=10 + number).expand(-1, len(names), -1, -1)
        y = Matrix(maps)(truth[-1]) + noise * normal(rows, M, seed=30 + number)
        views.append(View(f"view {number + 1}", names, y, Matrix(maps), noise))
    return views, truth, places


def test_mixtures_find_the_corners_that_one_gaussian_can_not():
    views, truth, places = corners(600)
    sources = [source("a", components=4), source("b", components=2)]
    stages = [Stage(("a",), ("view 1",), 1), Stage(("b",), ("view 2",), 1)]
    found = fit_mixtures(views, sources, stages, 30)
    for name, corner in places.items():
        assert torch.cdist(corner, found[name].means).min(1).values.max() < 0.05
    drawn = posterior_of_mixtures(views[1], found, torch.Generator().manual_seed(0))
    gaussian = posterior(views[1], fit_gaussians(views, sources)[0], torch.Generator().manual_seed(0))
    errors = [(x - truth[1]).square().mean().sqrt() for x in (drawn, gaussian)]
    assert errors[0] < 0.2 * errors[1]


def test_a_mixture_of_equals_is_one_of_them():
    """Shares of the choices, moments and samples: two equal components behave as one."""
    known, view = gaussians(), contrastive(20)[1]
    twice = {
        name: Mixture(torch.tensor([0.3, 0.7]).double(), torch.stack([g.mean] * 2), torch.stack([g.covariance] * 2))
        for name, g in known.items()
    }
    many = View("", view.sources, view.y[:1].expand(20_000, -1), Matrix(view.operator.matrix[0]), view.noise)
    drawn = posterior_of_mixtures(many, twice, torch.Generator().manual_seed(0)).flatten(1)
    exact = posterior(many, known, torch.Generator().manual_seed(1)).flatten(1)
    assert (torch.cov(drawn.T) - torch.cov(exact.T)).norm() / torch.cov(exact.T).norm() < 0.05
    x, t = normal(4, N), torch.full((4,), 1.0)
    schedule = ve(3, 0.1, 10.0)
    assert torch.allclose(twice["a"].prior(schedule).denoise(x, t), known["a"].prior(schedule).denoise(x, t))


def test_recordings_that_share_their_maps_are_treated_as_if_each_had_its_own():
    views, _, _ = corners(80)
    views = [View(v.name, v.sources, v.y, Matrix(v.operator.matrix[:1].expand(80, -1, -1, -1)), v.noise) for v in views]
    shared = [View(v.name, v.sources, v.y, Matrix(v.operator.matrix[0]), v.noise) for v in views]
    sources = [source("a", components=2), source("b", components=2)]
    stages = [Stage(("a", "b"), ("view 1", "view 2"), 1)]
    one, other = (fit_mixtures(each, sources, stages, 3) for each in (views, shared))
    for name in one:
        assert torch.allclose(one[name].means, other[name].means, rtol=1e-4, atol=1e-5)
        assert torch.allclose(one[name].covariances, other[name].covariances, rtol=1e-3, atol=1e-5)


def test_a_split_component_keeps_its_moments():
    gaussian = gaussians()["a"]
    halves = Mixture(torch.ones(1).double(), gaussian.mean[None], gaussian.covariance[None]).split(2)
    mean = (halves.weights[:, None] * halves.means).sum(0)
    off = halves.means - mean
    covariance = (halves.weights[:, None, None] * (halves.covariances + off[:, :, None] * off[:, None])).sum(0)
    assert torch.allclose(mean, gaussian.mean)
    assert torch.allclose(covariance, gaussian.covariance)


# Gibbs


def test_gibbs_leaves_exact_posterior_samples_as_they_are():
    known, schedule = gaussians(), ve(2, 1e-2, 10.0)
    view = contrastive(1)[1]
    many = View("", view.sources, view.y.expand(6000, -1), Matrix(view.operator.matrix[0]), 0.5)
    exact = posterior(many, known, torch.Generator().manual_seed(0)).float()
    priors = [g.prior(schedule) for g in known.values()]
    plan = Plan(method="gibbs", rounds=1, steps=64, sigma_min=1e-2)
    x, _ = draw(many, priors, plan, 0, exact)
    assert not torch.allclose(x, exact, atol=0.1)
    spread = exact.std(0)
    assert ((x.mean(0) - exact.mean(0)) / spread).abs().max() < 0.08
    found, wanted = torch.cov(x.flatten(1).T), torch.cov(exact.flatten(1).T)
    assert (found - wanted).norm() / wanted.norm() < 0.1


# What can be told apart


def views_of(*gains):
    names = tuple("abcd"[: len(gains[0])])
    return [View(str(i), names, torch.zeros(4, 1, 8), Mixing(torch.tensor([g])), 0.1) for i, g in enumerate(gains)]


@pytest.mark.parametrize(
    ("gains", "groups"),
    [
        ([[1.0, 0.0], [1.0, 1.0]], []),
        ([[1.0, 0.1], [0.1, 1.0]], []),
        ([[1.0, 0.5], [2.0, 1.0]], [("a", "b")]),  # the same ratio everywhere
        ([[1.0, 1.0], [1.0, -1.0]], [("a", "b")]),  # signs don't show in second moments
        ([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]], [("a", "b")]),
        ([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]], [("a", "c")]),
        # More than one combination is lost: all three are alike, or only the pairs of two and two.
        ([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], [("a", "b", "c")]),
        ([[1.0, 2.0, 0.0, 0.0], [1.0, 2.0, 1.0, 3.0]], [("a", "b"), ("c", "d")]),
        ([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]], [("a", "c"), ("b", "d")]),
        ([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]], [("a", "b", "c")]),
        ([[1.0, 0.0, 0.5], [1.0, 0.0, 0.2]], [("b",)]),  # nothing of b is anywhere
        ([[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]], [("a", "c", "d"), ("b",)]),
    ],
)
def test_sources_that_weigh_alike_in_all_views_are_named(gains, groups):
    assert indistinct(views_of(*gains)) == groups


def test_several_microphones_tell_apart_what_one_does_not():
    assert (
        indistinct([View("", ("a", "b"), torch.zeros(1, 2, 8), Mixing(torch.tensor([[1.0, 0.5], [0.5, 1.0]])))]) == []
    )
    assert indistinct(contrastive(50)) == []
    assert indistinct(contrastive(50)[1:]) == [("a", "b")]


# Laps


def tiny(laps=2, max_steps=60, **options):
    plan = Plan(steps=16, sigma_min=2e-2, max_steps=max_steps, batch_size=128, rows=64, start_laps=20, **options)
    stages = [Stage(("a",), ("view 1",), laps), Stage(("b",), ("view 2",), 1)]
    return contrastive(200), [source("a"), source("b")], stages, plan


def test_finished_laps_are_not_passed_over(tmp_path):
    views, sources, stages, plan = tiny(laps=1, max_steps=2)
    list(learn(views, sources, stages, plan, tmp_path))
    held = (tmp_path / "run.json").read_text()
    for laps in (0, 2):  # the second stage was learned from what one lap of the first had left
        with pytest.raises(UsageError, match=rf"holds 1 laps of stage 1 \(a\), asked for are {laps}"):
            list(learn(*tiny(laps=laps, max_steps=2), tmp_path))
    assert (tmp_path / "run.json").read_text() == held


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y": torch.full((4, 3), torch.nan)}, "nothing but NaN"),
        ({"y": torch.zeros(0, 3)}, "no recording"),
        ({"noise": torch.inf}, "finite and above 0"),
    ],
)
def test_views_without_anything_to_learn_from_are_refused(changed, message):
    view = replace(contrastive(4)[0], **changed)
    with pytest.raises(UsageError, match=message):
        check([view], [source("a")], [])


def test_later_laps_may_have_other_settings(tmp_path, caplog):
    first = next(lap for lap in learn(*tiny(), tmp_path) if (lap.stage, lap.lap) == (0, 1))
    laps = list(learn(*tiny(laps=3, learning_rate=1e-4), tmp_path))
    assert [(lap.stage, lap.lap) for lap in laps] == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    for name, x in first.samples.items():
        assert torch.equal(x, laps[0].samples[name])
    assert "a new plan, laps" in caplog.text


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    whole = list(learn(*tiny(), tmp_path / "whole"))
    assert [(lap.stage, lap.lap) for lap in whole] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    first = []
    for lap in learn(*tiny(), tmp_path / "parts"):
        first.append(lap)
        if (lap.stage, lap.lap) == (0, 1):
            break
    rest = list(learn(*tiny(), tmp_path / "parts"))
    assert (rest[0].stage, rest[0].lap) == (0, 1)
    for name, x in whole[-1].samples.items():
        assert torch.equal(x, rest[-1].samples[name])
    rows = [json.loads(line) for line in (tmp_path / "parts" / "laps.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["lap"]) for row in rows] == [(lap.stage, lap.lap) for lap in whole]
    with pytest.raises(UsageError, match="different seed;"):
        next(learn(*tiny(seed=7), tmp_path / "parts"))
    views, *rest = tiny()
    views[0].y[0] += 1
    with pytest.raises(UsageError, match="different recordings;"):
        next(learn(views, *rest, tmp_path / "parts"))


def test_a_folder_is_refused_when_mixing_network_or_stages_have_changed(tmp_path):
    views, sources, stages, plan = tiny(1, 2)
    first = next(learn(views, sources, stages, plan, tmp_path))
    assert (first.stage, first.lap) == (0, 0)
    again = next(learn(views, sources, stages, plan, tmp_path))
    assert torch.equal(again.samples["view 1"], first.samples["view 1"])
    wide = Prior(MLP(N, width=48, depth=2), ve(50, 1e-2, 10.0), level=0.0, parameterization="edm")
    other = Matrix(1.1 * views[1].operator.matrix)
    for what, changed in {
        "mixing": ([views[0], replace(views[1], operator=other)], sources, stages),
        "networks": (views, [Source("a", wide), sources[1]], stages),
        "stages": (views, sources, [*stages, Stage(("a",), ("view 1",), 1)]),
    }.items():
        with pytest.raises(UsageError, match=f"different {what};"):
            next(learn(*changed, plan, tmp_path))


def test_laps_draw_what_explains_the_recordings(tmp_path):
    """The samples, mixed again, are the observations within the noise; and priors are shared by later stages."""
    views, sources, stages, plan = tiny(1, 250)
    *_, last = learn(views, sources, stages, plan, tmp_path)
    view = views[1]
    left = (view.y - view.operator(last.samples["view 2"].double())).square().mean(1)
    assert left.isfinite().sum() > 150
    assert left[left.isfinite()].mean().sqrt() < 3 * view.noise
    assert all(isinstance(last.priors[name], Prior) for name in ("a", "b"))


def test_a_source_without_a_network_can_not_be_trained():
    with pytest.raises(UsageError, match="'a' has no prior"):
        check(contrastive(4), [Source("a"), source("b")], [])


def test_what_diverges_is_drawn_again_then_left_out_and_counted():
    class Diverges:
        def __init__(self, prior, times):
            self.prior, self.left, self.schedule = prior, times, prior.schedule

        def denoise(self, x_t, t, label=None, schedule=None):
            x = self.prior.denoise(x_t, t, label, schedule)
            if t[0] == 0 and self.left:
                self.left -= 1
                x = torch.cat((x[:2] * torch.nan, x[2:]))
            return x

    view, prior = contrastive(50)[0], gaussians()["a"].prior(ve(2, 1e-2, 10.0))
    plan, before = Plan(steps=8, sigma_min=1e-2, corrections=0, retries=2), torch.ones(50, 1, N)
    x, counts = draw(view, [Diverges(prior, 1)], plan, 0, before)
    assert counts == {"drawn_again": 2, "left_out": 0}
    assert x.isfinite().all()
    x, counts = draw(view, [Diverges(prior, 3)], plan, 0, before)
    assert counts == {"drawn_again": 4, "left_out": 2}
    assert x[:2].isnan().all()
    assert x[2:].isfinite().all()
    few = View("two", ("a",), view.y[:2], view.operator.rows(slice(0, 2)), 0.05)
    with pytest.raises(AudiosepError, match=r"two.*diverged"):
        draw(few, [Diverges(prior, 9)], plan, 0, before[:2])


def test_a_rare_loud_event_has_not_diverged():
    """One recording in two hundred is a thousand times louder than the others; what explains it stays."""
    known = gaussians()["a"]
    often = Mixture(
        torch.tensor([0.99, 0.01]).double(),
        torch.stack([known.mean] * 2),
        torch.stack((known.covariance, 1e6 * known.covariance)),
    )
    view = contrastive(200)[0]
    start = posterior(view, {"a": known}, torch.Generator().manual_seed(0))
    y = view.y.clone()
    y[7] *= 1000
    plan = Plan(steps=48, sigma_min=1e-2, sigma_max=3000.0, corrections=0)
    x, counts = draw(replace(view, y=y), [often.prior(ve(2, 1e-2, 10.0))], plan, 0, start)
    assert x.isfinite().all()
    assert counts == {"drawn_again": 0, "left_out": 0}
    assert x[7].abs().max() > 100 * start.square().mean().sqrt()
    # The same answer to a recording of the usual level is no event, but a failure.
    x, counts = draw(view, [_Louder(known.prior(ve(2, 1e-2, 10.0)))], plan, 0, start)
    assert counts["left_out"] == 1
    assert x[7].isnan().all()


class _Louder:
    """A prior whose answers for item 7 are far too large."""

    def __init__(self, prior):
        self.prior, self.schedule = prior, prior.schedule

    def denoise(self, x_t, t, label=None, schedule=None):
        factor = torch.ones(len(x_t), 1, dtype=x_t.dtype)
        factor[7 if len(x_t) > 7 else 0] = 1000
        return factor * self.prior.denoise(x_t, t, label, schedule)


def test_what_was_left_out_of_a_lap_is_drawn_from_noise_in_the_next():
    known = gaussians()["a"]
    one = contrastive(1)[0]
    many = View("", ("a",), one.y.expand(4001, -1), Matrix(one.operator.matrix[0]), 0.5)
    before = torch.full((4001, 1, N), torch.nan)
    before[0] = posterior(many, {"a": known})[0]
    plan = Plan(steps=64, sigma_min=1e-2, again=0.02)
    x, _ = draw(many, [known.prior(ve(2, 1e-2, 10.0))], plan, 0, before)
    exact = posterior(many, {"a": known}, torch.Generator().manual_seed(0))[:, 0].float()
    found, wanted = torch.cov(x[1:, 0].T), torch.cov(exact.T)
    assert (found - wanted).norm() / wanted.norm() < 0.1


def test_laps_keep_their_own_samples_and_fresh_weights_come_from_the_seed(tmp_path):
    views, sources, stages, plan = tiny(2, 5, fresh=True)
    laps = list(learn(views, sources, stages, plan, tmp_path / "one"))
    assert "view 2" not in laps[0].samples
    assert not torch.equal(laps[0].samples["view 1"], laps[1].samples["view 1"])
    torch.manual_seed(99)
    *_, last = learn(views, sources, stages, plan, tmp_path / "two")
    assert torch.equal(last.samples["view 2"], laps[-1].samples["view 2"])


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operator": Operator(3)}, "names 2 sources, its mixing is for 3"),
        ({"noise": 0.0}, "noise has to be finite and above 0"),
        ({"noise": torch.tensor([0.1, 0.0, 0.1])}, "noise has to be finite and above 0"),
        ({"sources": ("a", "c")}, "has c: no such source"),
        ({"y": torch.zeros(4, 2)}, r"mixing does not give recordings of shape \(2,\)"),
        ({"operator": Matrix(torch.zeros(2, M, 7))}, "sources of 7 numbers, the network of 'a' takes 5"),
        ({"y": torch.full((4, 3), torch.inf)}, "infinite"),
        ({"noise": torch.ones(2)}, r"noise of shape \(2,\) does not fit recordings of shape \(3,\)"),
        ({"noise": torch.ones(4, 3)}, "noise of shape"),
        ({"operator": Matrix(torch.ones(3, 2, M, N))}, "has 4 recordings, its mixing is for 3"),
        ({"operator": Matrix(torch.ones(1, 2, M, N))}, "has 4 recordings, its mixing is for 1"),
        ({"operator": Matrix(torch.full((2, M, N), torch.nan))}, "mixing holds NaN"),
    ],
)
def test_views_that_do_not_fit_are_refused(change, message):
    view = contrastive(4)[1]
    wrong = View(**{**vars(view), **change})
    with pytest.raises(UsageError, match=message):
        check([wrong], [source("a"), source("b")], [])


def test_sources_and_stages_that_do_not_fit_are_refused():
    views = contrastive(4)
    with pytest.raises(UsageError, match="'b' is in no view"):
        check(views[:1], [source("a"), source("b")], [])
    with pytest.raises(UsageError, match="lack a source"):
        check(views, [source("a"), source("b")], [Stage(("b",), ("view 1",), 1)])
    with pytest.raises(UsageError, match="two views are called 'view 1'"):
        check([views[0], *views], [source("a"), source("b")], [])
    with pytest.raises(UsageError, match="no view view 3"):
        check(views, [source("a"), source("b")], [Stage(("b",), ("view 3",), 1)])
    with pytest.raises(UsageError, match="rank 5 of 'a' is not below its 5 numbers"):
        check(views, [source("a", covariance="low_rank", rank=N), source("b")], [])
    with pytest.raises(UsageError, match="covariance"):
        source("a", covariance="diagonal")
    with pytest.raises(UsageError, match="components = 2 takes covariance 'full' or 'frames', got 'stationary'"):
        source("a", covariance="stationary", centred=True, components=2)
    with pytest.raises(UsageError, match="at least 1, got 0"):
        source("a", components=0)
    with pytest.raises(UsageError, match="gibs"):
        Plan(method="gibs")
    for wrong in ({"steps": 0}, {"corrections": -1}, {"limit": 0.0}, {"sigma_min": 20.0}, {"again": 0.0}):
        with pytest.raises(UsageError, match=r"at least|above"):
            Plan(**wrong)


def test_views_without_a_common_source_are_named(tmp_path, caplog):
    """Where their own sources can be learned from each of them, that is all; else they are refused."""
    a, both = contrastive(20)
    alone = View("alone", ("c",), a.y, a.operator, a.noise)
    stages = [Stage(("a", "c"), ("view 1", "alone"), 1)]
    next(learn([a, alone], [source("a"), source("c")], stages, Plan(start_laps=1), tmp_path))
    said = "views alone share no source with the others: nothing is learned from one for the other"
    assert doubts([a, alone])[1:] == [said]
    assert said in caplog.text
    assert doubts([a, both]) == []
    other = View("other", ("c", "d"), both.y, both.operator, both.noise)
    with pytest.raises(UsageError, match=r"views other share no source .* c and d apart"):
        doubts([a, both, other])


def test_a_source_without_any_gain_is_refused(tmp_path):
    views = [View(str(i), ("a", "b"), normal(4, 1, N), Mixing(torch.tensor([[1.0, 0.0]]))) for i in range(2)]
    with pytest.raises(UsageError, match="nothing of b is in any view"):
        next(learn(views, [source("a"), source("b")], [Stage(("a", "b"), ("0",), 1)], Plan(), tmp_path))


def test_a_perceptron_takes_a_longer_signal_vector_by_vector():
    net = source("a").prior.backbone
    x, t = torch.randn(2, 2 * N + 1), torch.tensor([3.0, 7.0])
    filled = torch.nn.functional.pad(x, (0, N - 1))
    parts = [net(part, t) for part in filled.split(N, 1)]
    assert torch.allclose(net(x, t), torch.cat(parts, 1)[:, : 2 * N + 1], atol=1e-6)


def test_normal_prior_is_the_conditional_mean():
    gaussian = gaussians()["a"]
    prior = NormalPrior(gaussian.mean, gaussian.covariance, ve(3, 0.1, 10.0))
    x, s = normal(4, N), float(prior.schedule.ratio[1])
    gain = gaussian.covariance @ torch.linalg.inv(gaussian.covariance + s**2 * torch.eye(N, dtype=torch.float64))
    assert torch.allclose(prior.denoise(x, torch.full((4,), 1.0)), gaussian.mean + (x - gaussian.mean) @ gain.T)
