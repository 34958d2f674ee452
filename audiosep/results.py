"""What an evaluation's rows say: summaries with intervals, and their tables, files and page.

A summary is plain data: the header of a separator on a task, then each score's mean over sources and mixtures, median
and 95 % bootstrap interval. Separators on one task are compared over the mixtures that both have done.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
from rich.table import Table
from torch import Tensor

from audiosep import metrics, report
from audiosep.errors import UsageError

__all__ = ["Example", "csv_text", "markdown", "notes", "summarise", "table", "write"]

Row = Mapping[str, Any]
Summary = dict[str, Any]

SCORES = ("si_sdr", "si_sdr_permuted", "sdr", "pesq", "estoi")
GRID = np.linspace(-20.0, 30.0, 201)  # dB, of the page's distributions

# Column -> how it is called, and its format.
COLUMNS = {
    "task": ("task", "{}"),
    "separator": ("separator", "{}"),
    "count": ("n", "{}"),
    "si_sdr": ("SI-SDR fixed", "{:.2f}"),
    "si_sdr_interval": ("95 %", "{}"),
    "si_sdr_median": ("median", "{:.2f}"),
    "si_sdri": ("SI-SDRi fixed", "{:.2f}"),
    "failure_rate": ("fails", "{:.1%}"),
    "si_sdr_permuted": ("permuted", "{:.2f}"),
    "si_sdr_permuted_interval": ("95 %", "{}"),
    "si_sdri_permuted": ("SI-SDRi permuted", "{:.2f}"),
    "success_permuted": ("of successes", "{:.2f}"),
    "failure_rate_permuted": ("fails", "{:.1%}"),
    "failure_rate_permuted_interval": ("95 %", "{}"),
    "sdr": ("SDR", "{:.2f}"),
    "pesq": ("PESQ-WB", "{:.2f}"),
    "estoi": ("ESTOI", "{:.3f}"),
    "evaluations": ("evals", "{:.0f}"),
    "seconds": ("s", "{:.2f}"),
    "real_time_factor": ("RTF", "{:.2f}"),
    "memory_gib": ("GiB", "{:.2f}"),
}

# What fits into 100 characters.
TERMINAL = (
    "task",
    "separator",
    "count",
    "si_sdr",
    "si_sdr_permuted",
    "si_sdr_permuted_interval",
    "failure_rate_permuted",
    "pesq",
    "evaluations",
)


@dataclass(frozen=True)
class Example:
    """A separated mixture to look at: its row, the dataset's item, the estimates (K, T) in the best order."""

    title: str
    row: Row
    item: Mapping[str, Any]
    estimates: Tensor
    sample_rate: int


def summarise(trials: Sequence[tuple[Mapping[str, Any], Sequence[Row]]]) -> list[Summary]:
    """One summary for each (header, rows); the first separator of each task is what the others are compared with."""
    summaries: list[Summary] = []
    first: dict[str, tuple[Mapping[str, Any], Sequence[Row]]] = {}
    for header, rows in trials:
        if not rows:
            raise UsageError("no rows to summarise")
        summary = _summary(header, rows)
        reference = first.setdefault(header["task"], (header, rows))
        if reference[0] is not header:
            summary["difference"] = _difference(rows, *reference)
        summaries.append(summary)
    return summaries


def _summary(header: Mapping[str, Any], rows: Sequence[Row]) -> Summary:
    mixture, permuted = _means(rows, "mixture_si_sdr"), _means(rows, "si_sdr_permuted")
    by_kind: dict[str, list[float]] = {"speech": [], "sound": []}
    for row in rows:
        for name, value in zip(row["names"], row.get("si_sdr", ())):
            by_kind["speech" if name == "speech" else "sound"].append(value)
    seconds = _mean([row.get("seconds") for row in rows])
    summary: Summary = {
        **header,
        "count": len(rows),
        "mixture_si_sdr": _statistics(mixture),
        "si_sdri_permuted": _statistics(permuted - mixture),
        "failure_rate_permuted": metrics.failure_rate(permuted),
        "failure_rate_permuted_interval": list(metrics.rate_interval(int((permuted < 0).sum()), len(rows))),
        "success_permuted": _statistics(permuted[permuted >= 0]),
        "si_sdr_by_kind": {kind: float(np.mean(values)) for kind, values in by_kind.items() if values},
        "evaluations": _mean([row.get("evaluations") for row in rows]),
        "seconds": seconds,
        "real_time_factor": seconds / header["segment"] if seconds is not None else None,
        "memory_gib": max((row["memory_gib"] for row in rows if row.get("memory_gib") is not None), default=None),
    }
    ordered = all("si_sdr" in row for row in rows)  # stems of unknown names have no fixed order
    if ordered:
        fixed = _means(rows, "si_sdr")
        summary["si_sdri"], summary["failure_rate"] = _statistics(fixed - mixture), metrics.failure_rate(fixed)
        summary["success"] = _statistics(fixed[fixed >= 0])
    for score in SCORES:
        if ordered if score == "si_sdr" else any(score in row for row in rows):
            values = _means(rows, score)
            summary[score] = _statistics(values[~np.isnan(values)])
            summary.setdefault("unscored", {})[score] = int(np.isnan(values).sum())
    return summary


