"""Draw the papers' figures from runs of our own: python recipes/blind/figures.py -o results/blind/figures

StrADiff (arXiv:2604.04973): figure 2 (recovered sources with bands), 3 (loss terms, correlations, length-scales), 4 to
6 (paths of the reverse diffusion at the start, at iteration 3000 and at the end), 7 (recovered sources, nonlinear
mixing), from a random start and over the paper's 10,000 iterations. AR-Flow VAE (arXiv:2603.14441): 2 (recovered
sources with bands) and 3 (training traces), from a random start too. Correlations with the true sources are watched;
nothing is learned from them. runs.json has the numbers. Needs matplotlib (pip install 'audiosep[eval]').
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import scenarios
import torch
from numpy.typing import NDArray

from audiosep.blind import ARFlowVAE, StrADiff
from audiosep.blind.matching import align, match, mean_correlation, scales, si_sdr

mpl.use("Agg")
import matplotlib.pyplot as plt

Array = NDArray[np.float64]
SHOWN_STATES = 6  # of a diffusion path
WATCHED = 100  # iterations at which StrADiff's sources are compared with the true ones


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
    axes[0].legend(fontsize=8, ncols=3, loc="upper right", bbox_to_anchor=(1, 1.25))
    figure.suptitle(f"{title}: mean correlation {mean_correlation(found.sources_, truth):.4f}", fontsize=10)
    save(figure, path)


def draw_traces(traces: dict[str, tuple[Array, Array]], title: str, path: Path) -> None:
    """Curves by name, each its iterations and values: one line, or one per source."""
    columns = 3
    rows = -(-len(traces) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 2.6 * rows))
    for axis, (name, (steps, values)) in zip(axes.flat, traces.items()):
        axis.plot(steps, values, lw=1)
        axis.set_title(name.rstrip("_").replace("_", " "), fontsize=9)
        if values.ndim == 2 and values.shape[1] > 1:
            axis.legend([f"source {j + 1}" for j in range(values.shape[1])], fontsize=7)
        if np.abs(values).max() > 1e3:
            axis.set_yscale("symlog" if values.min() <= 0 else "log")
        if "correlation" in name:
            axis.set_ylim(min(0.8, float(values.min())), 1.005)
    for axis in axes.flat[len(traces) :]:
        axis.remove()
    for axis in axes[-1]:
        axis.set_xlabel("iteration", fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def curves(found: Any, watched: dict[int, Array]) -> dict[str, tuple[Array, Array]]:
    """The loss, what was learned, and the correlations (n,) with the true sources, where they were watched."""
    everywhere = np.arange(found.n_iter_)
    steps = np.array(list(watched))
    correlations = np.stack(list(watched.values()))
    return {
        "loss": (everywhere, found.loss_curve_),
        **{name: (everywhere, trace) for name, trace in found.traces_.items()},
        "correlation of each true source with its best": (steps, correlations),
        "mean correlation": (steps, correlations.mean(1)),
    }


def draw_path(states: Array, order: Array, title: str, path: Path) -> None:
    """States (L + 1, T, n) from x_L to x_0: a row per source in this order, a column per shown state."""
    steps = len(states) - 1
    states = states[..., order]
    chosen = np.unique(np.linspace(0, steps, SHOWN_STATES).astype(int))
    figure, axes = plt.subplots(states.shape[2], len(chosen), figsize=(12, 5), sharex=True, sharey="row")
    for row, axis in zip(range(states.shape[2]), axes):
        for panel, step in zip(axis, chosen):
            panel.plot(states[step, :, row], lw=0.7)
            if panel is axis[0]:
                panel.set_ylabel(f"source {row + 1}", fontsize=9)
            if row == 0:
                panel.set_title(f"$x_{{{steps - step}}}$", fontsize=9)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def stradiff(out: Path, iterations: int, seed: int) -> dict[str, dict[str, float]]:
    middle = min(3000, iterations // 2)
    draw = scenarios.make("hetero", seed)
    options = {"init": "random", "posterior": "native", "random_state": seed}
    watched = sorted({0, middle, *range(0, iterations, max(1, iterations // WATCHED))})
    start = time.process_time()
    found = StrADiff(3, snapshots=watched, max_iter=iterations, **options).fit(draw.X)
    runs = {"linear": facts(found, draw.S, time.process_time() - start)}
    draw_sources(found, draw.S, "StrADiff, linear mixing", out / "stradiff_2_sources.png")
    correlations = {step: match(path[-1], draw.S).correlations for step, path in found.paths_.items()}
    draw_traces(curves(found, correlations), "StrADiff, linear mixing", out / "stradiff_3_convergence.png")
    order = match(found.sources_, draw.S).order
    for number, step in ((4, 0), (5, middle), (6, iterations)):
        title = f"StrADiff, paths at iteration {step}"
        draw_path(found.paths_[step], order, title, out / f"stradiff_{number}_paths.png")
    bent = scenarios.make("mlp_mild", seed)
    start = time.process_time()
    found = StrADiff(3, mixing="mlp", **(options | {"init": "auto"})).fit(bent.X)
    runs["nonlinear"] = facts(found, bent.S, time.process_time() - start)
    draw_sources(found, bent.S, "StrADiff, nonlinear mixing", out / "stradiff_7_nonlinear.png")
    return runs


def random_starts(out: Path, count: int, iterations: int = 3000) -> None:
    """StrADiff from annealed random starts on as many seeds of hetero; random_starts.json has the numbers.

    "correlation" is that of its own sources, which it smooths; "unmixed" that of the recording under its mixing.
    """
    runs = []
    for seed in range(count):
        draw = scenarios.make("hetero", seed)
        options = {"init": "random", "posterior": "native", "random_state": seed, "max_iter": iterations}
        start = time.process_time()
        found = StrADiff(3, **options).fit(draw.X)
        seconds = time.process_time() - start
        unmixed = (draw.X - found.mean_) @ np.linalg.pinv(found.mixing_).T
        row = facts(found, draw.S, seconds)
        runs.append({"seed": seed, **row, "unmixed": mean_correlation(unmixed, draw.S)})
        (out / "random_starts.json").write_text(json.dumps(runs, indent=1) + "\n")


class WatchedARFlow(ARFlowVAE):
    """Notes how close the encoder's sources are to the true ones."""

    truth: Array
    watched: dict[int, Array]

    def _loss(self, z: Any, fit: Any, beta: float) -> Any:
        with torch.no_grad():
            self.watched[len(self.watched)] = match(fit.encoder(z).numpy(), self.truth).correlations
        return super()._loss(z, fit, beta)


