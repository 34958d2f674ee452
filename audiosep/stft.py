"""Short-time Fourier transform whose inverse returns exactly as many samples as went in.

Frames are centred (reflection padding, zeros when a signal is shorter than half a window), windows are periodic.
With ``sqrt=True`` the square root of the Hann window is used for analysis and synthesis.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad


@lru_cache(maxsize=64)
def window(n_fft: int, sqrt: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Periodic Hann window (n_fft,), or its square root, cached by device and type."""
    hann = torch.hann_window(n_fft, periodic=True, device=device, dtype=dtype)
    return hann.sqrt() if sqrt else hann


def stft(x: Tensor, n_fft: int, hop_length: int, sqrt: bool = False) -> Tensor:
    """Transform x (..., N) to complex (..., n_fft // 2 + 1, 1 + ceil(N / hop_length)).

    Zeros are appended up to a whole hop, so that every sample lies between two frames' centres.
    """
    half = n_fft // 2
    flat = x.reshape(-1, x.shape[-1])
    flat = pad(flat, (0, -flat.shape[-1] % hop_length))
    mode = "reflect" if flat.shape[-1] > half else "constant"
    flat = pad(flat[:, None], (half, half), mode=mode)[:, 0]
    bins = torch.stft(
        flat,
        n_fft,
        hop_length,
        window=window(n_fft, sqrt, x.device, x.dtype),
        center=False,
        return_complex=True,
    )
    return bins.reshape(*x.shape[:-1], *bins.shape[-2:])


def istft(bins: Tensor, n_fft: int, hop_length: int, length: int, sqrt: bool = False) -> Tensor:
    """Invert :func:`stft`: bins (..., F, M) to a waveform (..., length)."""
    real = torch.float64 if bins.dtype == torch.complex128 else torch.float32
    wave = torch.istft(
        bins.reshape(-1, *bins.shape[-2:]),
        n_fft,
        hop_length,
        window=window(n_fft, sqrt, bins.device, real),
        center=True,
        length=length,
    )
    return wave.reshape(*bins.shape[:-2], length)
