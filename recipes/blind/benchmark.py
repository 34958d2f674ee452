"""Score the blind estimators on known mixtures: one command, the tables and the figures.

    python recipes/blind/benchmark.py -o results/blind --figures

Each method runs on ten seeds; the learned ones, which are slow, on three where no aim of theirs asks for more. Rows (a
method, scenario and seed each) go to rows.jsonl as they come, so that an interrupted run goes on where it was; table.md
has, per method and scenario, the mean and worst matched |correlation|, the mean SI-SDR in dB and how much that is above
the better of FastICA and SOBI, the share of samples within the 95 % band and the band's mean width (in standard
deviations of the source), and the CPU seconds of a fit on one thread; then the aims beside what was reached.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scenarios
import torch
from sklearn.exceptions import ConvergenceWarning

from audiosep import blind
from audiosep.blind import gp, posterior
from audiosep.blind.matching import coverage, mean_correlation, si_sdr

NONLINEAR = ("pnl", "mlp_mild", "mlp_strong", "mlp_gp")
NOISY = ("hetero_20dB", "gp_5x3_10dB")
LINEAR = tuple(name for name in scenarios.SCENARIOS if name not in NONLINEAR)


class Smoothed(blind.SOBI):
    """SOBI, then the step that ends the learned methods too: what of their gain is that step's alone?"""

    def _separate(self, X: np.ndarray, rng: np.random.RandomState) -> None:
        super()._separate(X, rng)
        found = posterior.gaussian_posterior(X - self.mean_, self.mixing_)
        self.sources_, self.sources_std_, self.mixing_ = found.mean, found.std, found.mixing


METHODS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "SOBI": lambda o: blind.SOBI(3),
    "FastICA": lambda o: blind.FastICA(3, random_state=0),
    "JADE": lambda o: blind.JADE(3),
    "AMUSE": lambda o: blind.AMUSE(3),
    "SOBI+GP": lambda o: Smoothed(3),
    "AR-Flow": lambda o: blind.ARFlowVAE(3, random_state=0, **o),
    "AR-Flow-t": lambda o: blind.ARFlowVAE(3, base="student_t", random_state=0, **o),
    "GP-VAE": lambda o: blind.GPVAE(3, random_state=0, **o),
    "SKR-VAE": lambda o: blind.SKRVAE(3, random_state=0, **o),
    "StrADiff": lambda o: blind.StrADiff(3, random_state=0, **o),
}
# Of a bent mixing.
BENT: dict[str, dict[str, Any]] = {
    "AR-Flow": {"max_iter": 1000},
    "AR-Flow-t": {"max_iter": 1000},
    "GP-VAE": {"max_iter": 600},
    "SKR-VAE": {"max_iter": 600},
    "StrADiff": {"max_iter": 300},
}
FOUR = ("AR-Flow", "GP-VAE", "SKR-VAE", "StrADiff")
BETTER = "dB over the better of SOBI and FastICA"
# What was asked for: scenario, of which methods, which of their figures (the worst method's for "all"), least, most.
AIMS: list[tuple[str, str, tuple[str, ...], float, float]] = [
    ("hetero", "correlation, all", FOUR, 0.999, 1),
    ("gp_rbf", "correlation, best", FOUR, 0.99, 1),
    ("gauss_ar", "correlation, best", FOUR, 0.999, 1),
    ("heavy_iid", "correlation, best", ("AR-Flow-t",), 0.99, 1),
    ("heavy_ar", "correlation, best", ("AR-Flow-t",), 0.995, 1),
    ("gp_5x3_10dB", "correlation, best", FOUR, 0.97, 1),
    ("hetero_20dB", "correlation, best", FOUR, 0.99, 1),
    *(("mlp_strong", "correlation, best", (method,), 0.98, 1) for method in ("AR-Flow", "StrADiff")),
    *(("pnl", "correlation, best", (method,), 0.965, 1) for method in ("AR-Flow", "StrADiff")),
    *((scenario, f"{BETTER}, best", FOUR, 0.0, np.inf) for scenario in NOISY),
    *((scenario, f"{BETTER}, best", ("AR-Flow",), 0.0, np.inf) for scenario in ("mlp_strong", "pnl")),
    *((scenario, "share in band, all", FOUR, 0.90, 0.98) for scenario in NOISY),
    *((scenario, "seconds, all", ("AR-Flow",), 0, 3) for scenario in LINEAR),
    *((scenario, "seconds, all", ("StrADiff",), 0, 15) for scenario in LINEAR),
]


def options(method: str, scenario: str) -> dict[str, Any]:
    """Of the learned methods: the bent mixing where the mixing is bent."""
    return {"mixing": "mlp", **BENT[method]} if scenario in NONLINEAR and method in BENT else {}


def seeds_of(method: str, scenario: str) -> int:
    """How many seeds a method runs on: fewer of the slow ones where no aim of theirs asks for more than the time."""
    asked = any(scenario == s and method in methods and "seconds" not in what for s, what, methods, *_ in AIMS)
    return 10 if asked or method not in BENT else 3


