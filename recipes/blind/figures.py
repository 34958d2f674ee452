"""Draw the papers' figures from runs of our own: python recipes/blind/figures.py -o results/blind/figures

StrADiff (arXiv:2604.04973): figure 2 (recovered sources with bands), 3 (loss terms, length-scales), 4 to 6 (paths of
the reverse diffusion at the start, at iteration 3000 and at the end), 7 (recovered sources, nonlinear mixing), from a
random start. AR-Flow VAE (arXiv:2603.14441): 2 (recovered sources with bands) and 3 (training traces).
Needs matplotlib (pip install 'audiosep[eval]').
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import scenarios
import torch
from numpy.typing import NDArray

from audiosep.blind import ARFlowVAE, StrADiff
from audiosep.blind.matching import align, match, mean_correlation, scales

mpl.use("Agg")
import matplotlib.pyplot as plt

Array = NDArray[np.float64]
SHOWN_STATES = 6  # of a diffusion path


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(path)


def draw_sources(found: Any, truth: Array, title: str, path: Path) -> None:
    """Each true source, its estimate, and the estimate's 95 % band."""
    pairing = match(found.sources_, truth)
    estimate = align(found.sources_, truth)
    band = 1.96 * found.sources_std_[:, pairing.order] * np.abs(scales(found.sources_, truth))
    figure, axes = plt.subplots(truth.shape[1], 1, figsize=(9, 6), sharex=True)
    time = np.arange(len(truth))
    for j, axis in enumerate(axes):
        axis.fill_between(time, estimate[:, j] - band[:, j], estimate[:, j] + band[:, j], alpha=0.3, label="95 % band")
        axis.plot(time, truth[:, j], "k", lw=1, label="true")
        axis.plot(time, estimate[:, j], "--", lw=1, label="estimate")
        axis.set_title(f"source {j + 1}: correlation {pairing.correlations[j]:.4f}", fontsize=9)
    axes[0].legend(fontsize=8, ncols=3)
    figure.suptitle(f"{title}: mean correlation {mean_correlation(found.sources_, truth):.4f}", fontsize=10)
    save(figure, path)


def draw_traces(found: Any, title: str, path: Path) -> None:
    """The loss and whatever was learned, over the iterations."""
    traces = {"loss": found.loss_curve_, **found.traces_}
    columns = 3
    figure, axes = plt.subplots(-(-len(traces) // columns), columns, figsize=(10, 2.6 * -(-len(traces) // columns)))
    for axis, (name, trace) in zip(axes.flat, traces.items()):
        axis.plot(trace, lw=1)
        axis.set_title(name.rstrip("_").replace("_", " "), fontsize=9)
        if trace.ndim == 1 and trace.min() <= 0:
            axis.set_yscale("symlog")
    for axis in axes.flat[len(traces) :]:
        axis.remove()
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def draw_path(states: Array, title: str, path: Path) -> None:
    """States (L + 1, T, n) from x_L to x_0: a row per source, a column per shown state."""
    steps = len(states) - 1
    chosen = np.unique(np.linspace(0, steps, SHOWN_STATES).astype(int))
    figure, axes = plt.subplots(states.shape[2], len(chosen), figsize=(12, 5), sharex=True, sharey="row")
    for row, axis in zip(range(states.shape[2]), axes):
        for panel, step in zip(axis, chosen):
            panel.plot(states[step, :, row], lw=0.7)
            if row == 0:
                panel.set_title(f"$x_{{{steps - step}}}$", fontsize=9)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def stradiff(out: Path, iterations: int, seed: int) -> None:
    middle = min(3000, iterations // 2)
    draw = scenarios.make("hetero", seed)
    options = {"init": "random", "posterior": "native", "max_iter": iterations, "random_state": seed}
    found = StrADiff(3, snapshots=(0, middle), **options).fit(draw.X)
    draw_sources(found, draw.S, "StrADiff, linear mixing", out / "stradiff_2_sources.png")
    draw_traces(found, "StrADiff, linear mixing", out / "stradiff_3_convergence.png")
    for number, step in ((4, 0), (5, middle), (6, iterations)):
        draw_path(found.paths_[step], f"StrADiff, paths at iteration {step}", out / f"stradiff_{number}_paths.png")
    bent = scenarios.make("mlp_mild", seed)
    found = StrADiff(3, mixing="mlp", **(options | {"init": "auto"})).fit(bent.X)
    draw_sources(found, bent.S, "StrADiff, nonlinear mixing", out / "stradiff_7_nonlinear.png")


def ar_flow(out: Path, seed: int) -> None:
    draw = scenarios.make("hetero", seed)
    found = ARFlowVAE(3, posterior="native", random_state=seed).fit(draw.X)
    draw_sources(found, draw.S, "AR-Flow VAE", out / "ar_flow_2_sources.png")
    draw_traces(found, "AR-Flow VAE", out / "ar_flow_3_traces.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("results/blind/figures"))
    parser.add_argument("--iterations", type=int, default=10000, help="of StrADiff; the paper's 10,000")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    ar_flow(arguments.out, arguments.seed)
    stradiff(arguments.out, arguments.iterations, arguments.seed)


if __name__ == "__main__":
    main()
