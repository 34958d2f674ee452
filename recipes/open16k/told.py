r"""How often tagger and classifier, alone and together, tell apart stems of recordings held out of their training.

Every stem of a held-out mixture holds the other sources `--faint` dB fainter, or is what a faulty mask leaves of all of
them (`tagger.masked`; lines whose `faint_db` is null). `pairs` is how often a stem fits its own class better than that
of another source (what class guidance climbs), `all` how often the best assignment of the mixture's stems is the true
one (what names them); chance is 1/2, and 1/K! for K sources. `together` is what the separator asks.

    python recipes/open16k/prepare.py --root DIR --valid 0.15 --least 3 -o data/open16k-rare.csv
    for n in tagger classifier; do
      audiosep train recipes/open16k/$n.toml -o runs/rare/$n --set data.manifest=data/open16k-rare.csv \
        --set train.max_steps=2000
    done
    python recipes/open16k/told.py runs/rare/tagger runs/rare/classifier --faint 10 \
      -o recipes/open16k/results/told.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiosep import hub
from audiosep.data import MixtureDataset, read_manifest
from audiosep.mixing import best_permutation
from audiosep.tagger import Ensemble, leaked, masked

TASKS = ("1speech+1sound", "1speech+2sound", "2sound", "3sound")


def scores(fits: Tensor) -> tuple[float, float]:
    """`pairs` and `all` of one mixture's fits (K, K)."""
    own, others = fits.diagonal()[:, None], ~torch.eye(len(fits), dtype=torch.bool)
    order = best_permutation(fits[None])[0].tolist()
    return (own > fits)[others].float().mean().item(), float(order == list(range(len(fits))))


def faulty(item: dict[str, Any], sample_rate: int, seed: int) -> Tensor:
    """The stems (K, N) of a mixture as faulty masks leave them."""
    rng = np.random.default_rng([7, seed])
    return torch.stack([masked(item["sources"], k, sample_rate, rng) for k in range(len(item["names"]))])


@torch.no_grad()
def main() -> None:
    """Write a line per task, level and network, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tagger", help="a checkpoint")
    parser.add_argument("classifier", help="another")
    parser.add_argument("--manifest", default="data/open16k-rare.csv", help="its valid split, default: %(default)s")
    parser.add_argument("--count", type=int, default=150, help="mixtures of each task, default: %(default)s")
    parser.add_argument("--faint", type=float, nargs="+", default=[10.0, 5.0], help="dB, default: 10 5")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    items = read_manifest(options.manifest, split="valid")
    tagger, classifier = hub.load_model(options.tagger), hub.load_model(options.classifier)
    networks = {"tagger": tagger, "classifier": classifier, "together": Ensemble(tagger, classifier)}
    lines = []
    for task in TASKS:
        mixtures = MixtureDataset(items, task, options.count, 3, classes=tagger.classes)
        for faint in (*options.faint, None):
            found: dict[str, list[tuple[float, float]]] = {}
            for i in range(options.count):
                item = mixtures[i]
                stems = (faulty(item, mixtures.sample_rate, i) if faint is None else leaked(item, faint))[None]
                for name, network in networks.items():
                    found.setdefault(name, []).append(scores(network.fits(stems, item["names"])[0]))
            for name, values in found.items():
                pairs, everything = (round(sum(column) / len(values), 3) for column in zip(*values))
                row = {"task": task, "faint_db": faint, "network": name, "pairs": pairs, "all": everything}
                lines.append(json.dumps(row | {"mixtures": options.count}))
                print(lines[-1], flush=True)
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
