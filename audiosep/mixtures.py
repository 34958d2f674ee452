"""Mixtures on the disk: what `MixtureDataset` makes, for programs that read files.

    mixtures.jsonl              what was asked for, then a row per mixture: clips, offsets, gains
    mixtures/0000.wav           32-bit floating point, one channel
    references/0000/<name>.wav  the sources, which add up to the mixture

So `audiosep separate DIR/mixtures` leaves stems in folders of the same names as the references'.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audiosep import audio, hub
from audiosep.data import MixtureDataset, read_manifest
from audiosep.errors import UsageError
from audiosep.progress import Callback

__all__ = ["SavedMixtures", "known_classes", "stem_names", "write"]

LIST = "mixtures.jsonl"


def write(
    manifest: str | Path,
    out: str | Path,
    *,
    task: str,
    count: int,
    seed: int,
    segment: float = 4.0,
    sample_rate: int = 16000,
    split: str | None = "test",
    root: str | Path | None = None,
    classes: Sequence[str] | None = None,
    progress: Callback | None = None,
) -> Path:
    """Write mixtures and their references to the folder `out`; the path of the list.

    A folder that an interrupted call left is completed. Arguments are those of `MixtureDataset`.

    Raises:
        UsageError: `out` holds other mixtures, or the manifest can't make these.
    """
    dataset = MixtureDataset(read_manifest(manifest, root, split), task, count, seed, segment, sample_rate, classes)
    header = {
        "task": task,
        "count": count,
        "seed": seed,
        "segment": segment,
        "sample_rate": sample_rate,
        "level_dbfs": list(dataset.level),
        "split": split,
        "clips": _fingerprint(dataset),
    }
    out = Path(out)
    done = _resume(out / LIST, header)
    width = max(4, len(str(count - 1)))
    for index in range(done, count):
        if progress is not None:
            progress(index, count, task)
        item, name = dataset[index], f"{index:0{width}d}"
        stems = dict(zip(stem_names(item["names"]), item["sources"]))
        for stem, source in stems.items():
            audio.write(out / "references" / name / f"{stem}.wav", source[None].numpy(), sample_rate, "FLOAT")
        audio.write(out / "mixtures" / f"{name}.wav", item["mixture"][None].numpy(), sample_rate, "FLOAT")
        drawn = {key: item[key] for key in ("names", "labels", "ids", "starts", "lengths", "gains")}
        _append(out / LIST, {"name": name, "stems": list(stems), **drawn})
    if progress is not None:
        progress(count, count, task)
    return out / LIST


class SavedMixtures:
    """The items of a folder that `write` made: those of the `MixtureDataset` that they were written from."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header, self.rows, _ = _read(self.folder / LIST)
        if len(self.rows) < self.header["count"]:
            raise UsageError(
                f"{self.folder} holds {len(self.rows)} of {self.header['count']} mixtures: run `audiosep mix` again"
            )
        self.task, self.sample_rate = self.header["task"], self.header["sample_rate"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        folder = self.folder / "references" / row["name"]
        sources = np.concatenate([audio.read(folder / f"{stem}.wav")[0] for stem in row["stems"]])
        mixture, _ = audio.read(self.folder / "mixtures" / f"{row['name']}.wav")
        return {**row, "mixture": torch.from_numpy(mixture[0]), "sources": torch.from_numpy(sources)}


def stem_names(names: Iterable[str]) -> list[str]:
    """Names of files as a separator's stems have them: lower case, and two of "speech" are speech_1 and speech_2."""
    plain = [name.casefold().replace("/", "-") for name in names]
    return [f"{name}_{plain[: k + 1].count(name)}" if plain.count(name) > 1 else name for k, name in enumerate(plain)]


def known_classes(names: Iterable[str]) -> list[str] | None:
    """Classes of sound that these checkpoints tell apart; None when they know none."""
    return [label for name in names for label in hub.read_config(hub.find(name)).get("classes", [])] or None


def _resume(path: Path, header: Mapping[str, Any]) -> int:
    """How many mixtures are there already; starts the list when there is none."""
    if not path.exists():
        _append(path, header)
        return 0
    old, rows, size = _read(path)
    if old != header:
        changed = [key for key in header if old.get(key) != header[key]]
        shown = ", ".join(f"{key} {old.get(key)!r}, here {header[key]!r}" for key in changed if key != "clips")
        raise UsageError(f"{path.parent} holds other mixtures ({shown or 'of other clips'}); choose another folder")
    os.truncate(path, size)  # a call that was killed may have left half a line
    return len(rows)


def _fingerprint(dataset: MixtureDataset) -> str:
    """Of the clips drawn from: other clips make other mixtures."""
    pools = [*dataset.speakers.values(), *dataset.classes.values()]
    names = "\n".join(f"{item.label} {item.id}" for pool in pools for item in pool)
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """The header, the rows that are complete, and how many bytes they take."""
    try:
        content = path.read_bytes()
        size = content.rfind(b"\n") + 1
        lines = [json.loads(line) for line in content[:size].splitlines()]
        return lines[0], lines[1:], size
    except FileNotFoundError as error:
        raise UsageError(f"{path}: not there; `audiosep mix` writes such a folder") from error
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{path}: not a list of mixtures: {error}") from error


def _append(path: Path, row: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UsageError(f"{path}: can't be written: {error.strerror}") from error
