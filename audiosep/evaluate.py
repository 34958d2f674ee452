"""How well a separator works: mixtures of a manifest's clips, a row per mixture, a summary.

Two SI-SDRs are always given: with the estimates in the order asked for ("fixed", what a user gets
who names the classes), and in the best order ("permuted", as the UnaSDiff paper scores every task).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from audiosep import metrics
from audiosep.data import Item, MixtureDataset, read_manifest
from audiosep.errors import AudiosepError, UsageError
from audiosep.mixing import best_permutation

if TYPE_CHECKING:
    from audiosep.separator import Separates

__all__ = ["markdown", "run", "score", "summarise", "table"]

# Rows hold decibels within +-100: beyond that lies rounding, and JSON has no infinity.
LIMIT_DB = 100.0

Progress = Callable[[int, int | None, str], None]


def run(
    manifest: str | Path,
    task: str,
    count: int,
    seed: int,
    models: str | Sequence[str] = "speech,sound",
    out: str | Path | None = None,
    progress: Progress | None = None,
    *,
    separator: Separates | None = None,
    split: str = "test",
    root: str | Path | None = None,
    segment: float = 4.0,
    labels: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Separate `count` mixtures of a task and return the summary.

    Sounds are kept to classes that the separator knows, and asked for by class; with labels=False
    the same sounds are asked for as "sound". `out` is a file of JSON lines, one per mixture as it
    is done; rows that are there already are kept, so that a run that was stopped goes on.
    `separator` stands in for `Separator.from_pretrained(models, **options)`.
    """
    items = read_manifest(manifest, root, split)
    models = models if isinstance(models, str) else ",".join(models)
    if separator is None:
        from audiosep.separator import Separator

        separator = Separator.from_pretrained(models, **options)
    classes = _classes(separator)
    dataset = MixtureDataset(items, task, count, seed, segment, separator.sample_rate, classes=classes or None)
    known = labels and bool(classes)
    header = {
        "task": task,
        "seed": seed,
        "models": models,
        "segment": segment,
        "labels": known,
        "options": {key: str(value) for key, value in sorted(options.items()) if _matters(key, value)},
        "weights": _weights(separator),
        "items": _fingerprint(dataset),
    }
    rows = {} if out is None else _resume(Path(out), header)
    for index in range(count):
        if progress is not None:
            progress(index, count, task)
        if index in rows:
            continue
        rows[index] = _row(separator, dataset[index], index, known)
        if out is not None:
            _append(Path(out), rows[index])
    if progress is not None:
        progress(count, count, task)
    return summarise([rows[index] for index in range(count)], header)


def score(estimates: Tensor, references: Tensor, mixture: Tensor) -> dict[str, Any]:
    """SI-SDRs in dB of estimates (K, T) against references (K, T), lists of K floats.

    `permutation[k]` is the estimate that fits reference k best.
    """
    pairs = _limited(metrics.si_sdr(estimates[:, None], references[None]))
    index = best_permutation(pairs[None])[0]
    return {
        "si_sdr": pairs.diagonal().tolist(),
        "si_sdr_permuted": pairs[index, torch.arange(len(pairs))].tolist(),
        "permutation": index.tolist(),
        "mixture_si_sdr": _limited(metrics.si_sdr(mixture, references)).tolist(),
    }


def summarise(rows: Sequence[Mapping[str, Any]], header: Mapping[str, Any]) -> dict[str, Any]:
    """Mean over sources, then over mixtures, with 95 % bootstrap intervals; `header` first."""
    if not rows:
        raise UsageError("no rows to summarise")

    def means(key: str) -> np.ndarray:
        return np.array([np.mean(row[key]) for row in rows])

    fixed, permuted, mixture = means("si_sdr"), means("si_sdr_permuted"), means("mixture_si_sdr")
    by_kind: dict[str, list[float]] = {"speech": [], "sound": []}
    for row in rows:
        for name, value in zip(row["names"], row["si_sdr"]):
            by_kind["speech" if name == "speech" else "sound"].append(value)
    evaluations = [row["evaluations"] for row in rows if row["evaluations"] is not None]
    return {
        **header,
        "count": len(rows),
        "mixture_si_sdr": _statistics(mixture),
        "si_sdr": _statistics(fixed),
        "si_sdri": _statistics(fixed - mixture),
        "si_sdr_permuted": _statistics(permuted),
        "si_sdri_permuted": _statistics(permuted - mixture),
        "failure_rate": metrics.failure_rate(fixed),
        "failure_rate_permuted": metrics.failure_rate(permuted),
        "si_sdr_by_kind": {kind: float(np.mean(v)) for kind, v in by_kind.items() if v},
        "seconds": float(means("seconds").mean()),
        "evaluations": float(np.mean(evaluations)) if evaluations else None,
    }


