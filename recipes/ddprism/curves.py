"""Experiment 1: random curves in five dimensions, three of which are seen at a time.

    python recipes/ddprism/curves.py contrastive2 -o runs/contrastive2 --rows 8192

Source k lives on a curve x_d(z) = sum_f a_df f^-alpha sin(2 pi (f b_df z + c_df)), z uniform, every coordinate scaled
to -2..2, alpha 3, 4, 5. A recording is y = A (x_1 + ...) + 0.01 noise with a new A (3, 5) of unit rows.

    contrastive2   view 1 has source 1, view 2 has sources 1 and 2; also contrastive3
    mixed          view a has A x_a + f_mix A x_b; --f-mix 0, 0.1, 0.5

Writes OUT/laps.jsonl (the loop's own), OUT/scores.jsonl (a line per lap) and OUT/final.json; with --rivals,
OUT/rivals.jsonl (a line per method and source).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from metrics import divergence, pqmass, psnr
from torch import Tensor

from audiosep.backbones.mlp import MLP
from audiosep.multiview import Plan, learn, read_start
from audiosep.multiview_baselines import CLVMVAE, CPCA, CVAE, PCPCA, CLVMLinear
from audiosep.multiview_start import Source, Stage, View, draw_start, fit_start
from audiosep.operators import Matrix
from audiosep.prior import JointPrior, Prior
from audiosep.recipe import build, override
from audiosep.samplers import OneNoise, Sampler
from audiosep.schedules import ve

N, M, NOISE = 5, 3, 0.01
ALPHAS = {"1": 3.0, "2": 4.0, "3": 5.0}
# Noise levels, as published for contrastive views; for mixed ones 5e-3..15 is published, and did no better.
LOW, HIGH = 1e-3, 10.0


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
    """One source after the other, each from the view in which it is new (contrastive) or strongest (mixed).

    Where a source is faint, or missing, its samples say little but what its prior was, errors and all. The start, which
    has no such errors, takes all mixed views at once.
    """
    names = ("1", "2", "3") if setting == "contrastive3" else ("1", "2")
    each = [Stage((name,), (name,), laps) for name in names] * rounds
    return [Stage(names, names, 0), *each] if setting == "mixed" else each


def pair(views: list[View]) -> tuple[View, View]:
    """The last two views as background and target: the sources that they share are one, "rest"."""
    background, target = views[-2:]
    maps = [view.operator.matrix[:, :1] for view in (background, target)]  # type: ignore[attr-defined]
    return (
        View(background.name, ("rest",), background.y, Matrix(maps[0]), NOISE),
        View(target.name, ("rest", target.name), target.y, Matrix(maps[1].expand(-1, 2, -1, -1)), NOISE),
    )


def made_up(prior: Prior, rows: int, plan: Plan, seed: int = 0) -> Tensor:
    """Rows (rows, N) of a prior itself."""
    joint = JointPrior([(prior, None)])
    schedule = ve(4 * plan.steps, plan.sigma_min, plan.sigma_max)
    times = list(range(len(schedule)))[::-1]
    sampler = Sampler(joint, schedule=schedule, times=times, t_init=None, init="noise", shared_noise=False)
    x = torch.zeros(rows, N)
    with torch.no_grad():
        for state in sampler(x, OneNoise(seed)):
            x = state.x[:, 0]
    return x


def score(drawn: dict[str, Tensor], made: dict[str, Tensor], truth: dict[str, Tensor], views: list[View]) -> list[Any]:
    """A row per source with what was drawn of it (rows, N), in the view where it is newest or strongest."""
    rows = []
    for view in views:
        if view.name not in drawn:
            continue
        true = truth[view.name][:, view.sources.index(view.name)]
        x = drawn[view.name].to(true)
        row: dict[str, Any] = {"source": view.name, "psnr": round(psnr(x, true), 2)}
        row["posterior_divergence"] = round(divergence(x, true), 3)
        row["posterior_pqmass"] = round(pqmass(x, true), 3)
        if view.name in made:
            row["prior_divergence"] = round(divergence(made[view.name].to(true), true), 3)
            row["prior_pqmass"] = round(pqmass(made[view.name].to(true), true), 3)
        rows.append(row)
    return rows


def own(views: list[View], samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of what was drawn (rows, K, N) in every view, the source that it is called after."""
    return {v.name: samples[v.name][:, v.sources.index(v.name)] for v in views if v.name in samples}


