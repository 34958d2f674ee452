"""Write a rival's checkpoint, from its run's, with its scores, its training and its sources.

Numbers come from files only: scores from `summary.json` of `audiosep evaluate recipes/unasdiff/rivals.toml`, training
from the card that the run wrote.
Run: python recipes/unasdiff/card.py runs/nmf checkpoints/nmf --separator NMF --scores runs/rivals/summary.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from audiosep import hub

HERE = Path(__file__).parent
ABOUT = {
    "expert": "A supervised network, trained on mixtures of the corpus: a rival of separation with diffusion priors, "
    "for one task only. A small one, trained on a shared CPU: expect weak separation.",
    "nmf": "Templates of spectra: a classical rival of separation with diffusion priors.",
}


def open16k() -> Any:
    """The corpus's own card.py, which knows its sources and how a score is shown."""
    spec = importlib.util.spec_from_file_location("open16k_card", HERE.parent / "open16k/card.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training(folder: Path) -> dict[str, str]:
    """The table of the card's section on training; an NMF has none."""
    section = (folder / hub.CARD).read_text(encoding="utf-8").partition("\n## Training\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    return {key: value for key, value in rows if key != "---"}


def main() -> None:
    """Rewrite a checkpoint with its card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--separator", required=True)
    parser.add_argument("--scores", type=Path, required=True)
    arguments = parser.parse_args()
    config, corpus = hub.read_config(arguments.run), open16k()
    summaries = json.loads(arguments.scores.read_text(encoding="utf-8"))["summaries"]
    card = {
        "title": f"audiosep/{arguments.checkpoint.name}",
        "description": ABOUT[config["model"]["name"]],
        "licence": corpus.LICENCE,
        "licence_id": "other",
        "data": "open16k (recipes/open16k), train split, 16 kHz mono",
        "training": training(arguments.run),
        "metrics": [corpus.metric_row(s) for s in summaries if s["separator"] == arguments.separator],
        "attribution": corpus.sources("speech") + corpus.sources("sound"),
    }
    print(hub.save_model(hub.load_model(arguments.run), arguments.checkpoint, card))


if __name__ == "__main__":
    main()
