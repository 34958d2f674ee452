"""The recursions over samples that are worth compiling. numba does it; without it numpy does the same, slower.

`compiled(name)` is the function, or None where numba is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@cache
def compiled(name: str) -> Callable[..., Any] | None:
    """The compiled function of that name; compiled once per machine where the cache can be written."""
    try:
        import numba
    except ImportError:
        return None
    functions = (
        durbin,
        matern_gains,
        matern_filter,
        matern_adjoint,
        matern_diagonal,
        flow_forward,
        flow_backward,
    )
    return numba.njit({f.__name__: f for f in functions}[name], cache=True, fastmath={"reassoc", "contract", "nsz"})


def durbin(column: Array) -> tuple[Array, Array]:
    """`toeplitz.durbin`, in loops."""
    size = len(column)
    a, errors = np.zeros(size), np.empty(size)
    old = np.zeros(size)
    a[0], errors[0] = 1.0, column[0]
    for k in range(1, size):
        total = 0.0
        for i in range(k):
            total += a[i] * column[k - i]
        reflection = -total / errors[k - 1]
        for i in range(k):
            old[i] = a[i]
        for i in range(1, k + 1):
            a[i] += reflection * old[k - i]
        errors[k] = errors[k - 1] * (1 - reflection * reflection)
        if not errors[k] > 0:
            errors[k:] = -1.0
            break
    return a, errors


def matern_gains(transition: Array, stationary: Array, noise: float, samples: int) -> tuple[Array, Array]:
    """Gains (T, p) and innovations' variances (T,) of the filter in `state_space`; they soon are the same always."""
    size = len(transition)
    gains, variances = np.empty((samples, size)), np.empty(samples)
    left, moved, after = np.empty((size, size)), np.empty((size, size)), np.empty((size, size))
    process = np.empty((size, size))
    for i in range(size):  # stationary - F stationary F^T
        for j in range(size):
            process[i, j] = stationary[i, j]
            for k in range(size):
                for m in range(size):
                    process[i, j] -= transition[i, k] * stationary[k, m] * transition[j, m]
    spread = stationary.copy()
    for t in range(samples):
        variances[t] = spread[0, 0] + noise
        for i in range(size):
            gains[t, i] = spread[i, 0] / variances[t]
        for i in range(size):
            for j in range(size):
                left[i, j] = spread[i, j] - gains[t, i] * spread[0, j]
        for i in range(size):
            for j in range(size):
                moved[i, j] = 0.0
                for k in range(size):
                    moved[i, j] += transition[i, k] * left[k, j]
        change = 0.0
        for i in range(size):
            for j in range(size):
                after[i, j] = process[i, j]
                for k in range(size):
                    after[i, j] += moved[i, k] * transition[j, k]
                change = max(change, abs(after[i, j] - spread[i, j]) / np.sqrt(spread[i, i] * spread[j, j]))
        if change <= 1e-14:
            variances[t:] = variances[t]
            gains[t:] = gains[t]
            break
        spread[:] = after
    return gains, variances


def matern_filter(s: Array, transition: Array, gains: Array) -> Array:
    """Innovations (T,) of a signal s (T,)."""
    samples, size = gains.shape
    innovations, state, moved = np.empty(samples), np.zeros(size), np.zeros(size)
    for t in range(samples):
        innovations[t] = s[t] - state[0]
        for i in range(size):
            moved[i] = state[i] + gains[t, i] * innovations[t]
        for i in range(size):
            total = 0.0
            for k in range(size):
                total += transition[i, k] * moved[k]
            state[i] = total
    return innovations


def matern_adjoint(weights: Array, transition: Array, gains: Array) -> Array:
    """L^-T weights (T,), backwards in time."""
    samples, size = gains.shape
    found, after, moved = np.empty(samples), np.zeros(size), np.zeros(size)
    for t in range(samples - 1, -1, -1):
        total = weights[t]
        for i in range(size):
            moved[i] = 0.0
            for k in range(size):
                moved[i] += transition[k, i] * after[k]
            total += gains[t, i] * moved[i]
        found[t] = total
        after[:] = moved
        after[0] -= total
    return found


