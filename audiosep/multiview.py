"""Learn a prior of every source from views of mixtures alone: no source is ever heard by itself.

View a holds recordings i with a known linear map each,

    y_i = sum_k A_ik x_ik + noise,

and the views weigh the sources differently. Expectation maximisation alternates two steps, in laps:

    E   draw the sources of every recording from p(x_1..x_K | y) under the priors as they are,
    M   train the prior of every source on what was drawn of it in all views.

The joint method draws all sources at once (`samplers.mmps_exact`). Gibbs draws them in turn, each from what the others
leave of y; it needs very many rounds where the noise is low, and is here to be compared with. The priors begin as
Gaussians fitted by exact expectation maximisation, whose E-step has a closed form (`fit_gaussians`).

Sebastian Wagner-Carena et al., "A Data-Driven Prism: Multi-View Source Separation with Diffusion Model Priors", 2025,
https://arxiv.org/abs/2510.05205.

R recordings of a view, K sources in it, N samples of a source, M observed numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from audiosep import train
from audiosep.errors import AudiosepError, UsageError
from audiosep.operators import Chain, Mask, Mixing, Only, Operator, dense
from audiosep.prior import Denoiser, GaussianPrior, JointPrior, NormalPrior, Prior
from audiosep.samplers import OneNoise
from audiosep.samplers.mmps_exact import ExactMomentMatching
from audiosep.schedules import Schedule, ve

__all__ = [
    "Gaussian",
    "Lap",
    "Plan",
    "Source",
    "Stage",
    "View",
    "check",
    "draw",
    "fit_gaussians",
    "indistinct",
    "learn",
]

LOG = "laps.jsonl"
PROBES = 32  # recordings of a view that `indistinct` looks at

log = logging.getLogger("audiosep.multiview")


@dataclass(frozen=True)
class View:
    """Recordings that share a kind of mixing.

    Args:
        name: for messages.
        sources: names of the K sources in it.
        y: (R, M) or (R, C, N) observations; NaN is what was not observed.
        operator: the map from sources (R, K, N) to y.
        noise: standard deviation of the noise: a number, or a tensor that broadcasts with one recording.
    """

    name: str
    sources: tuple[str, ...]
    y: Tensor
    operator: Operator
    noise: float | Tensor = 0.01

    def masked(self) -> View:
        """The view with a mask in place of NaN."""
        missing = self.y.isnan()
        if not missing.any():
            return self
        seen = Chain(self.operator, Mask((~missing).to(self.y.dtype)))
        return replace(self, y=self.y.nan_to_num(0.0), operator=seen)


@dataclass(frozen=True)
class Source:
    """A source to learn a prior of.

    Args:
        name: as the views call it.
        prior: untrained; it is trained in place.
        covariance: of its Gaussian start: "full", "low_rank" (plus a multiple of the identity) or "stationary".
        rank: of "low_rank".
        centred: its mean is 0, as that of sound is.
    """

    name: str
    prior: Prior
    covariance: str = "full"
    rank: int = 2
    centred: bool = False

    def __post_init__(self) -> None:
        if self.covariance not in ("full", "low_rank", "stationary"):
            raise UsageError(f"covariance is 'full', 'low_rank' or 'stationary', got {self.covariance!r}")


@dataclass(frozen=True)
class Stage:
    """Laps in which some sources are learned from some views; the other sources stay as they are.

    Args:
        learn: names of the sources.
        views: names of the views.
        laps: how many.
    """

    learn: tuple[str, ...]
    views: tuple[str, ...]
    laps: int


@dataclass(frozen=True)
class Plan:
    """How the two steps are done.

    Args:
        method: "joint" or "gibbs".
        rounds: of "gibbs": how often every source is drawn.
        steps: noise levels of the sampler.
        corrections: Langevin steps at each of them.
        tau: their size.
        sigma_min: least noise level.
        sigma_max: most.
        again: a lap after the first starts from the last lap's sources in noise of this level; None: from noise alone.
        iterations: of conjugate gradients, where more than 16 numbers are observed.
        rows: recordings that are drawn at a time.
        limit: a sample that is so many times beyond the sources' level has diverged.
        retries: how often it is drawn anew before its recording is left out of the lap.
        max_steps: steps of training per source and lap.
        batch_size: of training.
        learning_rate: falls to a hundredth in every lap.
        ema: of the weights, which the next lap draws with and begins from.
        fresh: begin every lap's training from new weights.
        gaussian_laps: of the Gaussian start.
        seed: of everything.
        device: "cpu" or "cuda".
    """

    method: str = "joint"
    rounds: int = 64
    steps: int = 128
    corrections: int = 1
    tau: float = 0.1
    sigma_min: float = 5e-3
    sigma_max: float = 10.0
    again: float | None = None
    iterations: int = 8
    rows: int = 4096
    limit: float = 10.0
    retries: int = 3
    max_steps: int = 1500
    batch_size: int = 1024
    learning_rate: float = 2e-3
    ema: float = 0.99
    fresh: bool = False
    gaussian_laps: int = 100
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.method not in ("joint", "gibbs"):
            raise UsageError(f"method is 'joint' or 'gibbs', got {self.method!r}")


@dataclass
class Lap:
    """Where the loop stands after a lap.

    Attributes:
        stage: number of the stage.
        lap: laps of it that are done; 0 is the Gaussian start.
        priors: source -> what it was drawn with.
        samples: view -> (R, K, N) sources drawn with these priors; NaN where all retries diverged.
        facts: seconds, losses, diverged and left-out recordings.
    """

    stage: int
    lap: int
    priors: dict[str, Denoiser]
    samples: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


def learn(
    views: Sequence[View], sources: Sequence[Source], stages: Sequence[Stage], plan: Plan, folder: str | Path
) -> Iterator[Lap]:
    """Run the stages, yielding every lap that is done; those that `folder` holds are not done again.

    The last lap's priors are in the sources' `prior`, trained in place. `folder` keeps `laps.jsonl`, a line per lap,
    and the state of the last lap.

    Raises:
        UsageError: views, sources and stages don't fit each other, or `folder` holds another run.
        AudiosepError: training or sampling has failed for good.
    """
    check(views, sources, stages)
    for names in indistinct(views):
        log.warning("nothing in the views tells %s apart: weigh them differently in some view", " and ".join(names))
    seen = {view.name: view.masked() for view in views}
    by_name = {source.name: source for source in sources}
    state = _State(Path(folder), plan, stages)
    priors: dict[str, Denoiser] = dict(state.gaussians(list(seen.values()), sources))
    done = state.restore(by_name)
    samples: dict[str, Tensor] = done.samples if done else {}
    for name in state.trained:
        priors[name] = by_name[name].prior
    for number, stage in enumerate(stages):
        used = [seen[name] for name in stage.views]
        for lap in range(stage.laps + 1):
            if done and (number, lap) <= (done.stage, done.lap):
                if (number, lap) == (done.stage, done.lap):
                    yield replace(done, priors=dict(priors))
                continue
            start, facts = time.monotonic(), {}
            if lap == 0:
                samples = {}
            else:
                for name in stage.learn:
                    rows = _of(name, used, samples)
                    seed = _seed(plan.seed, number, lap, name)
                    facts[f"loss/{name}"] = fit(by_name[name].prior, rows, plan, seed, state.folder / f"{name}.run")
                    priors[name] = by_name[name].prior
                    state.trained.add(name)
            facts["training_s"] = round(time.monotonic() - start, 1)
            for view in used:
                seed = _seed(plan.seed, number, lap, view.name)
                ask = [priors[name] for name in view.sources]
                samples[view.name], counts = draw(view, ask, plan, seed, samples.get(view.name))
                facts |= {f"{key}/{view.name}": value for key, value in counts.items() if value}
            facts["seconds"] = round(time.monotonic() - start, 1)
            result = Lap(number, lap, dict(priors), samples, facts)
            state.keep(result, by_name)
            yield result


def check(views: Sequence[View], sources: Sequence[Source], stages: Sequence[Stage]) -> None:
    """UsageError where views, sources and stages don't fit."""
    known = {source.name for source in sources}
    if not views:
        raise UsageError("there is no view to learn from")
    for view in views:
        if len(view.sources) != view.operator.n_sources:
            raise UsageError(
                f"view {view.name!r} names {len(view.sources)} sources, its mixing is for {view.operator.n_sources}"
            )
        if not set(view.sources) <= known:
            raise UsageError(f"view {view.name!r} has {', '.join(sorted(set(view.sources) - known))}: no such source")
        noise = torch.as_tensor(view.noise)
        if not (noise > 0).all():
            raise UsageError(
                f"view {view.name!r}: the noise has to be above 0 everywhere; where there is none, take a thousandth "
                "of the mixture's level"
            )
        if view.y.isinf().any():
            raise UsageError(f"view {view.name!r} holds infinite numbers; mark what was not observed as NaN")
        row = view.operator.rows(slice(0, 1))
        expected = row(torch.zeros(1, row.n_sources, _length(sources, view))).shape[1:]
        if expected != view.y.shape[1:]:
            raise UsageError(
                f"view {view.name!r}: the mixing gives {tuple(expected)} numbers per recording, "
                f"the recordings have {tuple(view.y.shape[1:])}"
            )
    for source in sources:
        if not any(source.name in view.sources for view in views):
            raise UsageError(f"source {source.name!r} is in no view")
    for stage in stages:
        held = {name for view in views if view.name in stage.views for name in view.sources}
        lost = set(stage.views) - {view.name for view in views}
        if lost or not set(stage.learn) <= held:
            what = (
                f"views {', '.join(sorted(lost))}: no such view" if lost else "its views lack a source that it learns"
            )
            raise UsageError(f"stage that learns {', '.join(stage.learn)}: {what}")


