"""Refinement: a small network hears all stems of a mixture and says, region by region, how they share it wrongly.

A denoiser knows what its source sounds like, but not what the others do, and errs in whole regions of the
time-frequency plane: half a syllable that went to the bell. An oracle that may only move a smooth field of 12 bands by
2.5 nodes a second over finished stems would win 5 dB and more (see recipes/open16k). The network learns that field from
stems that were separated: for stem k it sees the log-mel energies of the stem, of the other stems together and of the
mixture, and the name of the source, and answers D_k at few nodes; within +-BOUND where one is a sound without a class,
so that what it has never heard the like of is not moved altogether. The stems X_k then share their sum Y as in class
guidance,

    X_k + (softmax_k(log P_k + D_k) - softmax_k(log P_k)) Y,    loss = -mean_k of the SNR in dB,

with P_k the power of X_k around each time-frequency bin. Class guidance asks, step by step, what a region is of; this
one is asked of finished stems and has learned what samplers get wrong.

It is trained on mixtures of the clips that the priors were trained on, as tagger and classifier are: on estimates that
the sampler had on its way (`separated`), and on what random faulty masks leave of true sources.

B items, K sources, N samples, F bins, M frames.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from audiosep.data import KINDS, MixtureDataset, TaskMixtures, equalised
from audiosep.errors import UsageError, at_least
from audiosep.mixing import change_of_shares, grid, hats, log_power
from audiosep.stft import istft, stft

__all__ = ["Refiner", "Stems", "faulty", "read_stems", "resized", "write_stems"]

DILATIONS = (1, 2, 4, 1, 2)  # in time, of the blocks
UNNAMED = KINDS.index("sound")  # the label of a sound that has no class
BOUND = 3.0  # nats, of a field's nodes where such a sound is among the sources
LEVEL = 384.0  # mean power of a bin at unit RMS: the sum of the squared window
FLOOR = 0.05  # added to the energies of a mixture at unit RMS before the logarithm
MOST_SOURCES = 3  # that it has heard together
SMOOTH = 3  # bins and frames around each over which the power of stems is averaged
MOST = 1e3  # largest ratio of signal to noise in the loss, 30 dB
SUFFIX = ".safetensors"  # of files of stems
SEEN = (3, 5, 9, 15)  # bins and frames over which a faulty mask saw power


class Refiner(nn.Module):
    """Moves the stems (B, K, N) of mixtures, and leaves their sum.

    Args:
        classes: names of the classes of sound that it knows, beside "speech" and "sound", which is any.
        sample_rate: in Hz.
        width: channels, an even number.
        mels: bands of the spectrogram, an even number, twice as many as the field's.

    Raises:
        UsageError: a number is below 1, or an odd one where it has to be even.
    """

    n_fft, hop_length = 1024, 256
    bands: Tensor
    rows: Tensor

    def __init__(self, classes: Sequence[str], sample_rate: int = 16000, width: int = 64, mels: int = 48) -> None:
        super().__init__()
        at_least(1, sample_rate=sample_rate, width=width, mels=mels)
        if mels % 2 or width % 2:
            raise UsageError(f"width and mels are even numbers, got {width} and {mels}")
        self.classes, self.sample_rate, self.width, self.mels = tuple(classes), sample_rate, width, mels
        self.origin: dict[str, Any] = {}  # folder and hash, where it was loaded
        bands = librosa.filters.mel(sr=sample_rate, n_fft=self.n_fft, n_mels=mels)
        self.register_buffer("bands", torch.from_numpy(bands), persistent=False)
        pitch = torch.log1p(torch.linspace(0, sample_rate / 2, self.n_fft // 2 + 1) / 700)
        self.register_buffer("rows", hats(pitch / pitch[-1], mels // 2), persistent=False)
        self.first = nn.Sequential(
            nn.Conv2d(3, width // 2, 5, stride=(1, 2), padding=2, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.names = nn.ModuleList(nn.Embedding(len(self.labels), width) for _ in DILATIONS)
        for embedding in self.names:
            nn.init.normal_(embedding.weight, std=0.3)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(Block(width, dilation) for dilation in DILATIONS)
        self.out = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    @property
    def labels(self) -> tuple[str, ...]:
        """What a source can be called."""
        return (*KINDS, *self.classes)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments as plain data."""
        return {
            "classes": list(self.classes),
            "sample_rate": self.sample_rate,
            "width": self.width,
            "mels": self.mels,
        }

    def knows(self, names: Sequence[str]) -> bool:
        """Whether it is to be asked about such sources: two or three, all called differently, whatever the case."""
        lowered = [name.casefold() for name in names]
        known = {label.casefold() for label in self.labels}
        return 1 < len(lowered) <= MOST_SOURCES and len(lowered) == len({*lowered}) and {*lowered} <= known

    def numbers(self, names: Sequence[str]) -> Tensor:
        """Numbers of labels (K,), -1 of a name that is none."""
        index = {label.casefold(): i for i, label in enumerate(self.labels)}
        return torch.tensor([index.get(name.casefold(), -1) for name in names])

    def forward(self, bins: Tensor, labels: Tensor) -> Tensor:
        """The fields (B, K, F, M) of stems' transforms, by the numbers of the sources' labels (B, K).

        What is no source has the number -1.
        """
        batch, count, _, frames = bins.shape
        there = (labels.flatten() >= 0).nonzero()[:, 0]
        index = labels.flatten()[there]
        hidden = self.first(self._heard(bins)[there])
        for name, block in zip(self.names, self.blocks):
            hidden = block(hidden + name(index)[:, :, None, None])
        nodes = self.out(hidden)[:, 0].float()
        unnamed = (labels == UNNAMED).any(1, keepdim=True).expand(-1, count).flatten()[there][:, None, None]
        nodes = torch.where(unnamed, BOUND * torch.tanh(nodes / BOUND), nodes)
        # Each node lies on every fourth frame; the last few may have none behind them.
        place = torch.arange(frames, device=bins.device) / max(1, 4 * (nodes.shape[-1] - 1))
        with torch.autocast(bins.device.type, enabled=False):
            field = self.rows @ nodes @ hats(place.clamp(max=1), nodes.shape[-1]).T
        return field.new_zeros(batch * count, *field.shape[1:]).index_copy(0, there, field).unflatten(0, (batch, count))

    def _heard(self, bins: Tensor) -> Tensor:
        """Log-mel energies (B K, 3, bands, M) of each stem, of the others together and of their sum, at unit RMS."""
        with torch.autocast(bins.device.type, enabled=False):  # a tone's energy is out of fp16's range
            power, total = bins.abs().square(), bins.sum(1, keepdim=True)
            others = (total - bins).abs().square()
            seen = torch.stack((power, others, total.abs().square().expand_as(power)), 2)
            level = seen[:, :1, 2:].mean((-2, -1), keepdim=True).clamp(min=1e-14)
            energy = self.bands @ (LEVEL * seen / level).flatten(0, 1)
            return torch.log(energy + FLOOR) / 3

    def refine(self, stems: Sequence[Tensor], labels: Tensor, share: float) -> list[Tensor]:
        """Several runs' stems (B, K, N), float32, moved by a share of the field of their mean; labels (B, K)."""
        with torch.autocast(labels.device.type, enabled=False):
            bins = [stft(x, self.n_fft, self.hop_length) for x in stems]
            field = share * self(torch.stack(bins).mean(0), labels)
            moves = [change_of_shares(log_power(b, SMOOTH), field) * b.sum(1, keepdim=True) for b in bins]
            return [x + istft(move, self.n_fft, self.hop_length, x.shape[-1]) for x, move in zip(stems, moves)]

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Negative SNR in dB (B,), mean over sources, of "stems" against "sources" (B, K, N) with "labels" (B, K)."""
        bins, truth = (stft(batch[key], self.n_fft, self.hop_length) for key in ("stems", "sources"))
        field = self(bins, batch["labels"])
        moved = bins + change_of_shares(log_power(bins, SMOOTH), field) * bins.sum(1, keepdim=True)
        power, error = (x.abs().square().sum((-1, -2)) for x in (truth, moved - truth))
        there = (batch["labels"] >= 0).to(power.dtype)  # what has no label is no source
        snr = 10 * torch.log10((power + 1e-9) / (error + power / MOST + 1e-9))
        return -(there * snr).sum(-1) / there.sum(-1)


class Block(nn.Module):
    """A residual block; what all bands hear together goes to each of them."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.near = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=(1, dilation), dilation=(1, dilation), bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.time = nn.Sequential(
            nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation, bias=False),
            nn.BatchNorm1d(width),
        )
        self.last = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, bands, frames), as it comes."""
        hidden = self.near(x)
        hidden = hidden + self.time(hidden.mean(2))[:, :, None]
        return torch.relu(x + self.last(hidden))


class Stems(TaskMixtures):
    """Stems to be refined, of several tasks in turn: `stems` and `sources` (K, N), and the sources' `labels` (K,).

    K is that of the largest task; where a mixture has fewer sources there is silence with the label -1. Items follow
    from the folder, too.

    Args:
        datasets: of a task each; one may stand there several times.
        refiner: its labels are meant.
        folder: of stems that `write_stems` wrote; None for none.
        separated: share of the items that are of these, where there are any of the task; others are left by a faulty
            mask.
        unnamed: share of the items in which the class of one sound is not told.
        joined: share of the items of three sources in which two of the sounds are one that has no class.
        equaliser: dB by which a filter varies the octaves of an item, its stems and sources alike.
        speed: share by which separated stems and their sources are faster or slower, pitch too.
    """

    def __init__(
        self,
        datasets: Sequence[MixtureDataset],
        refiner: Refiner,
        folder: str | None = None,
        separated: float = 0.65,
        unnamed: float = 0.1,
        joined: float = 0.0,
        equaliser: float = 6.0,
        speed: float = 0.1,
    ) -> None:
        super().__init__(datasets, separated=separated, unnamed=unnamed, joined=joined)
        if equaliser < 0 or not 0 <= speed < 1:
            raise UsageError(f"equaliser is dB, at least 0, and speed a share below 1, got {equaliser} and {speed}")
        self.equaliser, self.speed = equaliser, speed
        self.refiner, self.separated, self.unnamed, self.joined = refiner, separated, unnamed, joined
        self.count = max(dataset.n_speech + dataset.n_sound for dataset in self.datasets)
        tasks = dict.fromkeys(dataset.task for dataset in self.datasets)
        self.files = {task: [] if folder is None else sorted(Path(folder).glob(f"{task}.*{SUFFIX}")) for task in tasks}
        if folder is not None and not any(self.files.values()):
            raise UsageError(f"{folder}: no stems of {', '.join(tasks)}; recipes/open16k/stems.py writes some")
        length = round(self.segment * refiner.sample_rate)
        for path in (files[0] for files in self.files.values() if files):
            stems, _, _ = read_stems(path, refiner)[0]
            if stems.shape[-1] != length:
                raise UsageError(f"{path}: stems of {stems.shape[-1]} samples, the recipe's segments have {length}")

    @property
    def settings(self) -> dict[str, Any]:
        """Which mixtures are made of the items, and how many files of stems there are, beside the tasks."""
        return super().settings | {"files": {task: len(files) for task, files in self.files.items()}}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        dataset, number, rng = self.drawn(index, 2)
        files = self.files[dataset.task]
        if files and rng.random() < self.separated:
            rows = read_stems(files[int(rng.random() * len(files))], self.refiner)
            stems, sources, names = rows[int(rng.random() * len(rows))]
            both = resized(torch.cat((stems, sources)), 1 + self.speed * (2 * rng.random() - 1))
            # Sounds begin anywhere.
            stems, sources = both.roll(int(rng.random() * both.shape[-1]), -1).split(len(stems))
        else:
            item = dataset[number]
            sources, names = item["sources"], item["names"]
            stems = faulty(sources, dataset.sample_rate, rng)
        if self.equaliser:
            waves = torch.cat((stems, sources)).numpy()
            both = torch.from_numpy(equalised(rng, waves, self.equaliser, dataset.sample_rate)).float()
            stems, sources = both.split(len(stems))
        stems, sources, names = self._less_named(stems, sources, names, rng)
        more = self.count - len(stems)
        labels = nn.functional.pad(self.refiner.numbers(names), (0, more), value=-1)
        stems, sources = (nn.functional.pad(x, (0, 0, 0, more)) for x in (stems, sources))
        return {"stems": stems, "sources": sources, "labels": labels}

    def _less_named(
        self, stems: Tensor, sources: Tensor, names: list[str], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, list[str]]:
        """At times one of the sounds without its class, or two of three as one."""
        sounds = rng.permutation([k for k, name in enumerate(names) if name != "speech"])
        joined, unnamed = rng.random() < self.joined, rng.random() < self.unnamed
        if not len(sounds) or "sound" in names:
            return stems, sources, names
        if joined and len(names) == 3 and len(sounds) > 1:
            rest = sounds[:2].tolist()
            kept = next(k for k in range(3) if k not in rest)
            stems, sources = (torch.stack((x[kept], x[rest].sum(0))) for x in (stems, sources))
            return stems, sources, [names[kept], "sound"]
        if unnamed:
            names = ["sound" if k == sounds[0] else name for k, name in enumerate(names)]
        return stems, sources, names


def resized(x: Tensor, ratio: float) -> Tensor:
    """Waves (K, N) that last `ratio` times as long, in as many samples: cut, or with silence behind."""
    length, spectrum = x.shape[-1], torch.fft.rfft(x)
    size = round(ratio * length)
    longer = torch.fft.irfft(spectrum, size) * (size / length)  # as many of the frequencies as there is room for
    return nn.functional.pad(longer[..., :length], (0, max(0, length - size)))


def faulty(sources: Tensor, sample_rate: int, rng: np.random.Generator) -> Tensor:
    """Stems (K, N) of the sources (K, N) of a mixture as masks leave them that are wrong, a little or altogether.

    The masks are softmax_k(trust log P_k + D_k) with P_k the power of source k around each time-frequency bin and D_k a
    random field; where there is no trust, stems are hardly more than the mixture.
    """
    n_fft, hop_length = Refiner.n_fft, Refiner.hop_length
    spectra = stft(sources, n_fft, hop_length)
    log = log_power(spectra, int(rng.choice(SEEN)))
    rows, columns = grid(sample_rate, log.shape[-2], log.shape[-1], sources.shape[-1])
    count, bands, nodes = len(sources), rows.shape[1], columns.shape[1]
    errors = 5 * rng.random() * rng.standard_normal((count, bands, nodes))
    errors += 3 * rng.random() * rng.standard_normal((count, 1, nodes)) + 1.5 * rng.standard_normal((count, 1, 1))
    kind, trust = rng.random(), 1.0
    if kind < 0.25:
        trust, errors = 0.0, 0.3 * rng.random() * errors
    elif kind < 0.6:
        trust = rng.random()
    mask = (trust * log + rows @ torch.from_numpy(errors).float() @ columns.T).softmax(0)
    if rng.random() < 0.3:
        sure = rng.random()
        mask = sure * mask + (1 - sure) / count
    return istft(mask * spectra.sum(0), n_fft, hop_length, sources.shape[-1])


def write_stems(path: Path, rows: Sequence[tuple[Tensor, Tensor, Sequence[str]]], sample_rate: int) -> None:
    """Write stems and sources (K, N) of several mixtures of one shape, and the sources' names, as a file."""
    stems, sources = (torch.stack([row[k] for row in rows]).half().contiguous() for k in (0, 1))  # type: ignore[misc]
    partial = path.with_suffix(".partial")
    facts = {"names": json.dumps([list(row[2]) for row in rows]), "sample_rate": str(sample_rate)}
    save_file({"stems": stems, "sources": sources}, partial, facts)
    partial.replace(path)


def read_stems(path: Path, refiner: Refiner) -> StemFile:
    """What `write_stems` wrote; UsageError where it isn't that, or not for this refiner."""
    try:
        found = StemFile(path)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: not a file of stems: {error}") from error
    if found.sample_rate != refiner.sample_rate:
        raise UsageError(f"{path}: stems at {found.sample_rate} Hz, the refiner hears at {refiner.sample_rate} Hz")
    unknown = {name for names in found.names for name, k in zip(names, refiner.numbers(names).tolist()) if k < 0}
    if unknown:
        raise UsageError(f"{path}: stems of {', '.join(sorted(unknown))}, which the refiner has no label for")
    return found


class StemFile:
    """The rows of a file of stems, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, "pt")
        facts = self.file.metadata()
        self.names, self.sample_rate = json.loads(facts["names"]), int(facts["sample_rate"])
        self.stems, self.sources = (self.file.get_slice(key) for key in ("stems", "sources"))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, list[str]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.stems[index].float(), self.sources[index].float(), self.names[index]
