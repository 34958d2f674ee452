"""Write a shipped checkpoint's model card: its training, its scores, its cost, its sources.

Numbers come from files only: training, and what tagger, classifier and refiner were probed with, from the checkpoint
itself, a prior's scores from `summary.json` of `audiosep evaluate recipes/open16k/shipped.toml`, its cost from
`recipes/benchmark/results.jsonl`. The weights stay as they are.
Run: python recipes/open16k/card.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from audiosep import hub, recipe

HERE = Path(__file__).parent
BENCHMARK = HERE.parent / "benchmark/results.jsonl"
SHIPPED = ("speech", "sound", "tagger", "classifier", "refiner")
LICENCE = "MIT for the weights; the recordings they were trained on keep their own licences, see Attribution"
DESCRIPTION = "Trained on isolated recordings only, for source separation by posterior sampling. "


def metric_row(summary: dict[str, Any]) -> dict[str, Any]:
    """One row of the card's table from an evaluation's summary."""
    fixed, best = summary["si_sdr"], summary["si_sdr_permuted"]
    return {
        "task": summary["task"],
        "separator": summary["separator"],
        "mixtures": summary["count"],
        "SI-SDR, labels fixed, dB": fixed["mean"],
        "95 %": "{:.2f} to {:.2f}".format(*fixed["interval"]),
        "median": fixed["median"],
        "SI-SDR, best order, dB": best["mean"],
        "of the mixture, dB": summary["mixture_si_sdr"]["mean"],
        "mean below 0 dB (best order)": f"{100 * summary['failure_rate_permuted']:.0f} %",
        "network evaluations": summary["evaluations"],
        "seconds per mixture": summary["seconds"],
    }


def cost_row(row: dict[str, Any]) -> dict[str, Any]:
    """One row of the card's table from the benchmark, which runs priors alone."""
    alone = "default, without guidance" if row["preset"] == "default" else row["preset"]
    return {
        "preset": f"{alone}, compiled" if row["compiled"] else alone,
        "device": row["device"],
        "number format": row["dtype"],
        "seconds of a step, 4 s of 2 sources": row["step_s"],
        "network evaluations per source": row["evaluations_per_source"],
        "real-time factor": row["real_time_factor"],
        "peak memory, GiB": row["peak_gib"],
    }


def before(name: str) -> dict[str, Any]:
    """What is known of the training that a checkpoint was started from."""
    path = HERE / f"results/training-{name}.json"
    if not path.exists():
        return {}
    facts = json.loads(path.read_text(encoding="utf-8"))
    return {"steps before": facts["steps"], "noise levels before": facts["noise levels"]}


def sources(kind: str) -> list[str]:
    """The corpus's repositories that hold recordings of a kind, from the table in this folder's README."""
    table = (HERE / "README.md").read_text(encoding="utf-8").split("## Sources")[1]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if "/" in line]
    spoken = [row for row in rows if len(row) == 3 and row[1].startswith(("speech", "spoken"))]
    chosen = spoken if kind == "speech" else [row for row in rows if len(row) == 3 and row not in spoken]
    return [": ".join(row) for row in chosen]


def prior_card(folder: Path, summaries: list[dict[str, Any]], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The card of a prior, from summaries of evaluations and the benchmark's rows."""
    config = hub.read_config(folder)
    kind = config["kind"]
    return {
        "title": f"audiosep/{folder.name}: a small diffusion prior of {kind}",
        "description": f"{DESCRIPTION}Trained on a shared CPU for a few hours: expect weak separation.",
        "licence": LICENCE,
        "licence_id": "other",
        "data": config["data"],
        "training": config["training"] | before(folder.name),
        "metrics": [metric_row(s) for s in summaries if kind in s["task"] and s["evaluations"]],
        "cost": [cost_row(row) for row in measured if row["network"] == "small"],
        "attribution": sources(kind),
    }


def listener_card(folder: Path) -> dict[str, Any]:
    """The card of tagger, classifier or refiner: as its recipe and its run have it, with all sources."""
    config = hub.read_config(folder)
    facts = {key: config[key] for key in ("data", "training", "metrics")}
    words = recipe.load(HERE / f"{folder.name}.toml")["card"]
    return words | facts | {"attribution": sources("speech") + sources("sound")}


def main() -> None:
    """Rewrite checkpoints with their cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = [HERE.parents[1] / "checkpoints" / name for name in SHIPPED]
    results = sorted(HERE.glob("results/*/summary.json"))
    parser.add_argument("checkpoints", type=Path, nargs="*", default=shipped, help="default: those shipped")
    parser.add_argument("--scores", type=Path, nargs="+", default=results, help="default: results/*/summary.json")
    arguments = parser.parse_args()
    files = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.scores]
    summaries = [summary for file in files for summary in file["summaries"]]
    measured = [json.loads(line) for line in BENCHMARK.read_text(encoding="utf-8").splitlines()]
    for folder in arguments.checkpoints:
        if hub.is_prior(folder):
            print(hub.save_prior(hub.load_prior(folder), folder, prior_card(folder, summaries, measured)))
        else:
            print(hub.save_model(hub.load_model(folder), folder, listener_card(folder)))


if __name__ == "__main__":
    main()
