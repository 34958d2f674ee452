"""Separate recordings of any rate, level, channel count and length with source priors.

Level, rate and shape are set at this door and undone behind it: a segment is resampled to the priors' rate, every
channel scaled to the level that a mixture of K training signals has, separated, and scaled and resampled back. At the
input's own rate the residual, the band above the priors' Nyquist frequency included, is shared out, so that the stems
add up to the recording.

K sources, C channels, T samples.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from audiosep import __version__, audio, distributed, hub
from audiosep.compiling import compile_network
from audiosep.errors import AudiosepError, ModelError, UsageError
from audiosep.guidance import STEERED, ClassGuidance
from audiosep.longform import Aligner, OverlapAdd, cosine, count_segments, cut, match
from audiosep.losses import ReconstructionLoss
from audiosep.lowrank import LAST, VAGUE, LowRank
from audiosep.mixing import best_permutation, combine, permute, project, residual
from audiosep.operators import Mixing
from audiosep.prior import JointPrior, Prior
from audiosep.progress import Callback
from audiosep.refiner import UNNAMED, Refiner
from audiosep.samplers import PRESETS, SAMPLES, Noise, Sampler, build
from audiosep.tagger import Ensemble, Tagger

log = logging.getLogger(__name__)

Array = TypeVar("Array", np.ndarray, Tensor)

SEGMENT = 4.0  # seconds; what the published priors were trained on
SILENCE = 1e-7  # RMS under which a channel counts as digital silence (-140 dBFS)
TAGGER = "tagger"  # the checkpoint that "auto" listens with
CLASSIFIER = "classifier"  # and the one that guides with it; both tell which stem is of which class
REFINER = "refiner"  # the checkpoint that says what is wrong with stems
REPORTED = 10  # labels whose scores a report holds
INACTIVE = -40.0  # dB under the mixture at which a stem is flagged as inactive
SELF_NOISE = (0.02, 0.05, 0.1, 0.2)  # noise levels at which a sample's likelihood under its prior is measured
# Nats by which two samples' estimates want to be of one class, times their cosine similarity: chosen on recordings held
# out of both networks' training. It decides few names: in 22 mixtures of three sounds 0.3 dB more than none, 1.8 more
# than twice as many, in 46 mixtures of other tasks nothing.
LIKENESS = 2.5
# Nats for each estimate that stays with the prior that found it, however many samples and channels speak: chosen on
# single sources, which without it at times left their prior for another's empty stem. In these mixtures a third
# of it or four times as much make no difference.
LEAD = 3.0
GUIDANCE = 0.55  # step of the class guidance, chosen on held-out mixtures
REFINE = 1.0  # share of the refiner's fields, chosen on held-out mixtures
LAST_REFINE = 0.5  # of that the last time, where there are restarts and each sound has a class; chosen there, too
AGAIN = 2  # steps of each restart after refinement; chosen there, too
LOW_RANK = 0.2  # share of the low-rank guidance, chosen there, too
RANKS = {"speech": 8}  # of a kind's spectrograms; those of one sound are 1
REST_RANK = 4  # of the one sound that has no class: it may be all the rest
LEAST_NOISE = 0.063  # of the last step: on held-out mixtures with a voice what came after it took the stems away again
LABEL_NOISE = (0.2, 0.3, 0.45, 0.67, 1.0)  # levels at which an estimate's class shows, chosen on held-out mixtures


@dataclass
class Separation:
    """What a separator returns.

    Attributes:
        sources: name -> array of the input's kind, (C, T). With several samples, their mean.
        sample_rate: the input's, in Hz.
        residual: the input minus the sum of the sources, (C, T).
        report: what was run and how it went, plain data.
        best: of several samples that were asked for the one that the priors hold to be likeliest, segment by segment.
        spread: with several samples, their standard deviation among themselves, at every point in time. It is the
            posterior's own only where the sampler goes on to the end (`least_noise`).
    """

    sources: dict[str, Any]
    sample_rate: int
    residual: Any
    report: dict[str, Any]
    best: dict[str, Any] = field(default_factory=dict)
    spread: dict[str, Any] = field(default_factory=dict)


class Separates(Protocol):
    """Anything that separates: diffusion separators, supervised networks, classical baselines."""

    sample_rate: int

    def __call__(self, wave: Any, sample_rate: int, sources: Sequence[str] | None = None) -> Separation:
        """Separate wave (C, T) at `sample_rate` into the named sources."""
        ...


@dataclass(frozen=True)
class Source:
    """One source to find: its stem's name, the key of its prior, its class number (None: the null class)."""

    name: str
    prior: str
    label: int | None


def audible(stems: Tensor) -> Tensor:
    """How much stems (B, K, N) are there, 0..1: 1 down to 20 dB under the loudest of the K, 0 from `INACTIVE` on."""
    level = 20 * stems.square().mean(-1).sqrt().clamp(min=1e-12).log10()
    return ((level - level.amax(-1, keepdim=True) - INACTIVE) / 20).clamp(0, 1)


def restarts_for(sources: int, asked: int | None) -> int:
    """How often so many sources that are refined are sampled again, None being asked for or a number."""
    return sources - 1 if asked is None else asked


def shares_for(share: float, restarts: int, named: bool) -> list[float]:
    """The share of its field by which the refiner moves stems each time, all sounds having a class or not."""
    shares = [share] * (restarts + 1)
    if restarts and named:
        shares[-1] *= LAST_REFINE
    return shares


def numbered(sources: Sequence[Source]) -> list[Source]:
    """The sources with names of their own: two of "speech" become speech_1 and speech_2."""
    names = [source.name for source in sources]
    counts = dict.fromkeys(names, 0)
    found = []
    for source in sources:
        counts[source.name] += 1
        suffix = f"_{counts[source.name]}" if names.count(source.name) > 1 else ""
        found.append(Source(source.name + suffix, source.prior, source.label))
    return found


