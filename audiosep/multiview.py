"""Learn a prior of every source from views of mixtures alone: no source is ever heard by itself.

View a holds recordings i with a known linear map each,

    y_i = sum_k A_ik x_ik + noise,

and the views weigh the sources differently. Expectation maximisation alternates two steps, in laps:

    E   draw the sources of every recording from p(x_1..x_K | y) under the priors as they are,
    M   train the prior of every source on what was drawn of it in all views.

The joint method draws all sources at once (`samplers.mmps_exact`). Gibbs draws them in turn, each from what the others
leave of y; it needs very many rounds where the noise is low, and is here to be compared with. The priors begin as
Gaussians, or mixtures of them, fitted by exact expectation maximisation (`multiview_start`).

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
from typing import Any, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from audiosep import train
from audiosep.errors import AudiosepError, UsageError
from audiosep.multiview_start import (
    Source,
    Stage,
    Start,
    View,
    draw_start,
    fit_start,
    length_of,
)
from audiosep.operators import Only, Operator, sizes
from audiosep.prior import Denoiser, JointPrior, Prior
from audiosep.samplers import OneNoise
from audiosep.samplers.mmps_exact import ExactMomentMatching
from audiosep.schedules import ve

__all__ = [
    "Lap",
    "Plan",
    "Source",
    "Stage",
    "View",
    "check",
    "doubts",
    "draw",
    "fit",
    "indistinct",
    "learn",
    "read_start",
]

LOG = "laps.jsonl"
PROBES = 32  # recordings of a view that `indistinct` looks at

log = logging.getLogger("audiosep.multiview")


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
        again: a lap after the first starts from the last lap's sources in noise of this level, a third of their own
            or less; None: from noise alone.
        iterations: of conjugate gradients, where more than 16 numbers are observed.
        rows: recordings that are drawn at a time.
        limit: a recording has diverged where its sources are so many times beyond all that it, they themselves before,
            and the view's sources on the whole have for a level.
        retries: how often it is drawn anew before its recording is left out of the lap.
        max_steps: steps of training per source and lap.
        batch_size: of training.
        learning_rate: falls to a hundredth in every lap.
        ema: of the weights, which the next lap draws with and begins from.
        fresh: begin every lap's training from new weights.
        start_laps: of the start; of a mixture, after every cut.
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
    start_laps: int = 100
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.method not in ("joint", "gibbs"):
            raise UsageError(f"method is 'joint' or 'gibbs', got {self.method!r}")
        for name in ("rounds", "steps", "iterations", "rows", "max_steps", "batch_size", "start_laps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is at least 1, got {getattr(self, name)}")
        for name in ("corrections", "retries"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is at least 0, got {getattr(self, name)}")
        for name in ("tau", "sigma_min", "sigma_max", "limit", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} is above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema is at least 0 and below 1, got {self.ema}")
        if not self.sigma_min < self.sigma_max:
            raise UsageError(f"sigma_max is above sigma_min, {self.sigma_min}, got {self.sigma_max}")
        if self.again is not None and not 0 < self.again < math.inf:
            raise UsageError(f"again is above 0 and finite, or left out, got {self.again}")


@dataclass
class Lap:
    """Where the loop stands after a lap.

    Attributes:
        stage: number of the stage.
        lap: laps of it that are done; 0 is the start.
        priors: source -> what it was drawn with.
        samples: view -> (R, K, N) sources drawn with these priors, at lap 0 with the start; NaN: diverged.
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
    for doubt in doubts(views):
        log.warning(doubt)
    seen = {view.name: view.masked() for view in views}
    trained = {source.name: source.prior for source in sources if source.prior is not None}
    state = _State(Path(folder), plan, views, sources, stages)
    starts = state.starts(list(seen.values()), sources, stages)
    schedule = ve(plan.steps, plan.sigma_min, plan.sigma_max)
    priors = {name: start.prior(schedule) for name, start in starts.items()}
    done = state.restore(trained)
    samples: dict[str, Tensor] = dict(done.samples) if done else {}
    for name in state.trained:
        priors[name] = trained[name].to(plan.device)
    for number, stage in enumerate(stages):
        used = [seen[name] for name in stage.views]
        for lap in range(stage.laps + 1):
            if done and (number, lap) <= (done.stage, done.lap):
                if (number, lap) == (done.stage, done.lap):
                    yield replace(done, priors=dict(priors))
                continue
            start, facts = time.monotonic(), {}
            for name in stage.learn if lap else ():
                rows = _of(name, used, samples)
                seed = _seed(plan.seed, number, lap, name)
                facts[f"loss/{name}"] = fit(trained[name], rows, plan, seed, state.folder / f"{name}.run")
                priors[name] = trained[name]
                state.trained.add(name)
            facts["training_s"] = round(time.monotonic() - start, 1)
            for view in used:
                seed = _seed(plan.seed, number, lap, view.name)
                if lap == 0 and not _drawn(stages[:number], view.name):
                    samples[view.name] = draw_start(view, starts, seed)
                elif lap:
                    ask = [priors[name] for name in view.sources]
                    samples[view.name], counts = draw(view, ask, plan, seed, samples[view.name])
                    facts |= {f"{key}/{view.name}": value for key, value in counts.items() if value}
            facts["seconds"] = round(time.monotonic() - start, 1)
            result = Lap(number, lap, dict(priors), dict(samples), facts)
            state.keep(result, trained)
            yield result


