"""How the time of a fit grows with the recording: python recipes/blind/growth.py -o results/blind

Linear mixtures of `gauss_ar` under 20 dB of noise, 1000 to 100,000 samples; CPU seconds on one thread, of the whole fit
with its final step, and of one exact likelihood and gradient of three Gaussian processes. Rows go to growth.jsonl as
they come, the table to growth.md.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import scenarios
import torch
from benchmark import METHODS, warm_up

from audiosep.blind import gp
from audiosep.blind.matching import coverage, mean_correlation

SAMPLES = (1000, 10_000, 100_000)
NOISY = scenarios.linear(scenarios.gauss_ar, snr=20)


def fit(method: str, samples: int) -> dict[str, float]:
    draw = NOISY(np.random.default_rng(0), samples)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = METHODS[method]({}).fit(draw.X)
    row = {"seconds": time.process_time() - start, "correlation": mean_correlation(found.sources_, draw.S)}
    if hasattr(found, "sources_std_"):
        row["coverage"] = coverage(found.sources_, found.sources_std_, draw.S)
    return row


def gp_step(samples: int) -> dict[str, float]:
    """Likelihood of three sources and its gradients by them and by their length-scales."""
    s = torch.randn(3, samples, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale = torch.tensor([[4.0], [12.0], [40.0]], dtype=torch.float64, requires_grad=True)
    lag = torch.arange(samples, dtype=torch.float64)
    times = []
    for _ in range(4):  # the first compiles
        start = time.process_time()
        column = gp.rbf(lag, scale) + 0.01 * (lag == 0)
        gp.negative_log_likelihood(s, column).sum().backward()
        times.append(time.process_time() - start)
    return {"seconds": float(np.median(times[1:]))}


def table(rows: list[dict[str, float]]) -> str:
    lines = [
        "| | " + " | ".join(f"{samples:,} samples" for samples in SAMPLES) + " |",
        "|---|" + "---|" * len(SAMPLES),
    ]
    for name in dict.fromkeys(str(row["method"]) for row in rows):
        found = {row["samples"]: row for row in rows if row["method"] == name}
        cells = []
        for samples in SAMPLES:
            row = found.get(samples)
            corr = f" s, corr. {row['correlation']:.4f}" if row and "correlation" in row else " s"
            cells.append(f"{row['seconds']:.3g}{corr}" if row else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("results/blind"))
    parser.add_argument("--methods", nargs="+", default=["SOBI", "SOBI+GP", "AR-Flow", "SKR-VAE", "GP-VAE"])
    parser.add_argument("--samples", nargs="+", type=int, default=list(SAMPLES), choices=SAMPLES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warm_up()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "growth.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["method"], row["samples"]) for row in rows}
    for samples in arguments.samples:
        for method in ["GP step", *arguments.methods]:
            if (method, samples) in done:
                continue
            row = gp_step(samples) if method == "GP step" else fit(method, samples)
            rows.append({"method": method, "samples": samples, **row})
            with file.open("a") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
            (arguments.out / "growth.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
