"""Write the checkpoint of a rival, from a run's checkpoint, with its scores, its training and its sources.

    python recipes/unasdiff/card.py runs/ct checkpoints/ct --separator Conv-TasNet --scores runs/rivals/summary.json

Numbers come from files only: --scores is the summary that `audiosep evaluate` wrote, training is what the run's own
checkpoint says.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from audiosep import hub

HERE = Path(__file__).parent
ABOUT = {
    "expert": "A supervised network, trained on mixtures of the corpus: a rival of separation with diffusion priors, "
    "for one task only. A small one, trained for minutes on a CPU.",
    "nmf": "Templates of spectra: a classical rival of separation with diffusion priors.",
}
COLUMNS = {
    "si_sdr": "SI-SDR, labels fixed, dB",
    "si_sdr_permuted": "SI-SDR, best order, dB",
    "si_sdri": "SI-SDRi, labels fixed, dB",
}


def metric_rows(path: Path, separator: str) -> list[dict[str, Any]]:
    """A row of the card per task of this separator."""
    rows = []
    for summary in json.loads(path.read_text(encoding="utf-8"))["summaries"]:
        if summary["separator"] != separator:
            continue
        low, high = summary["si_sdr"]["interval"]
        row = {"task": summary["task"], "mixtures": summary["count"], "seed": summary["seed"]}
        row |= {title: summary[key]["mean"] for key, title in COLUMNS.items()}
        row |= {"95 % interval of the first": f"{low:.2f} to {high:.2f}"}
        rows.append(row | {"mean below 0 dB": f"{100 * summary['failure_rate']:.0f} %"})
    if not rows:
        raise SystemExit(f"{path}: no scores of {separator}")
    return rows


def open16k() -> Any:
    """The corpus's own card.py, which knows its sources and the licence."""
    spec = importlib.util.spec_from_file_location("open16k_card", HERE.parent / "open16k/card.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training(folder: Path) -> str:
    """The card's section on training, as the run wrote it."""
    sections = (folder / hub.CARD).read_text(encoding="utf-8").split("\n## ")
    return next((s.partition("\n\n")[2].strip() for s in sections if s.startswith("Training\n")), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--separator", required=True)
    parser.add_argument("--scores", type=Path, required=True)
    arguments = parser.parse_args()
    config, model = hub.read_config(arguments.run), hub.load_model(arguments.run)
    corpus = open16k()
    card = {
        "title": f"audiosep/{arguments.checkpoint.name}",
        "description": ABOUT[config["model"]["name"]],
        "licence": corpus.LICENCE,
        "licence_id": "mit",
        "data": "open16k (recipes/open16k), train split, 16 kHz mono",
        "training": training(arguments.run),
        "metrics": metric_rows(arguments.scores, arguments.separator),
        "attribution": corpus.sources("speech") + corpus.sources("sound"),
    }
    print(hub.save_model(model, arguments.checkpoint, card))


if __name__ == "__main__":
    main()
