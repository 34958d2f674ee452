"""Short-time Fourier transform whose inverse returns exactly as many samples as went in.

Frames are centred (reflection padding, zeros when a signal is shorter than half a window), windows are periodic.
With ``sqrt=True`` the square root of the Hann window is used for analysis and synthesis.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import fold, pad


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # whoever asks first, others may want gradients
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
    """Invert :func:`stft`: bins (..., F, M) to a waveform (..., length).

    `torch.istft` looks at its window's envelope on the host at every call, which would make the loop wait for the
    device; here the envelope is cached.
    """
    real = torch.float64 if bins.dtype == torch.complex128 else torch.float32
    taper = window(n_fft, sqrt, bins.device, real)
    # Along the last dimension: along another, torch 2.11 compiles a gradient that fails, as it expects other strides.
    frames = torch.fft.irfft(bins.flatten(0, -3).mT, n=n_fft) * taper  # (B, M, n_fft)
    wave = overlap_add(frames.mT, hop_length) / envelope(bins.shape[-1], n_fft, hop_length, sqrt, bins.device, real)
    half = n_fft // 2
    return wave[:, half : half + length].reshape(*bins.shape[:-2], length)


def overlap_add(frames: Tensor, hop_length: int) -> Tensor:
    """Add frames (B, n, M) that start every `hop_length` samples to (B, n + (M - 1) hop_length)."""
    size, count = frames.shape[-2:]
    total = size + (count - 1) * hop_length
    return fold(frames, (1, total), (1, size), stride=(1, hop_length))[:, 0, 0]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def envelope(count: int, n_fft: int, hop_length: int, sqrt: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sum of `count` squared windows (1, n_fft + (count - 1) hop_length); one where no window reaches."""
    taper = window(n_fft, sqrt, device, dtype)
    total = overlap_add((taper**2)[None, :, None].expand(1, n_fft, count), hop_length)
    return torch.where(total > 1e-11, total, 1.0)
