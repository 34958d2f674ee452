"""Moment matching: the mixture enters through the denoiser, so no gradient of the priors is taken.

Given its noisy state alone, source k is approximately Gaussian with mean D_k = E[x_0,k | x_t,k] and covariance V_k.
Conditioning on y = sum_k x_k then moves the means onto the mixture:

    E[x_0,k | x_t, y] = D_k + V_k (sum_j V_j + sigma_y^2)^-1 (y - sum_j D_j).

By Tweedie's formula V_k = s^2 dD_k / dz_k. `MomentMatching` reads its diagonal in the time-frequency plane off the
denoiser's gain: where a linear denoiser answers D = M Z bin by bin, V = s^2 M. M^2 is estimated as the ratio of the
smoothed powers of D and Z. The answer adds up to the mixture at every step, and costs one forward pass.

That underestimates V where the denoiser doesn't know yet: the mean of many possible sounds is faint, though each of
them is loud. A source that is faint by chance would then get ever less, until another one holds the whole mixture. But
the level that a prior was trained at is known, and E|x_0|^2 = |D|^2 + tr V for every z: with p_k the source's power,
V_k is scaled up where its trace falls short of N p_k - |D_k|^2.

With several channels y = A x + noise and known A (C, K), the same is solved in every bin, with V = diag(s^2 M):

    E[x_0 | x_t, y] = D + V A^T (A V A^T + sigma_y^2)^-1 (y - A D).

François Rozet et al., "Learning Diffusion Priors from Observations by Expectation Maximization", 2024,
https://arxiv.org/abs/2405.13712, section 4 (moment matching posterior sampling).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from audiosep.mixing import around, residual, shares
from audiosep.prior import JointPrior
from audiosep.samplers.base import Noise, Sampler
from audiosep.stft import istft, stft

MOST = 100.0  # largest factor on a variance, where a denoiser answers next to nothing


class MomentMatching(Sampler):
    """Posterior sampling with variances per time-frequency bin.

    Args:
        prior: the K sources' priors.
        n_fft: STFT size of the variances.
        hop_length: its hop.
        smooth: bins and frames over which the powers are averaged.
        calibrate: scale the variances up to the power that the estimates lack of the priors'.
        mixing: (C, K) gains of the sources in the channels of y (B, C, N); None is the sum of the sources, y (B, N).
        noise: standard deviation of the channels' noise, where there is a mixing.
        steer: what else moves the estimates (B, K, N), and leaves their sum; it is given them and the noise, times
            full scale.
    """

    def __init__(
        self,
        prior: JointPrior,
        *,
        n_fft: int = 512,
        hop_length: int = 128,
        smooth: tuple[int, int] = (3, 3),
        calibrate: bool = True,
        mixing: Tensor | None = None,
        noise: float = 1e-3,
        steer: Callable[[Tensor, float], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(prior, **options)
        self.steer = steer
        self.n_fft, self.hop_length, self.smooth, self.calibrate = n_fft, hop_length, smooth, calibrate
        self.mixing, self.noise = mixing, noise

    def start(self, y: Tensor, noise: Noise) -> Tensor:
        """The initial state (B, K, N); with a mixing, around the sources that fit the channels best."""
        if self.mixing is None:
            return super().start(y, noise)
        x = torch.linalg.pinv(self.mixing.to(y)) @ y
        return self.initial_alpha * (x + self.initial_ratio * noise(len(self.prior), y))

    def denoise(self, x_t: Tensor, y: Tensor, i: int) -> Tensor:
        """E[x_0 | x_t, y] (B, K, N)."""
        estimate = super().denoise(x_t, y, i)
        variance = self.ratios[i] ** 2 * self.gain(x_t / self.alphas[i], estimate)
        if self.calibrate:
            variance = self._calibrated(variance, estimate)
        if self.mixing is not None:
            return estimate + self._moved(estimate, variance, y)
        left = stft(residual(y, estimate), self.n_fft, self.hop_length)
        moved = istft(shares(variance) * left[:, None], self.n_fft, self.hop_length, y.shape[-1])
        estimate = estimate + moved
        return estimate if self.steer is None else self.steer(estimate, self.ratios[i])

    def _moved(self, estimate: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        """V A^T (A V A^T + sigma_y^2)^-1 (y - A D), bin by bin, (B, K, N)."""
        a = self.mixing.to(y)  # type: ignore[union-attr]
        left = torch.view_as_real(stft(y - a @ estimate, self.n_fft, self.hop_length)).movedim(1, 3)  # (B, F, M, C, 2)
        back = variance.movedim(1, -1)[..., None] * a.T  # (B, F, M, K, C)
        noise = self.noise**2 * torch.eye(len(a), dtype=y.dtype, device=y.device)
        moved = back @ torch.linalg.solve(a @ back + noise, left)
        return istft(torch.view_as_complex(moved.movedim(3, 1).contiguous()), self.n_fft, self.hop_length, y.shape[-1])

    def _calibrated(self, variance: Tensor, estimate: Tensor) -> Tensor:
        """Variances (B, K, F, M) whose mean is at least what the estimates (B, K, N) lack of the priors' power."""
        # Filled in place of copied: the loop doesn't wait for the device.
        power = torch.stack([estimate.new_full((), power) for power in self.prior.power])
        lack = (power - estimate.square().mean(-1)).clamp(min=0)
        return variance * (lack / variance.mean((-1, -2))).clamp(1.0, MOST)[..., None, None]

    def gain(self, noisy: Tensor, estimate: Tensor) -> Tensor:
        """Magnitude of the denoiser's gain per bin (B, K, F, M)."""
        powers = stft(torch.stack((estimate, noisy)), self.n_fft, self.hop_length).abs().square()
        out, into = around(powers, *self.smooth)
        return (out / (into + 1e-20)).clamp(1e-8, 1.0).sqrt()
