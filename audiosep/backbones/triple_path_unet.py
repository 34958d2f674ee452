"""Triple-path attention U-Net on the complex spectrogram.

A noisy waveform x_t (B, N) becomes a spectrogram (B, 2, F, M), goes through a U-Net of three resolutions whose blocks
attend along frequency within each frame (intra-frame), along time within each frequency (intra-frequency) and, at the
coarsest resolution, across whole frames (global-temporal), and comes back as a waveform (B, N).

Runwu Shi et al., "Unsupervised Single-Channel Audio Separation with Diffusion Source Priors", AAAI 2026,
https://arxiv.org/abs/2512.07226, section "Model Architecture Design". Letters: B items, N samples, F bins, M frames,
C channels, E embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle
from torch.utils.checkpoint import checkpoint

from audiosep.backbones.layers import (
    Attention,
    FeedForward,
    Modulation,
    TimeEmbedding,
    gated,
    norm,
)
from audiosep.errors import at_least
from audiosep.stft import istft, stft

FOLD = 4  # adjacent frequency bins that share a token of global-temporal attention


class PathAttention(nn.Module):
    """Attention along the last-but-one axis of tokens (B, R, L, C): each of the R rows is one sequence."""

    def __init__(self, dim: int, heads: int, condition_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, 2 * dim)
        self.attention = Attention(dim, heads)
        self.feed_forward = FeedForward(dim)
        self.modulation = Modulation(condition_dim, dim, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(condition)
        h = norm(gated(self.gate(norm(x)))) * (1 + scale_a) + shift_a
        h = self.attention(h.flatten(0, 1)).unflatten(0, x.shape[:2])
        x = x + gate_a * h
        return x + gate_f * self.feed_forward(norm(x) * (1 + scale_f) + shift_f)


class GlobalTemporalAttention(nn.Module):
    """Attention between whole frames: a frame's F / 4 groups of bins, `squeeze` channels each, form one token.

    The published network normalises after the gate, which cancels the gate's scale; `gate_last` puts it behind.
    """

    def __init__(self, dim: int, heads: int, condition_dim: int, bins: int, squeeze: int, gate_last: bool) -> None:
        super().__init__()
        self.squeeze, self.gate_last = squeeze, gate_last
        token = squeeze * bins // FOLD
        self.fold = nn.Linear(FOLD * dim, 2 * squeeze)
        self.unfold = nn.Conv2d(squeeze, FOLD * dim, (3, 1), padding=(1, 0))
        self.attention = Attention(token, heads)
        self.feed_forward = FeedForward(dim)
        self.attention_modulation = Modulation(condition_dim, token, 3)
        self.feed_forward_modulation = Modulation(condition_dim, dim, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        batch, frames, bins, dim = x.shape
        shift, scale, gate = self.attention_modulation(condition)
        groups = norm(x).reshape(batch, frames, bins // FOLD, FOLD, dim).transpose(-1, -2).flatten(-2)
        tokens = gated(self.fold(groups)).transpose(-1, -2).flatten(-2)  # (B, M, squeeze * groups)
        h = norm(tokens) * (1 + scale[:, 0]) + shift[:, 0]
        h = self.attention(h)
        h = norm(h) * gate[:, 0] if self.gate_last else norm(h * gate[:, 0])
        h = h.reshape(batch, frames, self.squeeze, -1).permute(0, 2, 3, 1)  # (B, squeeze, groups, M)
        h = self.unfold(h).permute(0, 3, 2, 1)  # (B, M, groups, FOLD * C)
        x = x + h.unflatten(-1, (dim, FOLD)).transpose(-1, -2).reshape(x.shape)
        shift, scale, gate = self.feed_forward_modulation(condition)
        return x + gate * self.feed_forward(norm(x) * (1 + scale) + shift)


class Block(nn.Module):
    """[Global-temporal,] intra-frame, then intra-frequency attention on tokens (B, M, F, C)."""

    def __init__(self, dim: int, heads: int, condition_dim: int, global_path: GlobalTemporalAttention | None) -> None:
        super().__init__()
        self.global_temporal = global_path
        self.intra_frame = PathAttention(dim, heads, condition_dim)
        self.intra_frequency = PathAttention(dim, heads, condition_dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if self.global_temporal is not None:
            x = self.global_temporal(x, condition)
        x = self.intra_frame(x, condition)
        return self.intra_frequency(x.transpose(1, 2), condition).transpose(1, 2)


class Resample(nn.Module):
    """Halve (`down`) or double both axes of (B, M, F, C) by a 3x3 convolution and a pixel shuffle."""

    def __init__(self, dim: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(dim, dim // 2 if down else 2 * dim, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.permute(0, 3, 2, 1))
        h = pixel_unshuffle(h, 2) if self.down else pixel_shuffle(h, 2)
        return h.permute(0, 3, 2, 1)


class TriplePathUNet(nn.Module):
    """The published network at its default arguments (37,243,376 parameters with 50 classes).

    Args:
        num_classes: classes of the embedding table; row `num_classes` is the null class.
        width: channels C at the finest resolution (72 in the paper).
        depth: blocks per stage: encoder 1, encoder 2, latent, decoder 2, decoder 1.
        heads: attention heads.
        condition_dim: size E of the step and class embeddings (128).
        squeeze: channels per group of bins in global-temporal attention (16, "suppressed channel").
        n_fft: STFT size; n_fft / 2 + 1 bins and n_fft / 2 hop (510, hop 255), square-root Hann.
        patch: bins and frames that one token covers at the finest resolution; (1, 1) in the paper.
        head: "direct" returns the decoded spectrogram, "mask" a complex mask of magnitude below one times the input,
            whose log-magnitudes are then a further input feature.
        adaln_zero: new models start as the identity and gate after the norm. False is what the published code does:
            its zero initialisation is overwritten, and the gate of global-temporal attention stands before a norm.
        time_scale: factor on the step t before its embedding: the published network is fed t * 1000 / T.
        checkpointing: recompute activations in the backward pass (less memory, a third more time).
    """

    def __init__(
        self,
        num_classes: int = 50,
        width: int = 72,
        depth: Sequence[int] = (2, 4, 8, 4, 2),
        heads: int = 4,
        condition_dim: int = 128,
        squeeze: int = 16,
        n_fft: int = 510,
        patch: Sequence[int] = (1, 1),
        head: str = "direct",
        adaln_zero: bool = False,
        time_scale: float = 5.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if head not in ("direct", "mask"):
            raise ValueError(f"head is 'direct' or 'mask', not {head!r}")
        at_least(1, width=width, heads=heads, condition_dim=condition_dim, squeeze=squeeze)
        at_least(0, num_classes=num_classes)
        if width % 2:
            raise ValueError(f"width is even, not {width}")
        if len(depth) != 5 or len(patch) != 2 or min(*depth, *patch) < 1:
            raise ValueError(f"depth is five numbers and patch two, at least 1 each, not {depth} and {patch}")
        bins = n_fft // 2 + 1
        if bins % (4 * FOLD * patch[0]):
            raise ValueError(f"{bins} bins (n_fft {n_fft}) are not a multiple of {4 * FOLD * patch[0]}")
        self.config = {
            "num_classes": num_classes,
            "width": width,
            "depth": list(depth),
            "heads": heads,
            "condition_dim": condition_dim,
            "squeeze": squeeze,
            "n_fft": n_fft,
            "patch": list(patch),
            "head": head,
            "adaln_zero": adaln_zero,
            "time_scale": time_scale,
        }
        self.num_classes, self.n_fft, self.patch = num_classes, n_fft, (patch[0], patch[1])
        self.head, self.time_scale, self.checkpointing = head, time_scale, checkpointing

        def stage(level: int, count: int, latent: bool = False) -> nn.ModuleList:
            dim = width * 2**level
            rows = bins // patch[0] // 2**level

            def block() -> Block:
                path = GlobalTemporalAttention(dim, heads, condition_dim, rows, squeeze, adaln_zero) if latent else None
                return Block(dim, heads, condition_dim, path)

            return nn.ModuleList(block() for _ in range(count))

        self.time_embeddings = nn.ModuleList(TimeEmbedding(condition_dim) for _ in range(6))
        self.class_embeddings = nn.ModuleList(nn.Embedding(num_classes + 1, condition_dim) for _ in range(5))
        features = 3 if head == "mask" else 2
        if self.patch == (1, 1):
            self.stem = nn.Conv2d(features, width, 3, padding=1, bias=False)
        else:
            self.stem = nn.Conv2d(features, width, self.patch, stride=self.patch, bias=False)
        self.encoder_1 = stage(0, depth[0])
        self.down_1 = Resample(width, down=True)
        self.encoder_2 = stage(1, depth[1])
        self.down_2 = Resample(2 * width, down=True)
        self.latent = stage(2, depth[2], latent=True)
        self.up_2 = Resample(4 * width, down=False)
        self.merge_2 = nn.Linear(4 * width, 2 * width)
        self.decoder_2 = stage(1, depth[3])
        self.up_1 = Resample(2 * width, down=False)
        self.merge_1 = nn.Linear(2 * width, width)
        self.decoder_1 = stage(0, depth[4])
        self.head_conv = nn.Conv2d(width, width, 3, padding=1)
        self.head_modulation = Modulation(condition_dim, width, 2)
        if self.patch == (1, 1):
            self.head_out: nn.Module = nn.Conv2d(width, 2, 3, padding=1, bias=False)
        else:
            self.head_out = nn.ConvTranspose2d(width, 2, self.patch, stride=self.patch, bias=False)
        self._initialise(adaln_zero)

    def _initialise(self, adaln_zero: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                # Classes of 0.02, as published, are drowned by the step's embedding, which is near 1: after 4,000 steps
                # of a small run the network still did not listen to them.
                nn.init.normal_(module.weight, std=0.5 if adaln_zero else 0.02)
        if adaln_zero:
            for module in self.modules():
                if isinstance(module, Modulation):
                    nn.init.zeros_(module.linear.weight)
            assert isinstance(self.head_out.weight, Tensor)
            nn.init.zeros_(self.head_out.weight)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Map noisy waveforms to the network's estimate (the noise, for the published weights).

        Args:
            x_t: (B, N), any N >= 1.
            t: (B,) step of the noise schedule, 0..T-1; need not be whole.
            label: (B,) class numbers; None is the null class for all.

        Returns:
            (B, N).
        """
        if label is None:
            label = torch.full(t.shape, self.num_classes, device=t.device, dtype=torch.long)
        step = t * self.time_scale
        times = [embedding(step) for embedding in self.time_embeddings]
        conditions = [time + table(label) for time, table in zip(times, self.class_embeddings)]

        hop = self.n_fft // 2
        multiple = 4 * self.patch[1]
        frames = math.ceil((math.ceil(x_t.shape[-1] / hop) + 1) / multiple) * multiple
        padded = pad(x_t, (0, frames * hop - x_t.shape[-1])).float()
        spectrum = stft(padded, self.n_fft, hop, sqrt=True)[..., :frames]

        h = self.stem(self._features(spectrum).to(self.stem.weight.dtype)).permute(0, 3, 2, 1)  # (B, M, F, C)
        skip_1 = self._stage(self.encoder_1, h, conditions[0])
        skip_2 = self._stage(self.encoder_2, self.down_1(skip_1), conditions[1])
        h = self._stage(self.latent, self.down_2(skip_2), conditions[2])
        h = self.merge_2(torch.cat((self.up_2(h), skip_2), dim=-1))
        h = self._stage(self.decoder_2, h, conditions[3])
        h = self.merge_1(torch.cat((self.up_1(h), skip_1), dim=-1))
        h = self._stage(self.decoder_1, h, conditions[4])
        h = self.head_conv(h.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
        shift, scale = self.head_modulation(times[5])
        h = self.head_out((norm(h) * (1 + scale) + shift).permute(0, 3, 2, 1)).float()  # (B, 2, F, M)
        estimate = torch.complex(h[:, 0].contiguous(), h[:, 1].contiguous())
        if self.head == "mask":
            estimate = estimate / (1 + h.square().sum(1).add(1e-12).sqrt()) * spectrum
        return istft(estimate, self.n_fft, hop, x_t.shape[-1], sqrt=True)

    def _features(self, spectrum: Tensor) -> Tensor:
        parts = torch.view_as_real(spectrum).permute(0, 3, 1, 2)
        if self.head == "direct":
            return parts
        # Unit white noise has a standard deviation of about 11.3 per part; the log-magnitude shows weak partials.
        power = parts.square().sum(1, keepdim=True)
        return torch.cat((parts / self.n_fft**0.5, 0.25 * torch.log(power / self.n_fft + 1e-5)), dim=1)

    def _stage(self, blocks: nn.ModuleList, x: Tensor, condition: Tensor) -> Tensor:
        for block in blocks:
            if self.checkpointing and torch.is_grad_enabled():
                # The other variant keeps three times the memory here. This one asks for backward() instead of grad().
                x = checkpoint(block, x, condition, use_reentrant=True)
            else:
                x = block(x, condition)
        return x
