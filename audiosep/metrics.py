"""Scores of an estimate against its reference: always in that order, one score per signal.

Signals are tensors (..., T) on the same last axis; leading axes broadcast, so that
`si_sdr(estimates[:, None], references[None])` is the (K, K) table of all pairs. What can't be
scored (NaN, a silent reference, another length) is a `UsageError`, never a number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiosep.errors import UsageError

__all__ = [
    "METRICS",
    "bootstrap_interval",
    "estoi",
    "failure_rate",
    "paired_interval",
    "pesq",
    "rate_interval",
    "sdr",
    "si_sdr",
    "si_sdri",
]


def si_sdr(estimate: Tensor, reference: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, means removed: (..., T) -> (...).

    Le Roux, Wisdom, Erdogan, Hershey: "SDR - half-baked or well done?" (ICASSP 2019). A silent
    estimate scores -inf, an exact one +inf (or what rounding leaves of it).
    """
    estimate, reference = _signals(estimate, reference)
    estimate = estimate - estimate.mean(-1, keepdim=True)
    reference = reference - reference.mean(-1, keepdim=True)
    gain = (estimate * reference).sum(-1, keepdim=True) / reference.square().sum(-1, keepdim=True)
    target = gain * reference
    return _ratio_db(target, estimate - target)


def si_sdri(estimate: Tensor, reference: Tensor, mixture: Tensor) -> Tensor:
    """SI-SDR of the estimate less that of the unprocessed mixture, in dB: (..., T) -> (...)."""
    return si_sdr(estimate, reference) - si_sdr(mixture, reference)


def sdr(estimate: Tensor, reference: Tensor) -> Tensor:
    """Plain, scale-sensitive SDR in dB: (..., T) -> (...).

    The power of the reference over that of (estimate - reference).
    Nothing is projected away: neither a gain (as SI-SDR does) nor a 512-tap filter (as BSS-eval
    does). A wrong level or delay counts as distortion.
    """
    estimate, reference = _signals(estimate, reference)
    return _ratio_db(reference, estimate - reference)


def pesq(estimate: Tensor, reference: Tensor, sample_rate: int = 16000, mode: str = "wb") -> Tensor:
    """Perceptual evaluation of speech quality (ITU-T P.862), wide band unless mode="nb"."""
    if mode not in ("wb", "nb"):
        raise UsageError(f"PESQ mode is 'wb' or 'nb', got {mode!r}")
    rates = (16000,) if mode == "wb" else (8000, 16000)
    if sample_rate not in rates:
        allowed = " or ".join(map(str, rates))
        raise UsageError(f"PESQ ({mode}) needs {allowed} Hz, got {sample_rate}; resample first")
    module = _extra("pesq")

    def score(e: np.ndarray, r: np.ndarray) -> float:
        try:
            return float(module.pesq(sample_rate, r, e, mode))
        except (module.PesqError, ValueError) as error:
            raise UsageError(f"PESQ can't score this signal: {_message(error)}") from error

    return _one_by_one(score, estimate, reference)


def estoi(estimate: Tensor, reference: Tensor, sample_rate: int = 16000) -> Tensor:
    """Extended short-time objective intelligibility (Jensen and Taal 2016): (..., T) -> (...)."""
    stoi = _extra("pystoi").stoi

    def score(e: np.ndarray, r: np.ndarray) -> float:
        with warnings.catch_warnings():
            # With too few frames of speech pystoi warns and returns 1e-5.
            warnings.simplefilter("error", RuntimeWarning)
            try:
                return float(stoi(r, e, sample_rate, extended=True))
            except RuntimeWarning as error:
                raise UsageError(f"ESTOI can't score this signal: {_message(error)}") from error

    return _one_by_one(score, estimate, reference)


def failure_rate(values: Sequence[float] | np.ndarray | Tensor, threshold: float = 0.0) -> float:
    """Share of the values (an item's mean SI-SDR in dB) that lie below the threshold."""
    return float((_values(values) < threshold).mean())


