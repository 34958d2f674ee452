"""The recursions over samples that are worth compiling. numba does it; without it numpy does the same, slower.

`compiled(name)` is the function, or None where numba is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

# ruff: noqa: ANN001, ANN202 - numba infers the types of what it compiles


@cache
def compiled(name: str) -> Callable[..., Any] | None:
    """The compiled function of that name; compiled once per machine where the cache can be written."""
    try:
        import numba
    except ImportError:
        return None
    functions = {"durbin": _durbin, "matern_filter": matern_filter}
    return numba.njit(functions[name], cache=True, fastmath={"reassoc", "contract", "nsz"})


def _durbin(column):
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


def matern_filter(s, transition, stationary, noise):
    """Innovations and their variances of a state-space process observed in noise: (T,), (T,)."""
    samples, size = len(s), len(transition)
    innovations, variances = np.empty(samples), np.empty(samples)
    state, spread = np.zeros(size), stationary.copy()
    process = stationary - transition @ stationary @ transition.T
    for t in range(samples):
        innovations[t] = s[t] - state[0]
        variances[t] = spread[0, 0] + noise
        gain = spread[:, 0] / variances[t]
        state = transition @ (state + gain * innovations[t])
        spread = transition @ (spread - np.outer(gain, spread[0])) @ transition.T + process
    return innovations, variances
