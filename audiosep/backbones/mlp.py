"""A perceptron for short vectors: points on a curve, small pictures.

The input and sinusoids of the noise level go through `depth` layers of Linear, SiLU and layer normalisation. A longer
signal is cut into vectors that know nothing of each other; the last is filled up with zeros.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad, silu


class MLP(nn.Module):
    """Network of (x_t (B, T), t (B,)) -> (B, T).

    Args:
        dim: numbers of a vector.
        width: of the hidden layers.
        depth: how many of them.
        embedding: sinusoids of the noise level.
        period: steps of the schedule after which the slowest of them would repeat; the fastest has 2 pi steps.
    """

    num_classes = 0

    def __init__(self, dim: int, width: int = 256, depth: int = 3, embedding: int = 64, period: float = 6e4) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "dim": dim, "width": width, "depth": depth, "embedding": embedding, "period": period
        }  # fmt: skip
        self.dim, self.embedding, self.period = dim, embedding, period
        sizes = [dim + embedding] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(width, dim)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if x_t.shape[-1] != self.dim:
            rows = pad(x_t, (0, -x_t.shape[-1] % self.dim)).unflatten(-1, (-1, self.dim))
            flat = self(rows.flatten(0, 1), t.repeat_interleave(rows.shape[1]))
            return flat.view(len(x_t), -1)[:, : x_t.shape[-1]]
        half = self.embedding // 2
        exponent = torch.arange(half, device=x_t.device, dtype=x_t.dtype) / max(1, half - 1)
        angle = t[:, None] * torch.exp(-math.log(self.period / (2 * math.pi)) * exponent)
        h = torch.cat((x_t, angle.sin(), angle.cos()), -1)
        for layer in self.layers:
            h = silu(layer(h))
            h = layer_norm(h, h.shape[-1:])
        return self.out(h)
