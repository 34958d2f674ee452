"""Write a shipped checkpoint's model card: its scores, its training, its sources.

Numbers come from files only: SCORES are what `audiosep evaluate ... --json` printed, TRAINING is the last line of the
training log. Run: python recipes/open16k/card.py checkpoints/speech --training LOG.json --scores results/*.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from audiosep import hub

HERE = Path(__file__).parent
LICENCE = "MIT for the weights; the recordings they were trained on keep their own licences, see Attribution"


def metric_row(summary: dict[str, Any]) -> dict[str, Any]:
    """One row of the card's table from an evaluation's summary."""
    fixed, options = summary["si_sdr"], summary.get("options", {})
    low, high = fixed["interval"]
    return {
        "task": summary["task"],
        "mixtures": summary["count"],
        "seed": summary["seed"],
        "preset": options.get("preset", "default"),
        "SI-SDR of the mixture, dB": summary["mixture_si_sdr"]["mean"],
        "SI-SDR, labels fixed, dB": fixed["mean"],
        "95 % interval": f"{low:.2f} to {high:.2f}",
        "median": fixed["median"],
        "best permutation": summary["si_sdr_permuted"]["mean"],
        "mean below 0 dB": f"{100 * summary['failure_rate']:.0f} %",
        "network evaluations": summary["evaluations"],
        "seconds per mixture": summary["seconds"],
    }


def sources(kind: str) -> list[str]:
    """The corpus's repositories that hold recordings of a kind, from the table in this folder's README."""
    table = (HERE / "README.md").read_text(encoding="utf-8").split("## Sources")[1]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if "/" in line]
    spoken = [row for row in rows if len(row) == 3 and row[1].startswith(("speech", "spoken"))]
    chosen = spoken if kind == "speech" else [row for row in rows if len(row) == 3 and row not in spoken]
    return [": ".join(row) for row in chosen]


def main() -> None:
    """Rewrite the checkpoint with its card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--training", type=Path, required=True)
    parser.add_argument("--scores", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    prior = hub.load_prior(arguments.checkpoint)
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.scores]
    card = {
        "title": f"audiosep/{arguments.checkpoint.name}: a small diffusion prior of {prior.kind}",
        "description": "Trained on isolated recordings only, for source separation by posterior sampling. "
        "A first checkpoint, trained for about an hour and a half on one CPU core: expect weak separation.",
        "licence": LICENCE,
        "licence_id": "mit",
        "data": "open16k (recipes/open16k), train split: 16 kHz mono, windows of 4 s at -25..-20 dBFS RMS",
        "training": json.loads(arguments.training.read_text(encoding="utf-8")),
        "metrics": [metric_row(summary) for summary in summaries],
        "attribution": sources(prior.kind),
    }
    print(hub.save_prior(prior, arguments.checkpoint, card))


if __name__ == "__main__":
    main()
