"""Score stems that any program made: two folders of files in, a row per item out.

REFERENCES holds a folder per item with the true sources, such as `audiosep mix` writes; ESTIMATES holds folders of the
same names with the stems. Where the stems have the references' names, they are scored by name ("labels fixed"); where
they have others, only the best order says anything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiosep import audio, results
from audiosep.errors import UsageError
from audiosep.evaluate import score

__all__ = ["run", "score_folders"]

# What separators write beside the stems.
BESIDE = ("mixture", "mix", "residual")

Progress = Callable[[int, int | None, str], None]


def run(
    estimates: str | Path,
    references: str | Path,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """`score_folders`, summarised; `out` is a folder for the summary's files."""
    rows = score_folders(estimates, references, progress)
    name, task = Path(estimates).name, Path(references).name
    header = {"separator": name, "oracle": False, "task": task, "options": {}, "weights": {}}
    header["labels"] = all(row["labels"] for row in rows)
    summaries = results.summarise([(header, rows)])
    if out is not None:
        results.write(Path(out), summaries, {(name, task): rows}, {})
    return summaries


def score_folders(
    estimates: str | Path, references: str | Path, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Rows as `evaluate` writes them, in the items' order; the mixture is the references' sum.

    `labels` says whether the stems were matched by name. A folder of files alone is one item.

    Raises:
        UsageError: an item or a stem is missing, or files differ in rate, channels or length; the file is named.
    """
    estimates, references = Path(estimates), Path(references)
    for folder in (estimates, references):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
    items = sorted(p for p in references.iterdir() if p.is_dir()) or [references]
    rows = []
    for index, folder in enumerate(items):
        if progress is not None:
            progress(index, len(items), folder.name)
        rows.append({"index": index, **_row(estimates / folder.relative_to(references), folder)})
    if progress is not None:
        progress(len(items), len(items), "scored")
    return rows


def _row(estimates: Path, references: Path) -> dict[str, Any]:
    truth, found = _stems(references), _stems(estimates)
    if len(truth) < 2:
        raise UsageError(f"{references}: holds {len(truth)} sources, a mixture has at least two")
    if not found:
        raise UsageError(f"{estimates}: no stems; the references are {', '.join(truth)}")
    labels = set(truth) <= set(found)
    if labels:
        chosen = [found[name] for name in truth]
    elif len(found) == len(truth):
        chosen = list(found.values())
    else:
        raise UsageError(f"{estimates}: has stems {', '.join(found)}, the references are {', '.join(truth)}")
    target, rate = _read(list(truth.values()))
    output, _ = _read(chosen, target.shape[1:], rate)
    try:
        scores = score(output.flatten(1), target.flatten(1), target.sum(0).flatten())
    except UsageError as error:
        raise UsageError(f"{estimates}: {error}") from error
    return {"ids": [references.name], "names": list(truth), "labels": labels, "sample_rate": rate, **scores}


def _stems(folder: Path) -> dict[str, Path]:
    """Audio files of a folder by their names, lower case."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; every item of the references needs one")
    files = {path.stem.casefold(): path for path, _ in audio.find_audio([folder]) if path.parent == folder}
    return {name: path for name, path in sorted(files.items()) if name not in BESIDE}


def _read(paths: list[Path], shape: torch.Size | None = None, rate: int | None = None) -> tuple[Tensor, int]:
    """Waves (K, C, T) of one rate and shape."""
    waves = []
    for path in paths:
        wave, own = audio.read(path)
        rate = rate or own
        shape = shape or torch.Size(wave.shape)
        if own != rate:
            raise UsageError(f"{path}: is at {own} Hz, the references are at {rate} Hz; resample it first")
        if wave.shape != tuple(shape):
            raise UsageError(
                f"{path}: has {wave.shape[0]} channels of {wave.shape[1]} samples, "
                f"the references have {shape[0]} of {shape[1]}"
            )
        waves.append(wave)
    assert rate is not None
    return torch.from_numpy(np.stack(waves)), rate