def check(views: Sequence[View], sources: Sequence[Source], stages: Sequence[Stage]) -> None:
    """UsageError where views, sources and stages don't fit."""
    known = {source.name for source in sources}
    if not views:
        raise UsageError("there is no view to learn from")
    names = [view.name for view in views]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two views are called {name!r}; every view needs a name of its own")
    for view in views:
        if len(view.sources) != view.operator.n_sources:
            raise UsageError(
                f"view {view.name!r} names {len(view.sources)} sources, its mixing is for {view.operator.n_sources}"
            )
        if not set(view.sources) <= known:
            raise UsageError(f"view {view.name!r} has {', '.join(sorted(set(view.sources) - known))}: no such source")
        noise = torch.as_tensor(view.noise)
        if not _broadcasts(noise, view.y.shape[1:]):
            raise UsageError(
                f"view {view.name!r}: noise of shape {tuple(noise.shape)} does not fit recordings of shape "
                f"{tuple(view.y.shape[1:])}"
            )
        if not len(view.y):
            raise UsageError(f"view {view.name!r} holds no recording")
        if view.y.isnan().all():
            raise UsageError(f"view {view.name!r} holds nothing but NaN: nothing was observed in it")
        if not ((noise > 0) & noise.isfinite()).all():
            raise UsageError(
                f"view {view.name!r}: the noise has to be finite and above 0 everywhere; where there is none, take "
                "a thousandth of the mixture's level"
            )
        if view.y.isinf().any():
            raise UsageError(f"view {view.name!r} holds infinite numbers; mark what was not observed as NaN")
        for count in sizes(view.operator) - {len(view.y)}:
            raise UsageError(
                f"view {view.name!r} has {len(view.y)} recordings, its mixing is for {count}; give each its own, "
                "or one for all without the first axis"
            )
        try:
            one = torch.zeros_like(view.y[:1])
            fits = view.operator.rows(slice(0, 1))(view.operator.rows(slice(0, 1)).adjoint(one)).shape == one.shape
        except (RuntimeError, IndexError):
            fits = False
        if not fits:
            raise UsageError(
                f"view {view.name!r}: the mixing does not give recordings of shape {tuple(view.y.shape[1:])}"
            )
        if not view.operator.adjoint(torch.ones_like(view.y)).isfinite().all():
            raise UsageError(f"view {view.name!r}: its mixing holds NaN or infinite numbers")
        _check_networks(view, [source for source in sources if source.name in view.sources])
    for source in sources:
        if not any(source.name in view.sources for view in views):
            raise UsageError(f"source {source.name!r} is in no view")
    for stage in stages:
        held = {name for view in views if view.name in stage.views for name in view.sources}
        lost = set(stage.views) - {view.name for view in views}
        if lost or not set(stage.learn) <= held:
            what = f"no view {', '.join(sorted(lost))}" if lost else "its views lack a source that it learns"
            raise UsageError(f"stage that learns {', '.join(stage.learn)}: {what}")


