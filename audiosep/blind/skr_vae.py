"""SKR-VAE: a variational autoencoder whose prior means are kernel regressions of the latents themselves.

Wei, Deng, Cui, Sun: "Structured kernel regression VAE: a computationally efficient surrogate for GP-VAEs in ICA"
(2025), arXiv:2508.09721. The text of its formulas was not available to us; this is our reading of its abstract: kernels
model the correlations among the points of each latent dimension, without inverting a matrix.

    p(s_t | rest) = N(rho m_t, v + xi),  m_t = sum_{u != t} k(t - u) s_u / sum_{u != t} k(t - u)
    k(d) = exp(-d^2 / (2 l^2))

with l, rho, v learned per source; without the jitter xi smooth sources drive v to 0, and the sources apart. The sample
itself is left out: included, l -> 0 would explain everything. The product over t is a pseudo-likelihood, no density, so
that `elbo_` compares nothing and no starts are chosen by it. Under noise it can prefer wrong sources, far from the
start. So posterior="gp" weighs the mixing learned against that of the start by the likelihood of the recording under
the fitted processes, and takes the likelier (`start_kept_`).
All m_t take one FFT, O(T log T).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from audiosep.blind.base import Array, positive
from audiosep.blind.vae import SourcePrior, VariationalSeparator

SCALES = (1.0, 2.0, 5.0, 15.0, 50.0)  # bandwidths that a fit starts from, in samples


class KernelRegressionPrior(nn.Module):
    """The pseudo-likelihood of n sources given their neighbours."""

    def __init__(self, sources: int, jitter: float = 1e-2) -> None:
        super().__init__()
        self.jitter = jitter
        self.log_bandwidth = nn.Parameter(torch.full((sources,), math.log(5.0)))
        self.log_variance = nn.Parameter(torch.full((sources,), math.log(0.1)))
        self.rho = nn.Parameter(torch.ones(sources))

    def regression(self, s: Tensor) -> Tensor:
        """m_t of each trajectory: (..., n, T) -> (..., n, T)."""
        samples = s.shape[-1]
        lag = torch.arange(1, samples, dtype=s.dtype, device=s.device)
        scale = self.log_bandwidth.clamp(math.log(0.3), math.log(1e6)).exp()[:, None]
        kernel = torch.exp(-0.5 * (lag / scale) ** 2)  # (n, T - 1), lags 1..T-1
        zero = torch.zeros_like(kernel[:, :1])
        circle = torch.cat([zero, kernel, zero, kernel.flip(1)], dim=1)  # (n, 2 T), symmetric
        transfer = torch.fft.rfft(circle)
        both = torch.stack([s, torch.ones_like(s)])  # numerator, denominator
        smoothed = torch.fft.irfft(transfer * torch.fft.rfft(both, 2 * samples), 2 * samples)
        numerator, denominator = smoothed[..., :samples]
        return numerator / denominator.clamp_min(1e-12)

    @torch.no_grad()
    def start_from(self, s: Tensor) -> None:
        """Take the bandwidth of SCALES that predicts each trajectory of s (n, T) best, and its error."""
        errors = []
        for scale in SCALES:
            self.log_bandwidth.fill_(math.log(scale))
            errors.append((s - self.regression(s)).square().mean(1))
        smallest, best = torch.stack(errors).min(0)
        self.log_bandwidth.copy_(torch.tensor(SCALES, dtype=s.dtype, device=s.device)[best].log())
        self.log_variance.copy_(smallest.clamp_min(1e-6).log())

    def log_prob(self, s: Tensor) -> Tensor:
        variance = self.log_variance.exp()[:, None] + self.jitter
        error = s - self.rho[:, None] * self.regression(s)
        return -0.5 * (error.square() / variance + (2 * math.pi * variance).log()).sum(-1)

    def learned(self) -> dict[str, Tensor]:
        return {"length_scales_": self.log_bandwidth.exp(), "rho_": self.rho, "variance_": self.log_variance.exp()}


class SKRVAE(VariationalSeparator):
    """Separation by a variational autoencoder with a kernel-regression prior per source (see the module's head).

    Parameters
    ----------
    n_sources, mixing, init, posterior, beta, warm, mlp_units, block, learning_rate, max_iter, tol, random_state, device
        As ARFlowVAE's; init="auto" is SOBI's.
    jitter: float
        Least variance xi of a unit-variance source given its neighbours.

    Attributes: as ARFlowVAE's, with length_scales_ (samples), rho_, variance_ (n_sources,) instead of ar_coef_ and
    innovation_std_; elbo_ is a pseudo-likelihood's, and compares nothing. start_kept_: whether posterior="gp" found the
    start's mixing likelier than the learned one; length_scales_ and traces_ are those of the learned one all the same.
    """

    def __init__(
        self,
        n_sources: int | None = None,
        *,
        mixing: str = "linear",
        jitter: float = 1e-2,
        init: str = "auto",
        posterior: str = "gp",
        beta: float = 0.1,
        warm: float = 1.0,
        mlp_units: int = 32,
        block: int | None = 20000,
        learning_rate: float = 1e-2,
        max_iter: int = 400,
        tol: float = 0.1,
        random_state: Any = None,
        device: str = "auto",
    ) -> None:
        self.n_sources = n_sources
        self.mixing = mixing
        self.jitter = jitter
        self.init = init
        self.posterior = posterior
        self.beta = beta
        self.warm = warm
        self.mlp_units = mlp_units
        self.block = block
        self.learning_rate = learning_rate
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.device = device

    def _check_options(self) -> None:
        super()._check_options()
        positive("jitter", self.jitter, zero=True)

    @property
    def start_kept_(self) -> bool:
        """Was the start's mixing likelier than the learned one?"""
        return self._rival is not None

    def _rivals(self) -> list[Array]:
        """The mixing of the start, its sources in the order and of the signs of the learned ones."""
        start = self._whitening.inverse @ self._begun.T
        learned = np.linalg.pinv(start) @ self.mixing_
        _, order = linear_sum_assignment(-np.abs(learned).T)
        return [start[:, order] * np.sign(learned[order, range(len(order))])]

    def _prior(self, sources: int) -> SourcePrior:
        return KernelRegressionPrior(sources, self.jitter)
