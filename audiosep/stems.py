"""Score stems that any program made: two folders of files in, a row per item out.

REFERENCES holds a folder per item with the true sources, such as `audiosep mix` writes; ESTIMATES holds folders of the
same names with the stems. Where the stems have the references' names, all but one at most, they are scored by name
("labels fixed"); where they have others, only the best order says anything.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiosep import audio, report, results
from audiosep.errors import UsageError
from audiosep.evaluate import SPEECH_ONLY, check_metrics, score, score_one
from audiosep.progress import Callback

__all__ = ["run", "score_folders"]

log = logging.getLogger("audiosep.stems")

# What separators write beside the stems.
BESIDE = ("mixture", "mix", "residual")


def run(
    estimates: str | Path,
    references: str | Path,
    out: str | Path | None = None,
    metrics: Sequence[str] = (),
    progress: Callback | None = None,
) -> list[dict[str, Any]]:
    """Score the stems and return one summary per task, as `evaluate.run` does; with `out` the same files.

    Args:
        estimates: folder of a program's stems; it is shown under the folder's name.
        references: folder of the true sources.
        out: folder for rows, tables and a page.
        metrics: scores beside SI-SDR: "sdr", "pesq" and "estoi".
        progress: called with (items done, items in all, item).

    Raises:
        UsageError: as `score_folders`; `out` holds the rows of an evaluation.
    """
    check_metrics(metrics)
    if out is not None:
        _check_folder(Path(out))
    name = Path(estimates).resolve().name
    rows = score_folders(estimates, references, metrics, progress)
    tasks = {task: [row for row in rows if row["task"] == task] for task in sorted({row["task"] for row in rows})}
    trials = []
    for task, own in tasks.items():
        header = {
            "separator": name,
            "oracle": False,
            "task": task,
            "segment": float(np.mean([row["duration"] for row in own])),
            "labels": all(row["labels"] for row in own),
            "metrics": sorted(metrics),
            "options": {"estimates": str(estimates), "references": str(references)},
            "weights": {},
        }
        trials.append((header, own))
    summaries = results.summarise(trials)
    if out is not None:
        lines = [json.dumps({"separator": name, **row}, ensure_ascii=False) for row in rows]
        report.write_text(Path(out) / "rows.jsonl", "\n".join(lines) + "\n")
        results.write(Path(out), summaries, {(name, task): own for task, own in tasks.items()}, {})
    return summaries


def score_folders(
    estimates: str | Path, references: str | Path, metrics: Sequence[str] = (), progress: Callback | None = None
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
        rows.append({"index": index, **_row(estimates / folder.relative_to(references), folder, metrics)})
    if progress is not None:
        progress(len(items), len(items), "scored")
    for metric in metrics:
        if metric in SPEECH_ONLY and not any("speech" in row["names"] for row in rows):
            log.warning("%s left out: it is of speech, and no source is called speech or speech_1", metric.upper())
    by_name = sum(row["labels"] for row in rows)
    if 0 < by_name < len(rows):
        log.warning(
            "stems of %d of %d items have other names than their references: tables give the best order only",
            len(rows) - by_name,
            len(rows),
        )
    return rows


def _check_folder(out: Path) -> None:
    """UsageError where rows are that weren't made here: those of an evaluation took hours."""
    file = out / "rows.jsonl"
    if file.exists() and any('"run":' in line for line in file.read_text(encoding="utf-8").splitlines()):
        raise UsageError(f"{file}: holds the rows of an evaluation; choose another folder")


def _row(estimates: Path, references: Path, metrics: Sequence[str]) -> dict[str, Any]:
    truth, found = _stems(references), _stems(estimates)
    if len(truth) < 2:
        raise UsageError(f"{references}: holds {len(truth)} sources, a mixture has at least two")
    if not found:
        raise UsageError(f"{estimates}: no stems; the references are {', '.join(truth)}")
    missing, rest = [name for name in truth if name not in found], [name for name in found if name not in truth]
    if missing and len(found) != len(truth):
        raise UsageError(f"{estimates}: has stems {', '.join(found)}, the references are {', '.join(truth)}")
    chosen = [found[name] if name in found else found[rest.pop(0)] for name in truth]
    labels = len(missing) < 2  # what is left when all others are found is known, too: "sound" beside "speech"
    target, rate = _read(list(truth.values()))
    output, _ = _read(chosen, target.shape[1:], rate)
    # Channels end to end: one score for all of them.
    target, output = target.flatten(1), output.flatten(1)
    names = [_plain(name, list(truth)) for name in truth]
    try:
        scores = score(output, target, target.sum(0))
        ordered = output[scores["permutation"]]
        scores |= {metric: score_one(metric, ordered, target, names, rate) for metric in metrics}
    except UsageError as error:
        raise UsageError(f"{estimates}: {error}") from error
    if not labels:
        del scores["si_sdr"]  # their order says nothing
    speech = names.count("speech")
    parts = [(speech, "speech"), (len(names) - speech, "sound")]
    return {
        "task": "+".join(f"{count}{kind}" for count, kind in parts if count),
        "ids": [references.name],
        "names": names,
        "labels": labels,
        "sample_rate": rate,
        "duration": target.shape[1] / rate,
        **scores,
        "evaluations": None,
        "seconds": None,
    }


def _plain(name: str, others: Sequence[str]) -> str:
    """What a stem is: "speech" for speech_1 where there is a speech_2."""
    base = re.sub(r"_\d+$", "", name)
    return base if sum(re.sub(r"_\d+$", "", other) == base for other in others) > 1 else name


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
