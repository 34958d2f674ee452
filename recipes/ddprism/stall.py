"""Why learning from a Gaussian start stalls at source 2: the sampler against exact posteriors under the same priors.

    python recipes/ddprism/stall.py -o results/stall.jsonl

Both sources of `curves.py contrastive2` start as mixtures of Gaussians, under which the posterior can be drawn from
exactly. Moment matching takes the sources, given their noisy state, for Gaussian; how much that costs with the same
priors is the difference of the two scores. A line per number of components, PSNR in dB of sources 1 and 2 in view 2:

    exact         exact samples
    64x1, 256x1   moment matching from noise: noise levels x Langevin steps at each
    64x8
    again         moment matching, 64x1, from the exact samples in noise of 0.3
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from curves import make, stages
from metrics import psnr
from torch import Tensor

from audiosep.multiview import Plan, draw
from audiosep.multiview_start import Source, draw_start, fit_mixtures
from audiosep.schedules import ve

SIZES = ((1, 1), (16, 1), (16, 2), (16, 4), (16, 16))
PLANS = {
    "64x1": Plan(steps=64),
    "256x1": Plan(steps=256),
    "64x8": Plan(steps=64, corrections=8),
    "again": Plan(steps=64, again=0.3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4096, help="of a view, to fit")
    parser.add_argument("--drawn", type=int, default=1024, help="of them, to score")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    views, truth = make("contrastive2", options.rows, 0.0, options.seed)
    few = slice(0, options.drawn)
    view = replace(views[1], y=views[1].y[few], operator=views[1].operator.rows(few))

    def scores(x: Tensor) -> list[float]:
        return [round(psnr(x[:, k], truth["2"][few, k]), 2) for k in range(2)]

    for sizes in SIZES:
        sources = [Source(name, components=size) for name, size in zip(("1", "2"), sizes)]
        found = fit_mixtures(views, sources, stages("contrastive2", 0, 1), 40)
        exact = draw_start(view, found, 1)
        row = {"components": sizes, "rows": options.rows, "seed": options.seed, "exact": scores(exact)}
        for name, plan in PLANS.items():
            priors = [found[key].prior(ve(plan.steps, plan.sigma_min, plan.sigma_max)) for key in ("1", "2")]
            x, counts = draw(view, priors, plan, 1, exact)
            row[name] = scores(x)
            row |= {f"{name} {key}": count for key, count in counts.items() if count}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