def bootstrap_interval(
    values: Sequence[float] | np.ndarray | Tensor,
    level: float = 0.95,
    seed: int = 0,
    draws: int = 5000,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean: (low, high).

    For a paired comparison give the differences, or use `paired_interval`.
    """
    sample = _values(values)
    if not 0 < level < 1:
        raise UsageError(f"level lies between 0 and 1, got {level}")
    rng = np.random.default_rng(seed)
    means = [rng.choice(sample, sample.size).mean() for _ in range(draws)]
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_interval(
    values: Sequence[float] | np.ndarray | Tensor,
    others: Sequence[float] | np.ndarray | Tensor,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of the mean of `values - others`, both over the same items."""
    left, right = _values(values), _values(others)
    if left.shape != right.shape:
        raise UsageError(f"a paired interval needs the same items, got {left.size} and {right.size}")
    return bootstrap_interval(left - right, level, seed)


def rate_interval(failures: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share, (low, high), that is not empty where none or all failed: E. B. Wilson's (1927)."""
    if not 0 < level < 1:
        raise UsageError(f"level lies between 0 and 1, got {level}")
    if not 0 <= failures <= count or count < 1:
        raise UsageError(f"failures lie between 0 and the count, which is at least 1, got {failures} of {count}")
    z2, rate = NormalDist().inv_cdf((1 + level) / 2) ** 2 / count, failures / count
    centre, half = rate + z2 / 2, (z2 * (rate * (1 - rate) + z2 / 4)) ** 0.5
    return max(0.0, (centre - half) / (1 + z2)), min(1.0, (centre + half) / (1 + z2))


Metric = Callable[[Tensor, Tensor, int], Tensor]

# (estimate, reference, sample_rate) -> score; higher is better in all of them.
METRICS: dict[str, Metric] = {
    "si_sdr": lambda estimate, reference, sample_rate: si_sdr(estimate, reference),
    "sdr": lambda estimate, reference, sample_rate: sdr(estimate, reference),
    "pesq": pesq,
    "estoi": estoi,
}


def _signals(estimate: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Checked, and in double precision: 120 dB are beyond float32."""
    if estimate.ndim == 0 or reference.ndim == 0 or estimate.shape[-1] != reference.shape[-1]:
        shapes = f"estimate {tuple(estimate.shape)}, reference {tuple(reference.shape)}"
        raise UsageError(f"estimate and reference differ in length: {shapes}")
    for name, signal in (("estimate", estimate), ("reference", reference)):
        if not torch.isfinite(signal).all():
            raise UsageError(f"the {name} holds NaN or infinite samples")
    if estimate.device.type == "mps":  # has no double precision
        estimate, reference = estimate.cpu(), reference.cpu()
    estimate, reference = estimate.double(), reference.double()
    spread = reference.amax(-1) - reference.amin(-1) if reference.shape[-1] else torch.zeros(1)
    if not (spread > 0).all():
        raise UsageError("a reference is silent or constant: no ratio is defined against it")
    return estimate, reference


def _ratio_db(signal: Tensor, noise: Tensor) -> Tensor:
    power, error = signal.square().sum(-1), noise.square().sum(-1)
    decibels = 10 * (power.log10() - error.log10())
    # A silent estimate leaves neither signal nor noise: nothing of the reference is there.
    return decibels.masked_fill(power == 0, -torch.inf)


def _one_by_one(score: Callable[[np.ndarray, np.ndarray], float], estimate: Tensor, reference: Tensor) -> Tensor:
    estimate, reference = torch.broadcast_tensors(*_signals(estimate, reference))
    length = estimate.shape[-1]
    pairs = zip(
        estimate.detach().reshape(-1, length).cpu().numpy(),
        reference.detach().reshape(-1, length).cpu().numpy(),
    )
    scores = [score(e, r) for e, r in pairs]
    return torch.tensor(scores, dtype=torch.float64).reshape(estimate.shape[:-1])


def _values(values: Sequence[float] | np.ndarray | Tensor) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64).reshape(-1)
    if sample.size == 0:
        raise UsageError("no values to summarise")
    if np.isnan(sample).any():
        raise UsageError("the values to summarise hold NaN")
    return sample


def _extra(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} is not installed: pip install 'audiosep[eval]'") from error


def _message(error: BaseException) -> str:
    text = error.args[0] if error.args else type(error).__name__
    text = text.decode() if isinstance(text, bytes) else str(text)
    return text.splitlines()[0] if text else type(error).__name__
