"""Clean recordings: the manifest, windows to train a prior on, mixtures to score a separator on.

Every item is a pure function of (seed, index): two machines, or one that was killed and resumed,
see the same clips, offsets and gains. Only `Generator.random` is drawn from, on lists sorted by
path.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from audiosep import distributed
from audiosep.errors import AudioError, UsageError

__all__ = [
    "Cache",
    "Item",
    "MixtureDataset",
    "SourceDataset",
    "Undecoded",
    "active_spans",
    "class_names",
    "load_clip",
    "parse_task",
    "read_manifest",
    "write_manifest",
]

COLUMNS = ("path", "split", "kind", "speaker_or_class", "duration_s", "group")
KINDS = ("speech", "sound")

# A 50 ms window is active when the sum of its squares at 44.1 kHz is above 1e-4: a mean square of
# 4.5e-8 (-73 dBFS), whatever the sample rate.
ACTIVE_POWER = 1e-4 / 2205

BLOCK = 2**22  # frames of a recording that are read at a time

Wave = NDArray[np.float32]


@dataclass(frozen=True, order=True)
class Item:
    """One clean recording of a manifest; `label` is the speaker or the class of sound."""

    id: str  # the path below the folder that all rows share: the same on every machine
    path: Path
    split: str
    kind: str
    label: str
    duration: float
    group: str


def read_manifest(
    path: str | Path,
    root: str | Path | None = None,
    split: str | None = None,
    kind: str | None = None,
) -> list[Item]:
    """The rows of a manifest (CSV), sorted by path, of one split and one kind where given.

    Paths are relative to `root`, by default the manifest's folder. Columns other than `path, split,
    kind, speaker_or_class, duration_s, group` are ignored. The recordings are not opened.
    """
    path = Path(path)
    root = path.parent if root is None else Path(root)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise UsageError(f"{path}: no column {', '.join(missing)}")
            rows = [(f"{path}:{reader.line_num}", row) for row in reader]
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such manifest; a recipe's prepare.py writes one") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: can't be read as a manifest: {error}") from error
    try:
        shared = os.path.commonpath([Path(row["path"]).parent for _, row in rows] or [Path()])
    except ValueError as error:
        raise UsageError(f"{path}: its paths are partly absolute, partly relative") from error
    items = [_item(row, root, shared, where) for where, row in rows]
    chosen = sorted(item for item in items if split in (None, item.split) and kind in (None, item.kind))
    if not chosen:
        have = sorted({f"{item.split} {item.kind}" for item in items}) or ["no rows"]
        wanted = " ".join(word for word in (split, kind) if word)
        raise UsageError(f"{path}: no rows of {wanted or 'any kind'}; it has {', '.join(have)}")
    return chosen


def _item(row: dict[str, str], root: Path, shared: str, where: str) -> Item:
    if any(row.get(name) is None for name in COLUMNS):
        raise UsageError(f"{where}: the row has fewer cells than the header")
    if row["kind"] not in KINDS:
        raise UsageError(f"{where}: kind is {' or '.join(KINDS)}, got {row['kind']!r}")
    if not row["path"] or not row["speaker_or_class"]:
        raise UsageError(f"{where}: path and speaker_or_class can't be empty")
    try:
        duration = float(row["duration_s"])
    except ValueError:
        duration = float("nan")
    if not 0 < duration < float("inf"):
        raise UsageError(f"{where}: duration_s is seconds above 0, got {row['duration_s']!r}")
    return Item(
        id=Path(row["path"]).relative_to(shared).as_posix(),
        path=root / row["path"],
        split=row["split"],
        kind=row["kind"],
        label=row["speaker_or_class"],
        duration=duration,
        group=row["group"],
    )


def write_manifest(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], path: Path) -> None:
    """Write a manifest of these columns (those that `read_manifest` asks for, and more); complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def class_names(items: Iterable[Item], least: int = 5) -> list[str]:
    """Classes of sound with at least `least` clips, sorted: those worth a label of their own."""
    groups = _by_label(item for item in items if item.kind == "sound")
    return [label for label, clips in groups.items() if len(clips) >= least]


def load_clip(path: Path, sample_rate: int, seconds: float | None = None, where: float = 0.0) -> Wave:
    """A recording as one channel (T,) at `sample_rate`; AudioError when it can't be had.

    Of one longer than `seconds`, that much at the fraction `where` of what can be skipped.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            frames = file.frames if seconds is None else round(seconds * rate)
            file.seek(int(where * max(0, file.frames - frames)))
            wave = _read(file, frames)
        wave = wave if rate == sample_rate else soxr.resample(wave, rate, sample_rate)
    except (OSError, soundfile.SoundFileError, MemoryError, ValueError, RuntimeError) as error:  # the last are soxr's
        reason = str(error) if path.exists() else "no such file"
        raise AudioError(f"{path}: can't be decoded: {reason}") from error
    if wave.size == 0:
        raise AudioError(f"{path}: holds no samples")
    if not np.isfinite(wave).all():
        raise AudioError(f"{path}: holds NaN or infinite samples")
    return wave


def _read(file: soundfile.SoundFile, frames: int) -> Wave:
    """So many frames, or what there is, as one channel; in blocks, as a damaged header may promise more than memory."""
    parts = [np.zeros(0, np.float32)]
    while frames > 0 and len(block := file.read(min(frames, BLOCK), dtype="float32", always_2d=True)):
        parts.append(block.mean(axis=1))
        frames -= len(block)
    return np.concatenate(parts)


class Cache:
    """Recordings decoded once, in one file of 16-bit samples that all worker processes map into memory.

    The file is made when it is not in `folder` yet; its name follows from the sample rate and from the recordings'
    names, sizes and dates. Every recording is scaled to its own peak, so that quiet ones keep their resolution.
    One that can't be decoded is named in a warning, and `failed` holds its position.
    """

    def __init__(self, items: Sequence[Item], sample_rate: int, folder: str | Path) -> None:
        self.sample_rate = sample_rate
        name = _cache_name(items, sample_rate)
        self.path, index = Path(folder) / f"{name}.int16", Path(folder) / f"{name}.json"
        if distributed.local_rank() == 0 and not index.exists():
            _fill_cache(items, sample_rate, self.path, index)
        while not index.exists():  # another process of this machine is at it
            time.sleep(0.5)
        facts = json.loads(index.read_text(encoding="utf-8"))
        for reason in facts.get("reasons", ()):
            warnings.warn(f"left out of training: {reason}", stacklevel=2)
        self.ends, self.scales = np.cumsum([0, *facts["frames"]]), facts["scales"]
        self.failed = [i for i, frames in enumerate(facts["frames"]) if frames == 0]
        self._samples: NDArray[np.int16] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_samples": None}  # each process maps the file itself

    def clip(self, position: int, seconds: float | None = None, where: float = 0.0) -> Wave:
        """What `load_clip` gives of the recording at this position in `items`."""
        if self._samples is None:
            self._samples = np.memmap(self.path, np.int16, "r")
        start, end = self.ends[position : position + 2]
        if seconds is not None:
            frames = round(seconds * self.sample_rate)
            start += int(where * max(0, end - start - frames))
            end = min(end, start + frames)
        return self._samples[start:end].astype(np.float32) * np.float32(self.scales[position])


def _cache_name(items: Sequence[Item], sample_rate: int) -> str:
    digest = hashlib.sha256(f"{sample_rate}".encode())
    for item in items:
        stat = item.path.stat() if item.path.exists() else None
        digest.update(f"\n{item.id} {stat and (stat.st_size, int(stat.st_mtime))}".encode())
    return digest.hexdigest()[:16]


def _fill_cache(items: Sequence[Item], sample_rate: int, path: Path, index: Path) -> None:
    """Write samples, then the index: that it is there says that both are complete."""

    def decode(item: Item) -> Wave | str:
        try:
            return load_clip(item.path, sample_rate)
        except AudioError as error:
            return str(error)

    frames, scales, reasons = [], [], []
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file, ThreadPoolExecutor() as pool:
            for first in range(0, len(items), 256):  # so many are in memory at a time
                for wave in pool.map(decode, items[first : first + 256]):
                    if isinstance(wave, str):
                        reasons.append(wave)
                        wave = np.zeros(0, np.float32)
                    scale = float(np.abs(wave).max(initial=1e-9)) / 32767
                    file.write(np.rint(wave / scale).astype("<i2").tobytes())
                    frames.append(wave.size)
                    scales.append(scale)
            if not any(frames):
                raise AudioError(f"{items[0].path}: can't be decoded, nor can any other recording")
        partial.replace(path)
        partial.write_text(json.dumps({"frames": frames, "scales": scales, "reasons": reasons}), encoding="utf-8")
        partial.replace(index)
    except OSError as error:
        raise AudioError(f"{path}: can't be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def active_spans(wave: Wave, sample_rate: int) -> list[tuple[int, int]]:
    """Stretches [start, end) in samples that are not silent: (T,) -> list.

    Windows of 50 ms every 25 ms; a run of windows above `ACTIVE_POWER` is a span.
    """
    window, hop = max(1, round(0.05 * sample_rate)), max(1, round(0.025 * sample_rate))
    starts = np.arange(1 + max(0, -(-(wave.size - window) // hop))) * hop
    ends = np.minimum(starts + window, wave.size)
    energy = np.concatenate([[0.0], np.cumsum(np.square(wave, dtype=np.float64))])
    active = (energy[ends] - energy[starts]) / window > ACTIVE_POWER
    edges = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]])))
    return [(int(starts[a]), int(ends[b - 1])) for a, b in zip(edges[::2], edges[1::2])]


def parse_task(task: str) -> tuple[int, int]:
    """How many sources of speech and of sound: "1speech+2sound" is (1, 2)."""
    counts = {"speech": 0, "sound": 0}
    for part in str(task).replace(" ", "").lower().split("+"):
        match = re.fullmatch(r"([1-9]\d*)?(speech|sound)s?", part)
        if match is None:
            raise UsageError(f"a task is like 1speech+1sound, 2sound or 2speech, got {task!r}")
        counts[match[2]] += int(match[1] or 1)
    return counts["speech"], counts["sound"]


class Undecoded:
    """Which of these recordings can't be decoded: what one process has found out, no other tries again."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.positions = {item.id: i for i, item in enumerate(items)}
        self.flags = torch.zeros(len(items), dtype=torch.bool).share_memory_()

    def __contains__(self, item: Item) -> bool:
        return bool(self.flags[self.positions[item.id]])

    def add(self, item: Item, error: AudioError) -> None:
        """Leave a recording out from now on, with a warning that says why."""
        self.flags[self.positions[item.id]] = True
        warnings.warn(f"left out of training: {error}", stacklevel=1)  # here: one for all datasets of a process

    @property
    def ids(self) -> list[str]:
        """Those that were found so far."""
        return [id for id, i in self.positions.items() if self.flags[i]]


def _check_canvas(segment: float, sample_rate: int, level: tuple[float, float]) -> None:
    """UsageError for a length in seconds or a range of dBFS that nothing has."""
    if not 1 <= segment * sample_rate < float("inf"):
        raise UsageError(f"segment is seconds above 0, got {segment}")
    low, high = level
    if not -float("inf") < low <= high < float("inf"):
        raise UsageError(f"level is two numbers in dBFS, the lower first, got {low} and {high}")


class MixtureDataset(Dataset[dict[str, Any]]):
    """Mixtures as the UnaSDiff paper makes them (Shi et al., AAAI 2026), from `items`.

    Distinct speakers and distinct classes are drawn uniformly, then a clip of each; of a sound one
    active span (drawn by length); of what is longer than the segment a random part. The first
    source starts anywhere, each next one within the extent of the one before, so that neighbours
    overlap; sources of a speech-only task all start at 0. Every source's RMS over the whole canvas
    is uniform in `level` (dBFS), and the mixture is their sum.

    Item i, the same on every machine: `mixture` (T,), `sources` (K, T), `names` (what to ask a
    separator for: "speech" or the class), `labels` (speaker or class), `ids` (the clips' paths),
    `starts` and `lengths` (samples of the canvas that a clip takes), `gains` (its factor); speech
    first. `classes` keeps to sounds of these classes (names compared without case).
    A clip that can't be decoded is an error: without it these would be other mixtures. To train
    and to probe, `skip` has them made of other clips: one that fails to decode is named in one
    warning, left out from then on by all datasets of the same `skip`, and listed by `failed`.
    """

    def __init__(
        self,
        items: Iterable[Item],
        task: str,
        count: int,
        seed: int,
        segment: float = 4.0,
        sample_rate: int = 16000,
        classes: Sequence[str] | None = None,
        level: tuple[float, float] = (-25.0, -20.0),
        skip: Undecoded | None = None,
    ) -> None:
        if count < 1:
            raise UsageError(f"count is at least 1, got {count}")
        if seed < 0:
            raise UsageError(f"seed is at least 0, got {seed}")
        _check_canvas(segment, sample_rate, level)
        self.task, self.count, self.seed = task, count, seed
        self.segment, self.sample_rate, self.level, self.skip = segment, sample_rate, level, skip
        self.n_speech, self.n_sound = parse_task(task)
        known = None if classes is None else {name.casefold() for name in classes}
        items = sorted(items)
        self.speakers = _by_label(item for item in items if item.kind == "speech")
        self.classes = _by_label(
            item for item in items if item.kind == "sound" and (known is None or item.label.casefold() in known)
        )
        for need, groups, what in (
            (self.n_speech, self.speakers, "speakers"),
            (self.n_sound, self.classes, "classes of sound"),
        ):
            if need > len(groups):
                raise UsageError(f"{task} needs {need} {what}, the items have {len(groups)}")

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        """Of the clips drawn from: other clips make other mixtures."""
        pools = [*self.speakers.values()] if self.n_speech else []
        pools += [*self.classes.values()] if self.n_sound else []
        names = "\n".join(f"{item.label} {item.id}" for pool in pools for item in pool)
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    @property
    def settings(self) -> dict[str, Any]:
        """Which mixtures are made of the items, beside the task and the rate."""
        return {"segment": self.segment, "level": self.level}

    @property
    def failed(self) -> list[str]:
        """The clips that could not be decoded so far."""
        return self.skip.ids if self.skip else []

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        length = round(self.segment * self.sample_rate)
        drawn = self._drawn(rng, length)
        waves = [wave for _, wave in drawn]
        sizes = [wave.size for wave in waves]
        starts = _overlapping(rng, sizes, length) if self.n_sound else [0] * len(waves)
        sources, gains = np.zeros((len(waves), length)), []
        for row, start, wave in zip(sources, starts, waves):
            row[start : start + wave.size] = wave
            gains.append(_gain(row, _uniform(rng, *self.level)))
            row *= gains[-1]
        stems = torch.from_numpy(sources.astype(np.float32))
        items = [item for item, _ in drawn]
        return {
            "mixture": stems.sum(0),
            "sources": stems,
            "names": ["speech" if item.kind == "speech" else item.label for item in items],
            "labels": [item.label for item in items],
            "ids": [item.id for item in items],
            "starts": starts,
            "lengths": sizes,
            "gains": gains,
        }

    def _drawn(self, rng: np.random.Generator, length: int) -> list[tuple[Item, NDArray[np.float64]]]:
        """A clip of each speaker and class; where those of one are no use, and may be skipped, of others."""
        for _ in range(99 if self.skip else 0):
            with contextlib.suppress(AudioError):
                return self._draw_all(rng, length)
        return self._draw_all(rng, length)

    def _draw_all(self, rng: np.random.Generator, length: int) -> list[tuple[Item, NDArray[np.float64]]]:
        chosen = [
            *_distinct(rng, self.speakers, self.n_speech),
            *_distinct(rng, self.classes, self.n_sound),
        ]
        return [self._draw(rng, clips, length) for clips in chosen]

    def _draw(self, rng: np.random.Generator, clips: list[Item], length: int) -> tuple[Item, NDArray[np.float64]]:
        for _ in range(100):
            item = clips[_index(rng, len(clips))]
            wave = self._clip(item)
            wave = _excerpt(rng, wave, item.kind, length, self.sample_rate)
            if wave.any():
                return item, wave.astype(np.float64)
        bad = " or can't be decoded" if self.skip else ""
        raise AudioError(f"{clips[0].path}: silent{bad}, as are all clips drawn of {clips[0].label!r}")

    def _clip(self, item: Item) -> Wave:
        """All of a recording; nothing of one that is skipped."""
        if self.skip is None:
            return load_clip(item.path, self.sample_rate)
        try:
            return np.zeros(0, np.float32) if item in self.skip else load_clip(item.path, self.sample_rate)
        except AudioError as error:
            self.skip.add(item, error)
            return np.zeros(0, np.float32)


class TaskMixtures(Dataset[dict[str, Tensor]]):
    """Mixtures of several tasks in turn, for what is made of them; item i is a pure function of their seeds and of i.

    The datasets hold as many mixtures each.

    Args:
        datasets: of a task each; one may stand there several times.
        shares: of the items, by their names in messages.

    Raises:
        UsageError: there is no dataset, or a share does not lie in 0..1.
    """

    def __init__(self, datasets: Sequence[MixtureDataset], **shares: float) -> None:
        if not datasets:
            raise UsageError("no tasks to make mixtures of")
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UsageError(f"{name} is a share, 0..1, got {share}")
        self.datasets, self.segment = list(datasets), datasets[0].segment

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    @property
    def settings(self) -> dict[str, Any]:
        """Which mixtures are made of the items, beside the tasks and what is made of them."""
        return self.datasets[0].settings

    @property
    def failed(self) -> list[str]:
        """The clips that could not be decoded so far, of all datasets."""
        return sorted({id for dataset in self.datasets for id in dataset.failed})

    def drawn(self, index: int, stream: int) -> tuple[MixtureDataset, int, np.random.Generator]:
        """The dataset of item `index`, the number of its mixture there, and chance beside the mixtures' own."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        dataset = self.datasets[index % len(self.datasets)]
        return dataset, index // len(self.datasets), np.random.default_rng([dataset.seed, index, stream])


class SourceDataset(Dataset[dict[str, Any]]):
    """Windows of single sources, to train a prior on: item i is a pure function of (seed, i).

    `count` is the number of windows (steps x batch in a run): a resumed run goes on at index
    `done` with `Subset(dataset, range(done, count))`. Of the speakers or classes one is drawn in
    proportion to (the windows that its clips fill) ** `balance` (1: clips as they come, 0: every
    label equally often), then one of its clips:
    - speech: a random part of it; when it is too short, other clips of the speaker are appended
      at the same level, with probability `join`, or else it lies somewhere in silence;
    - sound: one active span, drawn by length, a random part of it when it is too long, somewhere
      in silence when it is too short.
    The RMS over the whole window is uniform in `level` (dBFS), with `gain` wider by +-gain dB. For a small corpus,
    `speed` (0.1: +-10 %, pitch too), `polarity` (a sign), `equaliser` (every octave +-so many dB) and `room` (the share
    of windows that are heard in a room, of 0.1 to 0.6 s reverberation time) vary the sound before. With `cache`, a
    folder, the recordings are decoded once, see `Cache`.

    An item is `wave` (T,) float32 and `label`, the index in `classes`, or len(classes), which is
    the null class, for one that is not there. A clip that fails to decode is named in one warning,
    left out from then on in all worker processes, and listed by `failed`.
    """

    def __init__(
        self,
        items: Iterable[Item],
        count: int,
        seed: int = 0,
        segment: float = 4.0,
        sample_rate: int = 16000,
        classes: Sequence[str] = (),
        balance: float = 0.5,
        join: float = 0.75,
        level: tuple[float, float] = (-25.0, -20.0),
        gain: float = 0.0,
        polarity: bool = True,
        speed: float = 0.0,
        equaliser: float = 0.0,
        room: float = 0.0,
        cache: str | Path | None = None,
    ) -> None:
        self.items = sorted(items)
        if not self.items:
            raise UsageError("no recordings to train on")
        if count < 1 or seed < 0:
            raise UsageError(f"count is at least 1 and seed at least 0, got {count} and {seed}")
        _check_canvas(segment, sample_rate, level)
        if not 0 <= join <= 1 or balance < 0:
            raise UsageError(f"join is a share in 0..1 and balance at least 0, got {join} and {balance}")
        if not 0 <= speed < 1:
            raise UsageError(f"speed varies by less than 1, got {speed}")
        if equaliser < 0 or not 0 <= room <= 1:
            raise UsageError(f"equaliser is dB above 0 and room a share in 0..1, got {equaliser} and {room}")
        self.count, self.seed, self.segment, self.sample_rate = count, seed, segment, sample_rate
        self.balance, self.join, self.level, self.gain = balance, join, level, gain
        self.polarity, self.speed = polarity, speed
        self.equaliser, self.room = equaliser, room
        self.index = {name.casefold(): i for i, name in enumerate(classes)}
        positions = {item.id: i for i, item in enumerate(self.items)}
        groups = _by_label(self.items).values()
        self.groups = [[positions[item.id] for item in group] for group in groups]
        filled = [sum(min(1.0, item.duration / segment) for item in group) for group in groups]
        self.shares = np.cumsum(np.array(filled) ** balance)
        self.undecoded = Undecoded(self.items)
        self.cache = Cache(self.items, sample_rate, cache) if cache else None
        if self.cache:
            self.undecoded.flags[self.cache.failed] = True

    def __len__(self) -> int:
        return self.count

    @property
    def settings(self) -> dict[str, Any]:
        """Which windows are drawn of the items, beside the rate and the classes."""
        names = ("segment", "balance", "join", "level", "gain", "polarity", "speed", "equaliser", "room")
        return {name: getattr(self, name) for name in names}

    @property
    def failed(self) -> list[str]:
        """The clips that could not be decoded so far."""
        return self.undecoded.ids

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        length = round(self.segment * self.sample_rate)
        for _ in range(100):
            group = self.groups[_index_by(rng, self.shares)]
            position = group[_index(rng, len(group))]
            wave = self._window(rng, position, group, length)
            if wave.any():
                break
        else:
            raise AudioError(f"no usable recording in 100 draws; {len(self.failed)} do not decode")
        if self.equaliser:
            wave = equalised(rng, wave, self.equaliser, self.sample_rate)
        if self.room and rng.random() < self.room:
            wave = _in_room(rng, wave, self.sample_rate)
        wave = wave * _gain(wave, _uniform(rng, *self.level) + _uniform(rng, -self.gain, self.gain))
        label = self.index.get(self.items[position].label.casefold(), len(self.index))
        return {"wave": torch.from_numpy(wave.astype(np.float32)), "label": label}

    def _window(self, rng: np.random.Generator, position: int, group: list[int], length: int) -> NDArray[np.float64]:
        """One window (length,), zeros when the clip is silent or can't be read."""
        wave = self._clip(rng, position, length)
        joins = rng.random() < self.join
        if joins and wave.any() and self.items[position].kind == "speech":
            wave = self._joined(rng, wave, group, length)
        start = int(rng.random() * (length - wave.size + 1))
        window = np.zeros(length)
        window[start : start + wave.size] = wave
        return window

    def _joined(self, rng: np.random.Generator, wave: Wave, group: list[int], length: int) -> Wave:
        """The clip and others of its speaker, at its level, until the window is full."""
        parts, total, level = [wave], wave.size, _level(wave)
        for _ in range(100):
            if total >= length or len(group) == 1:
                break
            other = self._clip(rng, group[_index(rng, len(group))], length)
            if other.any():
                parts.append(other * np.float32(_gain(other, level)))
                total += other.size
        # A random part, so that the joint lies anywhere.
        return _part(rng, np.concatenate(parts), length)

    def _clip(self, rng: np.random.Generator, position: int, length: int) -> Wave:
        """At most `length` samples of an item; none, once with a warning, if it can't be read."""
        item = self.items[position]
        rate = 1 + _uniform(rng, -self.speed, self.speed)
        sign = -1 if rng.random() < 0.5 and self.polarity else 1
        where = rng.random()
        # Known or new, an unreadable clip takes the same draws: the window stays the same.
        if item in self.undecoded:
            return np.zeros(0, np.float32)
        # Of speech only what the window takes is decoded; of a sound all, to find its spans.
        seconds = length * rate / self.sample_rate if item.kind == "speech" else None
        try:
            if self.cache:
                wave = self.cache.clip(position, seconds, where)
            else:
                wave = load_clip(item.path, self.sample_rate, seconds, where)
        except AudioError as error:
            self.undecoded.add(item, error)
            return np.zeros(0, np.float32)
        if rate != 1:
            wave = soxr.resample(wave, rate, 1)
        return sign * _excerpt(rng, wave, item.kind, length, self.sample_rate)


def _excerpt(rng: np.random.Generator, wave: Wave, kind: str, length: int, sample_rate: int) -> Wave:
    """At most `length` samples: of a sound one active span, drawn by length (none if silent)."""
    if kind == "sound":
        spans = active_spans(wave, sample_rate)
        if not spans:
            return wave[:0]
        start, end = spans[_index_by(rng, np.cumsum([b - a for a, b in spans]))]
        wave = wave[start:end]
    return _part(rng, wave, length)


def equalised(
    rng: np.random.Generator, wave: NDArray[np.float64], decibels: float, sample_rate: int
) -> NDArray[np.float64]:
    """Waves (..., N) through one filter without phase whose gain is uniform in +-`decibels` at each octave, straight
    lines between them.
    """
    octaves = sample_rate / 2 * 2.0 ** np.arange(-7, 1)
    gains = [_uniform(rng, -decibels, decibels) for _ in octaves]
    size = wave.shape[-1]
    spectrum = np.fft.rfft(wave, 2 * size)  # twice the length: what rings beyond the end does not come round
    frequencies = np.fft.rfftfreq(2 * size, 1 / sample_rate)
    curve = np.interp(np.log2(np.maximum(frequencies, 1.0)), np.log2(octaves), gains)
    return np.fft.irfft(spectrum * 10 ** (curve / 20))[..., :size]


def _in_room(rng: np.random.Generator, wave: NDArray[np.float64], sample_rate: int) -> NDArray[np.float64]:
    """The direct sound and a room's echoes: noise, 0 to 12 dB weaker in all, that decays by 60 dB in 0.1 to 0.6 s."""
    decay, weaker = _uniform(rng, 0.1, 0.6), _uniform(rng, 0.0, 12.0)
    time = np.arange(round(decay * sample_rate)) / sample_rate
    echoes = (rng.random(time.size) - 0.5) * 10 ** (-3 * time / decay)
    echoes[: round(0.002 * sample_rate)] = 0.0  # the first wall is more than 0.7 m away
    echoes *= 10 ** (-weaker / 20) / np.sqrt(np.square(echoes).sum())
    echoes[0] = 1.0
    size = wave.size + echoes.size
    return np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(echoes, size), size)[: wave.size]


def _part(rng: np.random.Generator, wave: Wave, length: int) -> Wave:
    start = int(rng.random() * (max(0, wave.size - length) + 1))
    return wave[start : start + length]


def _overlapping(rng: np.random.Generator, sizes: Sequence[int], length: int) -> list[int]:
    """Starts on the canvas, each within the extent of the source before."""
    starts: list[int] = []
    for k, size in enumerate(sizes):
        last = length - size
        low = starts[-1] if starts else 0
        high = min(starts[-1] + sizes[k - 1] - 1, last) if starts else last
        # A long source after a late one has to begin before it, and still overlaps with it.
        starts.append(low + int(rng.random() * (high - low + 1)) if low <= high else last)
    return starts


def _by_label(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Items by label: labels sorted, items in their order."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return dict(sorted(groups.items()))


def _distinct(rng: np.random.Generator, groups: dict[str, list[Item]], count: int) -> list[list[Item]]:
    order = np.argsort(rng.random(len(groups)), kind="stable")[:count]
    return [list(groups.values())[i] for i in order]


def _index(rng: np.random.Generator, count: int) -> int:
    return int(rng.random() * count)


def _index_by(rng: np.random.Generator, shares: NDArray[Any]) -> int:
    """An index drawn in proportion to its share, of shares summed up so far."""
    drawn = rng.random() * float(shares[-1])
    return min(int(np.searchsorted(shares, drawn, side="right")), len(shares) - 1)


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _level(wave: NDArray[Any]) -> float:
    """RMS in dB re full scale."""
    return float(10 * np.log10(np.square(wave, dtype=np.float64).mean()))


def _gain(wave: NDArray[Any], level: float) -> float:
    """The factor that brings the RMS to `level` dBFS."""
    return float(10 ** ((level - _level(wave)) / 20))
