"""Which sources a mixture holds: a small network that hears classes of sound, and up to two voices.

Log-mel energies of the mixture at unit RMS go through a stack of convolutions, each label's score is pooled over time
by attention (Qiuqiang Kong et al., "PANNs: Large-Scale Pretrained Audio Neural Networks for Audio Pattern Recognition",
2020, https://arxiv.org/abs/1912.10211), and the labels are independent:

    p_l = sum_t softmax_t(a_l)_t sigmoid(z_l)_t,    loss = mean_l of the binary cross-entropy.

It is trained on mixtures of the clips that the priors were trained on, so it knows the priors' classes.

B items, N samples, L labels, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import librosa
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from audiosep.data import MixtureDataset
from audiosep.errors import UsageError
from audiosep.stft import stft

__all__ = ["VOICES", "TaggedMixtures", "Tagger"]

VOICES = ("speech", "second speech")  # labels beside the classes of sound


class Tagger(nn.Module):
    """Scores (B, L) of labels for mixtures (B, N) of any level and length.

    Args:
        classes: names of the classes of sound; the labels are `VOICES`, then these.
        sample_rate: in Hz.
        width: channels of the first convolution; they double three times.
        mels: bands of the spectrogram.
        threshold: score from which a label counts as heard.
    """

    n_fft, hop_length = 1024, 320

    def __init__(
        self,
        classes: Sequence[str],
        sample_rate: int = 16000,
        width: int = 24,
        mels: int = 64,
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        self.classes, self.sample_rate, self.threshold = tuple(classes), sample_rate, threshold
        self.width, self.mels = width, mels
        self.evaluations = 1
        self.origin: dict[str, Any] = {}  # folder and hash, where it was loaded
        bands = librosa.filters.mel(sr=sample_rate, n_fft=self.n_fft, n_mels=mels)
        self.register_buffer("bands", torch.from_numpy(bands), persistent=False)
        widths = [1, *(width * 2**k for k in range(4))]
        self.stack = nn.Sequential(*(_block(a, b) for a, b in pairwise(widths)))
        self.attention, self.scores = (nn.Conv1d(widths[-1], len(self.labels), 1) for _ in range(2))

    @property
    def labels(self) -> tuple[str, ...]:
        """What each score is of."""
        return (*VOICES, *self.classes)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments as plain data."""
        return {
            "classes": list(self.classes),
            "sample_rate": self.sample_rate,
            "width": self.width,
            "mels": self.mels,
            "threshold": self.threshold,
        }

    def forward(self, mixture: Tensor) -> Tensor:
        """Probability of every label (B, L)."""
        rms = mixture.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-7)
        power = stft(mixture / rms, self.n_fft, self.hop_length).abs().square()
        heard = torch.log(self.bands @ power + 1e-3)[:, None]  # type: ignore[operator]
        frames = self.stack(heard).mean(2)  # (B, channels, T)
        weight = self.attention(frames).softmax(-1)
        return (weight * self.scores(frames).sigmoid()).sum(-1)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Binary cross-entropy (B,), mean over labels, of "mixture" (B, N) against "tags" (B, L) of zeros and ones."""
        probability = self(batch["mixture"]).float().clamp(1e-6, 1 - 1e-6)
        return nn.functional.binary_cross_entropy(probability, batch["tags"], reduction="none").mean(-1)

    def names(self, tags: Sequence[bool]) -> list[str]:
        """The names of the sources that tags stand for, voices as "speech"."""
        return [_public(label) for label, tag in zip(self.labels, tags) if tag]

    def is_allowed(self, label: str, allowed: Sequence[str]) -> bool:
        """Whether the source that a label stands for is among these names."""
        return _public(label).casefold() in {name.casefold() for name in allowed}

    def choose(self, scores: Sequence[float], allowed: Sequence[str], most: int = 5) -> list[str]:
        """The labels that are heard, best first, two at least and `most` at most, among `allowed`; voices as "speech".

        Raises:
            UsageError: fewer than two labels are allowed.
        """
        table = {label: score for label, score in zip(self.labels, scores) if self.is_allowed(label, allowed)}
        if len(table) < 2:
            raise UsageError("too few of the loaded priors' sounds are known to the tagger; name the sources")
        # A second voice is there only with a first one.
        if VOICES[1] in table:
            table[VOICES[1]] = min(table[VOICES[0]], table[VOICES[1]])
        ranked = sorted(table, key=lambda label: -table[label])
        heard = [label for label in ranked if table[label] >= self.threshold][:most]
        return [_public(label) for label in (heard if len(heard) >= 2 else ranked[:2])]


class TaggedMixtures(Dataset[dict[str, Tensor]]):
    """Mixtures of several tasks in turn, with what they hold: `mixture` (N,), `tags` (L,) in the order of `labels`.

    The datasets hold as many mixtures each; item i is a pure function of their seeds and of i.
    """

    def __init__(self, datasets: Sequence[MixtureDataset], labels: Sequence[str]) -> None:
        if not datasets:
            raise UsageError("no tasks to make mixtures of")
        self.datasets = list(datasets)
        self.index = {label.casefold(): i for i, label in enumerate(labels)}
        self.segment = self.datasets[0].segment

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        item = self.datasets[index % len(self.datasets)][index // len(self.datasets)]
        return {"mixture": item["mixture"], "tags": self.tags(item["names"])}

    def tags(self, names: Sequence[str]) -> Tensor:
        """(L,) ones for the names of a mixture's sources; a class that has no label is nowhere."""
        tags = torch.zeros(len(self.index))
        for k, name in enumerate(names):
            label = VOICES[min(list(names[:k]).count("speech"), 1)] if name == "speech" else name
            if label.casefold() in self.index:
                tags[self.index[label.casefold()]] = 1.0
        return tags


def _public(label: str) -> str:
    """The source name that a label stands for."""
    return "speech" if label in VOICES else label


def _block(into: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, 3, padding=1, bias=False),
        nn.GroupNorm(8, out),
        nn.GELU(),
        nn.Conv2d(out, out, 3, padding=1, groups=8, bias=False),
        nn.GroupNorm(8, out),
        nn.GELU(),
        nn.AvgPool2d(2, ceil_mode=True),
    )
