"""Score the blind estimators on known mixtures: one command, one table.

    python recipes/blind/benchmark.py -o results/blind --seeds 10

Rows (a method, scenario and seed each) go to rows.jsonl as they come, so that an interrupted run goes on where it
was; table.md has, per method and scenario, the mean and worst matched |correlation|, the mean SI-SDR in dB, the share
of samples within the 95 % band and the band's mean width, and the seconds of a fit.
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

from audiosep import blind
from audiosep.blind.matching import coverage, mean_correlation, si_sdr

NONLINEAR = ("pnl", "mlp_mild", "mlp_strong", "mlp_gp")
METHODS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "SOBI": lambda o: blind.SOBI(3),
    "FastICA": lambda o: blind.FastICA(3, random_state=0),
    "JADE": lambda o: blind.JADE(3),
    "AMUSE": lambda o: blind.AMUSE(3),
    "AR-Flow": lambda o: blind.ARFlowVAE(3, random_state=0, **o),
    "AR-Flow-t": lambda o: blind.ARFlowVAE(3, base="student_t", random_state=0, **o),
    "GP-VAE": lambda o: blind.GPVAE(3, random_state=0, **o),
    "SKR-VAE": lambda o: blind.SKRVAE(3, random_state=0, **o),
    "StrADiff": lambda o: blind.StrADiff(3, random_state=0, **o),
}
MLP_ITERATIONS = {"AR-Flow": 3000, "AR-Flow-t": 3000, "GP-VAE": 1000, "SKR-VAE": 3000, "StrADiff": 300}


def options(method: str, scenario: str) -> dict[str, Any]:
    """Of the learned methods: the bent mixing where the mixing is bent."""
    if scenario not in NONLINEAR or method not in MLP_ITERATIONS:
        return {}
    return {"mixing": "mlp", "max_iter": MLP_ITERATIONS[method]}


def score(method: str, scenario: str, seed: int, samples: int) -> dict[str, Any]:
    draw = scenarios.make(scenario, seed, samples)
    estimator = METHODS[method](options(method, scenario))
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = estimator.fit(draw.X)
    row = {
        "method": method,
        "scenario": scenario,
        "seed": seed,
        "samples": samples,
        "seconds": time.perf_counter() - start,
        "correlation": mean_correlation(found.sources_, draw.S),
        "si_sdr": float(si_sdr(found.sources_, draw.S).mean()),
        "warnings": len(caught),
    }
    if hasattr(found, "sources_std_"):
        row["coverage"] = coverage(found.sources_, found.sources_std_, draw.S)
        row["width"] = float(2 * 1.96 * found.sources_std_.mean())
    return row


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown; the best mean correlation of each scenario in bold."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        groups.setdefault(row["scenario"], {}).setdefault(row["method"], []).append(row)
    lines = [
        "| scenario | method | seeds | corr. mean | worst | SI-SDR dB | in band | width | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for scenario, methods in groups.items():
        means = {m: np.mean([r["correlation"] for r in rs]) for m, rs in methods.items()}
        top = max(means.values())
        for method, rs in methods.items():
            mean = f"{means[method]:.4f}"
            mean = f"**{mean}**" if means[method] > top - 5e-5 else mean
            bands = [r["coverage"] for r in rs if "coverage" in r]
            widths = [r["width"] for r in rs if "width" in r]
            cells = [
                scenario,
                method,
                str(len(rs)),
                mean,
                f"{min(r['correlation'] for r in rs):.4f}",
                f"{np.mean([r['si_sdr'] for r in rs]):.1f}",
                f"{np.mean(bands):.3f}" if bands else "",
                f"{np.mean(widths):.3f}" if widths else "",
                f"{np.mean([r['seconds'] for r in rs]):.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("results/blind"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--scenarios", nargs="+", default=list(scenarios.SCENARIOS), metavar="SCENARIO")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # times are those of one core
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["method"], r["scenario"], r["seed"], r["samples"]) for r in rows}
    for scenario in arguments.scenarios:
        for method in arguments.methods:
            for seed in range(arguments.seeds):
                if (method, scenario, seed, arguments.samples) in done:
                    continue
                rows.append(score(method, scenario, seed, arguments.samples))
                with file.open("a") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
            (arguments.out / "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