def _length(sources: Sequence[Source], view: View) -> int:
    """N: what the sources' networks say, or as long as the recordings."""
    sizes = {dim for source in sources if (dim := getattr(source.prior.backbone, "config", {}).get("dim"))}
    if len(sizes) > 1:
        raise UsageError(f"the sources' networks are for vectors of {sorted(sizes)} numbers; they have to agree")
    return sizes.pop() if sizes else view.y.shape[-1]


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=7).digest(), "big")


def _of(name: str, views: Sequence[View], samples: Mapping[str, Tensor]) -> Tensor:
    """What was drawn (R, N) of a source in all views, without what diverged."""
    rows = [samples[view.name][:, view.sources.index(name)] for view in views if name in view.sources]
    together = torch.cat(rows)
    return together[together.isfinite().all(-1)]


# What can be told apart


@torch.no_grad()
def indistinct(views: Sequence[View]) -> list[tuple[str, ...]]:
    """Groups of sources whose second moments no view tells apart; empty is good.

    Observations see source k through A_k A_k^T. The matrix of inner products <A_k A_k^T, A_l A_l^T> over all
    recordings, |A_k^T A_l|^2 each, is singular where sources weigh alike everywhere; a combination of sources that it
    sends to 0 names them. With one gain per view and source it is the matrix of squared gains, multiplied by its
    transpose.
    """
    names = sorted({name for view in views for name in view.sources})
    gram = torch.zeros(len(names), len(names), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for view in views:
        count = min(PROBES, len(view.y))
        operator, k = view.operator.rows(slice(0, count)), len(view.sources)
        length = operator.adjoint(torch.zeros_like(view.y[:count])).shape[-1]
        probe = torch.randn(count, length, generator=generator).double()
        for j, name in enumerate(view.sources):
            unit = torch.zeros(count, k, length, dtype=torch.float64)
            unit[:, j] = probe
            back = operator.adjoint(operator(unit)).square().sum(-1).mean(0) / length
            for i, other in enumerate(view.sources):
                gram[names.index(other), names.index(name)] += back[i]
    scale = gram.diagonal().clamp(min=1e-30).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * (gram + gram.mT) / 2 * scale)
    groups = []
    for value, vector in zip(values, vectors.mT):
        if value < 1e-5:
            groups.append(tuple(name for name, part in zip(names, vector) if abs(part) > 0.1))
    return groups


