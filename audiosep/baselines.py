"""Classical methods to measure separators against: NMF source models, spectral gating, oracle masks.

NMF learns templates W_c of every kind or class c of sources from the magnitudes |X| of its recordings, and explains a
mixture by the templates of what is in it:

    |X| ~ W_c H  (minimal KL divergence, W, H >= 0);   |Y| ~ sum_k W_k H_k, W fixed;   X_k = P_k / sum_j P_j Y

with P_k = (W_k H_k)^2, a Wiener filter. Paris Smaragdis, Bhiksha Raj, Madhusudana Shashanka, "Supervised and
Semi-supervised Separation of Sounds from Single-Channel Mixtures", 2007. The factorisations are scikit-learn's.

Spectral gating is noisereduce's: Tim Sainburg, Asaf Zorea, 2024, https://arxiv.org/abs/2412.17851.

The oracles take the references, so they are no separators. DeLiang Wang, Jitong Chen, "Supervised Speech Separation
Based on Deep Learning: An Overview", 2018, https://arxiv.org/abs/1708.07524.

B items, K sources, N samples, F bins, M frames, R templates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from audiosep.data import Item, SourceDataset, class_names
from audiosep.errors import UsageError
from audiosep.stft import istft, stft

__all__ = ["NMF", "ORACLES", "SpectralGating", "fit_nmf", "ideal_ratio_mask"]

KINDS = ("speech", "sound")


class NMF(nn.Module):
    """Templates of speech, of any sound, and of each class of sounds.

    Args:
        classes: names of the classes.
        rank: templates R of a class.
        kind_rank: templates of speech, and of any sound.
        n_fft: STFT size.
        hop_length: its hop.
        max_iter: updates of the activations of a mixture.
        sample_rate: in Hz.
    """

    evaluations = 0

    def __init__(
        self,
        classes: Sequence[str] = (),
        rank: int = 32,
        kind_rank: int = 128,
        n_fft: int = 512,
        hop_length: int = 256,
        max_iter: int = 100,
        sample_rate: int = 16000,
    ) -> None:
        super().__init__()
        self.config = {
            "classes": list(classes),
            "rank": rank,
            "kind_rank": kind_rank,
            "n_fft": n_fft,
            "hop_length": hop_length,
            "max_iter": max_iter,
            "sample_rate": sample_rate,
        }
        self.classes, self.sample_rate, self.max_iter = tuple(classes), sample_rate, max_iter
        self.n_fft, self.hop_length = n_fft, hop_length
        self.origin: dict[str, Any] = {}
        self.kind_templates: Tensor
        self.class_templates: Tensor
        self.register_buffer("kind_templates", torch.zeros(len(KINDS), kind_rank, n_fft // 2 + 1))
        self.register_buffer("class_templates", torch.zeros(len(classes), rank, n_fft // 2 + 1))

    def resolve(self, sources: Sequence[str] | None) -> list[str]:
        """Names of kinds and classes, as they were learned; UsageError for others."""
        known = {name.casefold(): name for name in (*self.classes, *KINDS)}
        wanted = [name.strip().casefold() for name in sources or KINDS]
        for name in wanted:
            if name not in known:
                raise UsageError(
                    f"unknown source {name!r}; these NMF models know: {', '.join((*KINDS, *self.classes))}"
                )
        return [known[name] for name in wanted]

    def templates(self, name: str) -> Tensor:
        """Templates (R, F) of a kind or class."""
        if name in KINDS:
            return self.kind_templates[KINDS.index(name)]
        return self.class_templates[self.classes.index(name)]

    def separate(self, mixture: Tensor, kinds: Sequence[str]) -> Tensor:
        """Sources (B, K, N) of mixtures (B, N). What is named twice is found once and shared: it has one model."""
        names = list(dict.fromkeys(kinds))
        templates = [self.templates(name).double().cpu().numpy() for name in names]
        bins = stft(mixture, self.n_fft, self.hop_length)
        magnitude = bins.abs().double().cpu().numpy()
        powers = np.stack([self._powers(item, templates) for item in magnitude])  # (B, names, F, M)
        share = powers / (powers.sum(1, keepdims=True) + np.finfo(np.float64).tiny)
        masks = torch.from_numpy(np.stack([share[:, names.index(k)] / kinds.count(k) for k in kinds], 1))
        return istft(masks.to(mixture) * bins[:, None], self.n_fft, self.hop_length, mixture.shape[-1])

    def _powers(self, magnitude: np.ndarray, templates: list[np.ndarray]) -> np.ndarray:
        """Power spectrograms of the sources (names, F, M) that explain a magnitude spectrogram (F, M)."""
        level = magnitude.mean()
        if level == 0:
            return np.ones((len(templates), *magnitude.shape))
        activations = _factorise(magnitude.T / level, np.concatenate(templates), None, self.max_iter)[0]
        ends = np.cumsum([len(w) for w in templates])
        parts = zip(templates, np.split(activations, ends[:-1], axis=1))
        return np.stack([(h @ w).T ** 2 for w, h in parts])


def fit_nmf(
    items: Sequence[Item],
    *,
    classes: Sequence[str] | None = None,
    rank: int = 32,
    kind_rank: int = 128,
    n_fft: int = 512,
    hop_length: int = 256,
    sample_rate: int = 16000,
    seconds: float = 30.0,
    kind_seconds: float = 300.0,
    max_iter: int = 60,
    seed: int = 0,
    progress: Callable[[int, int | None, str], None] | None = None,
) -> NMF:
    """Learn the templates from recordings, in windows of 1 s at one level.

    Args:
        items: recordings to learn from.
        classes: of sounds; None are those with at least five recordings.
        rank: of a class; this and what follows are of `NMF`.
        kind_rank: of speech, and of any sound.
        n_fft: STFT size.
        hop_length: its hop.
        sample_rate: in Hz.
        seconds: heard of a class.
        kind_seconds: heard of speech, and of all sounds.
        max_iter: updates of a factorisation.
        seed: chooses the windows.
        progress: called with (models learned, in all, name).
    """
    names = class_names(items) if classes is None else classes
    model = NMF(names, rank, kind_rank, n_fft, hop_length, sample_rate=sample_rate)
    jobs = [
        ([i for i in items if i.kind == kind], kind_seconds, model.kind_templates[k], kind)
        for k, kind in enumerate(KINDS)
    ]
    jobs += [
        ([i for i in items if i.kind == "sound" and i.label == name], seconds, model.class_templates[c], name)
        for c, name in enumerate(model.classes)
    ]
    for number, (own, amount, templates, name) in enumerate(jobs):
        if progress is not None:
            progress(number, len(jobs), name)
        if not own:
            if name in KINDS:
                continue  # a corpus of sounds alone
            raise UsageError(f"no recordings of {name!r} to learn from")
        amount = min(amount, math.ceil(sum(item.duration for item in own)) * 2)
        windows = SourceDataset(own, round(amount), seed, 1.0, model.sample_rate, join=0.0)
        waves = torch.stack([windows[i]["wave"] for i in range(len(windows))])
        frames = stft(waves, model.n_fft, model.hop_length).abs().transpose(1, 2).flatten(0, 1).double().numpy()
        frames = frames[frames.max(1) > 1e-3 * frames.max()]  # not the silence around short sounds
        found = _factorise(frames / frames.mean(), None, len(templates), max_iter)[1]
        templates[: len(found)] = torch.from_numpy(found / (found.max(1, keepdims=True) + 1e-12))
    if progress is not None:
        progress(len(jobs), len(jobs), "learned")
    return model


def _factorise(
    frames: np.ndarray, templates: np.ndarray | None, rank: int | None, max_iter: int
) -> tuple[np.ndarray, np.ndarray]:
    """Activations (M, R) and templates (R, F) of frames (M, F), by multiplicative updates of the KL divergence."""
    try:
        from sklearn.decomposition import non_negative_factorization
        from sklearn.exceptions import ConvergenceWarning
    except ImportError as error:
        raise UsageError("NMF needs scikit-learn: pip install 'audiosep[baselines]'") from error
    fixed = templates is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so many updates are what was asked for
        activations, found, _ = non_negative_factorization(
            frames,
            H=templates,
            n_components=len(templates) if templates is not None else rank,
            init=None if fixed else "random",
            update_H=not fixed,
            solver="mu",
            beta_loss="kullback-leibler",
            tol=1e-4,
            max_iter=max_iter,
            random_state=0,
        )
    return activations, found


class SpectralGating:
    """What stands out against the background of the last seconds is called speech, the rest sound."""

    evaluations = 0

    def __init__(self, sample_rate: int = 16000) -> None:
        self.sample_rate = sample_rate
        self.origin: dict[str, Any] = {}

    def resolve(self, sources: Sequence[str] | None) -> list[str]:
        """Speech and sound, in any order; nothing else can be told apart."""
        wanted = [name.strip().casefold() for name in sources or KINDS]
        if sorted(wanted) != sorted(KINDS):
            raise UsageError(f"spectral gating gives two stems, speech and sound; asked for {', '.join(wanted)}")
        return wanted

    def separate(self, mixture: Tensor, kinds: Sequence[str]) -> Tensor:
        """Sources (B, 2, N) of mixtures (B, N)."""
        try:
            import noisereduce
        except ImportError as error:
            raise UsageError("spectral gating needs noisereduce: pip install 'audiosep[baselines]'") from error
        waves = mixture.double().cpu().numpy()
        gated = [noisereduce.reduce_noise(y=y, sr=self.sample_rate, stationary=False) if y.any() else y for y in waves]
        speech = torch.from_numpy(np.nan_to_num(np.stack(gated))).to(mixture)
        stems = {"speech": speech, "sound": mixture - speech}
        return torch.stack([stems[kind] for kind in kinds], 1)


def ideal_ratio_mask(
    mixture: Tensor, references: Tensor, power: float = 1.0, n_fft: int = 512, hop_length: int = 128
) -> Tensor:
    """Oracle: the mixture (..., N) times |S_k|^p / sum_j |S_j|^p of the references (..., K, N); (..., K, N).

    With p = 1 the ideal ratio mask, with p = 2 the ideal Wiener filter.
    """
    magnitudes = stft(references, n_fft, hop_length).abs() ** power
    masks = magnitudes / (magnitudes.sum(-3, keepdim=True) + torch.finfo(magnitudes.dtype).tiny)
    return istft(masks * stft(mixture, n_fft, hop_length).unsqueeze(-3), n_fft, hop_length, mixture.shape[-1])


# Name -> (mixture, references) -> estimates. Upper bounds: whoever shows them says so.
ORACLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "oracle-ratio-mask": ideal_ratio_mask,
    "oracle-wiener": partial(ideal_ratio_mask, power=2.0),
}