class Separator:
    """Separation by posterior sampling under pretrained source priors.

    Args:
        priors: name -> prior; all of one sample rate.
        preset: "default", "published" or "paper", see `audiosep.samplers`.
        sampler: "hybrid", "dsg", "dps", "analytical", "mmps", "mmps-exact"; None is the preset's own.
        mixing: (C, K) gains with which the sources reach the C channels, in the order in which they are named; the
            channels are then separated together, by "mmps" or "mmps-exact", and a stem is its source as each channel
            has it.
            None: every channel is a recording of its own.
        steps: of the sampler, per sample; None is the preset's own number.
        sampling: more arguments of the sampler's class, such as {"t_init": 174, "floor": 0.001, "loss": {"stft": 0.0}}.
        segment: seconds separated at a time; None is 4.
        overlap: fraction of a segment shared with the next, 0..0.5.
        samples: runs of the sampler that a stem is made of; None is the preset's own number.
        guidance: how far tagger and classifier move estimates towards their own classes in each step, less at less
            noise, 0 for not at all (see `audiosep.guidance`); None is the preset's own. Where they do, priors are not
            told the class. Only the default preset's own sampler has it, for sources of two classes at least that both
            know.
        low_rank: how far estimates move, in all steps but the noisiest, towards spectrograms of low rank, 0..1, 0 for
            not at all; the last step moves sounds alone, among themselves, where there are several, four times as far,
            the whole way at most (see `audiosep.lowrank`). None is the preset's own. Only the default preset's own
            sampler has it, where there are sounds, and one voice at most; one sound without a class, which may be all
            the rest, has a higher rank and no last step.
        refine: how far a network that has heard all of a mixture's stems moves them each time, 0..1, 0 for not at all
            (see `audiosep.refiner`); the last time, after restarts, half as far, unless one has no class. None is the
            preset's own. Only the default preset's own sampler has it, for two or three sources of different names that
            the network knows, one of which may have no class.
        restarts: how often, where stems are refined, the sampler takes its last two steps again from them, and they are
            refined anew; with fewer than four steps, half of them, rounded down. None is one less than there are
            sources, and 0 where there is one step or the sampler ends at other noise than the default's.
        least_noise: level of the sampler's last step, relative to full scale. At 0.063, which is the default preset's
            for its own sampler without a mixing, a sample is the mean of what the sources could still become: nearer to
            the truth on average, and found in half the time. At 0.002, the other samplers', it is a sample, with all
            details.
        combine: how: "wiener" (None; `mixing.combine`, their mean where they agree, filtered where not) or "mean".
        seed: of the noise; the same seed and number type give the same stems, to rounding, on every machine.
        consistent: share the residual out, so that the stems add up to the recording.
        batch: segments separated together; None is 1 on a CPU, 16 elsewhere, halved when memory runs out.
        checkpointing: recompute activations in the backward pass of gradient samplers: less memory, a third more time.
        compile: have torch.compile make the networks faster for segments of full length, the others as ever: for long
            recordings, as the first segment waits a minute or two. In place: the priors stay compiled, and copies of
            them would use their weights.
        dtype: "auto" (bfloat16 on CUDA and on CPUs with instructions for it, else float32), "float32", "bfloat16" or
            "float16", for the networks.
    """

    def __init__(
        self,
        priors: Mapping[str, Prior],
        *,
        preset: str = "default",
        sampler: str | None = None,
        steps: int | None = None,
        sampling: Mapping[str, Any] | None = None,
        segment: float | None = None,
        overlap: float = 0.25,
        samples: int | None = None,
        guidance: float | None = None,
        low_rank: float | None = None,
        refine: float | None = None,
        restarts: int | None = None,
        least_noise: float | None = None,
        combine: str | None = None,
        seed: int = 0,
        consistent: bool = True,
        batch: int | None = None,
        checkpointing: bool = False,
        compile: bool = False,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        mixing: Any = None,
    ) -> None:
        if not priors:
            raise UsageError("a separator needs at least one prior")
        rates = {name: prior.sample_rate for name, prior in priors.items()}
        if len(set(rates.values())) > 1:
            raise UsageError(f"priors of one separator must share a sample rate, got {rates}")
        if not 0 <= overlap <= 0.5:
            raise UsageError(f"overlap must lie in 0..0.5 of a segment, got {overlap}")
        if segment is not None and segment < 0.1:
            raise UsageError(f"segment must be at least 0.1 s, got {segment} s")
        if samples is not None and samples < 1:
            raise UsageError(f"samples must be at least 1, got {samples}")
        if guidance is not None and not 0 <= guidance < math.inf:
            raise UsageError(f"guidance must be at least 0, got {guidance}")
        if low_rank is not None and not 0 <= low_rank <= 1:
            raise UsageError(f"low_rank lies in 0..1, got {low_rank}")
        if refine is not None and not 0 <= refine <= 1:
            raise UsageError(f"refine lies in 0..1, got {refine}")
        if restarts is not None and restarts < 0:
            raise UsageError(f"restarts must be at least 0, got {restarts}")
        if combine not in (None, "wiener", "mean"):
            raise UsageError(f"combine is 'wiener' or 'mean', not {combine!r}")
        self.device = torch.device(device)
        self.priors = {name: prior.to(self.device).eval() for name, prior in priors.items()}
        for prior in self.priors.values():
            prior.requires_grad_(False)
            prior.checkpoint_activations(checkpointing)
            if compile:
                compile_network(prior.backbone, self.device, round((segment or SEGMENT) * prior.sample_rate))
        self.sample_rate = next(iter(rates.values()))
        self.mixing = None if mixing is None else torch.as_tensor(np.asarray(mixing), dtype=torch.float32)
        if self.mixing is not None:
            if self.mixing.ndim != 2 or not self.mixing.isfinite().all():
                raise UsageError(f"mixing is a finite matrix (channels, sources), got shape {tuple(self.mixing.shape)}")
            if (sampler or PRESETS.get(preset)) not in ("mmps", "mmps-exact"):
                raise UsageError(f"a known mixing needs sampler 'mmps' or 'mmps-exact', not {sampler or preset!r}")
        self.preset, self.sampler, self.steps = preset, sampler, steps
        # Whether estimates go to the class that they fit: in the published loop they stay as they come, and a known
        # mixing says which is which.
        self.exchanges = preset == "default" and self.mixing is None
        guided = self.exchanges and (sampler or PRESETS[preset]) == "mmps"
        if guidance and not guided:
            raise UsageError("guidance by the classifier is for the default preset with its own sampler and no mixing")
        if low_rank and not guided:
            raise UsageError("low-rank guidance is for the default preset with its own sampler and no mixing")
        if refine and not guided:
            raise UsageError("refinement is for the default preset with its own sampler and no mixing")
        if restarts and not guided:
            raise UsageError("restarts are for the default preset with its own sampler and no mixing")
        self.guidance = float(GUIDANCE if guidance is None else guidance) if guided else 0.0
        self.low_rank = float(LOW_RANK if low_rank is None else low_rank) if guided else 0.0
        self.refine = float(REFINE if refine is None else refine) if guided else 0.0
        self.least_noise = LEAST_NOISE if guided and least_noise is None else least_noise
        as_chosen = guided and self.least_noise == LEAST_NOISE
        self.restarts = restarts if as_chosen or restarts is not None else 0
        self.sampling = dict(sampling or {})
        self.segment, self.overlap = segment or SEGMENT, overlap
        self.seed, self.consistent = seed, consistent
        self.batch = batch or (1 if self.device.type == "cpu" else 16)
        self.dtype, self.compiled = choose_dtype(dtype, self.device), compile
        self._listeners: dict[str, Tagger | Refiner] = {}  # each is read once
        empty = self._build(JointPrior([]))  # wrong options are refused here, not after minutes of work
        self.again = min(AGAIN, len(empty.times) // 2)  # a restart from much noise would be another run
        if not self.again:
            if restarts:
                raise UsageError(f"restarts need a sampler of at least 2 steps, got {len(empty.times)}")
            self.restarts = 0
        self.samples, self.combine = samples or SAMPLES[preset], combine or "wiener"
        self.rank = (samples or 1) > 1  # the likeliest sample is wanted, too

    @classmethod
    def from_pretrained(
        cls,
        names: str | Sequence[str] = "speech,sound",
        device: str | torch.device = "auto",
        **options: Any,
    ) -> Separator:
        """Load priors by name, folder or Hub id (a list, or one string with commas) and build a separator."""
        device = choose_device(device)
        names = names.split(",") if isinstance(names, str) else names
        names = [str(name).strip() for name in names]
        keys = [Path(name).name.split("@")[0] if "/" in name else name for name in names]
        if len(set(keys)) < len(keys):
            raise UsageError(f"two of the models {', '.join(names)} have one name; rename a folder")
        priors = {key: hub.load_prior(name) for key, name in zip(keys, names)}
        return cls(priors, device=device, **options)

    @functools.cached_property
    def classifier(self) -> Ensemble | None:
        """The shipped tagger and classifier as one; None where they have nothing to tell, or hear at another rate."""
        if not self.exchanges or not any(prior.classes for prior in self.priors.values()):
            return None
        try:
            listeners = {name: self._listener(name) for name in (TAGGER, CLASSIFIER)}
        except ModelError as error:
            log.warning("no class guidance, and sounds are told apart by their priors alone: %s", error)
            return None
        for name, listener in listeners.items():
            if listener.sample_rate != self.sample_rate:
                why = f"{name} hears at {listener.sample_rate} Hz, the priors are of {self.sample_rate} Hz"
                log.warning("no class guidance, and sounds are told apart by their priors alone: %s", why)
                return None
        return Ensemble(*listeners.values())

    @functools.cached_property
    def refiner(self) -> Refiner | None:
        """The shipped refiner; None where it isn't asked for, no prior has classes, or it can't be had at this rate."""
        if not self.refine or not any(prior.classes for prior in self.priors.values()):
            return None
        try:
            refiner = self._listener(REFINER)
        except ModelError as error:
            log.warning("stems are left as the sampler found them: %s", error)
            return None
        if refiner.sample_rate != self.sample_rate:
            why = f"the refiner hears at {refiner.sample_rate} Hz, the priors are of {self.sample_rate} Hz"
            log.warning("stems are left as the sampler found them: %s", why)
            return None
        return refiner

    @property
    def tagger(self) -> Tagger:
        """The shipped tagger, for "auto"; ModelError when it can't be had."""
        return self._listener(TAGGER)

    def _listener(self, name: str) -> Any:
        if name not in self._listeners:
            self._listeners[name] = hub.load_model(name, self.device)
        return self._listeners[name]

    @property
    def settings(self) -> dict[str, Any]:
        """What its stems follow from besides all weights, input and seed, defaults included; plain data."""
        sampler = self._build(JointPrior([]))
        return {
            "preset": self.preset,
            "sampler": self.sampler or PRESETS[self.preset],
            "steps": len(sampler.times),
            "noise levels": [sampler.ratios[0], sampler.ratios[-2]],
            "samples": self.samples,
            "combine": self.combine,
            "sampling": self.sampling,
            "segment": self.segment,
            "overlap": self.overlap,
            "consistent": self.consistent,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    # What to find ---------------------------------------------------------------------------------

    def source_names(self, sources: Sequence[str] | None = None) -> list[str]:
        """Names of the stems that `sources` gives; none for "auto", which needs a recording."""
        if _is_auto(sources):
            return []
        return [source.name for source in self.resolve(sources)]

    def resolve(self, sources: Sequence[str] | None) -> list[Source]:
        """Look source names up: class names of the priors, or a prior's own name for its null class.

        Raises:
            UsageError: a name is unknown, or belongs to several priors ("prior:name" says which).
        """
        if isinstance(sources, str):
            sources = sources.split(",")
        if sources is None:
            return [Source(key.lower(), key, None) for key in self.priors]
        if not sources:
            raise UsageError("no source named; leave `sources` out for one per prior")
        return numbered([self._find(name.strip()) for name in sources])

    def _find(self, name: str) -> Source:
        wanted, _, narrowed = name.casefold().rpartition(":")[::-1]
        priors = {key: prior for key, prior in self.priors.items() if narrowed in ("", key.casefold())}
        for key in priors:
            if key.casefold() == wanted:  # a prior's own name comes before what several may share
                return Source(wanted, key, None)
        hits = []
        for key, prior in priors.items():
            labels = [i for i, label in enumerate(prior.classes) if label.casefold() == wanted]
            if prior.kind.casefold() == wanted:
                hits.append(Source(wanted, key, None))
            elif labels:
                hits.append(Source(wanted, key, labels[0]))
        if len(hits) == 1:
            return hits[0]
        if hits:
            choices = ", ".join(f"{hit.prior}:{wanted}" for hit in hits)
            raise UsageError(f"source {name!r} is ambiguous; say which: {choices}")
        known = [f"{key} ({', '.join(prior.classes)})" if prior.classes else key for key, prior in self.priors.items()]
        raise UsageError(f"unknown source {name!r}; the loaded priors know: {'; '.join(known)}")

    def listen(self, blocks: Iterable[np.ndarray], sample_rate: int) -> tuple[list[str], dict[str, Any]]:
        """What a recording holds, for "auto".

        The shipped tagger hears segment by segment; a label's score is the highest of all segments.

        Args:
            blocks: the recording (C, n), piece by piece; its channels are averaged.
            sample_rate: in Hz.

        Returns:
            The names found, two at least; and for the report the tagger, and the highest of all its labels' scores.
        """
        tagger = self.tagger
        allowed = [label for label in ("speech", "sound", *tagger.classes) if self._knows(label)]
        size = round(self.segment * sample_rate)
        scores = torch.zeros(len(tagger.labels))
        for number, (segment, _) in enumerate(cut(blocks, size, size)):
            if number and segment.shape[1] < sample_rate:
                break  # what is left at the end, under a second, says little
            low = audio.resample(segment.mean(0, keepdims=True), sample_rate, tagger.sample_rate)
            with torch.no_grad():
                found = tagger(torch.from_numpy(low).float().to(self.device))[0].cpu()
            scores = torch.maximum(scores, found)
        names = tagger.choose(scores.tolist(), allowed)
        ranked = sorted(zip(tagger.labels, scores.tolist()), key=lambda pair: -pair[1])
        table = {label: round(score, 4) for label, score in ranked[:REPORTED]}
        return names, {"tagger": tagger.origin, "threshold": tagger.threshold, "scores": table, "chosen": names}

    def _knows(self, name: str) -> bool:
        try:
            self._find(name)
        except UsageError:
            return False
        return True

    def _wanted(
        self, sources: Sequence[str] | None, blocks: Callable[[], Iterable[np.ndarray]], sample_rate: int
    ) -> tuple[list[Source], dict[str, Any]]:
        """The sources to find, and what the report says of how they were chosen."""
        if not _is_auto(sources):
            return self.resolve(sources), {}
        names, facts = self.listen(blocks(), sample_rate)
        return self.resolve(names), {"auto": facts}

    # Separation -----------------------------------------------------------------------------------

    @torch.inference_mode(False)  # guidance takes gradients
    def __call__(
        self,
        wave: Array,
        sample_rate: int,
        sources: Sequence[str] | None = None,
        progress: Callback | None = None,
    ) -> Separation:
        """Separate a recording in memory.

        Args:
            wave: (C, T) or (T,), torch or numpy, full scale 1.
            sample_rate: of `wave`, in Hz.
            sources: names to find; None is one per prior, "auto" what the shipped tagger hears.
            progress: called with (steps done, steps in all, what is done).

        Returns:
            Arrays of the input's kind, shape, type and device.

        Raises:
            UsageError: the array is empty, not finite, of a wrong shape; a name is unknown.
        """
        array = as_array(wave)
        if array.ndim not in (1, 2) or array.size == 0:
            raise UsageError(f"wave must be (channels, time) with samples in it, got shape {array.shape}")
        if not np.isfinite(array).all():
            raise UsageError("wave holds NaN or infinite samples; repair the recording first")
        if array.ndim == 2 and array.shape[0] > array.shape[1]:
            raise UsageError(f"wave must be (channels, time), got shape {array.shape}: transpose it")
        if array.dtype.kind != "f":
            raise UsageError(f"wave must be of floating point, full scale 1, got {array.dtype}")
        if sample_rate != int(sample_rate) or sample_rate <= 0:
            raise UsageError(f"sample_rate must be a whole number of Hz above 0, got {sample_rate}")
        sample_rate = int(sample_rate)
        wanted, heard = self._wanted(sources, lambda: [np.atleast_2d(array)], sample_rate)
        job = self._job(wanted, sample_rate, array.shape[-1], progress, True)
        pieces = list(job.run([np.atleast_2d(array)]))

        def back(stems: Tensor) -> Any:
            joined = stems.numpy().reshape(*stems.shape[:1], *array.shape)
            if isinstance(wave, Tensor):
                return torch.from_numpy(joined).to(wave)
            return joined.astype(array.dtype)

        stems = torch.cat([piece.stems for piece in pieces], -1)
        rest = torch.from_numpy(np.atleast_2d(array)).double() - stems.sum(0)
        result = Separation(
            sources=dict(zip(job.names, back(stems))),
            sample_rate=sample_rate,
            residual=back(rest[None])[0],
            report={**job.report(), **heard},
        )
        if self.rank:
            result.best = dict(zip(job.names, back(torch.cat([p.best for p in pieces], -1))))
        if self.samples > 1:
            result.spread = dict(zip(job.names, back(torch.cat([p.spread for p in pieces], -1))))
        return result

    @torch.inference_mode(False)
    def separate_file(
        self,
        path: str | Path,
        out: str | Path | Callable[[str], Path | str],
        sources: Sequence[str] | None = None,
        *,
        format: str | None = None,
        subtype: str | None = None,
        residual: bool = False,
        progress: Callback | None = None,
    ) -> dict[str, Any]:
        """Separate a file piece by piece; memory does not grow with its length.

        Args:
            path: the recording, "-" for standard input.
            out: folder for `<stem>.<format>`, or a function from stem name to path.
            sources: names to find; None is one per prior, "auto" what the shipped tagger hears.
            format: of the stems: "wav", "flac", ...; None is wav.
            subtype: of the samples: "PCM_16", "FLOAT", ...; None is the input's where the format has it.
            residual: leave the stems as they were estimated and write what completes the sum as `residual`.
            progress: called with (steps done, steps in all, what is done).

        Returns:
            The report, with the paths written under "files".

        Raises:
            AudioError: the input can't be read or an output can't be written; nothing is left under a final name.
        """
        if not _is_auto(sources):
            self.resolve(sources)  # a wrong name is refused before the file is opened
        suffix = (format or "wav").lower()
        place = out if callable(out) else lambda stem: Path(out) / f"{stem}.{suffix}"
        with audio.open_reader(path) as reader, contextlib.ExitStack() as stack:
            info = reader.info
            wanted, heard = self._wanted(sources, lambda: reader.blocks(info.sample_rate), info.sample_rate)
            job = self._job(wanted, info.sample_rate, info.frames, progress, not residual)
            extra = [f"{name}_best" for name in job.names] if self.rank else []
            names = [*job.names, *extra, *(["residual"] if residual else [])]
            paths = {name: place(name) for name in names}
            # All outputs are opened before the work starts, so that what can't be written is known at once.
            writers = {
                name: stack.enter_context(
                    audio.Writer(
                        target,
                        info.sample_rate,
                        info.channels,
                        format=format,
                        subtype=subtype or audio.subtype_for(info, suffix),
                        frames=info.frames,
                    )
                )
                for name, target in paths.items()
            }
            for piece in job.run(reader.blocks(info.sample_rate)):
                for name, stem in zip(job.names, piece.stems):
                    writers[name].write(stem.numpy())
                for name, stem in zip(extra, piece.best):
                    writers[name].write(stem.numpy())
                if residual:
                    writers["residual"].write((piece.mixture - piece.stems.sum(0)).numpy())
        report = {**job.report(), **heard}
        report["input"] = {"path": str(path), "subtype": info.subtype, **report["input"]}
        report["files"] = {name: str(target) for name, target in paths.items()}
        report["clipped_samples"] = {name: writer.clipped for name, writer in writers.items()}
        return report

    def _job(
        self, sources: Sequence[Source], sample_rate: int, frames: int | None, progress: Callback | None, share: bool
    ) -> Job:
        return Job(self, sources, sample_rate, frames, progress, share)

    def gain(self, y: Tensor, sources: Sequence[Source]) -> Tensor:
        """What brings mixtures y (B, N), (B, C, N) of a known mixing, to the level of such sums of training signals.

        One number per mixture, (B, 1) or (B, 1, 1).
        """
        level = float(np.mean([self.priors[source.prior].sigma_data for source in sources]))
        power = len(sources) if self.mixing is None else float(self.mixing.square().sum()) / len(self.mixing)
        rms = y.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (y.ndim - 1))
        return level * power**0.5 / rms.clamp(min=SILENCE)

    def sampler_for(self, sources: Sequence[Source]) -> Sampler:
        """The sampler of these sources, with the settings asked for.

        Priors of sources that class guidance tells apart are not told the class: what they know of it is what the
        recordings were like that they were trained on. Those that were never trained without it are.
        """
        guides = self._guides(sources)
        guided = {k for group, _ in guides for k in group}
        asked: list[tuple[Prior, int | None]] = []
        for k, source in enumerate(sources):
            prior = self.priors[source.prior]
            asked.append((prior, None if k in guided and prior.label_dropout else source.label))
        joint = JointPrior(asked, self.dtype)
        if self.mixing is None:
            sampler = self._build(joint)
            steer = self._steer(sources, guides, sampler.ratios[-2])
            return sampler if steer is None else self._build(joint, steer=steer)
        if self.mixing.shape[1] != len(sources):
            raise UsageError(
                f"the mixing matrix has {self.mixing.shape[1]} columns, for {len(sources)} sources "
                f"({', '.join(source.name for source in sources)})"
            )
        exact = self.sampler == "mmps-exact"
        known: dict[str, Any] = {"operator": Mixing(self.mixing)} if exact else {"mixing": self.mixing}
        return self._build(joint, **known)

    def exchange_groups(self, sources: Sequence[Source]) -> list[list[int]]:
        """Positions of sources that may be found in each other's places, a list for each group.

        All of them, where tagger and classifier know them; otherwise those of one prior, which differ by class alone.
        """
        if not self.exchanges:
            return []
        alone = _alike(source.prior for source in sources)
        groups = alone if self.classifier_of(sources) is None else [list(range(len(sources)))]
        return [group for group in groups if len(set(self.classes_of([sources[k] for k in group]))) > 1]

    def classifier_of(self, sources: Sequence[Source]) -> Ensemble | None:
        """Tagger and classifier, where both know these classes."""
        classifier = None if self._of_its_own(sources) else self.classifier
        return classifier if classifier is not None and classifier.knows(self.classes_of(sources)) else None

    def refiner_of(self, sources: Sequence[Source]) -> Refiner | None:
        """The refiner, where it can tell these sources apart."""
        alike = len({name.casefold() for name in self.classes_of(sources)}) < len(sources)
        refiner = None if alike or self._of_its_own(sources) else self.refiner
        return refiner if refiner is not None and refiner.knows(self.classes_of(sources)) else None

    def refinements(self, sources: Sequence[Source]) -> list[float]:
        """The share of its field by which the refiner moves stems each time, a restart between; [] where it doesn't."""
        refiner = self.refiner_of(sources)
        if refiner is None:
            return []
        named = UNNAMED not in refiner.numbers(self.classes_of(sources)).tolist()
        return shares_for(self.refine, restarts_for(len(sources), self.restarts), named)

    def _of_its_own(self, sources: Sequence[Source]) -> bool:
        """Whether one of the priors may be of a sound of its own: it has no classes, and isn't of speech."""
        priors = [self.priors[source.prior] for source in sources]
        return not all(prior.classes or prior.kind == "speech" for prior in priors)

    def classes_of(self, sources: Sequence[Source]) -> list[str]:
        """Class names of sources, the null class's is the prior's kind."""
        priors = [self.priors[source.prior] for source in sources]
        return [class_name(prior, source.label) or prior.kind for prior, source in zip(priors, sources)]

    def guided(self, sources: Sequence[Source]) -> dict[str, Any]:
        """The report's part on what guides the sampler to these sources, 0 where it doesn't."""
        told = any(self.classifier_of([sources[k] for k in group]) for group in self.exchange_groups(sources))
        low = self._low_rank(sources) is not None
        shares = self.refinements(sources)
        return {
            "guidance": self.guidance if told else 0.0,
            "low_rank": self.low_rank if low else 0.0,
            "refine": self.refine if shares else 0.0,
            "restarts": max(0, len(shares) - 1),
            "refinements": shares,
        }

    def _guides(self, sources: Sequence[Source]) -> list[tuple[list[int], ClassGuidance]]:
        """Positions of the sources that tagger and classifier tell apart, group by group, and their class guidance."""
        guides = []
        for group in self.exchange_groups(sources) if self.guidance else []:
            members = [sources[k] for k in group]
            classifier = self.classifier_of(members)
            if classifier is not None:
                guides.append((group, ClassGuidance(classifier, self.classes_of(members), self.guidance)))
        return guides

    def _steer(
        self, sources: Sequence[Source], guides: Sequence[tuple[list[int], ClassGuidance]], last: float
    ) -> Callable[[Tensor, float], Tensor] | None:
        """Class guidance, then low-rank guidance of all; `last` is the noise of the last step."""
        low_rank = self._low_rank(sources)
        placed = [(torch.tensor(group, device=self.device), guide) for group, guide in guides]
        sounds = [k for k, rank in enumerate(self._ranks(sources)) if rank == 1]
        among, index = self._low_rank([sources[k] for k in sounds]), torch.tensor(sounds, device=self.device)

        def steer(x: Tensor, noise: float) -> Tensor:
            for group, guide in placed if noise >= STEERED else ():
                x = x.index_copy(1, group, guide(x[:, group], noise))
            if low_rank is None or noise >= VAGUE:
                return x
            if among is not None and noise <= last:
                return x.index_copy(1, index, among(x[:, index], LAST))
            return low_rank(x) if noise >= STEERED else x

        return steer if placed or low_rank is not None else None

    def _low_rank(self, sources: Sequence[Source]) -> LowRank | None:
        """Guidance by low rank; two voices share their spectra."""
        voices = sum(self.priors[source.prior].kind == "speech" for source in sources)
        if not self.low_rank or len(sources) < 2 or voices > 1:
            return None
        return LowRank(self._ranks(sources), self.low_rank, self.device)

    def _ranks(self, sources: Sequence[Source]) -> list[int]:
        """Of the sources' spectrograms; several sounds without a class are meant to be one sound each."""
        ranks = [RANKS.get(self.priors[source.prior].kind, 1) for source in sources]
        free = [k for k, source in enumerate(sources) if ranks[k] == 1 and source.label is None]
        if len(free) == 1:
            ranks[free[0]] = REST_RANK
        return ranks

    def _build(self, joint: JointPrior, **options: Any) -> Sampler:
        options |= sampler_options(self.sampling)
        try:
            return build(joint, self.sampler, self.preset, self.steps, self.least_noise, **options)
        except UsageError:
            raise
        except (TypeError, ValueError) as error:
            raise UsageError(f"sampling {self.sampling}: {error}") from error


def _alike(keys: Iterable[Hashable]) -> list[list[int]]:
    """Positions of equal keys, a list for each."""
    found: dict[Hashable, list[int]] = {}
    for k, key in enumerate(keys):
        found.setdefault(key, []).append(k)
    return list(found.values())


@dataclass
class Piece:
    """Finished samples: mixture (C, n), stems, best and spread (K, C, n), float64 on the CPU."""

    mixture: Tensor
    stems: Tensor
    best: Tensor
    spread: Tensor


class Job:
    """One recording on its way through a separator, and what is to be reported of it."""

    def __init__(
        self,
        separator: Separator,
        sources: Sequence[Source],
        sample_rate: int,
        frames: int | None,
        progress: Callback | None,
        share: bool,
    ) -> None:
        if len(sources) == 1:
            raise UsageError(
                f"{sources[0].name!r} alone would be the whole recording: name what else is in it, "
                "as in --sources speech,sound"
            )
        self.separator, self.sources = separator, sources
        self.names = [source.name for source in sources]
        self.sample_rate, self.share = sample_rate, share and separator.consistent
        self.batch = separator.batch
        self.refiner: Refiner | None = None
        # Segments start on a grid that both sample rates share.
        unit = sample_rate // math.gcd(sample_rate, separator.sample_rate)
        self.segment = unit * max(1, round(separator.segment * sample_rate / unit))
        self.hop = max(unit, unit * round(self.segment / unit * (1 - separator.overlap)))
        self.steps = self._prepare()
        self.progress, self.done = progress, 0
        segments = None if frames is None else count_segments(frames, self.segment, self.hop)
        self.total = None if segments is None else segments * self.steps * separator.samples
        self.groups = [group for group in _alike((source.prior, source.label) for source in sources) if len(group) > 1]
        self.aligner = Aligner(self.groups, self.segment - self.hop)
        self.segments = self.frames = self.channels = self.evaluations = 0
        self.energy = torch.zeros(len(sources), dtype=torch.float64)
        self.mixture_energy = self.residual_energy = 0.0
        self.spread_energy = torch.zeros(len(sources), dtype=torch.float64)
        self.started = time.perf_counter()
        self.seconds = 0.0

    def _prepare(self) -> int:
        """Make what separates ready; how many steps it takes per sample, restarts among them."""
        separator = self.separator
        self.sampler = separator.sampler_for(self.sources)
        self.exchanged = separator.exchange_groups(self.sources)
        self.refiner = separator.refiner_of(self.sources)
        steps = len(self.sampler.times)
        if self.sampler.evaluations > steps:
            log.warning(
                "%s takes up to %d network evaluations per step, forward and backward, where others take one",
                separator.sampler,
                self.sampler.evaluations // steps,
            )
        self.restart_at = steps - separator.again
        self.shares = separator.refinements(self.sources)
        return steps + max(0, len(self.shares) - 1) * separator.again

    def run(self, blocks: Iterable[np.ndarray]) -> Iterator[Piece]:
        """Separate a stream of blocks (C, n)."""
        size = self.segment, self.hop
        adders = [OverlapAdd(*size) for _ in range(4)]
        for batch in self._batches(cut(blocks, *size)):
            for piece, (_, last) in zip(self._separate([wave for wave, _ in batch]), batch):
                order = self.aligner.align(piece.stems)
                parts = [piece.mixture[None], piece.stems[order], piece.best[order], piece.spread[order]]
                mixture, *done = [adder.add(part, last) for adder, part in zip(adders, parts)]
                yield self._finish(Piece(mixture[0], *done))
        self.seconds = time.perf_counter() - self.started

    def _batches(self, segments: Iterable[tuple[np.ndarray, bool]]) -> Iterator[list[tuple[np.ndarray, bool]]]:
        """Collect segments of one length, at most `batch` at a time."""
        held: list[tuple[np.ndarray, bool]] = []
        for segment in segments:
            if held and segment[0].shape != held[0][0].shape:
                yield held
                held = []
            held.append(segment)
            if len(held) >= self.batch:
                yield held
                held = []
        if held:
            yield held

    def _separate(self, waves: list[np.ndarray]) -> list[Piece]:
        """Separate segments (C, n) of one length; when memory runs out, in smaller batches, then with checkpointing."""
        counts = self.done, self.evaluations
        try:
            return self._attempt(waves)
        except torch.OutOfMemoryError:
            self.done, self.evaluations = counts
            if len(waves) == 1 and not self._save_memory():
                raise AudiosepError(
                    f"out of memory on {self.separator.device} with a single segment of "
                    f"{self.separator.segment:g} s; use a shorter --segment or --device cpu"
                ) from None
        torch.cuda.empty_cache()
        if len(waves) == 1:
            return self._separate(waves)
        half = self.batch = len(waves) // 2
        log.warning("out of memory: going on with %d segments at a time", half)
        return self._separate(waves[:half]) + self._separate(waves[half:])

    def _save_memory(self) -> bool:
        """Let the networks recompute activations in the backward pass; False where that is done or saves nothing."""
        if not self.sampler.needs_gradient:
            return False
        if not any([prior.checkpoint_activations(True) for prior in self.separator.priors.values()]):
            return False
        log.warning("out of memory: going on with activation checkpointing")
        return True

    def _attempt(self, waves: list[np.ndarray]) -> list[Piece]:
        separator = self.separator
        native = torch.from_numpy(np.stack(waves)).double()  # (S, C, n)
        low = np.stack([audio.resample(w, self.sample_rate, separator.sample_rate) for w in waves])
        y = torch.from_numpy(low).float()
        estimates, scores = self._draw(y)  # (samples, S, K, C, N), (samples, S)
        pieces = []
        for s, mixture in enumerate(native):
            drawn = [self._restore(mixture, sample) for sample in estimates[:, s]]
            drawn = [drawn[0], *(self._as_first(drawn[0], other) for other in drawn[1:])]
            stack = torch.stack(drawn)
            pieces.append(
                Piece(
                    mixture.double(),
                    self._combine(mixture, stack),
                    stack[scores[:, s].argmax()],
                    stack.std(0, correction=0),
                )
            )
        self.segments += len(waves)
        return pieces

    def _draw(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Sources at the priors' rate (samples, S, K, C, N) for mixtures y (S, C, N), and their scores (samples, S)."""
        separator = self.separator
        count, channels, length = y.shape
        mixing = separator.mixing
        if mixing is None:  # every channel is a row
            rows = y.flatten(0, 1).to(separator.device)  # (S * C, N)
        elif len(mixing) == channels:
            rows = y.to(separator.device)  # (S, C, N)
        else:
            raise UsageError(f"the mixing matrix has {len(mixing)} rows, the recording {channels} channels")
        gain = separator.gain(rows, self.sources)
        silent = rows.square().flatten(1).mean(1).sqrt().view(gain.shape) < SILENCE
        each = len(rows) // count
        # The channels of a segment share their noise, so that identical channels give identical stems.
        segments = [self.segments + i // each for i in range(len(rows))]
        noises = [Noise([mix_seed(separator.seed, s, n) for s in segments]) for n in range(separator.samples)]
        found = [self._run_sampler(rows * gain, noise, count) for noise in noises]
        if self.exchanged:
            found = self._by_class(found, each)
        for n, share in enumerate(self.shares):
            if n:
                starts = [(x, self.restart_at) for x in found]
                found = [self._run_sampler(rows * gain, noise, count, start) for noise, start in zip(noises, starts)]
            found = self._refined(found, share)
        drawn, scores = [], []
        for x in found:
            score = self._log_likelihood(x) if separator.rank else torch.zeros(len(x))
            scores.append(score.view(count, each).mean(1).cpu())
            sources = torch.where(silent.view(-1, 1, 1), 0.0, x / gain.view(-1, 1, 1))
            if mixing is None:
                sources = sources.view(count, channels, len(self.sources), length).transpose(1, 2)
            else:
                sources = mixing.to(sources).T[:, :, None] * sources[:, :, None]
            drawn.append(sources.cpu())
        return torch.stack(drawn), torch.stack(scores)

    def _refined(self, samples: list[Tensor], share: float) -> list[Tensor]:
        """Samples (S * C, K, N) moved by a share of the refiner's field."""
        assert self.refiner is not None
        labels = self.refiner.numbers(self.separator.classes_of(self.sources)).to(samples[0].device)
        return self.refiner.refine(samples, labels.expand(len(samples[0]), -1), share)

    def _run_sampler(self, y: Tensor, noise: Noise, count: int, restart: tuple[Tensor, int] | None = None) -> Tensor:
        x = y[:, None]
        for state in self.sampler(y, noise, restart):
            x = state.x
            self.done += count
            self.evaluations += len(y) * len(self.sources) * self.sampler.passes
            if self.progress is not None:
                part = "" if restart is None else "restart, "
                self.progress(self.done, self.total, f"{part}step {state.step}/{state.steps}")
        if not x.isfinite().all():
            raise AudiosepError(
                f"the networks gave NaN or infinite samples in {str(self.separator.dtype).removeprefix('torch.')}; "
                "use --dtype float32"
            )
        return x.float()

    @torch.no_grad()
    def _by_class(self, samples: Sequence[Tensor], channels: int = 1) -> list[Tensor]:
        """Samples (S * C, K, N), their estimates exchanged among the sources so that each fits its class.

        A sampler tells sounds apart better than it names them. What each sample and channel of a segment says of
        its estimates counts for those of the first as far as they sound alike; the others then follow the first, unless
        theirs fit better otherwise. What fits elsewhere about as well stays with its prior.
        """
        parts = [part for x in samples for part in x.unflatten(0, (-1, channels)).unbind(1)]  # (S, K, N)
        for members in self.exchanged:
            first, *others = (x[:, members] for x in parts)
            fits = [self._fits(x, members) for x in (first, *others)]
            alike = [(LIKENESS * cosine(first, x)).softmax(-1) for x in others]
            # Leaving a prior must pay; leaving anything at all, just above rounding.
            own, still = self._own(members).to(first), torch.eye(len(members)).to(first) / 64
            lead = LEAD * own + still
            pooled = lead + fits[0] + sum(share @ fit for share, fit in zip(alike, fits[1:]))
            order = best_permutation(pooled)
            stems = [permute(first, order)]
            # Where one of the first has left its prior, none of the others is held back.
            kept = own[order, torch.arange(len(members), device=order.device)].bool().all(-1)[:, None, None]
            stay = torch.where(kept, lead, still)
            for x, fit in zip(others, fits[1:]):
                stems.append(permute(x, best_permutation(stay + fit + LIKENESS * cosine(x, stems[0]))))
            index = torch.tensor(members, device=first.device)
            parts = [x.index_copy(1, index, stem) for x, stem in zip(parts, stems)]
        return [torch.stack(parts[i : i + channels], 1).flatten(0, 1) for i in range(0, len(parts), channels)]

    def _own(self, members: Sequence[int]) -> Tensor:
        """1 where source j of the members has the prior that estimate i was found with (n, n)."""
        priors = [self.sources[k].prior for k in members]
        return torch.tensor([[float(a == b) for b in priors] for a in priors])

    def _fits(self, x: Tensor, members: Sequence[int]) -> Tensor:
        """How well each of estimates x (B, n, N) fits the class of each of n sources, in nats (B, n, n).

        Tagger and classifier say, where both know the classes, but of what is next to silent. Elsewhere priors do: the
        class under which a denoiser errs least is the likeliest (Alexander C. Li et al., "Your Diffusion Model is
        Secretly a Zero-Shot Classifier", 2023, https://arxiv.org/abs/2303.16203).
        """
        classifier = self._classifier_of(members)
        if classifier is not None:
            return audible(x)[..., None] * classifier.fits(x, self.separator.classes_of(self._of(members)))
        n = len(members)
        # Pair i n + j is estimate i under the class of source j.
        pairs = JointPrior([self.sampler.prior.sources[j] for _ in members for j in members], self.separator.dtype)
        nats = 0.5 * x.shape[-1] * self._errors(pairs, x.repeat_interleave(n, 1), LABEL_NOISE)
        return -nats.unflatten(1, (n, n))

    def _of(self, members: Sequence[int]) -> list[Source]:
        return [self.sources[k] for k in members]

    def _classifier_of(self, members: Sequence[int]) -> Ensemble | None:
        return self.separator.classifier_of(self._of(members))

    def _log_likelihood(self, x: Tensor) -> Tensor:
        """How well sources x (B, K, N) fit their priors (B,)."""
        # What ends at some noise lacks the details that show at less.
        levels = [level for level in SELF_NOISE if level >= self.sampler.ratios[-2]]
        return -self._errors(self.sampler.prior, x, levels or SELF_NOISE[-1:]).mean(1)

    @torch.no_grad()
    def _errors(self, joint: JointPrior, x: Tensor, levels: Sequence[float]) -> Tensor:
        """Denoising errors of x (B, K, N) in units of the noise, which all K share, summed over its levels (B, K).

        They are the integrand of the diffusion model's bound on -log p(x).
        """
        schedule = next(iter(self.separator.priors.values())).schedule
        noise = Noise([0] * len(x))(1, x)
        total = x.new_zeros(x.shape[:2])
        for ratio in levels:
            t = schedule.step_at(torch.tensor(ratio, dtype=torch.float64))
            actual = schedule.ratio_at(t).item()
            alpha = schedule.alpha_of(torch.tensor(actual, dtype=torch.float64)).item()
            self.evaluations += x.shape[0] * x.shape[1]
            estimate = joint.denoise(alpha * (x + actual * noise), t.item(), schedule)
            total += (estimate.float() - x).square().mean(2) / actual**2
        return total

    def _restore(self, mixture: Tensor, sources: Tensor) -> Tensor:
        """Bring sources (K, C, N) to the mixture's rate and length and, by default, onto the mixture (C, n)."""
        rate, length = self.separator.sample_rate, mixture.shape[-1]
        flat = audio.resample(sources.flatten(0, 1).numpy(), rate, self.sample_rate)
        high = torch.from_numpy(fit(flat, length)).view(*sources.shape[:2], length).double()
        # Two speakers may come out in another order in the right channel: the first one's order holds.
        for c in range(1, high.shape[1] if self.separator.mixing is None else 1):
            high[:, c] = self._as_first(high[:, :1], high[:, c : c + 1])[:, 0]
        if not self.share:
            return high
        n_fft = 4 * self._hop
        known = 0.95 * rate / self.sample_rate if self.sample_rate > rate else 1.0
        return project(mixture.double(), high.transpose(0, 1), n_fft, n_fft // 4, known_band=known).transpose(0, 1)

    @property
    def _hop(self) -> int:
        """Of the transforms at the recording's rate: 128 samples at the priors' own."""
        return round(128 * self.sample_rate / self.separator.sample_rate)

    def _combine(self, mixture: Tensor, samples: Tensor) -> Tensor:
        """One estimate (K, C, n) from samples (R, K, C, n) of a mixture (C, n)."""
        if not self.share or self.separator.combine == "mean":
            return samples.mean(0)
        return combine(mixture, samples.transpose(1, 2), 8 * self._hop, 2 * self._hop).transpose(0, 1)

    def _as_first(self, first: Tensor, other: Tensor) -> Tensor:
        """Reorder interchangeable sources of `other` (K, C, n) as they are in `first`."""
        order = list(range(len(other)))
        for group in self.groups:
            best, _ = match(cosine(first[group].flatten(1), other[group].flatten(1)))
            for stem, source in zip(group, best):
                order[stem] = group[source]
        return other[order]

    def _finish(self, piece: Piece) -> Piece:
        """Put what rounding left over into the loudest stem, and take the statistics."""
        if self.share:
            loudest = piece.stems.square().sum((1, 2)).argmax()
            piece.stems[loudest] += piece.mixture - piece.stems.sum(0)
        self.channels, self.frames = len(piece.mixture), self.frames + piece.mixture.shape[-1]
        self.energy += piece.stems.square().sum((1, 2))
        self.spread_energy += piece.spread.square().sum((1, 2))
        self.mixture_energy += piece.mixture.square().sum().item()
        self.residual_energy += residual(piece.mixture, piece.stems.transpose(0, 1)).square().sum().item()
        return piece

    def report(self) -> dict[str, Any]:
        """What was run and how it went, plain data (JSON)."""
        separator, size = self.separator, max(self.frames * self.channels, 1)
        duration = self.frames / self.sample_rate
        mixture_level = decibel(self.mixture_energy / size)
        silent = self.mixture_energy <= size * SILENCE**2
        sources = {}
        for k, source in enumerate(self.sources):
            level = decibel(self.energy[k].item() / size)
            row: dict[str, Any] = {
                **self._about_source(k),
                "level_dbfs": round(level, 2),
                "active": level > mixture_level + INACTIVE and not silent,
            }
            if separator.samples > 1:
                spread = decibel(self.spread_energy[k].item() / size)
                row["spread_db"] = round(spread - level, 2)
            sources[source.name] = row
        notes = []
        if self.sample_rate > separator.sample_rate:
            notes.append(
                f"the models know the band up to {separator.sample_rate / 2:g} Hz; what lies above was shared out "
                "by the stems' power just below"
            )
        notes += self._doubts()
        if silent:
            notes.append("the input is silent, and so are the stems")
        return {
            "schema": 1,
            "audiosep": __version__,
            "input": {
                "sample_rate": self.sample_rate,
                "channels": self.channels,
                "frames": self.frames,
                "duration_s": round(duration, 4),
                "level_dbfs": round(mixture_level, 2),
            },
            **self._about(),
            "device": str(separator.device),
            "dtype": str(separator.dtype).removeprefix("torch."),
            "segments": self.segments,
            "segment_s": round(self.segment / self.sample_rate, 4),
            "overlap_s": round((self.segment - self.hop) / self.sample_rate, 4),
            "network_evaluations": self.evaluations,
            "seconds": round(self.seconds, 3),
            "real_time_factor": round(self.seconds / duration, 4) if duration else None,
            "residual_db": None if silent else round(decibel(self.residual_energy / size) - mixture_level, 2),
            "alignment_margins": [round(margin, 4) for margin in self.aligner.margins],
            "sources": sources,
            "notes": notes,
        }

    def _about(self) -> dict[str, Any]:
        """The report's part on what separated."""
        separator = self.separator
        listeners: dict[str, Tagger] = {}
        for members in self.exchanged:
            classifier = self._classifier_of(members)
            if classifier is not None:
                listeners |= classifier.asked(separator.classes_of(self._of(members)))
        asked = {name: {"name": name, **listener.origin} for name, listener in listeners.items()}
        return {
            "models": {name: {"name": name, **prior.origin} for name, prior in separator.priors.items()},
            **({"classifiers": asked} if asked else {}),
            **({"refiner": {"name": REFINER, **self.refiner.origin}} if self.refiner is not None else {}),
            "sampler": {
                "name": separator.sampler or PRESETS[separator.preset],
                "preset": separator.preset,
                "steps": len(self.sampler.times),
                "samples": separator.samples,
                "noise_levels": [self.sampler.ratios[0], self.sampler.ratios[-2]],
                **separator.guided(self.sources),
                "combine": separator.combine,
                "sampling": separator.sampling,
                "seed": separator.seed,
                "compiled": separator.compiled,
            },
        }

    def _about_source(self, k: int) -> dict[str, Any]:
        """The report's part on what source k was asked for as; its prior isn't told the class where it is guided."""
        source, (prior, told) = self.sources[k], self.sampler.prior.sources[k]
        assert isinstance(prior, Prior)
        return {"prior": source.prior, "class": class_name(prior, source.label), "class_told": told is not None}

    def _doubts(self) -> list[str]:
        """Notes on what a user should know of this run."""
        reach = min(prior.schedule.ratio[-1].item() for prior in self.separator.priors.values())
        if self.sampler.ratios[0] <= 1.001 * reach:
            return []
        start = self.sampler.ratios[0]
        return [f"the sampler starts at a noise level of {start:.2f}, the priors were trained up to {reach:.2f}"]


def sampler_options(table: Mapping[str, Any]) -> dict[str, Any]:
    """A sampler's arguments from plain data: the weights of the reconstruction loss are a table of their own."""
    loss = table.get("loss")
    return {**table, "loss": ReconstructionLoss(**loss)} if isinstance(loss, Mapping) else dict(table)


def _is_auto(sources: Sequence[str] | None) -> bool:
    return sources is not None and (sources == "auto" or list(sources) == ["auto"])


def as_array(wave: Any) -> np.ndarray:
    """A tensor or array-like as an array; bfloat16, which numpy lacks, as float32."""
    if not isinstance(wave, Tensor):
        return np.asarray(wave)
    wave = wave.detach().cpu()
    return (wave.float() if wave.dtype == torch.bfloat16 else wave).numpy()


def class_name(prior: Prior, label: int | None) -> str | None:
    """Name of a prior's class, None for its null class."""
    return None if label is None else prior.classes[label]


def decibel(power: float) -> float:
    """Power in dB, at least -300."""
    return 10 * math.log10(max(power, 1e-30))


def fit(wave: np.ndarray, length: int) -> np.ndarray:
    """Cut or zero-pad wave (..., n) to `length` samples."""
    return np.pad(wave[..., :length], ((0, 0), (0, max(0, length - wave.shape[-1]))))


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, the same on every machine."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def choose_device(name: str | torch.device) -> torch.device:
    """The device for "auto", "cpu", "cuda", "cuda:1", "mps"; refused when this machine has none."""
    if name == "auto":
        if torch.cuda.is_available():  # one GPU for each of several processes
            return torch.device(f"cuda:{distributed.local_rank()}" if distributed.world_size() > 1 else "cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    unknown = f"unknown device {str(name)!r}; use auto, cpu, cuda, cuda:N or mps"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(unknown) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(unknown)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; "
            "run `audiosep doctor`, or use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' is not there; use --device cpu")
    return device


def _cpu_has_bfloat16(device: torch.device) -> bool:
    """Whether this is a CPU that multiplies bfloat16 matrices itself, several times as fast as float32 ones."""
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The networks' number type for "auto", "float32", "bfloat16", "float16"."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" or _cpu_has_bfloat16(device) else torch.float32
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in types:
        raise UsageError(f"unknown dtype {name!r}; use auto, {', '.join(types)}")
    return types[name]
