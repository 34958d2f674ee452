"""Moment matching: the mixture enters through the denoiser, so no gradient is taken.

Given its noisy state alone, source k is approximately Gaussian with mean D_k = E[x_0,k | x_t,k] and covariance V_k.
Conditioning on y = sum_k x_k then moves the means onto the mixture:

    E[x_0,k | x_t, y] = D_k + V_k (sum_j V_j + sigma_y^2)^-1 (y - sum_j D_j).

By Tweedie's formula V_k = s^2 dD_k / dz_k. `MomentMatching` reads its diagonal in the time-frequency plane off the
denoiser's gain: where a linear denoiser answers D = M Z bin by bin, V = s^2 M. M^2 is estimated as the ratio of the
smoothed powers of D and Z. The answer adds up to the mixture at every step, and costs one forward pass.

François Rozet et al., "Learning Diffusion Priors from Observations by Expectation Maximization", 2024,
https://arxiv.org/abs/2405.13712, section 4 (moment matching posterior sampling).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from audiosep.mixing import residual, shares
from audiosep.prior import JointPrior
from audiosep.samplers.base import Sampler
from audiosep.stft import istft, stft


class MomentMatching(Sampler):
    """Posterior sampling with variances per time-frequency bin.

    Args:
        prior: the K sources' priors.
        n_fft: STFT size of the variances.
        hop_length: its hop.
        smooth: bins and frames over which the powers are averaged.
        power: exponent on the gain.
    """

    def __init__(
        self,
        prior: JointPrior,
        *,
        n_fft: int = 512,
        hop_length: int = 128,
        smooth: tuple[int, int] = (3, 3),
        power: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(prior, **options)
        self.n_fft, self.hop_length, self.smooth, self.power = n_fft, hop_length, smooth, power

    def denoise(self, x_t: Tensor, y: Tensor, i: int) -> Tensor:
        """E[x_0 | x_t, y] (B, K, N)."""
        estimate = super().denoise(x_t, y, i)
        variance = self.gain(x_t / self.alphas[i], estimate) ** self.power
        left = stft(residual(y, estimate), self.n_fft, self.hop_length)
        moved = istft(shares(variance) * left[:, None], self.n_fft, self.hop_length, y.shape[-1])
        return estimate + moved

    def gain(self, noisy: Tensor, estimate: Tensor) -> Tensor:
        """Magnitude of the denoiser's gain per bin (B, K, F, M)."""
        powers = stft(torch.stack((estimate, noisy)), self.n_fft, self.hop_length).abs().square()
        rows, columns = self.smooth
        out, into = avg_pool2d(
            powers.flatten(0, 2)[:, None],
            self.smooth,
            stride=1,
            padding=(rows // 2, columns // 2),
            count_include_pad=False,
        ).view(powers.shape)
        return (out / (into + 1e-20)).clamp(1e-8, 1.0).sqrt()