def table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """A table for the terminal, one row per summary."""
    header, *rows = _cells(summaries)
    shown = Table()
    for name in header:
        shown.add_column(name, justify="left" if name in ("task", "models") else "right")
    for row in rows:
        shown.add_row(*row)
    return shown


def markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The same table as Markdown."""
    header, *rows = _cells(summaries)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(summaries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    header = ["task", "models", "n", "mixture"]
    for way in ("fixed", "permuted"):
        header += [f"SI-SDR {way}", "95 %", "median", "SI-SDRi", "fails"]
    lines = [[*header, "evaluations", "s"]]
    for summary in summaries:
        line = [summary["task"], summary["models"], str(summary["count"])]
        line.append(f"{summary['mixture_si_sdr']['mean']:.2f}")
        for suffix in ("", "_permuted"):
            value, gain = summary[f"si_sdr{suffix}"], summary[f"si_sdri{suffix}"]
            low, high = value["interval"]
            line += [f"{value['mean']:.2f}", f"{low:.2f} to {high:.2f}", f"{value['median']:.2f}"]
            line += [f"{gain['mean']:.2f}", f"{100 * summary[f'failure_rate{suffix}']:.1f} %"]
        evaluations = summary["evaluations"]
        line += ["-" if evaluations is None else f"{evaluations:.0f}", f"{summary['seconds']:.2f}"]
        lines.append(line)
    return lines


def _row(separator: Separates, item: Mapping[str, Any], index: int, labels: bool) -> dict[str, Any]:
    names = item["names"]
    asked = [name if labels or name == "speech" else "sound" for name in names]
    start = time.perf_counter()
    try:
        result = separator(item["mixture"][None], separator.sample_rate, sources=asked)
        estimates = torch.stack([torch.as_tensor(s)[0] for s in result.sources.values()])
        seconds = time.perf_counter() - start
        if len(estimates) != len(names):
            raise UsageError(f"asked for {len(names)} sources, got {len(estimates)}")
        scores = score(estimates.cpu(), item["sources"], item["mixture"])
    except AudiosepError as error:
        clips = ", ".join(item["ids"])
        raise type(error)(f"mixture {index} ({clips}): {error}") from error
    return {
        "index": index,
        "ids": item["ids"],
        "names": names,
        **scores,
        "seconds": seconds,
        "evaluations": result.report.get("network_evaluations"),
    }


def _matters(option: str, value: Any) -> bool:
    """Whether an option changes the rows: where and how many at a time does not, nor a default."""
    return value is not None and option not in ("device", "batch")


def _classes(separator: Separates) -> list[str]:
    """Class names of the separator's priors; none for a separator without priors or labels."""
    priors = getattr(separator, "priors", {})
    return [name for prior in priors.values() for name in getattr(prior, "classes", ())]


def _weights(separator: Separates) -> dict[str, str]:
    """Hashes of the checkpoints: a name can stand for other weights tomorrow."""
    priors = getattr(separator, "priors", {})
    return {name: getattr(prior, "origin", {}).get("sha256", "") for name, prior in priors.items()}


def _limited(decibels: Tensor) -> Tensor:
    return decibels.clamp(-LIMIT_DB, LIMIT_DB)


def _statistics(values: np.ndarray) -> dict[str, Any]:
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "interval": list(metrics.bootstrap_interval(values)),
    }


def _fingerprint(dataset: MixtureDataset) -> str:
    """Of the clips drawn from: other clips make other mixtures."""
    pools: list[list[Item]] = [*dataset.speakers.values(), *dataset.classes.values()]
    names = "\n".join(f"{item.label} {item.id}" for pool in pools for item in pool)
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def _resume(path: Path, header: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The rows of an earlier run of the same; starts the file when there is none."""
    if not path.exists():
        _append(path, header)
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: can't be read: {error}") from error
    whole = text[: text.rfind("\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise UsageError(f"{path}: not a file of rows; choose another name") from error
    if not lines:
        path.unlink()
        return _resume(path, header)
    if lines[0] != header:
        other = _difference(lines[0], header)
        raise UsageError(f"{path} holds rows of another run ({other}); choose another name")
    # A run that was killed may have left half a line.
    os.truncate(path, len(whole.encode()))
    return {row["index"]: row for row in lines[1:]}


def _difference(old: Any, new: Mapping[str, Any]) -> str:
    if not isinstance(old, Mapping):
        return "no header"
    changed = [key for key in new if old.get(key) != new[key]] or ["more keys"]
    return ", ".join(f"{key} {old.get(key)!r}, here {new.get(key)!r}" for key in changed)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UsageError(f"{path}: can't be written: {error}") from error
