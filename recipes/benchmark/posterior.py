"""Presets against an exact posterior: two stationary Gaussian sources, whose posterior given their sum is known.

Writes posterior.json: per preset the relative error of the mean of 64 samples, and per source the ratio of the samples'
summed variance, and of its median over the frequency bins, to the exact one. Run: python recipes/benchmark/posterior.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from audiosep.prior import GaussianPrior, JointPrior
from audiosep.samplers import Noise, build
from audiosep.schedules import vp_linear

N, RUNS = 16000, 64


def main() -> None:
    """Sample both presets and write the file."""
    f = torch.fft.fftfreq(N, 1 / 16000).abs().double()
    shapes = 1 / (1 + (f / 400) ** 4), 1 / (1 + ((f - 2500) / 500) ** 4)
    first, second = ((0.07**2 * s / s.mean())[: N // 2 + 1] for s in shapes)
    joint = JointPrior([(GaussianPrior(s, vp_linear()), None) for s in (first, second)])
    noise = torch.randn(2, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sources = torch.fft.irfft(torch.stack((first, second)).sqrt() * torch.fft.rfft(noise), n=N)
    y = sources.sum(0).float()[None]
    gain = torch.stack((first, second)) / (first + second)
    mean = torch.fft.irfft(gain * torch.fft.rfft(y[0].double()), n=N)
    variance = first * second / (first + second)
    found = {}
    for preset in ("published", "default"):
        sampler = build(joint, preset=preset)
        *_, last = sampler(y.expand(RUNS, -1), Noise(range(RUNS)))
        samples = last.x.double()
        centre = samples.mean(0)
        spread = torch.fft.rfft(samples - centre).abs().square().sum(0) / (RUNS - 1) / N
        found[preset] = {
            "network_evaluations": sampler.evaluations,
            "relative_error_of_mean": round(((centre - mean).norm() / mean.norm()).item(), 4),
            "variance_ratio": [round(x, 3) for x in (spread.sum(-1) / variance.sum()).tolist()],
            "variance_ratio_median_bin": [round(x, 3) for x in (spread / variance).median(-1).values.tolist()],
        }
    (Path(__file__).parent / "posterior.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
