"""What trains best in equal time: one change of a recipe at a time, minutes each, scored on the same held-out windows.

    python recipes/open16k/search.py -o runs/search --minutes 4

Each change is `audiosep train recipes/open16k/speech.toml` with `COMMON` and its own settings. The score is one for
all, whatever noise levels or loss a change trains with: E[x_0 | x_0 + s eps] is asked of every prior at the same eight
levels s, 1.5 down to 0.01 (the lowest of the published schedule), on windows of 4 s, and the loss is

    mean (estimate - x_0)^2 (s^2 + d^2) / (s d)^2,    d the standard deviation of speech,

which is 1 for the best linear denoiser of flat noise. A row goes to results/search.jsonl as it is done, a run that was
stopped goes on, and several can run side by side, each with its own part (`--part 1/2`). The table: results/search.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audiosep import recipe
from audiosep.data import SourceDataset, read_manifest
from audiosep.hub import load_prior
from audiosep.prior import precision

HERE = Path(__file__).parent
RECIPE = HERE / "speech.toml"
# A run of minutes wants a shorter average and warm-up than one of hours.
COMMON = [
    "train.ema=0.99",
    "train.warmup=20",
    "train.probe_every=0",
    "probe.windows=0",
    "probe.mixtures=0",
    "train.save_every=100000",
]
CHANGES: dict[str, list[str]] = {
    "as it is": [],
    "width 48": ["backbone.width=48"],
    "direct estimate instead of a mask": ["backbone.head=direct"],
    "patch 8 x 4": ["backbone.patch=[8,4]"],
    "windows of 2 s, twice as many": ["data.segment=2.0", "train.batch_size=8"],
    "noise estimate, published schedule": [
        "prior.parameterization=eps",
        "prior.focus=0",
        "backbone.head=direct",
        'schedule={name="vp_linear"}',
    ],
    "all levels alike": ["prior.focus=0"],
    "four blocks at the bottom": ["backbone.depth=[1,1,4,1,1]"],
    "learning rate 2e-3": ["train.learning_rate=2e-3"],
    "batch 2": ["train.batch_size=2"],
    "width 96": ["backbone.width=96"],
    "no adaptive normalisation from zero": ["backbone.adaln_zero=false"],
    "learning rate 5e-4": ["train.learning_rate=5e-4"],
    "batch 8": ["train.batch_size=8"],
    "middle levels more": ["prior.focus=0.9"],
    "one block at the bottom": ["backbone.depth=[1,1,1,1,1]"],
    "patch 4 x 8": ["backbone.patch=[4,8]"],
    "lowest noise 1e-2": ["schedule.sigma_min=1e-2"],
    "windows of 2 s, as many": ["data.segment=2.0"],
    "constant learning rate": ["train.decay=constant"],
    "average over 50 steps": ["train.ema=0.98"],
    "average over 500 steps": ["train.ema=0.998"],
}
LEVELS = np.geomspace(1.5, 1e-2, 8)
WINDOWS = 24


@torch.no_grad()
def held_out(folder: Path) -> list[float]:
    """Loss of the checkpoint in `folder` at each of LEVELS."""
    prior = load_prior(str(folder)).eval()
    data = recipe.load(RECIPE)["data"]
    items = read_manifest(data["manifest"], None, "valid", prior.kind)
    windows = SourceDataset(items, WINDOWS, 0, data["segment"], prior.sample_rate, join=data["join"])
    clean = torch.stack([windows[i]["wave"] for i in range(WINDOWS)])
    d, losses = prior.sigma_data, []
    for k, s in enumerate(LEVELS):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(k))
        # The state of the prior's own schedule at that ratio of noise to signal.
        t = prior.schedule.step_at(torch.tensor([s], dtype=torch.float64))
        alpha = float(prior.schedule.alpha_of(torch.tensor(s)))
        error = 0.0
        for x, eps in zip(clean.split(4), noise.split(4)):
            with precision(clean.device, torch.bfloat16):
                estimate = prior.denoise(alpha * (x + s * eps), t.expand(len(x))).float()
            error += float((estimate - x).square().mean(-1).sum())
        losses.append(error / WINDOWS * (s**2 + d**2) / (s * d) ** 2)
    return losses


def run(name: str, changes: list[str], folder: Path, minutes: float) -> dict[str, Any]:
    """Train with the changes and score: a row."""
    sets = [*COMMON, f"train.max_minutes={minutes:g}", *changes]
    digest = hashlib.sha256(json.dumps(sets).encode()).hexdigest()[:8]  # a run of other settings is another run
    out = folder / f"{name.replace(' ', '-')}-{digest}"
    train = [sys.executable, "-m", "audiosep", "train", str(RECIPE), "-o", str(out), "--resume", "--progress", "plain"]
    settings = [part for setting in sets for part in ("--set", setting)]
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*train, *settings], check=True, stdout=sys.stderr, env=one_core)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    losses = held_out(out)
    about = {"change": name, "minutes": minutes, "steps": config["training"]["steps"], "loss": float(np.mean(losses))}
    by_level = {f"{level:.3g}": round(loss, 4) for level, loss in zip(LEVELS, losses)}
    return about | {"by level": by_level, "settings": changes, "common": COMMON}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the best change first."""
    lines = ["| change | `--set` | steps | held-out loss |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["loss"]):
        sets = " ".join(f"`{setting}`" for setting in row["settings"])
        lines.append(f"| {row['change']} | {sets} | {row['steps']} | {row['loss']:.4f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing; write the rows and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/search"), help="where the checkpoints go")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--part", default="1/1", help="which of how many parts of the changes to run")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    file = arguments.results / "search.jsonl"

    def rows() -> list[dict[str, Any]]:
        """Those of the settings and the time of now."""
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        found = [json.loads(line) for line in lines if line]
        now = [(name, changes, COMMON, arguments.minutes) for name, changes in CHANGES.items()]
        return [row for row in found if (row["change"], row["settings"], row["common"], row["minutes"]) in now]

    torch.set_num_threads(1)
    for k, (name, changes) in enumerate(CHANGES.items()):
        if k % parts == part - 1 and name not in {row["change"] for row in rows()}:
            row = run(name, changes, arguments.out, arguments.minutes)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
    (arguments.results / "search.md").write_text(table(rows()), encoding="utf-8")
    print(table(rows()))


if __name__ == "__main__":
    main()
