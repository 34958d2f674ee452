"""A small network that gives every bin of a short-time spectrum Wiener's gain, for sound that is learned from scratch.

With X the STFT of the noisy signal, S an estimate of the clean signal's variance in every bin and s the noise's
standard deviation, the answer is the signal of S / (S + s^2) X. Convolutions over time estimate log S from log |X|^2
and s, so the phase never matters, and S = const is the exact denoiser of a stationary Gaussian. Where S stands for one
of several spectra it is that of their mixture.

The scale is that of the signals: they have RMS 1.

B items, T samples, F bins, M frames.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from audiosep.stft import istft, stft

EMBEDDING = 16  # numbers that say how strong the noise is


class Wiener(nn.Module):
    """Network of (x (B, T), noise (B,)) -> (B, T), for priors of the parameterisation "direct".

    Args:
        n_fft: window of the STFT in samples; frames start every half window.
        width: channels of the convolutions.
        depth: layers between the first and the last; their reach in time doubles from one to the next.
    """

    num_classes = 0
    parameterization = "direct"

    def __init__(self, n_fft: int = 256, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        if n_fft < 4 or n_fft % 2 or width < 1 or depth < 0:
            raise ValueError(f"n_fft is even and 4 at least, width 1 at least, got {n_fft}, {width}; depth not below 0")
        self.config: dict[str, Any] = {"n_fft": n_fft, "width": width, "depth": depth}
        self.n_fft, bins = n_fft, n_fft // 2 + 1
        self.into = nn.Conv1d(bins + EMBEDDING, width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 3, padding=2**i, dilation=2**i) for i in range(depth))
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(depth))
        self.out = nn.Conv1d(width, bins, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        spectrum = stft(x, self.n_fft, self.n_fft // 2, sqrt=True)
        variance = noise.square()[:, None, None]
        # White noise of variance 1 has n_fft / 2 in every bin, the window's energy.
        power = (spectrum.real.square() + spectrum.imag.square()) / (self.n_fft / 2)
        seen = torch.log(power / (1 + variance) + 1e-4) / 3 + 1
        h = self.into(torch.cat((seen, self._embedding(noise, seen)), 1))
        for norm, layer in zip(self.norms, self.layers):
            h = h + layer(silu(norm(h)))
        clean = torch.exp((self.out(silu(h)) - 1).clamp(-14, 10))
        gained = clean / (clean + variance) * spectrum
        return istft(gained, self.n_fft, self.n_fft // 2, x.shape[-1], sqrt=True)

    def _embedding(self, noise: Tensor, like: Tensor) -> Tensor:
        """Sinusoids (B, EMBEDDING, M) of log noise."""
        pitches = 0.3 * 1.5 ** torch.arange(EMBEDDING // 2, device=like.device, dtype=like.dtype)
        angle = noise.log()[:, None] * pitches
        return torch.cat((angle.sin(), angle.cos()), 1)[:, :, None].expand(-1, -1, like.shape[-1])
