"""How guidance and the priors pull at each source, step by step: figures 2 and 3 of the UnaSDiff paper.

With g_prior = (the prior step's mean) - x_t and g_cond = -dL/dx_t, a step makes progress on the mixture when

    gamma(t) > g_bound(t) = -<g_prior, g_cond> / ||g_cond||^2                                        (eq. 9);

a bound above zero is a conflict between the two. Runwu Shi et al., "Unsupervised Single-Channel Audio Separation with
Diffusion Source Priors", AAAI 2026, https://arxiv.org/abs/2512.07226.

K sources, N samples, S steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiosep import audio, metrics, report
from audiosep.errors import UsageError
from audiosep.mixing import best_permutation
from audiosep.progress import Callback
from audiosep.samplers import Noise, Sampler
from audiosep.separator import Separator

__all__ = ["SAMPLERS", "Trace", "run", "trace"]

log = logging.getLogger("audiosep.diagnose")

SAMPLERS = ("dps", "dsg", "hybrid")
LEFT = 0.1  # of the mixture, beyond rounding and lossy formats: references that are not its sources
CUT = 0.99  # quantile of gamma's and of its bound's size up to which a curve is shown
SHOWN = 5  # states of a trajectory that the page plays


@dataclass
class Trace:
    """One sampler's way through a mixture.

    Attributes:
        steps: (S,) the steps of the schedule that were left.
        bound: (S, K) g_bound, what gamma has to exceed.
        gamma: (S, K) the guidance strength that was used.
        strength: (S,) RMS of the guidance before it is normalised by the gradient, figure 3; constant gamma for DPS.
        si_sdr: (S, K) of the denoised estimates, in dB, each against the reference of its own source.
        si_sdr_permuted: (S, K) of each reference's estimate in the order that is best at the end, in which the paper
            scores.
        states: (step, sources (K, N) relative to the clean signal's scale), evenly spaced over the run.
    """

    steps: list[float] = field(default_factory=list)
    bound: list[list[float]] = field(default_factory=list)
    gamma: list[list[float]] = field(default_factory=list)
    strength: list[float] = field(default_factory=list)
    si_sdr: list[list[float]] = field(default_factory=list)
    si_sdr_permuted: list[list[float]] = field(default_factory=list)
    states: list[tuple[float, Tensor]] = field(default_factory=list)


def trace(
    sampler: Sampler, mixture: Tensor, references: Tensor, seed: int = 0, progress: Callback | None = None
) -> Trace:
    """Run a sampler that takes gradients on mixture (N,) at the priors' level, against references (K, N).

    Raises:
        UsageError: the sampler takes no gradient: it has no gamma.
    """
    if not sampler.needs_gradient:
        raise UsageError(f"{type(sampler).__name__} takes no gradient, so it has no guidance strength to draw")
    found, tables = Trace(), []
    count = len(sampler.times)
    shown = set(np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int).tolist())
    for state in sampler(mixture[None], Noise([seed])):
        i = state.step - 1
        assert state.gradient is not None
        assert state.guidance is not None
        gradient = state.gradient[0].double()
        prior = (sampler.mean(state.x_t, state.denoised, i) - state.x_t)[0].double()
        squares = gradient.square().sum(-1).clamp(min=1e-30)
        guidance = state.guidance[0].double()
        found.steps.append(float(state.t))
        found.bound.append(((prior * gradient).sum(-1) / squares).tolist())
        found.gamma.append((guidance.norm(dim=-1) / squares.sqrt()).tolist())
        found.strength.append(_strength(sampler, i))
        tables.append(metrics.si_sdr(state.denoised[0, :, None], references[None]).clamp(-100, 100))
        if i in shown:
            found.states.append((float(state.t), (state.x[0] / sampler.alphas[i + 1]).detach().cpu()))
        if progress is not None:
            progress(state.step, count, f"step {state.step}/{count}")
    order = best_permutation(tables[-1][None])[0]
    found.si_sdr = [table.diagonal().tolist() for table in tables]
    found.si_sdr_permuted = [table[order].diagonal().tolist() for table in tables]
    return found


def _strength(sampler: Any, i: int) -> float:
    """Of DSG and hybrid what `gamma` is proportional to, of DPS its constant."""
    return float(sampler.strength(i) if hasattr(sampler, "strength") else sampler.step_size)


def run(
    separators: Mapping[str, Separator],
    mixture: str | Path,
    references: Sequence[str | Path],
    out: str | Path,
    sources: Sequence[str] | None = None,
    seconds: float = 4.0,
    progress: Callback | None = None,
) -> Path:
    """Trace each separator's sampler on the start of a recording and write `diagnosis.json` and `report.html`.

    Args:
        separators: name -> separator.
        mixture: the recording; several channels are averaged.
        references: its sources' recordings, in the order of `sources`.
        out: folder of the two files.
        sources: names as of `Separator`; None is one per prior.
        seconds: how much of the recording is used.
        progress: called with (steps done, steps in all, what is done).

    Returns:
        The page's path.

    Raises:
        UsageError: another number of references than of sources, of another length than the mixture, or silent.
    """
    first = next(iter(separators.values()))
    names = first.source_names(sources)
    if len(references) != len(names):
        raise UsageError(f"{len(names)} sources ({', '.join(names)}) need as many references, got {len(references)}")
    rate = first.sample_rate
    y, *truth = (_load(path, rate, seconds) for path in (mixture, *references))
    for path, wave in zip(references, truth):
        if wave.shape != y.shape:
            raise UsageError(f"{path} holds {len(wave) / rate:.3f} s, the mixture {len(y) / rate:.3f} s")
        if not (wave - wave.mean()).any():
            raise UsageError(f"{path} is silent in its first {len(wave) / rate:.3f} s: no ratio is defined against it")
    clean = torch.stack(truth)
    left = (y - clean.sum(0)).square().mean().sqrt() / y.square().mean().sqrt()
    if left > LEFT:
        log.warning("the references leave %.0f %% of the mixture (RMS): are all of its sources there?", 100 * left)
    traces = {}
    for name, separator in separators.items():
        gain = separator.gain(y[None], separator.resolve(sources))[0]
        sampler = separator.sampler_for(separator.resolve(sources))
        device = separator.device
        step = None if progress is None else _named(progress, name)
        traces[name] = trace(sampler, (gain * y).to(device), clean.to(device), separator.seed, step)
    _write(Path(out), traces, names, y, clean, rate)
    return Path(out) / "report.html"


def _named(progress: Callback, name: str) -> Callback:
    return lambda done, total, message: progress(done, total, f"{name}, {message}")


def _load(path: str | Path, rate: int, seconds: float) -> Tensor:
    wave, own = audio.read(path)
    mono = audio.resample(wave.mean(0, keepdims=True), own, rate)[0]
    return torch.from_numpy(mono[: round(seconds * rate)]).float()


def _write(
    folder: Path, traces: Mapping[str, Trace], names: Sequence[str], mixture: Tensor, clean: Tensor, rate: int
) -> None:
    data = {name: {key: value for key, value in vars(t).items() if key != "states"} for name, t in traces.items()}
    report.write_json(folder / "diagnosis.json", {"sources": list(names), "samplers": data})
    tracks: list[report.Track] = [("mixture", mixture[None].numpy(), rate)]
    tracks += [(f"{name}, reference", wave[None].numpy(), rate) for name, wave in zip(names, clean)]
    plots, facts = [], {}
    for name, found in traces.items():
        plots += _plots(name, found, names)
        both = zip(names, found.si_sdr_permuted[-1], found.si_sdr[-1])
        facts[name] = {source: f"{best:.2f} dB" + _own(best, fixed) for source, best, fixed in both}
        for step, state in found.states:
            for source, wave in zip(names, state):
                shown = wave / wave.abs().max().clamp(min=1.0)  # early states are louder than full scale
                tracks.append((f"{name}: {source} after step {step:g}", shown[None].numpy(), rate))
    report.write_page(folder / "report.html", "Guidance", facts, tracks, [*plots, _schedules(traces)])


def _own(best: float, fixed: float) -> str:
    """What the source's own estimate has, where it isn't the one that fits best."""
    return "" if best == fixed else f" from another source's estimate, {fixed:.2f} dB from its own"


def _plots(name: str, found: Trace, sources: Sequence[str]) -> list[report.Plot]:
    bound, gamma, si_sdr = np.array(found.bound), np.array(found.gamma), np.array(found.si_sdr_permuted)
    # The largest swings, where the gradient almost vanishes, would flatten everything else.
    limit = 1.5 * max(np.quantile(np.abs(curve), CUT) for curve in (gamma, bound))
    curves = {f"bound, {source}": bound[:, k].clip(-limit, limit) for k, source in enumerate(sources)}
    curves |= {f"gamma, {source}": gamma[:, k].clip(-limit, limit) for k, source in enumerate(sources)}
    scores = {source: si_sdr[:, k] for k, source in enumerate(sources)}
    return [
        _over_steps(f"{name}: guidance strength gamma and its bound, cut off at +-{limit:.3g}", curves, found),
        _over_steps(f"{name}: SI-SDR in dB, in the order that is best at the end", scores, found),
    ]


def _schedules(traces: Mapping[str, Trace]) -> report.Plot:
    """Figure 3: the strengths as fractions of their largest."""
    curves = {name: np.array(t.strength) / max(t.strength) for name, t in traces.items()}
    title = "Schedules: strength before normalisation, relative to its largest"
    return _over_steps(title, curves, next(iter(traces.values())))


def _over_steps(title: str, curves: Mapping[str, np.ndarray], found: Trace) -> report.Plot:
    return report.Plot(title, curves, "(step of the schedule)", found.steps[-1], x_start=found.steps[0])
