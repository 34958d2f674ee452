"""Experiment 3: handwritten digits over textures, neither of which is audio; the paper's images in small.

    python recipes/ddprism/digits.py -o runs/digits

View "texture" has 8 x 8 pictures of waves of random direction, pitch, phase and strength; view "both" has others with a
digit of scikit-learn's set on top. Sources are 64 numbers, everything is seen, with noise of 0.02. Half of the digits
are in the view, the others are only compared with. OUT/rows.jsonl has, per method, the PSNR of the digits (span 1) and
the Frechet distance of what was drawn of them, and of what the prior makes up, from digits that were never used.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from metrics import psnr
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from torch import Tensor

from audiosep.backbones.mlp import MLP
from audiosep.multiview import Plan, learn
from audiosep.multiview_baselines import CLVMVAE, CPCA, CVAE, PCPCA, CLVMLinear
from audiosep.multiview_start import Source, Stage, View, draw_start, fit_start
from audiosep.operators import Matrix
from audiosep.prior import JointPrior, Prior
from audiosep.samplers import OneNoise, Sampler
from audiosep.schedules import ve

N, NOISE, LOW, HIGH = 64, 0.02, 1e-2, 10.0
NAMES = ("texture", "digit")


def textures(rows: int, generator: torch.Generator) -> Tensor:
    """Waves (rows, 64)."""
    angle, phase = 2 * math.pi * torch.rand(2, rows, 1, generator=generator)
    pitch, strength = (
        0.5 + torch.rand(rows, 1, generator=generator),
        0.3 + 0.4 * torch.rand(rows, 1, generator=generator),
    )
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    return strength * torch.sin(pitch * (angle.cos() * x.flatten() + angle.sin() * y.flatten()) + phase)


def frechet(x: Tensor, y: Tensor) -> float:
    """|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^1/2): 0 where both moments agree; of pixels, there being so few."""
    x, y = x[x.isfinite().all(1)].double(), y.double()
    a, b = torch.cov(x.T), torch.cov(y.T)
    root = np.trace(np.real(sqrtm((a @ b).numpy() + 1e-10 * np.eye(len(a)))))
    return float((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace()) - 2 * float(root)


def made_up(prior: Prior, rows: int) -> Tensor:
    schedule = ve(128, LOW, HIGH)
    sampler = Sampler(
        JointPrior([(prior, None)]), schedule=schedule, times=list(range(128))[::-1], t_init=None, init="noise",
        shared_noise=False,
    )  # fmt: skip
    x = torch.zeros(rows, N)
    with torch.no_grad():
        for state in sampler(x, OneNoise(0)):
            x = state.x[:, 0]
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--laps", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000, help="of training per lap")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    digits = torch.from_numpy(load_digits().data / 16).float()
    digits = digits[torch.randperm(len(digits), generator=generator)]
    half = len(digits) // 2
    digits, others = digits[:half], digits[half:]
    eye = torch.eye(N, dtype=torch.float64)
    alone, under = textures(half, generator), textures(half, generator)
    views = []
    for name, sources, x in ((NAMES[0], NAMES[:1], alone), (NAMES[1], NAMES, under + digits)):
        y = x + NOISE * torch.randn(x.shape, generator=generator)
        views.append(View(name, sources, y, Matrix(eye.expand(len(sources), N, N)), NOISE))
    path = options.out / "rows.jsonl"
    done = {json.loads(line)["method"] for line in path.read_text().splitlines()} if path.exists() else set()

    def record(method: str, drawn: Tensor, made: Tensor, began: float) -> None:
        row = {"method": method, "psnr": round(psnr(drawn.float(), digits, 1.0), 2)}
        row["frechet_posterior"] = round(frechet(drawn, others), 3)
        row["frechet_prior"] = round(frechet(made, others), 3)
        row |= {"seconds": round(time.monotonic() - began, 1), "rows": half}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    stages = [Stage((name,), (name,), options.laps) for name in NAMES]

    def start(components: int) -> tuple[Tensor, Tensor]:
        found = fit_start(views, [Source(name, components=components) for name in NAMES], stages, 20)
        return draw_start(views[1], found, 0)[:, 1], found[NAMES[1]].sample(1000, generator)

    def rival(make: Callable[..., object]) -> tuple[Tensor, Tensor]:
        fitted = make(*views)
        return fitted.draw(views[1], generator)[:, 1], fitted.prior(1000, generator)  # type: ignore[attr-defined]

    def joint() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        priors = [Prior(MLP(N, 384), ve(200, LOW, HIGH), level=-10.0, parameterization="edm") for _ in NAMES]
        sources = [Source(name, prior, components=options.components) for name, prior in zip(NAMES, priors)]
        plan = Plan(
            steps=32, sigma_min=LOW, sigma_max=HIGH, again=0.3, iterations=8, max_steps=options.steps, batch_size=256,
            start_laps=20,
        )  # fmt: skip
        *_, last = learn(views, sources, stages, plan, options.out / "joint")
        return last.samples[NAMES[1]][:, 1], made_up(priors[1], 1000)

    methods: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "Gaussian EM": lambda: start(1),
        f"mixture of {options.components}": lambda: start(options.components),
        "Joint": joint,
    }
    for make in (CPCA, PCPCA, CLVMLinear, CLVMVAE, CVAE):
        extra = {"dims": 10} if make is not CLVMLinear else {"dims": 10, "laps": 5}
        if make in (CLVMVAE, CVAE):
            extra["steps"] = 1500
        methods[make.__name__] = lambda make=make, extra=extra: rival(lambda *v: make(*v, **extra))
    for method, run in methods.items():
        if method not in done:
            began = time.monotonic()
            drawn, made = run()
            record(method, drawn, made, began)


if __name__ == "__main__":
    main()
