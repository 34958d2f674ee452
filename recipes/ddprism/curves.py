"""Experiment 1: random curves in five dimensions, three of which are seen at a time.

    python recipes/ddprism/curves.py contrastive2 -o runs/contrastive2 --rows 8192

Source k lives on a curve x_d(z) = sum_f a_df f^-alpha sin(2 pi (f b_df z + c_df)), z uniform, every coordinate scaled
to -2..2, alpha 3, 4, 5. A recording is y = A (x_1 + ...) + 0.01 noise with a new A (3, 5) of unit rows.

    contrastive2   view 1 has source 1, view 2 has sources 1 and 2; also contrastive3
    mixed          view a has A x_a + f_mix A x_b; --f-mix 0, 0.1, 0.5

Writes OUT/laps.jsonl (the loop's own), OUT/scores.jsonl (a line per lap and source) and OUT/rivals.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiosep.backbones.mlp import MLP
from audiosep.multiview import Plan, learn
from audiosep.multiview_start import Source, Stage, View
from audiosep.operators import Matrix
from audiosep.prior import Prior
from audiosep.recipe import build, override
from audiosep.schedules import ve

N, M, NOISE = 5, 3, 0.01
ALPHAS = {"1": 3.0, "2": 4.0, "3": 5.0}
RANGES = {"contrastive": (1e-3, 10.0), "mixed": (5e-3, 15.0)}  # noise levels, as published


def curve(alpha: float, rows: int, generator: torch.Generator) -> list[Tensor]:
    """Two sets of points (rows, N) on a random curve."""
    count = math.ceil(1000 ** (1 / alpha))
    a, b, c = (torch.rand(N, count, generator=generator) for _ in range(3))
    f = torch.arange(1, count + 1.0)
    z = torch.rand(2 * rows, 1, 1, generator=generator)
    x = (a * f**-alpha * torch.sin(2 * math.pi * (f * b * z + c))).sum(-1)
    low, high = x.min(0).values, x.max(0).values
    return list(((x - low) / (high - low) * 4 - 2).split(rows))


def make(setting: str, rows: int, f_mix: float, seed: int) -> tuple[list[View], dict[str, Tensor]]:
    """The views, and the true sources (rows, K, N) of each."""
    generator = torch.Generator().manual_seed(seed)
    names = ("1", "2", "3") if setting == "contrastive3" else ("1", "2")
    points = {name: curve(ALPHAS[name], rows * len(names) // 2, generator) for name in names}
    pool = {name: torch.cat(points[name]) for name in names}
    views, truth = [], {}
    for number, view in enumerate(names):
        shown = names if setting == "mixed" else names[: number + 1]
        x = torch.stack([pool[name][number * rows : (number + 1) * rows] for name in shown], 1)
        a = torch.nn.functional.normalize(torch.randn(rows, 1, M, N, generator=generator), dim=-1)
        gains = torch.tensor([1.0 if setting != "mixed" or name == view else f_mix for name in shown])
        operator = Matrix(a * gains[:, None, None])
        y = operator(x) + NOISE * torch.randn(rows, M, generator=generator)
        views.append(View(view, shown, y, operator, NOISE))
        truth[view] = x
    return views, truth


def stages(setting: str, laps: int, rounds: int) -> list[Stage]:
    """Contrastive sources one after the other, each from the view in which it is new; mixed ones together."""
    if setting == "mixed":
        return [Stage(("1", "2"), ("1", "2"), laps)] * rounds
    names = ("1", "2", "3") if setting == "contrastive3" else ("1", "2")
    return [Stage((name,), (name,), laps) for name in names]


def psnr(estimate: Tensor, truth: Tensor) -> float:
    """Mean over rows of the peak signal-to-noise ratio in dB, for a range of 4."""
    error = (estimate - truth).square().mean(-1).sqrt() + 1e-6
    return float((20 * (4 / error).log10()).nanmean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=["contrastive2", "contrastive3", "mixed"])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8192, help="recordings per view")
    parser.add_argument("--laps", type=int, default=8, help="per stage")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--f-mix", type=float, default=0.1)
    parser.add_argument("--components", type=int, default=1, help="of the mixtures that the sources start as")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of the curves")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="of the plan")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    table: dict[str, Any] = {}
    for setting in options.settings:
        override(table, setting)
    low, high = RANGES["mixed" if options.setting == "mixed" else "contrastive"]
    plan = build(Plan, {"sigma_min": low, "sigma_max": high, **table}, "plan")
    views, truth = make(options.setting, options.rows, options.f_mix, options.seed)
    names = sorted({name for view in views for name in view.sources})
    priors = {
        name: Prior(MLP(N, options.width), ve(200, low, high), level=0.0, kind=name, parameterization="edm")
        for name in names
    }
    sources = [Source(name, priors[name], components=options.components) for name in names]
    began = time.monotonic()
    for lap in learn(views, sources, stages(options.setting, options.laps, options.rounds), plan, options.out):
        row: dict[str, Any] = {"stage": lap.stage, "lap": lap.lap, "minutes": round((time.monotonic() - began) / 60, 2)}
        for view in views:
            if view.name in lap.samples:
                for k, name in enumerate(view.sources):
                    score = psnr(lap.samples[view.name][:, k], truth[view.name][:, k])
                    row[f"psnr/{name} in view {view.name}"] = round(score, 3)
        row |= lap.facts
        print(json.dumps(row), flush=True)
        with (options.out / "scores.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
