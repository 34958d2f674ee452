"""Conv-TasNet: a learned filter bank, masks from a stack of dilated convolutions, the inverse filter bank.

Y = filters * y (B, F, M); source k = inverse filters * (mask_k Y). Yi Luo, Nima Mesgarani, "Conv-TasNet: Surpassing
Ideal Time-Frequency Magnitude Masking for Speech Separation", 2019, https://arxiv.org/abs/1809.07454. The network is
torchaudio's; this file gives it the shapes and the names that the other networks have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from audiosep.errors import UsageError, at_least


class ConvTasNet(nn.Module):
    """Waveforms (B, N) to sources (B, K, N).

    The defaults are the paper's best non-causal network (letters in brackets), whose filters of 16 samples were meant
    for 8000 Hz: at 16000 Hz it has kernel 32, 5,001,265 parameters for two sources.

    Args:
        n_sources: K.
        kernel: length of a filter in samples [L]; filters start every half of it.
        filters: number of them [N].
        bottleneck: channels between the blocks [B, Sc].
        hidden: channels in a block [H].
        layers: blocks per stack, dilations 1, 2, 4, ... [X].
        stacks: their number [R].
        mask: "sigmoid" or "relu".
        start: of the filters: "random" as published, or "stft": windowed sines and cosines whose inverse the decoder
            is, so that the untrained network gives back what it was given and short trainings get somewhere.
    """

    def __init__(
        self,
        n_sources: int = 2,
        kernel: int = 16,
        filters: int = 512,
        bottleneck: int = 128,
        hidden: int = 512,
        layers: int = 8,
        stacks: int = 3,
        mask: str = "sigmoid",
        start: str = "random",
    ) -> None:
        super().__init__()
        self.config = {
            "n_sources": n_sources,
            "kernel": kernel,
            "filters": filters,
            "bottleneck": bottleneck,
            "hidden": hidden,
            "layers": layers,
            "stacks": stacks,
            "mask": mask,
            "start": start,
        }
        at_least(2, kernel=kernel)
        at_least(1, n_sources=n_sources, filters=filters, bottleneck=bottleneck, hidden=hidden)
        at_least(1, layers=layers, stacks=stacks)
        self.n_sources = n_sources
        # torchaudio's wheels don't import beside every torch: only who uses this network needs them.
        try:
            from torchaudio.models import ConvTasNet as Network
        except (ImportError, OSError) as error:
            raise UsageError(f"Conv-TasNet needs a torchaudio that fits torch: {error}") from error
        self.network = Network(
            num_sources=n_sources,
            enc_kernel_size=kernel,
            enc_num_feats=filters,
            msk_kernel_size=3,  # [P]; torchaudio pads for no other
            msk_num_feats=bottleneck,
            msk_num_hidden_feats=hidden,
            msk_num_layers=layers,
            msk_num_stacks=stacks,
            msk_activate=mask,
        )
        if start not in ("random", "stft"):
            raise UsageError(f"start is 'random' or 'stft', got {start!r}")
        if start == "stft":
            bank = tight_filters(filters, kernel)
            self.network.encoder.weight = nn.Parameter(bank[:, None].clone())
            self.network.decoder.weight = nn.Parameter(bank[:, None].clone())

    def forward(self, mixture: Tensor) -> Tensor:
        """Sources (B, K, N) of mixtures (B, N)."""
        return self.network(mixture[:, None])


def tight_filters(filters: int, kernel: int) -> Tensor:
    """Sines and cosines under a square-root Hann window, (filters, kernel); analysis, then synthesis, is the identity.

    With M = filters / 2 frequencies (k + 1/2) pi / M the Gram matrix sum_k cos((k + 1/2) pi d / M) is zero for every
    distance d != 0 of two samples below 2 M.
    """
    if filters % 2 or filters < kernel:
        raise UsageError(f"start 'stft' needs an even number of filters, at least the kernel's {kernel}, got {filters}")
    count = filters // 2
    angle = torch.outer((torch.arange(count) + 0.5) * math.pi / count, torch.arange(kernel))
    window = torch.hann_window(kernel, periodic=True).sqrt()
    return torch.cat((angle.cos(), angle.sin())) * window / math.sqrt(count)
