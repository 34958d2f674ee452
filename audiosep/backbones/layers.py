"""Building blocks of the triple-path U-Net: rotary attention, gated linear units, embeddings.

Everything works on channels-last tokens, (..., sequence, channels), so that a 1x1 convolution is a `Linear`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu


def norm(x: Tensor) -> Tensor:
    """Layer normalisation over the channels, without learned scale."""
    return layer_norm(x, x.shape[-1:], eps=1e-6)


def gated(x: Tensor) -> Tensor:
    """Swish-gated linear unit: halve the channels of x (..., 2 C) to value * SiLU(gate) (..., C)."""
    value, gate = x.chunk(2, dim=-1)
    return value * silu(gate)


@lru_cache(maxsize=64)
def rotary_table(length: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, dim) of rotary position embedding, theta 1e4, interleaved pairs."""
    # Made where it is used: a compiled block then holds no copy from another device.
    frequency = 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
    angle = angle.repeat_interleave(2, dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor) -> Tensor:
    """Turn q or k (..., length, dim) by its position."""
    cos, sin = rotary_table(x.shape[-2], x.shape[-1], x.device, x.dtype)
    pair = x.unflatten(-1, (-1, 2))
    turned = torch.stack((-pair[..., 1], pair[..., 0]), dim=-1).flatten(-2)
    return x * cos + turned * sin


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions, over tokens (B, L, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, L, d)
        q, k, v = qkv.unbind(0)
        mixed = scaled_dot_product_attention(rotate(q), rotate(k), v)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """Gated feed-forward layer C -> 4 C -> 2 C -> C."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(gated(self.expand(x)))


class Modulation(nn.Module):
    """Shifts, scales and gates computed from the conditioning vector (AdaLN; Peebles and Xie 2023)."""

    def __init__(self, condition_dim: int, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(condition_dim, parts * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Map condition (B, E) to `parts` tensors (B, 1, 1, dim)."""
        return self.linear(silu(condition))[:, None, None].chunk(self.parts, dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of the (scaled) step, then a two-layer perceptron."""

    def __init__(self, dim: int, n_sinusoids: int = 256) -> None:
        super().__init__()
        self.n_sinusoids = n_sinusoids
        self.first = nn.Linear(n_sinusoids, dim)
        self.second = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """Embed t (B,) as (B, dim)."""
        half = self.n_sinusoids // 2
        frequency = torch.exp(-math.log(1e4) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angle = t.float()[:, None] * frequency
        sinusoids = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return self.second(silu(self.first(sinusoids.to(self.first.weight.dtype))))
