"""Symmetric positive definite Toeplitz matrices K, given by their first columns r (T,), in numpy.

What a stationary Gaussian process on a regular grid needs: K^-1 s, log |K|, and the sums of K^-1 along its diagonals,
which are the gradient of log |K| by r. All follow from x = K^-1 e_1 by the Gohberg-Semencul formula

    K^-1 = (L(x) L(x)^T - L(y) L(y)^T) / x_0,    y = (0, x_{T-1}, ..., x_1),

L(v) lower triangular Toeplitz with first column v, so that each costs a few FFTs. x itself comes from Durbin's
recursion, O(T^2), or past `DURBIN_LIMIT` from conjugate gradients with T. Chan's circulant preconditioner, O(T log T).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft

from audiosep.blind.compiled import compiled
from audiosep.errors import UsageError

Array = NDArray[np.float64]

DURBIN_LIMIT = 16000  # samples; beyond it conjugate gradients are faster
TAIL_ORDER = 4000  # order from which prediction errors are taken to have converged, past that limit
MAX_CG_STEPS = 1000
CG_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Inverse:
    """K^-1 of the Toeplitz matrix with first column r: (T,), through x = K^-1 e_1 (T,).

    logdet is log |K|; past DURBIN_LIMIT its error is below T - TAIL_ORDER times the (tiny) decrease of the
    logarithmic prediction error past that order.
    """

    column: Array
    x: Array
    logdet: float

    @classmethod
    def of(cls, column: Array) -> Inverse:
        """Invert; raises UsageError if K is not positive definite in double precision."""
        samples = len(column)
        orders = samples if samples <= DURBIN_LIMIT else TAIL_ORDER
        filter_, errors = durbin(np.ascontiguousarray(column[:orders], dtype=np.float64))
        if not errors.min() > 0:
            raise UsageError("the kernel's covariance matrix is not positive definite: raise its noise")
        logdet = float(np.log(errors).sum())
        if samples <= DURBIN_LIMIT:
            return cls(column, filter_ / errors[-1], logdet)
        x = conjugate_gradients(column, np.eye(1, samples)[0])
        # The errors fall from errors[-1] to 1 / x_0, and mostly at once.
        return cls(column, x, logdet - (samples - orders) * float(np.log(x[0])))

    def solve(self, s: Array) -> Array:
        """K^-1 s for s (..., T)."""
        alpha = self._apply(s)
        return alpha + self._apply(s - multiply(self.column, alpha))  # one refinement: rounding of the differences

    def _apply(self, s: Array) -> Array:
        samples, n = s.shape[-1], self._size
        by_x, by_y = self._transforms
        seen = rfft(s, n)
        upper = irfft(np.stack([np.conj(by_x) * seen, np.conj(by_y) * seen]), n)[..., :samples]  # L(x)^T s, L(y)^T s
        of_x, of_y = rfft(upper, n)
        return irfft(by_x * of_x - by_y * of_y, n)[..., :samples] / self.x[0]

    @property
    def _size(self) -> int:
        return next_fast_len(2 * len(self.x), real=True)

    @cached_property
    def _pair(self) -> Array:
        """x and y: (2, T)."""
        return np.stack([self.x, np.r_[0.0, self.x[:0:-1]]])

    @cached_property
    def _transforms(self) -> NDArray[np.complex128]:
        return rfft(self._pair, self._size)

    @cached_property
    def diagonal_sums(self) -> Array:
        """Sum of the k-th diagonal of K^-1 for k = 0..T-1: (T,). The first is the trace."""
        samples, n = len(self.x), self._size
        weighted = rfft(np.arange(samples, 0, -1) * self._pair, n)
        of_x, of_y = np.conj(self._transforms) * weighted
        return irfft(of_x - of_y, n)[:samples] / self.x[0]

    @cached_property
    def diagonal(self) -> Array:
        """The diagonal of K^-1: (T,)."""
        x, y = self._pair
        return np.cumsum(x**2 - y**2) / self.x[0]


def correlate(a: Array, b: Array) -> Array:
    """sum_i a[i] b[i + k] for k = 0..T-1: (..., T), (..., T) -> (..., T)."""
    n = next_fast_len(2 * a.shape[-1], real=True)
    return irfft(np.conj(rfft(a, n)) * rfft(b, n), n)[..., : a.shape[-1]]


def multiply(column: Array, s: Array) -> Array:
    """K s for s (..., T), by a circulant of twice the size."""
    samples = s.shape[-1]
    n = next_fast_len(2 * samples, real=True)
    padded = np.zeros(n)
    padded[:samples] = column
    padded[n - samples + 1 :] = column[:0:-1]
    return irfft(rfft(padded) * rfft(s, n), n)[..., :samples]


def durbin(column: Array) -> tuple[Array, Array]:
    """Prediction filter (1, a_1, ..., a_{T-1}) and the prediction error of each order: (T,), (T,)."""
    fast = compiled("durbin")
    return fast(column) if fast else _durbin(column)


def _durbin(column: Array) -> tuple[Array, Array]:
    size = len(column)
    a, errors = np.zeros(size), np.empty(size)
    a[0], errors[0] = 1.0, column[0]
    for k in range(1, size):
        reflection = -(a[:k] @ column[k:0:-1]) / errors[k - 1]
        a[1 : k + 1] += reflection * a[k - 1 :: -1] if k > 1 else reflection
        errors[k] = errors[k - 1] * (1 - reflection**2)
        if not errors[k] > 0:
            errors[k:] = -1.0
            break
    return a, errors


def conjugate_gradients(column: Array, s: Array) -> Array:
    """K^-1 s by conjugate gradients, preconditioned with the circulant nearest to K (T. Chan, 1988)."""
    samples = len(column)
    k = np.arange(samples)
    spectrum = rfft(((samples - k) * column + k * np.roll(column[::-1], 1)) / samples).real
    spectrum = np.maximum(spectrum, 1e-12 * spectrum.max())
    n = next_fast_len(2 * samples, real=True)
    padded = np.zeros(n)
    padded[:samples], padded[n - samples + 1 :] = column, column[:0:-1]
    embedded = rfft(padded)
    x, left = np.zeros(samples), np.array(s, dtype=np.float64)
    conditioned = irfft(rfft(left) / spectrum, samples)
    direction, power = conditioned.copy(), float(left @ conditioned)
    for _ in range(MAX_CG_STEPS):
        image = irfft(embedded * rfft(direction, n), n)[:samples]
        step = power / float(direction @ image)
        x += step * direction
        left -= step * image
        if np.linalg.norm(left) <= CG_TOLERANCE * np.linalg.norm(s):
            break
        conditioned = irfft(rfft(left) / spectrum, samples)
        power, before = float(left @ conditioned), power
        direction = conditioned + power / before * direction
    return x