def _broadcasts(noise: Tensor, shape: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(noise.shape, shape) == shape
    except RuntimeError:
        return False


def _check_networks(view: View, sources: Sequence[Source]) -> None:
    length = length_of(view)
    for source in sources:
        if source.prior is None:
            raise UsageError(f"source {source.name!r} has no prior to train")
        if source.covariance == "low_rank" and source.rank >= length:
            raise UsageError(f"rank {source.rank} of {source.name!r} is not below its {length} numbers")
        takes = getattr(source.prior.backbone, "config", {}).get("dim", length)
        if takes != length:
            raise UsageError(
                f"view {view.name!r} has sources of {length} numbers, the network of {source.name!r} takes {takes}"
            )


def _drawn(stages: Sequence[Stage], view: str) -> bool:
    """Whether an earlier stage with laps has left samples of the view that a later one can go on from."""
    return any(view in stage.views and stage.laps for stage in stages)


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
    recordings, |A_k^T A_l|^2 each, is singular where sources weigh alike everywhere; the combinations of sources that
    it sends to 0 name them. With one gain per view and source it is the matrix of squared gains, multiplied by its
    transpose. A source that is in no view at all is a group of its own.
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
    heard = gram.diagonal() > 1e-20
    scale = torch.where(heard, gram.diagonal(), 1.0).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * (gram + gram.mT) / 2 * scale)
    lost = vectors[:, values < 1e-5]
    # Any basis of that space may come out, but there is one projection on it. It ties sources together, or, where it
    # has several parts, each part's own.
    tied = (lost @ lost.mT).abs() > 1e-3
    groups: list[tuple[str, ...]] = []
    left = [i for i in range(len(names)) if tied[i, i]]
    while left:
        group, fresh = set[int](), {left[0]}
        while fresh:
            group |= fresh
            fresh = {j for j in left if any(tied[i, j] for i in fresh)} - group
        groups.append(tuple(names[i] for i in sorted(group)))
        left = [i for i in left if i not in group]
    return groups


def doubts(views: Sequence[View]) -> list[str]:
    """What about the views will keep some of what is learned from being true, a sentence each; empty is good.

    Raises UsageError where nothing of a source can be learned: it is in no view, or it is in views that share no source
    with the others and can't be told apart in them.
    """
    said = []
    for group in indistinct(views):
        if len(group) == 1:
            raise UsageError(f"nothing of {group[0]} is in any view: give it a gain")
        said.append(f"nothing in the views tells {' and '.join(group)} apart: weigh them differently in some view")
    for own in _strangers(views):
        names = ", ".join(view.name for view in own)
        for group in indistinct(own):
            raise UsageError(
                f"views {names} share no source with the others, and nothing in them tells {' and '.join(group)} "
                "apart; is a source spelled in two ways?"
            )
        said.append(f"views {names} share no source with the others: nothing is learned from one for the other")
    return said


def _strangers(views: Sequence[View]) -> list[list[View]]:
    """The sets of views that share no source with the others; empty if all hang together."""
    left, sets = list(views), []
    while left:
        names, held = set(left[0].sources), [left[0]]
        while more := [v for v in left if names & set(v.sources) and not any(v is one for one in held)]:
            held += more
            names.update(*(view.sources for view in more))
        sets.append(held)
        left = [view for view in left if not any(view is one for one in held)]
    return sets if len(sets) > 1 else []


# E


