"""The modified discrete cosine transform of a circle of samples: orthogonal, so white noise stays white.

Frame m has the N coefficients

    c_mk = sqrt(2 / N) sum_n w_n x_{m N + n} cos(pi / N (n + (N + 1) / 2) (k + 1 / 2)),     n = 0..2N - 1,

with the sine window w_n = sin(pi (n + 1/2) / 2N); the signal's end is followed by its beginning.

John Princen and Alan Bradley, "Analysis/Synthesis Filter Bank Design Based on Time Domain Aliasing Cancellation", 1986,
https://doi.org/10.1109/TASSP.1986.1164954.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def _waves(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2 size, size)"""
    n = torch.arange(2 * size, dtype=torch.float64)[:, None] + 0.5
    k = torch.arange(size, dtype=torch.float64) + 0.5
    waves = (2 / size) ** 0.5 * torch.sin(math.pi * n / (2 * size)) * torch.cos(math.pi / size * (n + size / 2) * k)
    return waves.to(device, dtype)


def mdct(x: Tensor, size: int) -> Tensor:
    """Coefficients (..., T / size, size) of signals (..., T); `size` divides T."""
    around = torch.cat((x, x[..., :size]), -1)
    return around.unfold(-1, 2 * size, size) @ _waves(size, x.dtype, x.device)


def imdct(coefficients: Tensor) -> Tensor:
    """Signals (..., T) of coefficients (..., T / size, size)."""
    size = coefficients.shape[-1]
    halves = coefficients @ _waves(size, coefficients.dtype, coefficients.device).mT
    return (halves[..., :size] + halves[..., size:].roll(1, -2)).flatten(-2)
