"""GP-VAE: a variational autoencoder whose latent sources are Gaussian processes, at the price of a Toeplitz solver."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from audiosep.blind import gp, state_space
from audiosep.blind.base import choose, positive
from audiosep.blind.compiled import compiled
from audiosep.blind.vae import SourcePrior, VariationalSeparator

SCALES = 24  # length-scales that a fit starts from


class GPPrior(nn.Module):
    """Unit-variance processes with a learned length-scale per source, plus jitter xi at lag 0.

    Length-scales are in samples; those of periodic kernels are shares of the period, which is learned too.
    """

    def __init__(self, sources: int, kernel: str = "rbf", jitter: float = 1e-2) -> None:
        super().__init__()
        self.kernel = kernel
        self.jitter = jitter
        self.periodic = kernel in gp.PERIODIC
        self.log_length_scale = nn.Parameter(torch.full((sources,), math.log(0.5 if self.periodic else 10.0)))
        if self.periodic:
            self.log_period = nn.Parameter(torch.full((sources,), math.log(10.0)))

    def column(self, samples: int) -> Tensor:
        """First columns of the covariances: (n, samples)."""
        lag = torch.arange(samples, dtype=torch.float64, device=self.log_length_scale.device)
        scale = self._log_scale().exp()[:, None]
        frequency = (-self.log_period).exp()[:, None] if self.periodic else 0.0
        return gp.correlation(self.kernel, lag, scale, frequency) + self.jitter * (lag == 0).to(lag)

    @torch.no_grad()
    def start_from(self, s: Tensor) -> None:
        """Take the likeliest of a grid of length-scales for each trajectory of s (n, T), and its strongest period."""
        samples = s.shape[1]
        if self.periodic:
            peaks = [max(gp.spectral_peak(x), 1 / samples) for x in s.cpu().numpy()]
            self.log_period.copy_(-torch.tensor(peaks, dtype=s.dtype).log())
        reach = (0.1, 2.0) if self.periodic else (1.0, max(2.0, samples / 3))
        grid = torch.logspace(math.log10(reach[0]), math.log10(reach[1]), SCALES, dtype=s.dtype)
        values = []
        for scale in grid:
            self.log_length_scale.fill_(math.log(float(scale)))
            values.append(-self.log_prob(s))
        self.log_length_scale.copy_(grid.log()[torch.stack(values).argmin(0).cpu()])

    def log_prob(self, s: Tensor) -> Tensor:
        if self.kernel in state_space.ORDERS and compiled("matern_filter"):
            return -state_space.negative_log_likelihood(s, self._log_scale(), self.kernel, self.jitter)
        return -gp.negative_log_likelihood(s, self.column(s.shape[-1]))

    def _log_scale(self) -> Tensor:
        return self.log_length_scale.clamp(math.log(0.05), math.log(1e6))

    def learned(self) -> dict[str, Tensor]:
        found = {"length_scales_": self.log_length_scale.exp()}
        return {**found, "periods_": self.log_period.exp()} if self.periodic else found


class GPVAE(VariationalSeparator):
    """Separation by a variational autoencoder with a Gaussian process prior per source.

    Wei: "Innovative blind source separation techniques combining Gaussian process algorithms and variational
    autoencoders" (2024) has the model. The likelihood and its gradient are exact, by Toeplitz solvers.

    Parameters
    ----------
    n_sources, mixing, init, n_init, posterior, beta, warm, mlp_units, block, learning_rate, max_iter, tol,
    random_state, device
        As ARFlowVAE's; init="auto" is SOBI's.
    kernel: "rbf", "matern12", "matern32", "matern52", "periodic" or "periodic12"
        Of all sources. The Matern kernels' likelihood takes O(T) (with numba), where the others take O(T^2), past
        16,000 samples O(T log T). The periodic ones are rbf and matern12 on a circle (`gp.correlation`): for sources
        that all repeat.
    jitter: float
        White part xi of the unit-variance processes.

    Attributes: as ARFlowVAE's, with length_scales_ (n_sources,) in samples instead of ar_coef_ and innovation_std_;
    with a periodic kernel they are shares of periods_ (n_sources,) in samples.
    """

    def __init__(
        self,
        n_sources: int | None = None,
        *,
        mixing: str = "linear",
        kernel: str = "rbf",
        jitter: float = 1e-2,
        init: str = "auto",
        n_init: int = 1,
        posterior: str = "gp",
        beta: float = 0.1,
        warm: float = 10.0,
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
        self.kernel = kernel
        self.jitter = jitter
        self.init = init
        self.n_init = n_init
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
        choose("kernel", self.kernel, gp.KERNELS)
        positive("jitter", self.jitter, zero=True)

    def _prior(self, sources: int) -> SourcePrior:
        return GPPrior(sources, self.kernel, self.jitter)