def draw(
    view: View, priors: Sequence[Denoiser], plan: Plan, seed: int, before: Tensor
) -> tuple[Tensor, dict[str, int]]:
    """Sources (R, K, N) of a view's recordings, and how many recordings had to be drawn again or were left out.

    Args:
        view: the recordings.
        priors: of its sources, in the view's order.
        plan: see `Plan`.
        seed: of the noise.
        before: (R, K, N) sources as they were drawn last: their level says what has diverged; `Plan.again` and Gibbs
            start from them.
    """
    view = view.masked()
    parts, again, lost = [], 0, 0
    for first in range(0, len(view.y), plan.rows):
        index = torch.arange(first, min(first + plan.rows, len(view.y)))
        largest = plan.limit * _levels(view, index, before)[:, None, None]
        x = _draw_rows(view, priors, plan, _seed(seed, first), index, before)
        for attempt in range(plan.retries + 1):
            bad = ~(x.abs() <= largest).flatten(1).all(1)
            if not bad.any():
                break
            if attempt == plan.retries:
                x[bad] = torch.nan
                lost += int(bad.sum())
                break
            again += int(bad.sum())
            x[bad] = _draw_rows(view, priors, plan, _seed(seed, first, attempt), index[bad], before)
        parts.append(x)
    if lost == len(view.y):
        raise AudiosepError(
            f"view {view.name!r}: every recording diverged; raise its noise, or take more steps, "
            "or a lower learning_rate, and go on in the same folder"
        )
    return torch.cat(parts), {"drawn_again": again, "left_out": lost}


def _levels(view: View, index: Tensor, before: Tensor) -> Tensor:
    """What the sources of each of these recordings (B,) are known to reach: a rare loud one says so itself.

    It is the greatest of the RMS of all sources of the view as they were drawn last, of the peak of the recording's
    own, and of the peak of what explains most of the recording along A^T y.
    """
    operator, y = view.operator.rows(index), view.y[index].double()
    back = operator.adjoint(y)
    power = operator(back).flatten(1).square().sum(1)
    step = back.flatten(1).square().sum(1) / power.clamp(min=1e-30)
    explained = step * back.flatten(1).abs().amax(1)
    last = before[index].nan_to_num(0.0).flatten(1).abs().amax(1).double()
    level = before[before.isfinite()].square().mean().sqrt().double().nan_to_num(0.0)
    return torch.stack((explained, last, level.expand(len(index)))).amax(0)


def _draw_rows(view: View, priors: Sequence[Denoiser], plan: Plan, seed: int, index: Tensor, before: Tensor) -> Tensor:
    known = before[index].isfinite().flatten(1).all(1)
    if plan.method == "joint" and plan.again is not None and not known.all():
        # What was left out of the last lap has nothing to go on from: it is drawn from noise alone.
        drawn = torch.zeros_like(before[index], dtype=torch.float32)
        for rows, how in ((known, plan), (~known, replace(plan, again=None))):
            if rows.any():
                drawn[rows] = _draw_rows(view, priors, how, _seed(seed, how.again), index[rows], before)
        return drawn
    operator, y = view.operator.rows(index), view.y[index].float().to(plan.device)
    noise, x = OneNoise(seed, plan.device), before[index].nan_to_num(0.0).to(plan.device)
    if plan.method == "joint":
        return _sample(priors, operator, view, plan, y, noise, None if plan.again is None else x)
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
        levels = [t for t in levels if schedule.ratio[t] <= 1.000001 * plan.again] or levels[-1:]
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
        with torch.random.fork_rng():
            torch.manual_seed(seed)
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


def read_start(path: Path) -> dict[str, Start]:
    """What the sources of a run start as, from its `start.safetensors`."""
    held, _ = _read(path)
    starts: dict[str, Start] = {}
    for name in sorted({key.rpartition("/")[0] for key in held}):
        parts = {key.removeprefix(f"{name}/"): held[key] for key in held if key.rpartition("/")[0] == name}
        starts[name] = next(kind for kind in get_args(Start) if set(parts) == set(kind.__annotations__))(**parts)
    return starts


