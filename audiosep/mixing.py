"""Mixtures of sources, and the way back: residuals shared out so that estimates add up to the mixture.

Sources are (..., K, N) on their own axis, mixtures (..., N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from audiosep.stft import istft, stft


def mix(sources: Tensor) -> Tensor:
    """Sum the sources (..., K, N) to the mixture (..., N)."""
    return sources.sum(-2)


def residual(mixture: Tensor, sources: Tensor) -> Tensor:
    """What the sources (..., K, N) leave of the mixture (..., N)."""
    return mixture - mix(sources)


def project(
    mixture: Tensor,
    sources: Tensor,
    n_fft: int = 512,
    hop_length: int = 128,
    known_band: float = 1.0,
) -> Tensor:
    """Make estimates add up to the mixture: each time-frequency bin's residual is shared out by their power there.

    With powers P_k the estimate becomes X_k + P_k / sum_j P_j * (Y - sum_j X_j), which for variances P_k is the step of
    a Kalman filter onto the mixture. Where no source has power the residual is shared equally.

    Args:
        mixture: (..., N).
        sources: (..., K, N) estimates.
        n_fft: STFT size.
        hop_length: its hop.
        known_band: fraction of the band that the estimates cover; above it each frame is shared out as in the
            upper half of the band that they know.

    Returns:
        (..., K, N) whose sum is the mixture to rounding.
    """
    power = stft(sources, n_fft, hop_length).abs().square()
    known = round(known_band * power.shape[-2])
    if known < power.shape[-2]:
        power[..., known:, :] = power[..., known // 2 : known, :].mean(-2, keepdim=True)
    left = residual(mixture, sources)
    shared = istft(
        shares(power) * stft(left, n_fft, hop_length).unsqueeze(-3),
        n_fft,
        hop_length,
        sources.shape[-1],
    )
    projected = sources + shared
    # What the transforms' rounding left over is spread evenly.
    return projected + (residual(mixture, projected) / sources.shape[-2]).unsqueeze(-2)


def shares(power: Tensor, dim: int = -3) -> Tensor:
    """Fractions power_k / sum_j power_j along `dim`; equal where there is no power at all."""
    # The floor lies 120 dB under the loudest bin, so that rounding noise decides nothing.
    floor = 1e-12 * power.amax() + torch.finfo(power.dtype).tiny
    return (power + floor) / (power + floor).sum(dim, keepdim=True)
