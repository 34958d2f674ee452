"""DiffWave: gated dilated convolutions on the waveform, in UnDiff's large form with squeeze-and-excitation.

    h = ReLU(conv(x_t));  L layers:  (a, b) = dilated conv(h + W e),  (r, s) = conv(sigmoid(a) tanh(b)),
    h <- (h + r) / sqrt 2,  skip += SE(s);  output = conv(ReLU(conv(skip / sqrt L)))

with e the embedding of the step and SE(s) = s * sigmoid(W_2 ReLU(W_1 mean_n s)). Zhifeng Kong, Wei Ping, Jiaji Huang,
Kexin Zhao, Bryan Catanzaro, "DiffWave: A Versatile Diffusion Model for Audio Synthesis", 2020,
https://arxiv.org/abs/2009.09761; Anastasiia Iashchenko et al., "UnDiff: Unsupervised Voice Restoration with
Unconditional Diffusion Model", 2023, https://arxiv.org/abs/2306.00721. UnDiff embeds log10 beta_t by random Fourier
features, DiffWave the step itself by sinusoids, with as many weights: here it is the step, as for the other backbones.

B items, N samples, C channels, E embedding size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from audiosep.errors import at_least

SINUSOIDS = 128
EMBEDDING = 512


class StepEmbedding(nn.Module):
    """Sinusoids of t * 10^(4 j / 63), j = 0..63, then two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(SINUSOIDS, EMBEDDING)
        self.second = nn.Linear(EMBEDDING, EMBEDDING)

    def forward(self, t: Tensor) -> Tensor:
        """Embed t (B,) as (B, E)."""
        half = SINUSOIDS // 2
        exact = torch.float32 if t.device.type == "mps" else torch.float64  # angles up to 2e6 are beyond float32
        frequency = 10 ** (4 / (half - 1) * torch.arange(half, dtype=exact, device=t.device))
        angle = t.to(exact)[:, None] * frequency
        sinusoids = torch.cat((angle.sin(), angle.cos()), dim=-1)
        return silu(self.second(silu(self.first(sinusoids.to(self.first.weight.dtype)))))


class SqueezeExcitation(nn.Module):
    """Scales channels (B, C, N) by gates computed from their means over time."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction, bias=False)
        self.excite = nn.Linear(channels // reduction, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(torch.relu(self.squeeze(x.mean(-1)))).sigmoid()
        return x * gate[..., None]


class Layer(nn.Module):
    """One residual layer: (B, C, N) to the next state and its share of the output."""

    def __init__(self, channels: int, dilation: int, reduction: int | None) -> None:
        super().__init__()
        self.step = nn.Linear(EMBEDDING, channels)
        self.dilated = nn.Conv1d(channels, 2 * channels, 3, padding=dilation, dilation=dilation)
        self.out = nn.Conv1d(channels, 2 * channels, 1)
        self.gate = SqueezeExcitation(channels, reduction) if reduction else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.dilated(h + self.step(embedding)[..., None]).chunk(2, dim=1)
        rest, skip = self.out(a.sigmoid() * b.tanh()).chunk(2, dim=1)
        return (h + rest) / math.sqrt(2), self.gate(skip)


class DiffWave(nn.Module):
    """UnDiff's network at its default arguments: 32,307,201 parameters, a context of 32,761 samples.

    DiffWave's own unconditional network has 36 layers without squeeze-and-excitation (24,034,305 parameters), its
    vocoders 64 or 128 channels, 30 layers and a cycle of 10.

    Args:
        num_classes: classes of the embedding table, whose last row is the null class; 0 for no table.
        channels: C.
        layers: L.
        cycle: dilations are 1, 2, 4, ... 2^(cycle - 1), and again.
        reduction: of the squeeze-and-excitation on the skip branch; None for none.
        checkpointing: recompute activations in the backward pass (less memory, a third more time).
    """

    def __init__(
        self,
        num_classes: int = 0,
        channels: int = 256,
        layers: int = 48,
        cycle: int = 12,
        reduction: int | None = 16,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, channels=channels, layers=layers, cycle=cycle)
        if reduction and channels // reduction < 1:
            raise ValueError(f"{channels} channels can't be squeezed by {reduction}")
        self.config = {
            "num_classes": num_classes,
            "channels": channels,
            "layers": layers,
            "cycle": cycle,
            "reduction": reduction,
        }
        self.num_classes, self.checkpointing = num_classes, checkpointing
        self.embedding = StepEmbedding()
        self.class_embeddings = nn.ModuleList([nn.Embedding(num_classes + 1, EMBEDDING)] if num_classes else [])
        self.stem = nn.Conv1d(1, channels, 1)
        self.layers = nn.ModuleList(Layer(channels, 2 ** (i % cycle), reduction) for i in range(layers))
        self.head = nn.Conv1d(channels, channels, 1)
        self.out = nn.Conv1d(channels, 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.out.weight)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Map noisy waveforms to the network's estimate.

        Args:
            x_t: (B, N), any N >= 1.
            t: (B,) step of the noise schedule, 0..T-1; need not be whole.
            label: (B,) class numbers; None is the null class for all.

        Returns:
            (B, N).
        """
        embedding = self.embedding(t)
        for table in self.class_embeddings:
            null = torch.full(t.shape, self.num_classes, device=t.device, dtype=torch.long)
            embedding = embedding + table(null if label is None else label)
        h = torch.relu(self.stem(x_t[:, None].to(self.stem.weight.dtype)))
        total = torch.zeros_like(h)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                h, skip = checkpoint(layer, h, embedding, use_reentrant=True)
            else:
                h, skip = layer(h, embedding)
            total = total + skip
        h = torch.relu(self.head(total / math.sqrt(len(self.layers))))
        return self.out(h)[:, 0].to(x_t.dtype)