class _State:
    """The folder of a run."""

    def __init__(
        self, folder: Path, plan: Plan, views: Sequence[View], sources: Sequence[Source], stages: Sequence[Stage]
    ) -> None:
        self.folder, self.plan = folder, plan
        self.trained: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(plan).items() if key != "device"}
        about = {
            "seed": settings.pop("seed"),
            "start_laps": settings.pop("start_laps"),
            "stages": [(stage.learn, stage.views) for stage in stages],
            "recordings": {view.name: [*view.y.shape, _fingerprint(view.y)] for view in views},
            "mixing": {view.name: [view.sources, _fingerprint(_seen(view))] for view in views},
            "sources": {s.name: [s.covariance, s.rank, s.frame, s.centred, s.components] for s in sources},
            "networks": {s.name: getattr(s.prior.backbone, "config", {}) for s in sources if s.prior is not None},
        }
        # Later laps may have other settings than finished ones, as after one that diverged.
        loose = {
            "plan": settings,
            "laps": [stage.laps for stage in stages],
            "noise": {view.name: _fingerprint(torch.as_tensor(view.noise)) for view in views},
        }
        now = json.loads(json.dumps(about | loose, default=str))
        path = folder / "run.json"
        held = json.loads(path.read_text()) if path.exists() else now
        other = [key for key in about if held.get(key) != now[key]]
        if other:
            raise UsageError(f"{folder} holds another run, with different {', '.join(other)}; choose another folder")
        self._check_laps(stages)
        changed = [key for key in loose if held.get(key) != now[key]]
        if changed:
            log.warning("%s: finished laps are kept, the others are done with a new %s", folder, ", ".join(changed))
        path.write_text(json.dumps(now, indent=2) + "\n")

    def _check_laps(self, stages: Sequence[Stage]) -> None:
        """UsageError where finished laps are not the first ones of the stages as they are asked for."""
        path = self.folder / LOG
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        done = {row["stage"]: row["lap"] for row in rows}
        for number, laps in done.items():
            asked = stages[number].laps
            if laps > asked or (laps < asked and number < max(done)):
                raise UsageError(
                    f"{self.folder} holds {laps} laps of stage {number + 1} ({', '.join(stages[number].learn)}), asked "
                    f"for are {asked}: all after it was learned from those; ask for {laps}, or choose another folder"
                )

    def starts(self, views: Sequence[View], sources: Sequence[Source], stages: Sequence[Stage]) -> dict[str, Start]:
        """What the sources start as, fitted once."""
        path = self.folder / "start.safetensors"
        if not path.exists():
            found = fit_start(views, sources, stages, self.plan.start_laps)
            parts = {f"{name}/{part}": value for name, start in found.items() for part, value in vars(start).items()}
            _write(path, {key: value.contiguous() for key, value in parts.items()}, {})
        return read_start(path)

    def keep(self, lap: Lap, priors: Mapping[str, Prior]) -> None:
        """Put a lap on the disk."""
        tensors = {f"samples/{name}": value.contiguous() for name, value in lap.samples.items()}
        for name in self.trained:
            for key, value in priors[name].backbone.state_dict().items():
                tensors[f"weights/{name}/{key}"] = value.detach().cpu().contiguous()
        facts = {"stage": lap.stage, "lap": lap.lap, "facts": lap.facts, "trained": sorted(self.trained)}
        _write(self.folder / "lap.safetensors", tensors, facts)
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps({"stage": lap.stage, "lap": lap.lap, **lap.facts}) + "\n")

    def restore(self, priors: Mapping[str, Prior]) -> Lap | None:
        """The last lap that was done, with its weights put back."""
        path = self.folder / "lap.safetensors"
        if not path.exists():
            return None
        tensors, facts = _read(path)
        self.trained = set(facts["trained"])
        for name in self.trained:
            start = f"weights/{name}/"
            weights = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            priors[name].backbone.load_state_dict(weights)
            priors[name].eval().requires_grad_(False)
        samples = {k.removeprefix("samples/"): v for k, v in tensors.items() if k.startswith("samples/")}
        return Lap(facts["stage"], facts["lap"], {}, samples, facts["facts"])


def _fingerprint(x: Tensor) -> str:
    """Six digits that change with any of the numbers, but not with how a machine rounds."""
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return f"{float((weights * x.nan_to_num(0.0).double().cpu()).sum()):.6g}"


def _seen(view: View) -> Tensor:
    """What a view's mixing makes of fixed sources."""
    like = view.operator.adjoint(torch.zeros_like(view.y))
    probe = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return view.operator(probe.to(like))


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, {"facts": json.dumps(facts)})
    partial.replace(path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