# The Gaussian start


@dataclass
class Gaussian:
    """Mean (N,) and covariance (N, N) of a source; a stationary one has a power spectrum (N // 2 + 1,) in its place."""

    mean: Tensor
    covariance: Tensor

    def prior(self, schedule: Schedule) -> Denoiser:
        """It as a prior."""
        if self.covariance.ndim == 1:
            return GaussianPrior(self.covariance, schedule)
        return NormalPrior(self.mean, self.covariance, schedule)


def fit_gaussians(
    views: Sequence[View], sources: Sequence[Source], laps: int = 100, tolerance: float = 1e-7
) -> tuple[dict[str, Gaussian], list[float]]:
    """Maximum-likelihood Gaussians of all sources, by exact expectation maximisation over all views.

    With gain G_k = C_k A_k^T (A C A^T + R)^-1 the E-step is E[x_k | y] = m_k + G_k (y - A m) and
    Cov[x_k | y] = C_k - G_k A_k C_k; the M-step takes the moments of x_k, projected on what its covariance may be.

    Returns:
        The Gaussians, and the mean log-likelihood of a recording by lap; it never falls.
    """
    if all(source.covariance == "stationary" and source.centred for source in sources) and all(
        isinstance(view.operator, Mixing) and view.operator.matrix.ndim == 2 for view in views
    ):
        return _fit_spectra(views, sources, laps, tolerance)
    length = _length(sources, views[0])
    scale = sum(view.y.double().square().mean() for view in views) / len(views)
    found = {
        source.name: Gaussian(torch.zeros(length, dtype=torch.float64), scale * torch.eye(length, dtype=torch.float64))
        for source in sources
    }
    maps = {view.name: dense(view.operator, length) for view in views}
    curve: list[float] = []
    for _ in range(laps):
        sums = {source.name: _Moments(length) for source in sources}
        likelihood = 0.0
        for view in views:
            likelihood += _expect(view, maps[view.name], found, sums)
        curve.append(likelihood / sum(len(view.y) for view in views))
        for source in sources:
            found[source.name] = sums[source.name].gaussian(source)
        if len(curve) > 1 and curve[-1] - curve[-2] < tolerance * abs(curve[-1]):
            break
    return found, curve


