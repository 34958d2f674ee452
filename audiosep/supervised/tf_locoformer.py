"""TF-Locoformer: attention and convolutional feed-forward layers along frequency, then along time.

The spectrogram of the mixture (B, 2, M, F) becomes D features per bin; N blocks of two paths follow, and a last
convolution gives the K spectrograms themselves, without a mask. Along the axis of a path

    x <- x + FFN_1(norm(x));  x <- x + Attention(norm(x));  x <- x + FFN_2(norm(x))

where FFN(h) = deconv(a * SiLU(b)), (a, b) = conv(h), with kernels of a few neighbouring bins or frames.
Kohei Saijo, Gordon Wichern, Francois G. Germain, Zexu Pan, Jonathan Le Roux, "TF-Locoformer: Transformer with Local
Modeling by Convolution for Speech Separation and Enhancement", IWAENC 2024, https://arxiv.org/abs/2408.03440. The
paper halves the FFN branches, its published weights don't; here they are not halved.

B items, K sources, N samples, M frames, F bins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, silu

from audiosep.backbones.layers import rotate
from audiosep.errors import UsageError, at_least
from audiosep.stft import istft, stft


class RMSGroupNorm(nn.Module):
    """Each of `groups` parts of a bin's features over (its RMS + eps), times a gain per feature."""

    def __init__(self, dim: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.float().unflatten(-1, (self.groups, -1))
        rms = parts.square().mean(-1, keepdim=True).sqrt()
        return (parts / (rms + self.eps)).flatten(-2) * self.gain


class ConvFeedForward(nn.Module):
    """Conv-SwiGLU on sequences (S, L, dim): each output sees 2 kernel - 1 neighbours at stride 1."""

    def __init__(self, dim: int, hidden: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.expand = nn.Conv1d(dim, 2 * hidden, kernel, stride)
        self.contract = nn.ConvTranspose1d(hidden, dim, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        length, edge = x.shape[1], self.kernel - self.stride
        right = edge + -(length + 2 * edge - self.kernel) % self.stride  # so that the strides come out even
        value, gate = self.expand(pad(x.transpose(1, 2), (edge, right))).chunk(2, dim=1)
        return self.contract(value * silu(gate))[..., edge : edge + length].transpose(1, 2)


class RotaryAttention(nn.Module):
    """Multi-head self-attention on sequences (S, L, dim), of `inner` features in all, without biases."""

    def __init__(self, dim: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (S, heads, L, d) each
        mixed = scaled_dot_product_attention(rotate(q), rotate(k), v)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Path(nn.Module):
    """One path of a block, on (B, R, L, dim): each of the R rows is a sequence."""

    def __init__(self, dim: int, inner: int, heads: int, groups: int, hidden: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSGroupNorm(dim, groups) for _ in range(3))
        self.before = ConvFeedForward(dim, hidden, kernel, stride)
        self.attention = RotaryAttention(dim, inner, heads)
        self.after = ConvFeedForward(dim, hidden, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(0, 1)
        for norm, layer in zip(self.norms, (self.before, self.attention, self.after)):
            h = h + layer(norm(h))
        return h.unflatten(0, x.shape[:2])


class Block(nn.Module):
    """A path along frequency and one along time, on (B, M, F, dim)."""

    def __init__(self, *arguments: int) -> None:
        super().__init__()
        self.frequency, self.time = Path(*arguments), Path(*arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.time(self.frequency(x).transpose(1, 2)).transpose(1, 2)


class TFLocoformer(nn.Module):
    """Waveforms (B, N) at unit RMS to sources (B, K, N).

    | size | blocks | width | attention | hidden | parameters, K = 2 | K = 3 |
    |---|---|---|---|---|---|---|
    | S | 4 | 96 | 128 | 256 | 5,129,316 | 5,131,046 |
    | M (the defaults) | 6 | 128 | 128 | 384 | 14,975,620 | 14,977,926 |

    Args:
        n_sources: K.
        blocks: N.
        width: features D per bin.
        attention: features of queries, keys and values, over all heads.
        heads: their number.
        groups: of the normalisation.
        hidden: channels H of the feed-forward layers.
        kernel: taps of their convolutions.
        stride: of their convolutions.
        n_fft: STFT size; 16 ms at 16000 Hz.
        hop_length: its hop.
    """

    def __init__(
        self,
        n_sources: int = 2,
        blocks: int = 6,
        width: int = 128,
        attention: int = 128,
        heads: int = 4,
        groups: int = 4,
        hidden: int = 384,
        kernel: int = 4,
        stride: int = 1,
        n_fft: int = 256,
        hop_length: int = 128,
    ) -> None:
        super().__init__()
        self.config = {
            "n_sources": n_sources,
            "blocks": blocks,
            "width": width,
            "attention": attention,
            "heads": heads,
            "groups": groups,
            "hidden": hidden,
            "kernel": kernel,
            "stride": stride,
            "n_fft": n_fft,
            "hop_length": hop_length,
        }
        at_least(1, **self.config)
        if width % groups or attention % (2 * heads) or stride > kernel:
            raise UsageError(
                f"width {width} is a multiple of the {groups} groups, attention {attention} of twice the {heads} heads,"
                f" and stride {stride} at most the kernel {kernel}"
            )
        self.n_sources, self.n_fft, self.hop_length = n_sources, n_fft, hop_length
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.stem_norm = nn.GroupNorm(1, width, eps=1e-5)
        parts = (width, attention, heads, groups, hidden, kernel, stride)
        self.blocks = nn.ModuleList(Block(*parts) for _ in range(blocks))
        self.head = nn.ConvTranspose2d(width, 2 * n_sources, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, mixture: Tensor) -> Tensor:
        """Sources (B, K, N) of mixtures (B, N)."""
        spectrum = stft(mixture.float(), self.n_fft, self.hop_length)
        parts = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # (B, 2, M, F)
        with torch.autocast(mixture.device.type, enabled=False):  # as its authors: first and last layer in float32
            x = self.stem_norm(self.stem(parts)).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        with torch.autocast(mixture.device.type, enabled=False):
            pairs = self.head(x.float().permute(0, 3, 1, 2)).unflatten(1, (self.n_sources, 2))  # (B, K, 2, M, F)
        bins = torch.view_as_complex(pairs.permute(0, 1, 4, 3, 2).contiguous())
        return istft(bins, self.n_fft, self.hop_length, mixture.shape[-1])