def score(method: str, scenario: str, seed: int, samples: int) -> dict[str, Any]:
    draw = scenarios.make(scenario, seed, samples)
    estimator = METHODS[method](options(method, scenario))
    start = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = estimator.fit(draw.X)
    row = {
        "method": method,
        "scenario": scenario,
        "seed": seed,
        "samples": samples,
        "seconds": time.process_time() - start,
        "correlation": mean_correlation(found.sources_, draw.S),
        "si_sdr": float(si_sdr(found.sources_, draw.S).mean()),
        "converged": not any(issubclass(w.category, ConvergenceWarning) for w in caught),
    }
    if hasattr(found, "init_"):
        row["init"] = found.init_
    if hasattr(found, "start_kept_"):
        row["start kept"] = found.start_kept_
    if hasattr(found, "sources_std_"):
        row["coverage"] = coverage(found.sources_, found.sources_std_, draw.S)
        row["width"] = float(2 * 1.96 * (found.sources_std_ / found.sources_.std(0)).mean())
    return row


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """scenario -> method -> means over the seeds."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        groups.setdefault(row["scenario"], {}).setdefault(row["method"], []).append(row)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for scenario in [s for s in scenarios.SCENARIOS if s in groups]:
        methods = groups[scenario]
        found[scenario] = {}
        for method in [m for m in METHODS if m in methods]:
            rs = methods[method]
            seeds = {r["seed"] for r in rs}
            # On the same seeds, as some methods may have run on fewer.
            rivals = [
                np.mean([r["si_sdr"] for r in methods[name] if r["seed"] in seeds])
                for name in ("SOBI", "FastICA")
                if seeds <= {r["seed"] for r in methods.get(name, [])}
            ]
            found[scenario][method] = {
                "seeds": len(rs),
                "correlation": float(np.mean([r["correlation"] for r in rs])),
                "worst": min(r["correlation"] for r in rs),
                "SI-SDR": float(np.mean([r["si_sdr"] for r in rs])),
                BETTER: float(np.mean([r["si_sdr"] for r in rs]) - max(rivals)) if len(rivals) == 2 else float("nan"),
                "share in band": float(np.mean([r.get("coverage", np.nan) for r in rs])),
                "width": float(np.mean([r.get("width", np.nan) for r in rs])),
                "seconds": float(np.mean([r["seconds"] for r in rs])),
            }
    return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown; the best mean correlation of each scenario in bold."""
    lines = [
        "| scenario | method | seeds | corr. mean | worst | SI-SDR dB | margin dB | in band | width | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scenario, methods in summary(rows).items():
        top = max(f["correlation"] for f in methods.values())
        for method, f in methods.items():
            mean = f"{f['correlation']:.4f}"
            cells = [
                scenario,
                method,
                f"{f['seeds']:.0f}",
                f"**{mean}**" if f["correlation"] > top - 5e-5 else mean,
                f"{f['worst']:.4f}",
                f"{f['SI-SDR']:.1f}",
                "" if np.isnan(f[BETTER]) else f"{f[BETTER]:+.1f}",
                "" if np.isnan(f["share in band"]) else f"{f['share in band']:.3f}",
                "" if np.isnan(f["width"]) else f"{f['width']:.3f}",
                f"{f['seconds']:.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def aims(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: each aim, what was reached, and by which of the methods that ran on all the seeds."""
    found = summary(rows)
    lines = ["| scenario | figure | of | aim | reached | by |  |", "|---|---|---|---|---|---|---|"]
    for scenario, what, methods, least, most in AIMS:
        name, which = what.rsplit(", ", 1)
        there = {m: found[scenario][m] for m in methods if m in found.get(scenario, {})}
        seeds = max((row["seeds"] for row in there.values()), default=0)
        values = {m: row[name] for m, row in there.items() if row["seeds"] == seeds}
        open_above = most in (1, np.inf)
        aim = f"at least {least:g}" if open_above else f"{least:g} to {most:g}"
        if not values:
            lines.append(f"| {scenario} | {name} | {which} of 0 | {aim} |  |  | not run |")
            continue
        misses = {m: least - v if open_above else max(least - v, v - most) for m, v in values.items()}
        by = min(misses, key=misses.__getitem__) if which == "best" else max(misses, key=misses.__getitem__)
        met = "met" if misses[by] <= 1e-9 else "missed"  # a mean of shares is rounded
        digits = 4 if name == "correlation" else 3
        cells = [scenario, name, f"{which} of {len(values)}", aim, f"{values[by]:.{digits}f}", by, met]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def warm_up() -> None:
    """Compile what is compiled: the times are those of a fit alone."""
    X = scenarios.make("hetero_20dB", 0, 200).X
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blind.ARFlowVAE(3, max_iter=2).fit(X)
        blind.GPVAE(3, kernel="matern12", max_iter=2).fit(X)
        posterior.joint_smooth(X, 0.1 * np.eye(3), (gp.Process("matern12", 5.0, 0.0, 1.0, 0.0),) * 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("results/blind"))
    parser.add_argument("--seeds", type=int, help="of each method  [default: 10, or 3 of slow ones without an aim]")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--scenarios", nargs="+", default=list(scenarios.SCENARIOS), metavar="SCENARIO")
    parser.add_argument("--figures", action="store_true", help="the papers' figures too, into OUT/figures (minutes)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # times are those of one core
    warm_up()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["method"], r["scenario"], r["seed"], r["samples"]) for r in rows}
    for scenario in arguments.scenarios:
        for method in arguments.methods:
            count = arguments.seeds or seeds_of(method, scenario)
            for seed in range(arguments.first_seed, arguments.first_seed + count):
                if (method, scenario, seed, arguments.samples) in done:
                    continue
                rows.append(score(method, scenario, seed, arguments.samples))
                with file.open("a") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
    text = f"{table(rows)}\n{aims(rows)}"
    (arguments.out / "table.md").write_text(text)
    print(text)
    if arguments.figures:
        import figures

        figures.draw(arguments.out / "figures")


if __name__ == "__main__":
    main()