def ar_flow(out: Path, seed: int) -> dict[str, dict[str, float]]:
    draw = scenarios.make("hetero", seed)
    estimator = WatchedARFlow(3, init="random", posterior="native", max_iter=1000, random_state=seed, device="cpu")
    estimator.truth, estimator.watched = draw.S, {}
    start = time.process_time()
    found = estimator.fit(draw.X)
    runs = {"AR-Flow": facts(found, draw.S, time.process_time() - start)}
    draw_sources(found, draw.S, "AR-Flow VAE", out / "ar_flow_2_sources.png")
    draw_traces(curves(found, found.watched), "AR-Flow VAE", out / "ar_flow_3_traces.png")
    return runs


def facts(found: Any, truth: Array, seconds: float) -> dict[str, float]:
    return {
        "iterations": found.n_iter_,
        "correlation": mean_correlation(found.sources_, truth),
        "SI-SDR": float(si_sdr(found.sources_, truth).mean()),
        "CPU seconds": seconds,
    }


def draw(out: Path, iterations: int = 10000, seed: int = 0) -> None:
    """All figures and runs.json into the folder `out`."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    runs = ar_flow(out, seed) | stradiff(out, iterations, seed)
    (out / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("results/blind/figures"))
    parser.add_argument("--iterations", type=int, default=10000, help="of StrADiff; the paper's 10,000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random-starts", type=int, metavar="N", help="only StrADiff from random starts on N seeds")
    arguments = parser.parse_args()
    if arguments.random_starts:
        torch.set_num_threads(1)
        arguments.out.mkdir(parents=True, exist_ok=True)
        random_starts(arguments.out, arguments.random_starts)
        return
    draw(arguments.out, arguments.iterations, arguments.seed)


if __name__ == "__main__":
    main()