def rivals(options: argparse.Namespace) -> None:
    """Score everything but diffusion priors: it all takes minutes. One JSON line per method and source."""
    views, truth = make(options.setting, options.rows, options.f_mix, options.seed)
    names = sorted({name for view in views for name in view.sources})
    generator = torch.Generator().manual_seed(options.seed)
    out = options.out / "rivals.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["method"] for line in out.read_text().splitlines()} if out.exists() else set()

    def record(method: str, rows: list[Any], seconds: float) -> None:
        with out.open("a") as file:
            for row in rows:
                line = {"setting": options.setting, "f_mix": options.f_mix, "rows": options.rows, "seed": options.seed}
                line |= {"method": method, **row, "seconds": round(seconds, 1)}
                file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)

    def starts(components: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sources = [Source(name, components=components) for name in names]
        kept = options.out / "start.safetensors"  # of Joint, if it has run
        if components > 1 and kept.exists():
            found = read_start(kept)
        else:
            found = fit_start(views, sources, stages(options.setting, 0, 1), 300 if components == 1 else 40)
        drawn = own(views, {view.name: draw_start(view, found, 1) for view in views})
        return drawn, {name: start.sample(4096, generator).float() for name, start in found.items()}

    tasks: dict[str, Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]] = {
        "Gaussian EM": lambda: starts(1),
        f"mixture of {options.components}": lambda: starts(options.components),
    }
    if options.setting != "mixed":  # the others need a view without the target, and one matrix for all sources
        background, target = pair(views)

        def task(make_rival: Callable[..., Any], **more: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            rival = make_rival(background, target, **more)
            drawn = {target.name: rival.draw(target, generator)[:, 1]}
            return drawn, {target.name: rival.prior(4096, generator)}

        tasks |= {
            "CPCA": lambda: task(CPCA),
            "PCPCA": lambda: task(PCPCA),
            "CLVM-Linear": lambda: task(CLVMLinear),
            "CLVM-VAE": lambda: task(CLVMVAE, steps=options.rival_steps),
            "CVAE": lambda: task(CVAE, dims=1, steps=options.rival_steps),
        }
    for method, run in tasks.items():
        if method not in done:
            began = time.monotonic()
            drawn, made = run()
            seconds = time.monotonic() - began
            record(method, score(drawn, made, truth, views), seconds)


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
    parser.add_argument("--rival-steps", type=int, default=2000, help="of the variational rivals' training")
    parser.add_argument("--rivals", action="store_true", help="score the other methods and the start, train nothing")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    if options.rivals:
        return rivals(options)
    table: dict[str, Any] = {}
    for setting in options.settings:
        override(table, setting)
    plan = build(Plan, {"sigma_min": LOW, "sigma_max": HIGH, **table}, "plan")
    views, truth = make(options.setting, options.rows, options.f_mix, options.seed)
    names = sorted({name for view in views for name in view.sources})
    priors = {
        name: Prior(MLP(N, options.width), ve(200, LOW, HIGH), level=0.0, kind=name, parameterization="edm")
        for name in names
    }
    sources = [Source(name, priors[name], components=options.components) for name in names]
    began = time.monotonic()
    for lap in learn(views, sources, stages(options.setting, options.laps, options.rounds), plan, options.out):
        row: dict[str, Any] = {"stage": lap.stage, "lap": lap.lap, "minutes": round((time.monotonic() - began) / 60, 2)}
        for view in views:
            if view.name in lap.samples:
                for k, name in enumerate(view.sources):
                    found = psnr(lap.samples[view.name][:, k], truth[view.name][:, k])
                    row[f"psnr/{name} in view {view.name}"] = round(found, 3)
        row |= lap.facts
        print(json.dumps(row), flush=True)
        with (options.out / "scores.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    made = {name: made_up(prior, 4096, plan) for name, prior in priors.items()}
    rows = score(own(views, lap.samples), made, truth, views)
    (options.out / "final.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