class _Moments:
    """Sums of what is known of a source, over recordings."""

    def __init__(self, length: int) -> None:
        self.count = 0
        self.first = torch.zeros(length, dtype=torch.float64)
        self.second = torch.zeros(length, length, dtype=torch.float64)

    def gaussian(self, source: Source) -> Gaussian:
        """The likeliest Gaussian of a kind with these moments."""
        mean = torch.zeros_like(self.first) if source.centred else self.first / self.count
        covariance = self.second / self.count - torch.outer(mean, mean)
        if source.covariance == "low_rank":
            values, vectors = torch.linalg.eigh(covariance)
            values[: -source.rank] = values[: -source.rank].mean()
            covariance = vectors * values @ vectors.mT
        elif source.covariance == "stationary":
            bins = torch.fft.fft(torch.fft.ifft(covariance.to(torch.complex128), dim=0), dim=1).diagonal().real
            circle = torch.fft.ifft(bins).real
            places = torch.arange(len(mean))
            covariance = circle[(places[:, None] - places) % len(mean)]
        return Gaussian(mean, (covariance + covariance.mT) / 2)


def _expect(view: View, maps: Tensor, found: Mapping[str, Gaussian], sums: Mapping[str, _Moments]) -> float:
    """Add a view's recordings to the sums; returns their log-likelihood."""
    likelihood = 0.0
    for first in range(0, len(view.y), 8192):
        index = slice(first, first + 8192)
        y = view.y[index].double().flatten(1)
        a = maps[index] if len(maps) > 1 else maps
        _, gains, left, covariance = _gains(view, a, found, y)
        weighed = torch.linalg.solve(covariance, left[..., None])[..., 0]
        dimension = left.shape[1] * math.log(2 * math.pi)
        likelihood -= 0.5 * float(((left * weighed).sum(1) + torch.logdet(covariance) + dimension).sum())
        for k, name in enumerate(view.sources):
            own, moments = found[name], sums[name]
            mean = own.mean + (gains[k] @ left[..., None])[..., 0]
            taken = (gains[k] @ a[:, k] @ own.covariance).expand(len(y), -1, -1)
            moments.count += len(y)
            moments.first += mean.sum(0)
            moments.second += mean.mT @ mean + len(y) * own.covariance - taken.sum(0)
    return likelihood


