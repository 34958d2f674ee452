"""Reconstruction losses (estimate (B, N), mixture (B, N)) -> (B,): how far the estimates' sum is from the mixture.

Runwu Shi et al., "Unsupervised Single-Channel Audio Separation with Diffusion Source Priors", AAAI 2026,
https://arxiv.org/abs/2512.07226: L = lambda_time L_time + lambda_group L_group + lambda_stft L_stft with the weights
1, 0.05, 0.1. The paper prints squared norms and a mean over the groups; its published code takes plain norms and a sum,
which balances the three terms' gradients (squared, the spectral term outweighs the others by more than ten to one).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from audiosep.stft import window


def time_loss(estimate: Tensor, mixture: Tensor, squared: bool = False) -> Tensor:
    """|| y - y_hat ||_2, or its square."""
    return _norm(mixture - estimate, squared)


def group_loss(estimate: Tensor, mixture: Tensor, squared: bool = False, groups: int = 512) -> Tensor:
    """Sum of the norms over segments of ceil(N / groups) samples; with `squared` the mean of the squared norms."""
    error = mixture - estimate
    size = math.ceil(error.shape[-1] / groups)
    error = pad(error, (0, -error.shape[-1] % size)).unflatten(-1, (-1, size))
    norms = _norm(error, squared)
    return norms.mean(-1) if squared else norms.sum(-1)


def stft_loss(
    estimate: Tensor,
    mixture: Tensor,
    squared: bool = False,
    n_fft: int = 512,
    hop_length: int = 256,
) -> Tensor:
    """Frobenius norm, or its square, of the difference of the magnitude spectrograms."""
    difference = _magnitude(mixture, n_fft, hop_length) - _magnitude(estimate, n_fft, hop_length)
    return _norm(difference.flatten(-2), squared)


@dataclass(frozen=True)
class ReconstructionLoss:
    """Weighted sum of the three losses; `squared` selects the paper's printed form over the published code's."""

    time: float = 1.0
    group: float = 0.05
    stft: float = 0.1
    squared: bool = False

    def __call__(self, estimate: Tensor, mixture: Tensor) -> Tensor:
        terms = ((self.time, time_loss), (self.group, group_loss), (self.stft, stft_loss))
        losses = [weight * loss(estimate, mixture, self.squared) for weight, loss in terms if weight]
        return torch.stack(losses).sum(0)


def _norm(x: Tensor, squared: bool) -> Tensor:
    # A tiny number inside the root keeps the gradient of an exactly zero segment finite.
    power = x.square().sum(-1)
    return power if squared else (power + 1e-20).sqrt()


def _magnitude(x: Tensor, n_fft: int, hop_length: int) -> Tensor:
    # The published code's frames: the last one is the last that starts within the signal, nothing is appended.
    hann = window(n_fft, False, x.device, x.dtype)
    bins = torch.stft(x, n_fft, hop_length, window=hann, center=True, return_complex=True)
    return (bins.real.square() + bins.imag.square() + 1e-20).sqrt()