def matern_diagonal(variances: Array, transition: Array, gains: Array) -> Array:
    """The diagonal (T,) of the inverse covariance, backwards in time."""
    samples, size = gains.shape
    found, after = np.empty(samples), np.zeros((size, size))
    half, moved, image = np.empty((size, size)), np.empty((size, size)), np.empty(size)
    for t in range(samples - 1, -1, -1):
        for i in range(size):  # moved = F^T after F
            for j in range(size):
                half[i, j] = 0.0
                for k in range(size):
                    half[i, j] += transition[k, i] * after[k, j]
        for i in range(size):
            for j in range(size):
                moved[i, j] = 0.0
                for k in range(size):
                    moved[i, j] += half[i, k] * transition[k, j]
        found[t] = 1 / variances[t]
        for i in range(size):
            image[i] = 0.0
            for k in range(size):
                image[i] += moved[i, k] * gains[t, k]
            found[t] += gains[t, i] * image[i]
        after[:] = moved  # (I - g e^T)^T moved (I - g e^T) + e e^T / D
        for i in range(size):
            after[0, i] -= image[i]
            after[i, 0] -= image[i]
        after[0, 0] += found[t]
    return found


def flow_forward(
    u: Array,
    w_b: Array,
    c_b: Array,
    w_alpha: Array,
    c_alpha: Array,
    w_h: Array,
    w_eps: Array,
    c_h: Array,
    kappa: float,
) -> tuple[Array, Array, Array]:
    """Invert the recurrent flow: noise (k, R), log-scales (k, R) and states (k, R + 1, H) of residuals u (k, R).

    Row r is a draw of source r modulo the number of sources.
    """
    rows, steps = u.shape
    sources, size = w_b.shape
    eps, alpha = np.empty((rows, steps)), np.empty((rows, steps))
    h, total = np.zeros((rows, steps + 1, size)), np.empty(size)
    for r in range(rows):
        j = r % sources
        for t in range(steps):
            b, a = c_b[j], c_alpha[j]
            for i in range(size):
                b += w_b[j, i] * h[r, t, i]
                a += w_alpha[j, i] * h[r, t, i]
            # tanh by exp, which is the faster, and the same to rounding.
            a = kappa * (1 - 2 / (np.exp(min(2 * a, 700.0)) + 1))
            e = (u[r, t] - b) * np.exp(-a)
            alpha[r, t], eps[r, t] = a, e
            for i in range(size):
                total[i] = c_h[j, i] + w_eps[j, i] * e
                for k in range(size):
                    total[i] += w_h[j, i, k] * h[r, t, k]
            for i in range(size):
                h[r, t + 1, i] = 1 - 2 / (np.exp(min(2 * total[i], 700.0)) + 1)
    return eps, alpha, h


def flow_backward(
    eps: Array,
    alpha: Array,
    h: Array,
    by_eps: Array,
    by_alpha: Array,
    w_b: Array,
    w_alpha: Array,
    w_h: Array,
    w_eps: Array,
    kappa: float,
) -> tuple[Array, ...]:
    """Gradients by u and by the parameters, in `flow_forward`'s order, of what has gradients by eps and alpha."""
    rows, steps = eps.shape
    sources, size = w_b.shape
    d_u = np.empty((rows, steps))
    d_w_b, d_c_b = np.zeros((sources, size)), np.zeros(sources)
    d_w_alpha, d_c_alpha = np.zeros((sources, size)), np.zeros(sources)
    d_w_h = np.zeros((sources, size, size))
    d_w_eps, d_c_h = np.zeros((sources, size)), np.zeros((sources, size))
    d_h, before, inner = np.zeros(size), np.zeros(size), np.zeros(size)
    for r in range(rows):
        j = r % sources
        d_h[:] = 0.0
        for t in range(steps - 1, -1, -1):
            e, a = eps[r, t], alpha[r, t]
            d_e = by_eps[r, t]
            for i in range(size):
                inner[i] = d_h[i] * (1 - h[r, t + 1, i] ** 2)
                d_e += inner[i] * w_eps[j, i]
                d_w_eps[j, i] += inner[i] * e
                d_c_h[j, i] += inner[i]
            d_u[r, t] = d_e * np.exp(-a)
            d_b = -d_u[r, t]
            d_a = (by_alpha[r, t] - d_e * e) * (kappa - a * a / kappa)
            d_c_b[j] += d_b
            d_c_alpha[j] += d_a
            for i in range(size):
                before[i] = w_b[j, i] * d_b + w_alpha[j, i] * d_a
                d_w_b[j, i] += d_b * h[r, t, i]
                d_w_alpha[j, i] += d_a * h[r, t, i]
            for i in range(size):
                for k in range(size):
                    before[k] += w_h[j, i, k] * inner[i]
                    d_w_h[j, i, k] += inner[i] * h[r, t, k]
            for i in range(size):
                d_h[i] = before[i]
    return d_u, d_w_b, d_c_b, d_w_alpha, d_c_alpha, d_w_h, d_w_eps, d_c_h
