"""Gradient guidance: DPS, DSG and the hybrid SmoothMax schedule.

Each step follows the prior, then moves every source against the gradient of the reconstruction loss at the denoised
estimates, taken through the network: x_{t-1,k} = x'_{t-1,k} - gamma_k(t) g_k with
g_k = d L(y, sum_j x_0|t,j) / d x_{t,k}.

- DPS: gamma constant. Hyungjin Chung et al., "Diffusion Posterior Sampling for General Noisy Inverse Problems", 2023,
  https://arxiv.org/abs/2209.14687.
- DSG: gamma_k = factor sigma(t) sqrt(N) / ||g_k||, with sigma(t) the standard deviation of the ancestral step.
  Lingxiao Yang et al., "Guidance with Spherical Gaussian Constraint for Conditional Diffusion", 2024,
  https://arxiv.org/abs/2402.03201.
- Hybrid: gamma_k = SmoothMax_c(factor sigma(t), s_floor) sqrt(N) / ||g_k||. Runwu Shi et al., "Unsupervised
  Single-Channel Audio Separation with Diffusion Source Priors", AAAI 2026, https://arxiv.org/abs/2512.07226,
  eqs. 10-11.

The published code multiplies sigma(t) by 0.09, which the paper does not print; norms are per source, as published.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from audiosep.losses import ReconstructionLoss
from audiosep.prior import JointPrior
from audiosep.samplers.base import Sampler


def smooth_max(a: float, b: float, c: float) -> float:
    """log(exp(c a) + exp(c b)) / c, eq. 10."""
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(c * (low - high))) / c


class GradientSampler(Sampler):
    """Common part: the loss's gradient with respect to each source's state."""

    needs_gradient = True

    def __init__(self, prior: JointPrior, *, loss: ReconstructionLoss | None = None, **options: Any) -> None:
        super().__init__(prior, **options)
        self.loss = loss or ReconstructionLoss()

    def gradient(self, x_t: Tensor, denoised: Tensor, y: Tensor) -> Tensor:
        """d L / d x_t (B, K, N)."""
        with torch.enable_grad():
            self.loss(denoised.sum(1), y).sum().backward()
        assert x_t.grad is not None
        return x_t.grad


class DPS(GradientSampler):
    """Constant step on the gradient as it is (1.5 in the published comparison)."""

    def __init__(self, prior: JointPrior, *, step_size: float = 1.5, **options: Any) -> None:
        super().__init__(prior, **options)
        self.step_size = step_size

    def guide(self, x: Tensor, x_t: Tensor, denoised: Tensor, y: Tensor, i: int) -> Tensor:
        return -self.step_size * self.gradient(x_t, denoised, y)


class DSG(GradientSampler):
    """A step of RMS `factor` sigma(t) along each source's gradient."""

    def __init__(self, prior: JointPrior, *, factor: float = 0.09, **options: Any) -> None:
        super().__init__(prior, **options)
        self.factor = factor

    def strength(self, i: int) -> float:
        """RMS of the move at step i."""
        return self.factor * self.alphas[i + 1] * self.spread(i)

    def guide(self, x: Tensor, x_t: Tensor, denoised: Tensor, y: Tensor, i: int) -> Tensor:
        gradient = self.gradient(x_t, denoised, y)
        length = gradient.norm(dim=-1, keepdim=True) + 1e-8
        return -(x.shape[-1] ** 0.5) * self.strength(i) * gradient / length


class Hybrid(DSG):
    """DSG whose steps do not vanish: SmoothMax of factor sigma(t) and a floor."""

    def __init__(self, prior: JointPrior, *, floor: float = 0.002, sharpness: float = 1000.0, **options: Any) -> None:
        super().__init__(prior, **options)
        self.floor, self.sharpness = floor, sharpness

    def strength(self, i: int) -> float:
        """RMS of the move at step i, eq. 11."""
        return smooth_max(super().strength(i), self.floor, self.sharpness)