def _difference(rows: Sequence[Row], header: Mapping[str, Any], others: Sequence[Row]) -> dict[str, Any]:
    """Of the mean SI-SDR, in dB, over the mixtures that two separators have in common; paired 95 % intervals."""
    reference = {row["index"]: row for row in others}
    common = [(row, reference[row["index"]]) for row in rows if row["index"] in reference]
    found: dict[str, Any] = {"to": header["separator"], "count": len(common)}
    for score in ("si_sdr", "si_sdr_permuted"):
        if common and all(score in row for pair in common for row in pair):
            a, b = (_means([pair[side] for pair in common], score) for side in (0, 1))
            found[score] = {"mean": float((a - b).mean()), "interval": list(metrics.paired_interval(a, b))}
    return found


def _means(rows: Sequence[Row], key: str) -> np.ndarray:
    """Mean over the sources of each row that are scored; NaN where none is."""
    kept = [[value for value in row.get(key, []) if value is not None] for row in rows]
    return np.array([np.mean(values) if values else np.nan for values in kept])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _statistics(values: np.ndarray) -> dict[str, Any] | None:
    if not values.size:
        return None
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "interval": list(metrics.bootstrap_interval(values)),
    }


# Tables -------------------------------------------------------------------------------------------


def table(summaries: Sequence[Summary], published: Mapping[str, Any] | None = None) -> Table:
    """A table for the terminal, the tasks below each other; the files hold more columns."""
    header, *rows = _cells(summaries, published or {}, TERMINAL)
    shown = Table(box=rich.box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for name in header[1:]:
        left = name == "separator"
        # In narrow terminals names break at spaces before anything else does.
        width = max(len(word) for row in rows for cell in row[:2] for word in cell.split()) if left else None
        shown.add_column(name, justify="left" if left else "right", overflow="fold", min_width=width)
    for task in dict.fromkeys(row[0] for row in rows):
        shown.add_section()
        shown.add_row(task, style="bold")
        for row in rows:
            if row[0] == task:
                shown.add_row(*row[1:])
    return shown


def markdown(summaries: Sequence[Summary], published: Mapping[str, Any] | None = None) -> str:
    """The same table as Markdown, and below it the paired differences."""
    lines = _markdown(_cells(summaries, published or {}))
    lines += [line for note in notes(summaries, published or {}) for line in ("", note)]
    compared = _differences(summaries)
    if len(compared) > 1:
        lines += ["", *_markdown(compared)]
    return "\n".join(lines)


def notes(summaries: Sequence[Summary], published: Mapping[str, Any]) -> list[str]:
    """What a table's numbers leave out: mixtures without a score, failed ones, how published figures differ."""
    found = [f"{name} (published): {rows['note']}" for name, rows in published.items() if "note" in rows]
    for summary in summaries:
        where = f"{summary['separator']}, {summary['task']}"
        if summary.get("errors"):
            found.append(f"{where}: {summary['errors']} mixtures could not be separated and are left out.")
        for score, count in summary.get("unscored", {}).items():
            if summary.get(score) and count:
                found.append(f"{where}: {count} mixtures have no {COLUMNS[score][0]} and are left out of it.")
    return found


def _markdown(cells: Sequence[Sequence[str]]) -> list[str]:
    header, *rows = cells
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def csv_text(summaries: Sequence[Summary], published: Mapping[str, Any] | None = None) -> str:
    """The same rows as CSV, numbers in full: of every score mean, median, and the ends of its interval."""
    rows = []
    for flat in _flat(summaries, published or {}):
        row = {key: value for key, value in flat.items() if not key.endswith(("_interval", "_low", "_high", "_median"))}
        for key in ("low", "high", "median"):
            row |= {name: value for name, value in flat.items() if name.endswith(f"_{key}")}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(summaries: Sequence[Summary], published: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of plain values, task by task: the published ones first."""
    rows = []
    for task in dict.fromkeys(summary["task"] for summary in summaries):
        for name, tasks in published.items():
            if task in tasks:
                rows.append({"task": task, "separator": f"{name} (published)", **tasks[task]})
        rows += [_flat_row(summary) for summary in summaries if summary["task"] == task]
    return rows


def _shown(summary: Summary) -> str:
    """A separator's name as every table and plot has it."""
    return summary["separator"] + (" (oracle)" if summary["oracle"] else "")


def _flat_row(summary: Summary) -> dict[str, Any]:
    flat: dict[str, Any] = {"task": summary["task"], "separator": _shown(summary)}
    for key in COLUMNS:
        value = summary.get(key)
        if isinstance(value, list):
            low, high = value
            flat[key] = f"{100 * low:.1f} to {100 * high:.1f}%"
            flat[key.replace("interval", "low")], flat[key.replace("interval", "high")] = low, high
        elif isinstance(value, dict):
            flat[key], flat[f"{key}_median"] = value["mean"], value["median"]
            flat[f"{key}_low"], flat[f"{key}_high"] = value["interval"]
            flat[f"{key}_interval"] = "{:.2f} to {:.2f}".format(*value["interval"])
        elif key not in flat:
            flat[key] = value
    return flat


def _cells(
    summaries: Sequence[Summary], published: Mapping[str, Any], columns: Sequence[str] = tuple(COLUMNS)
) -> list[list[str]]:
    flat = _flat(summaries, published)
    shown = [key for key in columns if any(row.get(key) is not None for row in flat)]
    lines = [[COLUMNS[key][0] for key in shown]]
    for row in flat:
        lines.append(["-" if row.get(key) is None else COLUMNS[key][1].format(row[key]) for key in shown])
    return lines


def _differences(summaries: Sequence[Summary]) -> list[list[str]]:
    lines = [["task", "separator", "less", "n", "SI-SDR fixed", "95 %", "SI-SDR permuted", "95 %"]]
    for summary in summaries:
        found = summary.get("difference", {})
        if not found.get("count"):
            continue
        line = [summary["task"], _shown(summary), found["to"], str(found["count"])]
        for score in ("si_sdr", "si_sdr_permuted"):
            if score not in found:
                line += ["-", "-"]
                continue
            mean, (low, high) = found[score]["mean"], found[score]["interval"]
            line += [f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}"]
        lines.append(line)
    return lines


# Files --------------------------------------------------------------------------------------------


def write(
    folder: Path,
    summaries: Sequence[Summary],
    rows: Mapping[tuple[str, str], Sequence[Row]],
    published: Mapping[str, Any],
    examples: Sequence[Example] = (),
) -> None:
    """Write `summary.json`, `.md`, `.csv` and `report.html` into a folder; `rows` by (separator, task)."""
    report.write_json(folder / "summary.json", {"summaries": summaries, "published": published})
    report.write_text(folder / "summary.md", markdown(summaries, published) + "\n")
    report.write_text(folder / "summary.csv", csv_text(summaries, published))
    tables = [_cells(summaries, published), _differences(summaries)]
    tracks: list[report.Track] = []
    for example in examples:
        tracks += _tracks(example)
    facts: dict[str, Any] = {f"{s['separator']}, {s['task']}": s["options"] for s in summaries}
    weights: dict[str, dict[str, str]] = {}
    for s in summaries:
        beside = s.get("classifiers", {}) | s.get("refiner", {})
        weights[s["separator"]] = weights.get(s["separator"], {}) | s["weights"] | beside
    facts["weights"] = {name: found for name, found in weights.items() if found}
    facts["left out"] = notes(summaries, published)
    if not tracks:
        facts["players"] = "none: the stems were not kept"
    report.write_page(
        folder / "report.html",
        "Evaluation",
        facts,
        tracks,
        plots=_plots(summaries, rows),
        tables=[table for table in tables if len(table) > 1],
    )


def _tracks(example: Example) -> list[report.Track]:
    item, rate = example.item, example.sample_rate
    scores = example.row["si_sdr_permuted"]
    tracks = [(f"{example.title}: mixture {example.row['index']}", item["mixture"][None].numpy(), rate)]
    for name, reference, estimate, value in zip(item["names"], item["sources"], example.estimates, scores):
        tracks.append((f"{name}, reference", reference[None].numpy(), rate))
        tracks.append((f"{name}, estimate, {value:.1f} dB", estimate[None].numpy(), rate))
    return tracks


def _plots(summaries: Sequence[Summary], rows: Mapping[tuple[str, str], Sequence[Row]]) -> list[report.Plot]:
    """For each task the distribution of SI-SDR, then quality against evaluations of priors."""
    plots = []
    for task in dict.fromkeys(summary["task"] for summary in summaries):
        curves, points = {}, {}
        for summary in summaries:
            values = _means(rows.get((summary["separator"], task), []), "si_sdr_permuted")
            if summary["task"] != task or not values.size:
                continue
            curves[_shown(summary)] = (values[None] <= GRID[:, None]).mean(1)
            mean, count = summary["si_sdr_permuted"]["mean"], summary["evaluations"]
            # Empty where there is none, so that a separator has one colour in both plots.
            points[_shown(summary)] = np.array([[np.log10(count), mean]]) if count else np.zeros((0, 2))
        title = f"{task}: share of mixtures at or below an SI-SDR (best order)"
        plots.append(report.Plot(title, curves, "dB", GRID[-1], x_start=GRID[0]))
        places = np.concatenate([*points.values(), np.zeros((0, 2))])[:, 0]
        if len(places) > 1:
            start, end = np.floor(places.min()), np.ceil(places.max() + 1e-9)
            title = f"{task}: SI-SDR in dB (best order) against evaluations of priors"
            plots.append(report.Plot(title, {}, "log10(evaluations)", end, x_start=start, points=points))
    return plots
