"""Stationary Gaussian processes on a regular grid: exact likelihood, gradient, fit and smoothing.

A source s (T,) has covariance K = Toeplitz(r), r[d] = variance * k(d) for lags d in samples, plus `noise` at lag 0.
With x and the diagonal sums of K^-1 from `toeplitz`,

    NLL = (T log 2 pi + log|K| + s^T K^-1 s) / 2,    dNLL/ds = a = K^-1 s,
    dNLL/dr[d] = (sum of both d-th diagonals of K^-1 - a a^T) / 2,

exact at O(T^2) (O(T log T) past 16,000 samples), where a Cholesky factor costs O(T^3). Matern processes that are not
moved to a frequency take O(T), by `state_space`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.signal.windows import tukey
from torch import Tensor

from audiosep.blind import state_space, toeplitz
from audiosep.blind.compiled import compiled
from audiosep.blind.state_space import StateSpace
from audiosep.errors import UsageError

Array = NDArray[np.float64]


def rbf(lag: Tensor, length_scale: Tensor) -> Tensor:
    """exp(-d^2 / (2 l^2))."""
    return torch.exp(-0.5 * (lag / length_scale) ** 2)


def matern12(lag: Tensor, length_scale: Tensor) -> Tensor:
    """exp(-d / l): first-order autoregressive."""
    return torch.exp(-lag / length_scale)


def matern32(lag: Tensor, length_scale: Tensor) -> Tensor:
    """(1 + sqrt(3) d / l) exp(-sqrt(3) d / l)."""
    scaled = 3**0.5 * lag / length_scale
    return (1 + scaled) * torch.exp(-scaled)


def matern52(lag: Tensor, length_scale: Tensor) -> Tensor:
    """(1 + sqrt(5) d / l + 5 d^2 / (3 l^2)) exp(-sqrt(5) d / l)."""
    scaled = 5**0.5 * lag / length_scale
    return (1 + scaled + scaled**2 / 3) * torch.exp(-scaled)


ENVELOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rbf": rbf,
    "matern12": matern12,
    "matern32": matern32,
    "matern52": matern52,
}
PERIODIC = ("periodic", "periodic12")
KERNELS = (*ENVELOPES, *PERIODIC)
DEFAULT_KERNELS = ("rbf", "matern32", "matern12", *PERIODIC)
FIT_SAMPLES = 4000
FIT_TOLERANCE = 1e-7  # of the likelihood (some 1000 nats) in a step of a fit, the last one
FINALISTS = 2  # processes that are fitted after a survey of all, beside the best periodic one
FADE = 0.1  # share of the recording that is faded in and out before its spectrum is taken


def correlation(kernel: str, lag: Tensor, length_scale: Tensor, frequency: Tensor | float = 0.0) -> Tensor:
    """The kernel at lags d (T,), 1 at lag 0; parameters broadcast, as (n, 1).

    rbf and matern are multiplied by cos(2 pi f d), which moves the spectrum from 0 to the frequency f in cycles per
    sample; periodic is exp(-2 sin^2(pi f d) / l^2), of period 1 / f and with l a share of it: rbf of the
    chord 2 |sin| between two times on a circle. periodic12, matern12 of it, has jumps and corners.
    """
    turns = torch.pi * lag * frequency
    if kernel == "periodic":
        return torch.exp(-2 * torch.sin(turns) ** 2 / length_scale**2)
    if kernel == "periodic12":
        return torch.exp(-2 * torch.sin(turns).abs() / length_scale)
    if kernel not in ENVELOPES:
        raise UsageError(f"kernel is {', '.join(KERNELS[:-1])} or {KERNELS[-1]}, got {kernel!r}")
    return ENVELOPES[kernel](lag, length_scale) * torch.cos(2 * turns)


class _NegativeLogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, column: Tensor) -> Tensor:
        signals, columns = (t.detach().cpu().double().numpy() for t in (s, column))
        values, by_signal, by_column = np.empty(s.shape[:-1]), np.empty_like(signals), np.empty_like(signals)
        for i, first in enumerate(columns):
            inverse, signal = toeplitz.Inverse.of(first), signals[..., i, :]
            a = inverse.solve(signal)
            values[..., i] = 0.5 * (len(first) * np.log(2 * np.pi) + inverse.logdet + (signal * a).sum(-1))
            by_signal[..., i, :] = a
            by_column[..., i, :] = inverse.diagonal_sums - toeplitz.correlate(a, a)
        by_column[..., 0] /= 2  # the other diagonals come in pairs
        ctx.save_for_backward(torch.from_numpy(by_signal).to(s), torch.from_numpy(by_column).to(column))
        return torch.from_numpy(values).to(s)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        by_signal, by_column = ctx.saved_tensors
        by_value = grads[0][..., None]
        return by_value * by_signal, (by_value * by_column).reshape(-1, *by_column.shape[-2:]).sum(0)


def negative_log_likelihood(s: Tensor, column: Tensor) -> Tensor:
    """-log N(s; 0, Toeplitz(column)) of each source: (..., n, T), (n, T) -> (..., n). Differentiable in both.

    Computed in double precision on the CPU, whatever the tensors' device and type.
    """
    return _NegativeLogLikelihood.apply(s, column)


@dataclass(frozen=True)
class Process:
    """A fitted process: variance * correlation(kernel, ...), observed in white noise of variance `noise`.

    length_scale in samples (of the period for "periodic"); frequency in cycles per sample; nll of the fit.
    """

    kernel: str
    length_scale: float
    frequency: float
    variance: float
    noise: float
    nll: float = float("nan")

    def column(self, samples: int, *, noise: bool = False) -> Array:
        """The first column of the covariance: (samples,)."""
        lag = torch.arange(samples, dtype=torch.float64)
        scale = torch.tensor(self.length_scale, dtype=torch.float64)
        column = self.variance * correlation(self.kernel, lag, scale, self.frequency).numpy()
        column[0] += self.noise if noise else 0.0
        return column


NOISE_FLOOR = 1e-6  # of the variance: keeps the covariance of noise-free smooth sources invertible


def inverse_of(process: Process, samples: int) -> toeplitz.Inverse | StateSpace:
    """The inverse covariance of the process and its noise, by whichever is fastest."""
    if process.kernel in state_space.ORDERS and process.frequency == 0 and compiled("matern_filter"):
        return StateSpace.of(process.kernel, process.length_scale, process.variance, process.noise, samples)
    return toeplitz.Inverse.of(process.column(samples, noise=True))


def smooth(observed: Array, process: Process) -> tuple[Array, Array]:
    """The exact posterior of s given observed = s + noise: mean (T,), standard deviation (T,).

    With C = K + v I: mean = K C^-1 y, and the covariance K - K C^-1 K = v I - v^2 C^-1. v is at least NOISE_FLOOR of
    the variance.
    """
    noise = max(process.noise, NOISE_FLOOR * process.variance)
    inverse = inverse_of(replace(process, noise=noise), len(observed))
    mean = observed - noise * inverse.solve(observed)  # K C^-1 y = y - v C^-1 y
    variance = noise - noise**2 * inverse.diagonal
    return mean, np.sqrt(np.maximum(variance, 0.0))


def fit(
    s: Array,
    kernels: Sequence[str] = DEFAULT_KERNELS,
    *,
    noise: float | None = None,
    modulated: bool = True,
    max_iter: int = 30,
    near: Process | None = None,
) -> Process:
    """The process that makes s (T,) likeliest: over the kernels, with and without a frequency.

    noise: the variance of the noise in s if it is known; None fits it. near: a process to begin at, whose kernel stays.
    Of more than FIT_SAMPLES samples the middle ones are taken: a stationary process is the same everywhere.
    """
    s = _stretch(s)
    power = float(np.mean(s**2))
    if not power > 0:
        raise UsageError("a silent source has no process to fit")
    unit = torch.from_numpy(np.ascontiguousarray(s / np.sqrt(power)))[None]
    level = None if noise is None else noise / power
    if near is None:
        survey = _survey(unit[0].numpy(), kernels, spectral_peak(s) if modulated else 0.0, level)
        finalists = [p for p in survey if p.kernel not in PERIODIC][:FINALISTS]
        finalists += [p for p in survey if p.kernel in PERIODIC][:1]
    else:
        finalists = [replace(near, variance=near.variance / power, noise=near.noise / power)]
    best = min((_climb(unit, p, level, max_iter) for p in finalists), key=lambda p: p.nll)
    nll = best.nll + len(s) / 2 * float(np.log(power))
    return replace(best, variance=best.variance * power, noise=best.noise * power, nll=nll)


def _stretch(s: Array) -> Array:
    begin = max(0, len(s) - FIT_SAMPLES) // 2
    return s[begin : begin + FIT_SAMPLES]


def spectral_peak(s: Array) -> float:
    """The frequency of the strongest spectral line in cycles per sample; 0 where it lies in the lowest bins."""
    samples = len(s)
    spectrum = np.abs(np.fft.rfft((s - s.mean()) * np.hanning(samples), 4 * samples)) ** 2
    peak = int(spectrum.argmax())
    if peak <= 4 or peak == len(spectrum) - 1:
        return 0.0
    before, at, after = np.log(spectrum[peak - 1 : peak + 2] + 1e-300)
    return (peak + 0.5 * (before - after) / (before - 2 * at + after - 1e-12)) / (4 * samples)


def tapered_spectrum(X: Array, fade: float = FADE) -> Array:
    """Spectra (T // 2 + 1, ...) of X (T, ...), faded in and out over a share; their power is on average that of X."""
    taper = _taper(len(X), fade).reshape(-1, *[1] * (X.ndim - 1))
    return np.fft.rfft(X * taper, axis=0) / np.sqrt(len(X))


def expected_power(column: Array, fade: float = FADE) -> Array:
    """Expected |`tapered_spectrum`|^2, (T // 2 + 1,), of a process of these autocovariances (T,), leakage too."""
    samples = len(column)
    seen = column * _overlap(samples, fade)
    both = np.r_[seen[0], seen[1:] + seen[:0:-1]]
    return np.maximum(np.fft.rfft(both).real, 1e-12 * seen[0])


@lru_cache(maxsize=8)
def _overlap(samples: int, fade: float) -> Array:
    """How much of the taper and of itself at each lag coincide: (T,)."""
    taper = _taper(samples, fade)
    return toeplitz.correlate(taper, taper) / samples


def _taper(samples: int, fade: float) -> Array:
    taper = tukey(samples, fade)
    return taper / np.sqrt(np.mean(taper**2))


def _survey(unit: Array, kernels: Sequence[str], peak: float, noise: float | None) -> list[Process]:
    """A process per kernel, with and without a frequency, likeliest first, by the powers at all frequencies.

    That takes them for independent, which is good enough for a start but not for a fit.
    """
    power = np.abs(tapered_spectrum(unit)) ** 2
    level = np.logspace(-6, 1, 15) if noise is None else np.logspace(-1.5, 1, 15)
    found = []
    for kernel, frequency in [(k, f) for k in kernels for f in {0.0, peak} if f > 0 or k not in PERIODIC]:
        best = Process(kernel, 1.0, frequency, 1.0, 0.0, np.inf)
        reach = (0.1, 2.0, 9) if kernel in PERIODIC else (0.3, min(len(unit) / 2, 1000.0), 16)
        for scale in np.geomspace(*reach):
            shape = expected_power(Process(kernel, scale, frequency, 1.0, 0.0).column(len(unit)))
            if noise is None:  # levels are those of the noise, the variance follows
                both = shape + level[:, None]
                variance = (power / both).mean(1)
                both *= variance[:, None]
            else:
                variance = level
                both = shape * level[:, None] + max(noise, NOISE_FLOOR)
            misfit = (np.log(both) + power / both).sum(1)
            i = int(misfit.argmin())
            if misfit[i] < best.nll:
                kept = level[i] * variance[i] if noise is None else noise
                best = Process(kernel, float(scale), frequency, float(variance[i]), float(kept), float(misfit[i]))
        found.append(best)
    return sorted(found, key=lambda p: p.nll)


def _climb(unit: Tensor, begin: Process, noise: float | None, max_iter: int) -> Process:
    """Length-scale, frequency, variance and noise (where None) by exact gradients from `begin`."""
    samples = unit.shape[1]
    lag = torch.arange(samples, dtype=torch.float64)
    moves = begin.frequency > 0

    def column(p: Tensor) -> Tensor:
        f = begin.frequency + 0.1 * p[2] / samples if moves else 0.0
        shape = p[1].exp() * correlation(begin.kernel, lag, p[0].exp(), f)
        level = p[3].exp() if noise is None else torch.tensor(max(noise, NOISE_FLOOR), dtype=torch.float64)
        return shape + (level + 1e-9) * (lag == 0)

    def loss(values: Array) -> tuple[float, Array]:
        p = torch.from_numpy(np.asarray(values, dtype=np.float64)).requires_grad_()
        try:
            with torch.enable_grad():
                nll = negative_log_likelihood(unit, column(p)[None])[0]
        except UsageError:
            return 1e12, np.zeros_like(values)
        (gradient,) = torch.autograd.grad(nll, p)
        return float(nll.detach()), gradient.numpy()

    turn = min(5.0, 5.0 * samples * begin.frequency)  # half a cycle over the whole
    bounds = [(np.log(0.05), np.log(10.0 * samples)), (-12, 6), (-turn, turn), (np.log(NOISE_FLOOR), 1.0)]
    start = np.array([np.log(begin.length_scale), np.log(begin.variance), 0.0, np.log(max(begin.noise, NOISE_FLOOR))])
    options = {"maxiter": max_iter, "ftol": FIT_TOLERANCE}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    x = found.x
    return Process(
        begin.kernel,
        float(np.exp(x[0])),
        float(begin.frequency + 0.1 * x[2] / samples) if moves else 0.0,
        float(np.exp(x[1])),
        float(np.exp(x[3])) if noise is None else noise,
        float(found.fun),
    )
