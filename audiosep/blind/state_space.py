"""Matern processes as state spaces: likelihood, gradient and inverse covariance at O(T), for recordings of any length.

Hartikainen and Sarkka, "Kalman filtering and smoothing solutions to temporal Gaussian process regression models"
(2010): a Matern process of half-integer smoothness is Markov in x = (s, s', ...), x_{t+1} = F x_t + noise. Seen with
white noise of variance v, K = L D L^T in the innovations e = L^-1 s of the Kalman filter, D their variances:

    e_t = s_t - x_t[0],    x_{t+1} = F (x_t + g_t e_t),    NLL = (sum_t log 2 pi D_t + e_t^2 / D_t) / 2
    K^-1 s = L^-T D^-1 e:    m = F^T l_{t+1},  a_t = e_t / D_t + g_t . m,  l_t = m - a_t (1, 0, ...)
    (K^-1)_tt = 1 / D_t + (F g_t)^T N_{t+1} F g_t,    N_t = (1, 0, ..)(1, 0, ..)^T / D_t + L_t^T N_{t+1} L_t,
    L_t = F (I - g_t (1, 0, ...))

the last two running backwards from 0 (de Jong, "Smoothing and interpolation with the state-space model", 1989).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import expm
from torch import Tensor

from audiosep.blind import compiled
from audiosep.errors import UsageError

Array = NDArray[np.float64]

ORDERS = {"matern12": 0, "matern32": 1, "matern52": 2}
STEP = 1e-4  # of the logarithm of the length-scale, in the central difference


def matern(kernel: str, length_scale: float, variance: float = 1.0) -> tuple[Array, Array]:
    """F, the transition over one sample, and the stationary covariance of the state: (p + 1, p + 1) each."""
    if kernel not in ORDERS:
        raise UsageError(f"kernel is {', '.join(ORDERS)} for a state space, got {kernel!r}")
    order = ORDERS[kernel]
    rate = np.sqrt(2 * order + 1) / length_scale
    companion = {
        0: [[-rate]],
        1: [[0, 1], [-(rate**2), -2 * rate]],
        2: [[0, 1, 0], [0, 0, 1], [-(rate**3), -3 * rate**2, -3 * rate]],
    }[order]
    shape = {
        0: [[1.0]],
        1: [[1, 0], [0, rate**2]],
        2: [[1, 0, -(rate**2) / 3], [0, rate**2 / 3, 0], [-(rate**2) / 3, 0, rate**4]],
    }[order]
    return expm(np.array(companion, dtype=np.float64)), variance * np.array(shape, dtype=np.float64)


@dataclass(frozen=True)
class StateSpace:
    """The inverse of a covariance (T, T): transition (p, p), gains (T, p) and innovations' variances (T,)."""

    transition: Array
    gains: Array
    variances: Array

    @classmethod
    def of(cls, kernel: str, length_scale: float, variance: float, noise: float, samples: int) -> StateSpace:
        transition, stationary = matern(kernel, length_scale, variance)
        gains, variances = _run("matern_gains", transition, stationary, float(noise), samples)
        return cls(transition, gains, variances)

    def innovations(self, s: Array) -> Array:
        """e of s (T,)."""
        return np.asarray(_run("matern_filter", _row(s), self.transition, self.gains))

    def solve(self, s: Array) -> Array:
        """K^-1 s for s (..., T)."""
        rows = np.asarray(s, dtype=np.float64).reshape(-1, s.shape[-1])
        weights = [self.innovations(row) / self.variances for row in rows]
        return np.stack([_run("matern_adjoint", w, self.transition, self.gains) for w in weights]).reshape(s.shape)

    @property
    def diagonal(self) -> Array:
        """The diagonal of K^-1: (T,)."""
        return np.asarray(_run("matern_diagonal", self.variances, self.transition, self.gains))

    def negative_log_likelihood(self, s: Array) -> float:
        """-log N(s; 0, K) of s (T,)."""
        e = self.innovations(s)
        return 0.5 * float(np.sum(np.log(2 * np.pi * self.variances) + e**2 / self.variances))


def _run(name: str, *arguments: Any) -> Any:
    plain: Callable[..., Any] = getattr(compiled, name)
    return (compiled.compiled(name) or plain)(*arguments)


def _row(s: Array) -> Array:
    return np.ascontiguousarray(s, dtype=np.float64)


class _NegativeLogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, log_scale: Tensor, kernel: str, noise: float) -> Tensor:
        signals = s.detach().cpu().double().numpy()
        values, by_scale = np.empty(s.shape[:-1]), np.empty(s.shape[:-1])
        by_signal = np.empty_like(signals)

        def at(log: float) -> StateSpace:
            return StateSpace.of(kernel, float(np.exp(log)), 1.0, noise, signals.shape[-1])

        for i, log in enumerate(log_scale.detach().cpu().double().tolist()):
            here, up, down = (at(log + h) for h in (0.0, STEP, -STEP))
            for k in np.ndindex(s.shape[:-2]):
                signal = signals[(*k, i)]
                values[(*k, i)], by_signal[(*k, i)] = here.negative_log_likelihood(signal), here.solve(signal)
                rise = up.negative_log_likelihood(signal) - down.negative_log_likelihood(signal)
                by_scale[(*k, i)] = rise / (2 * STEP)
        ctx.save_for_backward(torch.from_numpy(by_signal).to(s), torch.from_numpy(by_scale).to(log_scale))
        return torch.from_numpy(values).to(s)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        by_signal, by_scale = ctx.saved_tensors
        by_log_scale = (grads[0] * by_scale).reshape(-1, by_scale.shape[-1]).sum(0)
        return grads[0][..., None] * by_signal, by_log_scale, None, None


def negative_log_likelihood(s: Tensor, log_scale: Tensor, kernel: str, noise: float) -> Tensor:
    """-log N(s; 0, K + noise I) of sources s (..., n, T) under unit-variance Matern kernels: (..., n).

    Differentiable in s, exactly, and in the logarithms of the length-scales (n,), by a central difference of the exact
    likelihood (to some 8 digits). On the CPU, whatever the tensors' device.
    """
    return _NegativeLogLikelihood.apply(s, log_scale, kernel, noise)