def _gains(
    view: View, a: Tensor, found: Mapping[str, Gaussian], y: Tensor
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Noise variances (M,), gains (B, N, M) of the K sources, y less its mean (B, M), covariance of y (B, M, M)."""
    noise = (torch.as_tensor(view.noise, dtype=torch.float64) ** 2).expand(view.y.shape[1:]).flatten()
    crossed = [found[name].covariance @ a[:, k].mT for k, name in enumerate(view.sources)]
    covariance = torch.diag(noise) + sum(a[:, k] @ c for k, c in enumerate(crossed))
    covariance = covariance.expand(len(y), -1, -1) if len(a) == 1 else covariance
    gains = [torch.linalg.solve(covariance[: len(a)], c.mT).mT for c in crossed]
    left = y - sum((a[:, k] @ found[name].mean[:, None])[..., 0] for k, name in enumerate(view.sources))
    return noise, gains, left, covariance


def _fit_spectra(
    views: Sequence[View], sources: Sequence[Source], laps: int, tolerance: float
) -> tuple[dict[str, Gaussian], list[float]]:
    """The same for zero-mean stationary sources and instantaneous mixing, bin by bin of a unitary FFT."""
    length = views[0].y.shape[-1]
    matrices = [view.operator.matrix.double() for view in views]  # type: ignore[attr-defined]
    bins = [torch.fft.rfft(view.y.double(), norm="ortho") for view in views]  # (R, C, F)
    power = [torch.einsum("rcf,rdf->fcd", b, b.conj()).real / len(b) for b in bins]
    spectra = {
        source.name: torch.stack([p.diagonal(dim1=1, dim2=2).mean(1) for p in power]).mean(0) for source in sources
    }
    curve: list[float] = []
    total = sum(len(view.y) for view in views)
    twice = torch.full_like(power[0][:, 0, 0], 2.0)  # a bin stands for itself and its mirror image
    twice[0] = 1
    if length % 2 == 0:
        twice[-1] = 1
    for _ in range(laps):
        sums = {source.name: torch.zeros_like(twice) for source in sources}
        counts = dict.fromkeys(sums, 0)
        likelihood = 0.0
        for view, a, p in zip(views, matrices, power):
            own = torch.stack([spectra[name] for name in view.sources], 1)  # (F, K)
            noise = (torch.as_tensor(view.noise, dtype=torch.float64) ** 2).expand(a.shape[0])
            covariance = (a * own[:, None]) @ a.mT + torch.diag(noise)
            gain = torch.linalg.solve(covariance, a * own[:, None]).mT  # (F, K, C)
            inverse = torch.linalg.inv(covariance)
            score = (inverse * p.mT).sum((1, 2)) + torch.logdet(covariance) + len(a) * math.log(2 * math.pi)
            likelihood -= 0.5 * len(view.y) * float((twice * score).sum())
            second = (gain @ p @ gain.mT).diagonal(dim1=1, dim2=2) + own - (gain @ a).diagonal(dim1=1, dim2=2) * own
            for k, name in enumerate(view.sources):
                sums[name] += len(view.y) * second[:, k]
                counts[name] += len(view.y)
        curve.append(likelihood / total)
        spectra = {name: sums[name] / counts[name] for name in sums}
        if len(curve) > 1 and curve[-1] - curve[-2] < tolerance * abs(curve[-1]):
            break
    zero = torch.zeros(length, dtype=torch.float64)
    return {name: Gaussian(zero, spectrum) for name, spectrum in spectra.items()}, curve


def posterior(view: View, gaussians: Mapping[str, Gaussian], generator: torch.Generator | None = None) -> Tensor:
    """Sources (R, K, N) of a view's recordings under Gaussian priors: a sample each, or the mean without a generator.

    A sample is a draw x~ of the prior, moved by the gain onto the recording: x~ + G (y - A x~ - eps).
    """
    view = view.masked()
    means = torch.stack([gaussians[name].mean for name in view.sources])
    covariances = [gaussians[name].covariance for name in view.sources]
    shape = (len(view.y), *means.shape)
    noise = torch.as_tensor(view.noise, dtype=torch.float64)
    if covariances[0].ndim == 1:
        a = view.operator.matrix.double()  # type: ignore[attr-defined]
        own = torch.stack(covariances, 1)
        gain = torch.linalg.solve(
            (a * own[:, None]) @ a.mT + torch.diag((noise**2).expand(len(a))), a * own[:, None]
        ).mT
        x = torch.zeros(shape, dtype=torch.float64)
        if generator is not None:
            white = torch.fft.rfft(torch.randn(shape, generator=generator, dtype=torch.float64))
            x = torch.fft.irfft(white * own.mT.sqrt(), n=shape[-1])
        left = torch.fft.rfft(view.y.double() - _noisy(a @ x, noise, generator))
        return x + torch.fft.irfft(torch.einsum("fkc,rcf->rkf", gain.to(left.dtype), left), n=shape[-1])
    maps, parts = dense(view.operator, means.shape[-1]), []
    for first in range(0, len(view.y), 8192):
        index = slice(first, first + 8192)
        y = view.y[index].double().flatten(1)
        a = maps[index] if len(maps) > 1 else maps
        _, gains, _, _ = _gains(view, a, gaussians, y)
        x = means.expand(len(y), -1, -1)
        if generator is not None:
            roots = torch.stack([_root(covariance) for covariance in covariances])
            x = x + (roots @ torch.randn(x.shape, generator=generator, dtype=torch.float64)[..., None])[..., 0]
        seen = (a @ x[..., None])[..., 0].sum(1).unflatten(1, view.y.shape[1:])
        left = y - _noisy(seen, noise, generator).flatten(1)
        parts.append(torch.stack([x[:, k] + (g @ left[..., None])[..., 0] for k, g in enumerate(gains)], 1))
    return torch.cat(parts)


def _noisy(y: Tensor, noise: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return y
    return y + noise * torch.randn(y.shape, generator=generator, dtype=y.dtype)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


# E


def draw(
    view: View, priors: Sequence[Denoiser], plan: Plan, seed: int, before: Tensor | None = None
) -> tuple[Tensor, dict[str, int]]:
    """Sources (R, K, N) of a view's recordings, and how many recordings had to be drawn again or were left out.

    Args:
        view: the recordings.
        priors: of its sources, in the view's order.
        plan: see `Plan`.
        seed: of the noise.
        before: (R, K, N) sources to start from, see `Plan.again`.
    """
    view = view.masked()
    exact = _gaussians_of(priors)
    if exact is not None:
        generator = torch.Generator().manual_seed(seed)
        named = dict(zip(view.sources, exact))
        return posterior(view, named, generator).float(), {}
    parts, again, lost = [], 0, 0
    largest = plan.limit * max(_level(prior) for prior in priors)
    for first in range(0, len(view.y), plan.rows):
        index = torch.arange(first, min(first + plan.rows, len(view.y)))
        x = _draw_rows(view, priors, plan, _seed(seed, first), index, before)
        for attempt in range(plan.retries + 1):
            bad = ~(x.abs() < largest).flatten(1).all(1)
            if not bad.any():
                break
            if attempt == plan.retries:
                x[bad] = torch.nan
                lost += int(bad.sum())
                break
            again += int(bad.sum())
            x[bad] = _draw_rows(view, priors, plan, _seed(seed, first, attempt), index[bad], None)
        parts.append(x)
    if lost == len(view.y):
        raise AudiosepError(
            f"view {view.name!r}: every recording diverged; raise its noise, or take more steps, or a lower learning_rate"
        )
    return torch.cat(parts), {"drawn_again": again, "left_out": lost}


def _gaussians_of(priors: Sequence[Denoiser]) -> list[Gaussian] | None:
    """The priors as Gaussians, None where one isn't."""
    if all(isinstance(prior, GaussianPrior) for prior in priors):
        spectra = [prior.spectrum for prior in priors if isinstance(prior, GaussianPrior)]
        return [Gaussian(torch.zeros(2 * len(s) - 2, dtype=torch.float64), s) for s in spectra]
    if all(isinstance(prior, NormalPrior) for prior in priors):
        return [Gaussian(prior.mean, prior.covariance) for prior in priors if isinstance(prior, NormalPrior)]
    return None


def _level(prior: Denoiser) -> float:
    """Root of a source's mean square."""
    if isinstance(prior, NormalPrior):
        return float((prior.covariance.diagonal() + prior.mean**2).mean().sqrt())
    if isinstance(prior, GaussianPrior):
        return float(prior.spectrum.mean().sqrt())
    return prior.sigma_data if isinstance(prior, Prior) else 1.0


def _draw_rows(
    view: View, priors: Sequence[Denoiser], plan: Plan, seed: int, index: Tensor, before: Tensor | None
) -> Tensor:
    operator, y = view.operator.rows(index), view.y[index].float().to(plan.device)
    noise = OneNoise(seed, plan.device)
    start = None
    if before is not None and plan.again is not None:
        start = before[index].nan_to_num(0.0).to(plan.device)
    if plan.method == "joint":
        return _sample(priors, operator, view, plan, y, noise, start)
    x = torch.zeros(len(y), len(priors), operator.adjoint(y).shape[-1], device=plan.device)
    if before is not None:
        x = before[index].nan_to_num(0.0).to(plan.device)
    for _ in range(plan.rounds):
        for k, prior in enumerate(priors):
            x[:, k] = 0
            x[:, k] = _sample([prior], Only(operator, k), view, plan, y - operator(x), noise, None)[:, 0]
    return x.cpu()


def _sample(
    priors: Sequence[Denoiser],
    operator: Operator,
    view: View,
    plan: Plan,
    y: Tensor,
    noise: OneNoise,
    start: Tensor | None,
) -> Tensor:
    schedule = ve(plan.steps, plan.sigma_min, plan.sigma_max)
    levels = list(range(plan.steps))[::-1]
    if start is not None and plan.again is not None:
        levels = [t for t in levels if schedule.ratio[t] <= plan.again] or levels[-1:]
    sampler = ExactMomentMatching(
        JointPrior([(prior, None) for prior in priors]),
        operator=operator,
        noise=view.noise,
        iterations=plan.iterations,
        corrections=plan.corrections,
        tau=plan.tau,
        length=operator.adjoint(y[:1]).shape[-1],
        start_from=start,
        schedule=schedule,
        times=levels,
        t_init=None,
        init="noise",
        shared_noise=False,
        eta=0.0,
    )
    x = y
    for state in sampler(y, noise):
        x = state.x
    return x.cpu()


# M


class _Rows:
    """Item i: a batch of rows, drawn at random."""

    def __init__(self, rows: Tensor, batch: int, count: int, seed: int) -> None:
        self.rows, self.batch, self.count, self.seed = rows, batch, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed((self.seed + index) % 2**62)
        return {"wave": self.rows[torch.randint(len(self.rows), (self.batch,), generator=generator)]}


class _Denoises(nn.Module):
    """A prior whose loss takes an item of many rows, at levels from the middle of the schedule more than from its ends.

    The level is the median of five uniform draws, which is Beta(3, 3), as published.
    """

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior = prior

    def loss(self, batch: dict[str, Any]) -> Tensor:
        wave = batch["wave"][0]
        generator = torch.Generator(wave.device).manual_seed(batch["seed"][0])
        t = torch.rand(len(wave), 5, generator=generator, device=wave.device, dtype=torch.float64).median(1).values
        return self.prior.loss_at({"wave": wave}, t * (len(self.prior.schedule) - 1), None, generator)


def fit(prior: Prior, rows: Tensor, plan: Plan, seed: int, folder: Path) -> float:
    """Train a prior in place on rows (R, N); returns the loss of the last hundred steps. `folder` is used meanwhile."""
    if len(rows) == 0:
        raise AudiosepError("no recording is left to train on: all have diverged")
    if plan.fresh:
        for module in prior.backbone.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    shutil.rmtree(folder, ignore_errors=True)
    prior.requires_grad_(True)
    options = train.Options(
        max_steps=plan.max_steps,
        batch_size=1,
        learning_rate=plan.learning_rate,
        weight_decay=0.0,
        warmup=min(100, plan.max_steps // 10),
        ema=plan.ema,
        seed=seed % 2**31,
        log_every=min(100, plan.max_steps),
        save_every=plan.max_steps,
        probe_every=0,
    )
    kept: dict[str, Tensor] = {}

    def save(average: nn.Module, facts: dict[str, Any]) -> None:
        kept.update(average.state_dict())

    model = _Denoises(prior)
    result = train.train(
        model, _Rows(rows, plan.batch_size, plan.max_steps, seed), folder, options, save=save, device=plan.device
    )
    if not result["finished"]:
        raise KeyboardInterrupt
    model.load_state_dict(kept)
    prior.eval().requires_grad_(False)
    shutil.rmtree(folder, ignore_errors=True)
    return float(result["loss"])


# What is kept


class _State:
    """The folder of a run."""

    def __init__(self, folder: Path, plan: Plan, stages: Sequence[Stage]) -> None:
        self.folder, self.plan = folder, plan
        self.trained: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        own = {key: value for key, value in vars(plan).items() if key != "device"}
        about = json.loads(json.dumps({"plan": own, "learn": [stage.learn for stage in stages]}))
        path = folder / "run.json"
        if path.exists() and json.loads(path.read_text()) != about:
            raise UsageError(f"{folder} holds a run with another plan; choose another folder")
        path.write_text(json.dumps(about, indent=2) + "\n")

    def gaussians(self, views: Sequence[View], sources: Sequence[Source]) -> dict[str, Denoiser]:
        """The Gaussian start, fitted once."""
        path = self.folder / "gaussians.safetensors"
        schedule = ve(self.plan.steps, self.plan.sigma_min, self.plan.sigma_max)
        if not path.exists():
            found, _ = fit_gaussians(views, sources, self.plan.gaussian_laps)
            tensors = {
                f"{name}/{part}": value.contiguous() for name, g in found.items() for part, value in vars(g).items()
            }
            _write(path, tensors, {})
        held, _ = _read(path)
        return {s.name: Gaussian(held[f"{s.name}/mean"], held[f"{s.name}/covariance"]).prior(schedule) for s in sources}

    def keep(self, lap: Lap, sources: Mapping[str, Source]) -> None:
        """Put a lap on the disk."""
        tensors = {f"samples/{name}": value.contiguous() for name, value in lap.samples.items()}
        for name in self.trained:
            for key, value in sources[name].prior.backbone.state_dict().items():
                tensors[f"weights/{name}/{key}"] = value.detach().cpu().contiguous()
        facts = {"stage": lap.stage, "lap": lap.lap, "facts": lap.facts, "trained": sorted(self.trained)}
        _write(self.folder / "lap.safetensors", tensors, facts)
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps({"stage": lap.stage, "lap": lap.lap, **lap.facts}) + "\n")

    def restore(self, sources: Mapping[str, Source]) -> Lap | None:
        """The last lap that was done, with its weights put back."""
        path = self.folder / "lap.safetensors"
        if not path.exists():
            return None
        tensors, facts = _read(path)
        self.trained = set(facts["trained"])
        for name in self.trained:
            start = f"weights/{name}/"
            weights = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            sources[name].prior.backbone.load_state_dict(weights)
            sources[name].prior.eval().requires_grad_(False)
        samples = {k.removeprefix("samples/"): v for k, v in tensors.items() if k.startswith("samples/")}
        return Lap(facts["stage"], facts["lap"], {}, samples, facts["facts"])


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, {"facts": json.dumps(facts)})
    partial.replace(path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
