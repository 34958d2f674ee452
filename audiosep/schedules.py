"""Noise schedules: tables of levels alpha[t], sigma[t] with x_t = alpha_t x_0 + sigma_t eps, least noise first.

Everything about a level follows from its ratio s = sigma / alpha: x_t / alpha_t is the clean signal in white noise of
standard deviation s. A variance-preserving schedule has alpha = 1 / sqrt(1 + s^2), a variance-exploding one alpha = 1.
So any prior can be asked at any schedule's levels, and levels between two steps are found on log s.

VP: Jonathan Ho, Ajay Jain, Pieter Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239.
VE: Yang Song et al., "Score-Based Generative Modeling through SDEs", 2021, https://arxiv.org/abs/2011.13456.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """A table of noise levels.

    Args:
        ratio: (T,) float64, sigma / alpha per step, rising.
        preserving: True for variance preserving, False for variance exploding.
        config: name and arguments of the function that made it.
    """

    ratio: Tensor
    preserving: bool
    config: dict[str, Any] = field(compare=False, default_factory=dict)

    def __len__(self) -> int:
        return len(self.ratio)

    @property
    def alpha(self) -> Tensor:
        """(T,) factor on the clean signal."""
        return self.alpha_of(self.ratio)

    @property
    def sigma(self) -> Tensor:
        """(T,) standard deviation of the noise."""
        return self.ratio * self.alpha

    def alpha_of(self, ratio: Tensor) -> Tensor:
        """Factor on the clean signal at a level of any ratio (...)."""
        return torch.rsqrt(1 + ratio**2) if self.preserving else torch.ones_like(ratio)

    def ratio_at(self, t: Tensor) -> Tensor:
        """Ratio at steps t (...), which need not be whole."""
        log = np.interp(t.detach().cpu().double(), np.arange(len(self)), self.ratio.log())
        return torch.from_numpy(np.asarray(log)).exp().to(t.device)

    def step_at(self, ratio: Tensor) -> Tensor:
        """Step, not rounded, whose level has the ratio (...); limited to 0..T-1."""
        log = ratio.detach().cpu().double().log().numpy()
        t = np.interp(log, self.ratio.log(), np.arange(len(self)))
        return torch.from_numpy(np.asarray(t)).to(ratio.device)


def vp_linear(steps: int = 200, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Schedule:
    """The published schedule: variance preserving, beta linear from `beta_start` to `beta_end`, ends included."""
    if steps < 1 or not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"steps is at least 1 and 0 < beta_start <= beta_end < 1, not {steps}, {beta_start}, {beta_end}"
        )
    betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    config = {"name": "vp_linear", "steps": steps, "beta_start": beta_start, "beta_end": beta_end}
    return Schedule(torch.sqrt((1 - kept) / kept), preserving=True, config=config)


def ve(steps: int = 200, sigma_min: float = 1e-3, sigma_max: float = 1.5) -> Schedule:
    """Variance exploding, levels evenly spaced on a logarithmic scale."""
    if steps < 1 or not 0 < sigma_min < sigma_max < np.inf:
        raise ValueError(f"steps is at least 1 and 0 < sigma_min < sigma_max, not {steps}, {sigma_min}, {sigma_max}")
    ratio = torch.logspace(np.log10(sigma_min), np.log10(sigma_max), steps, dtype=torch.float64)
    ratio[-1] = sigma_max  # a single step is the noisiest, not the cleanest
    config = {"name": "ve", "steps": steps, "sigma_min": sigma_min, "sigma_max": sigma_max}
    return Schedule(ratio, preserving=False, config=config)
