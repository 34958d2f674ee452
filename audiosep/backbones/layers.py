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
def rotary_angles(length: int, dim: int, device: torch.device) -> Tensor:
    """Angles (length, dim / 2) of rotary position embedding, theta 1e4, for interleaved pairs of channels."""
    # Made where it is used: a compiled block then holds no copy from another device.
    frequency = 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    return torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency


def rotate(x: Tensor) -> Tensor:
    """Turn q or k (..., length, dim) by its position."""
    angle = rotary_angles(x.shape[-2], x.shape[-1], x.device)
    pair = x.unflatten(-1, (-1, 2))
    if x.device.type == "cpu":  # one pass over the memory
        pair = torch.view_as_complex(pair.float().contiguous())
        return torch.view_as_real(pair * torch.polar(torch.ones_like(angle), angle)).flatten(-2).to(x.dtype)
    # Elsewhere torch.compile fuses this, and no complex numbers.
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    turned = (pair[..., 0] * cos - pair[..., 1] * sin, pair[..., 1] * cos + pair[..., 0] * sin)
    return torch.stack(turned, dim=-1).flatten(-2)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q, k, v (B, H, L, d)."""
    if q.device.type != "cpu":
        return scaled_dot_product_attention(q, k, v)
    # On a CPU its backward pass in bfloat16 takes seven times as long as in float32.
    with torch.autocast("cpu", enabled=False):
        return scaled_dot_product_attention(q.float(), k.float(), v.float()).to(v.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions, over tokens (B, L, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % (2 * heads):
            raise ValueError(f"{dim} channels can't be shared by {heads} heads, an even number each")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, L, d)
        q, k, v = qkv.unbind(0)
        return self.out(attended(rotate(q), rotate(k), v).transpose(1, 2).flatten(-2))


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
