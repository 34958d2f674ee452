"""Which sources a mixture or a stem holds: a small network that hears how many voices and sounds, and which classes.

Log-mel energies of the mixture at unit RMS, above a floor, go through a stack of convolutions, each label's score is
pooled over time by attention (Qiuqiang Kong et al., "PANNs: Large-Scale Pretrained Audio Neural Networks for Audio
Pattern Recognition", 2020, https://arxiv.org/abs/1912.10211), and the labels are independent:

    p_l = sum_t softmax_t(a_l)_t sigmoid(z_l)_t,    loss = mean_l of the binary cross-entropy.

Where one class alone is there, the loss may also have the cross-entropy of the classes' log-odds, log(p_l / (1 - p_l)),
by whose differences stems are told apart.

It is trained on mixtures of the clips that the priors were trained on, so it knows the priors' classes. Two are
shipped. The tagger listens to recordings for `-s auto`, and knows voices better. The classifier knows sounds better: in
two of three of its mixtures of several sources all but one count for nothing, as they are faint, or left by a faulty
mask here and there, as in a stem that a separator made. Together (`Ensemble`) they tell which stem is of which class,
and their gradient guides the sampler (`audiosep.guidance`).

B items, N samples, L labels, T frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import librosa
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from audiosep.data import MixtureDataset, TaskMixtures
from audiosep.errors import UsageError, at_least
from audiosep.mixing import BANDS, grid, log_power
from audiosep.stft import istft, stft

__all__ = ["COUNTS", "Ensemble", "TaggedMixtures", "Tagger", "leaked"]

# Labels beside the classes of sound: the first is there from one such source on, the second from two on, ...
COUNTS = {"speech": ("speech", "second speech"), "sound": ("sound", "second sound", "third sound")}
HEARD = 0.5  # score from which a voice or a sound is there
# Nats at which a label's log-odds end (p of one in a million), in the loss and where stems are named: no one label is
# to outweigh all others. Guidance, which asks for directions only, takes them whole: beyond the end is no gradient.
SURE = 13.8
FAINT = (5.0, 25.0)  # dB that what counts for nothing lies under the rest
# Stems as a separator's masks leave them: bins and frames over which it saw power, vaguely as at much noise, or sharply
# as at little, and the largest rms of its errors, in nats.
SEEN = (3, 5, 9, 15)
ERRORS = 4.0


class Tagger(nn.Module):
    """Scores (B, L) of labels for mixtures (B, N) of any level and length.

    Args:
        classes: names of the classes of sound; the labels are those of `COUNTS`, then these.
        sample_rate: in Hz.
        width: channels of the first convolution; they double three times.
        mels: bands of the spectrogram.
        threshold: score from which a sound is called by its class.
        floor: added to the energies before the logarithm; white noise has about 25 in each band. A high one hides what
            is faint: recordings' own noise, and what a separator left of other sources.
        among: weight in the loss of telling one class from the others.

    Raises:
        UsageError: floor is not above 0, among below, or another number below 1.
    """

    n_fft, hop_length = 1024, 320

    def __init__(
        self,
        classes: Sequence[str],
        sample_rate: int = 16000,
        width: int = 32,
        mels: int = 64,
        threshold: float = 0.5,
        floor: float = 1e-3,
        among: float = 0.0,
    ) -> None:
        super().__init__()
        at_least(1, sample_rate=sample_rate, width=width, mels=mels)
        if floor <= 0 or among < 0:
            raise UsageError(f"floor is above 0 and among at least 0, got {floor} and {among}")
        self.classes, self.sample_rate, self.threshold = tuple(classes), sample_rate, threshold
        self.width, self.mels, self.floor, self.among = width, mels, floor, among
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
        return (*COUNTS["speech"], *COUNTS["sound"], *self.classes)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments as plain data."""
        return {
            "classes": list(self.classes),
            "sample_rate": self.sample_rate,
            "width": self.width,
            "mels": self.mels,
            "threshold": self.threshold,
            "floor": self.floor,
            "among": self.among,
        }

    def forward(self, mixture: Tensor) -> Tensor:
        """Probability of every label (B, L)."""
        return self.log_odds(mixture).sigmoid()

    def log_odds(self, mixture: Tensor) -> Tensor:
        """log(p / (1 - p)) of every label (B, L), as exact, and so is its gradient, where p rounds to 0 or 1."""
        # Limited before the root, whose gradient is infinite in silence.
        rms = mixture.square().mean(-1, keepdim=True).clamp(min=1e-14).sqrt()
        power = stft(mixture / rms, self.n_fft, self.hop_length).abs().square()
        heard = torch.log(self.bands @ power + self.floor)[:, None]  # type: ignore[operator]
        frames = self.stack(heard).mean(2)  # (B, channels, T)
        exact = torch.promote_types(frames.dtype, torch.float32)  # half types are not
        weight, scores = self.attention(frames).to(exact).log_softmax(-1), self.scores(frames).to(exact)
        there, absent = ((weight + logsigmoid(z)).logsumexp(-1) for z in (scores, -scores))
        return there - absent

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Loss (B,) of "mixture" (B, N) against "tags" (B, L) of zeros and ones."""
        odds, tags = self.log_odds(batch["mixture"]).clamp(-SURE, SURE), batch["tags"]
        loss = nn.functional.binary_cross_entropy_with_logits(odds, tags, reduction="none").mean(-1)
        if not self.among or not self.classes:
            return loss
        odds, classes = odds[:, -len(self.classes) :], tags[:, -len(self.classes) :]
        among = nn.functional.cross_entropy(odds, classes.argmax(-1), reduction="none")
        return loss + self.among * among * (classes.sum(-1) == 1)

    def knows(self, names: Sequence[str]) -> bool:
        """Whether all of these are classes, whatever their case, or the kinds "speech" and "sound"."""
        return {name.casefold() for name in names} <= {label.casefold() for label in (*COUNTS, *self.classes)}

    def fits(self, stems: Tensor, names: Sequence[str], sure: float = SURE) -> Tensor:
        """How well each of stems (B, K, N) fits each of J names, in nats (B, K, J).

        As the labels are independent, log p of a stem's own labels and no others is the sum of their log-odds, but for
        a constant of the stem: those of "speech", of "sound", or of "sound" and the class. They end at +-`sure`.
        """
        odds = self.log_odds(stems.flatten(0, 1)).clamp(-sure, sure).unflatten(0, stems.shape[:2])
        index = {label.casefold(): i for i, label in enumerate(self.labels)}
        fits = []
        for name in names:
            own = odds[..., index[name.casefold()]]
            fits.append(own if name.casefold() in COUNTS else own + odds[..., index["sound"]])
        return torch.stack(fits, -1)

    def choose(self, scores: Sequence[float], allowed: Sequence[str]) -> list[str]:
        """Names of the sources that are heard, two at least, from the scores (L,) of all labels.

        A sound is called by its class where that is heard, too, otherwise "sound".

        Args:
            scores: of every label.
            allowed: names that may be given: "speech", "sound", classes.

        Raises:
            UsageError: none of the names is one that the tagger knows.
        """
        table, names = dict(zip(self.labels, scores)), {name.casefold() for name in allowed}
        classes = [label for label in self.classes if label.casefold() in names]
        ranked = [label for kind, labels in COUNTS.items() if kind in names for label in labels]
        if classes and "sound" not in names:
            ranked += COUNTS["sound"]
        if not ranked:
            raise UsageError("the tagger knows no sound of the loaded priors; name the sources")
        for first, second in pairwise(ranked):  # a second one is there only with a first one
            table[second] = min(table[second], table[first]) if second not in COUNTS else table[second]
        heard = sorted(ranked, key=lambda label: -table[label])
        heard = heard[: max(2, sum(table[label] >= HEARD for label in ranked))]
        voices = sum(label in COUNTS["speech"] for label in heard)
        best = sorted(classes, key=lambda label: -table[label])[: len(heard) - voices]
        called = [label for label in best if table[label] >= self.threshold or "sound" not in names]
        return ["speech"] * voices + called + ["sound"] * (len(heard) - voices - len(called))


class Ensemble(nn.Module):
    """Two taggers as one: how well a stem fits a voice says the first, which of several sounds it is say both.

    Args:
        tagger: trained on mixtures, it knows voices better.
        classifier: trained on stems, it knows sounds better.

    Raises:
        UsageError: their sample rates differ.
    """

    def __init__(self, tagger: Tagger, classifier: Tagger) -> None:
        super().__init__()
        self.tagger, self.classifier = tagger, classifier
        self.sample_rate = tagger.sample_rate
        if classifier.sample_rate != self.sample_rate:
            raise UsageError(
                f"taggers that are asked together must share a sample rate, got {self.sample_rate} and "
                f"{classifier.sample_rate}"
            )

    @property
    def members(self) -> dict[str, Tagger]:
        """Both by name."""
        return {"tagger": self.tagger, "classifier": self.classifier}

    def knows(self, names: Sequence[str]) -> bool:
        """Whether both do."""
        return self.tagger.knows(names) and self.classifier.knows(names)

    def asked(self, names: Sequence[str]) -> dict[str, Tagger]:
        """Those that `fits` asks about these names: of one class of sound the classifier has nothing to tell."""
        sounds = {name.casefold() for name in names} - {"speech"}
        return self.members if len(sounds) > 1 else {"tagger": self.tagger}

    def fits(self, stems: Tensor, names: Sequence[str], sure: float = SURE) -> Tensor:
        """How well each of stems (B, K, N) fits each of J names, in nats (B, K, J).

        The tagger's `fits`, and for sounds how far the classifier's lie above or below the mean of its fits to all that
        are sounds. (So the likeliest sound gains a little on a voice, too.) Log-odds of a label end at +-`sure`.
        """
        fits = self.tagger.fits(stems, names, sure)
        if "classifier" not in self.asked(names):
            return fits
        sounds = [j for j, name in enumerate(names) if name.casefold() != "speech"]
        among = self.classifier.fits(stems, [names[j] for j in sounds], sure)
        columns = list(fits.unbind(-1))
        for j, more in zip(sounds, (among - among.mean(-1, keepdim=True)).unbind(-1)):
            columns[j] = columns[j] + more
        return torch.stack(columns, -1)


class TaggedMixtures(TaskMixtures):
    """Mixtures of several tasks in turn, with what they hold: `mixture` (N,), `tags` (L,) in the order of `labels`.

    Args:
        datasets: of a task each; one may stand there several times.
        labels: the tagger's.
        alone: share of the mixtures in which one source alone is tagged, and all others are faint (`FAINT`).
        masked: share of these in which what is left of the others, and of the one, is up to a faulty mask (`masked`).
    """

    def __init__(
        self, datasets: Sequence[MixtureDataset], labels: Sequence[str], alone: float = 0.0, masked: float = 0.0
    ) -> None:
        super().__init__(datasets, alone=alone, masked=masked)
        self.alone, self.masked = alone, masked
        self.index = {label.casefold(): i for i, label in enumerate(labels)}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        dataset, number, rng = self.drawn(index, 1)
        item = dataset[number]
        if rng.random() >= self.alone:
            return {"mixture": item["mixture"], "tags": self.tags(item["names"])}
        kept = int(rng.random() * len(item["names"]))
        if self.masked and rng.random() < self.masked:
            stem = masked(item["sources"], kept, dataset.sample_rate, rng)
        else:
            faint, fainter = FAINT
            gains = torch.tensor([10 ** (-(faint + (fainter - faint) * rng.random()) / 20) for _ in item["names"]])
            gains[kept] = 1.0
            stem = gains @ item["sources"]
        return {"mixture": stem, "tags": self.tags([item["names"][kept]])}

    def tags(self, names: Sequence[str]) -> Tensor:
        """(L,) ones for the sources of a mixture, "speech" or a class each; a class that has no label is a sound."""
        voices = list(names).count("speech")
        heard = [*COUNTS["speech"][:voices], *COUNTS["sound"][: len(names) - voices], *names]
        tags = torch.zeros(len(self.index))
        for label in heard:
            if label.casefold() in self.index:
                tags[self.index[label.casefold()]] = 1.0
        return tags


def leaked(item: Mapping[str, Any], faint: float) -> Tensor:
    """The stems (K, N) of a mixture, each with the others `faint` dB fainter, as a separator leaves them."""
    stems: Tensor = item["sources"]
    return stems + 10 ** (-faint / 20) * (item["mixture"] - stems)


def masked(sources: Tensor, kept: int, sample_rate: int, rng: np.random.Generator) -> Tensor:
    """The stem (N,) of one of the sources (K, N) of a mixture, as masks that are wrong here and there leave it.

    The masks are softmax_k(log P_k + D_k) with P_k the power of source k around each time-frequency bin and D_k a
    smooth random field: what `audiosep.guidance` looks for. Where others are louder in the stem, D is 0.
    """
    n_fft, hop_length = 1024, 256
    spectra = stft(sources, n_fft, hop_length)
    log = log_power(spectra, int(rng.choice(SEEN)))
    rows, columns = grid(sample_rate, log.shape[-2], log.shape[-1], sources.shape[-1])
    errors = rng.random() * ERRORS * rng.standard_normal((len(sources), BANDS, columns.shape[-1]))
    errors += rng.standard_normal((len(sources), 1, 1))
    mask = (log + rows @ torch.from_numpy(errors).float() @ columns.T).softmax(0)[kept]
    own, total = spectra[kept], spectra.sum(0)
    if (mask * (total - own)).abs().square().sum() > (mask * own).abs().square().sum():
        mask = log.softmax(0)[kept]
    return istft((mask * total)[None], n_fft, hop_length, sources.shape[-1])[0]


def _block(into: int, out: int) -> nn.Sequential:
    # Statistics of the batch, though they make training depend on how it is split: with those of groups of channels it
    # learned to tell stems apart several times more slowly.
    return nn.Sequential(
        nn.Conv2d(into, out, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
        nn.Conv2d(out, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )
