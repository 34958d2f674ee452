"""Time, memory and real-time factor of separating 1 speech + 1 sound: the published and the small network.

Each case runs in a process of its own, on random weights (time does not depend on them) and without what guides the
default preset. Its row takes the place of an earlier one of the same case in results.jsonl; results.md has the rows as
Markdown.

Run, where nothing else runs: python recipes/benchmark/run.py [--device cpu|cuda] [--network small] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SEGMENT, OVERLAP, RATE = 4.0, 0.25, 16000
NETWORKS: dict[str, dict[str, Any]] = {
    "published": {},
    "small": {
        "width": 64,
        "depth": (1, 1, 2, 1, 1),
        "patch": (4, 4),
        "head": "mask",
        "adaln_zero": True,
    },
}
PRESETS = ("default", "published")
CASE = ("network", "preset", "device", "dtype", "checkpointing", "compiled", "segments")  # what tells rows apart


def measure(
    network: str,
    preset: str,
    device: str,
    dtype: str,
    batch: int,
    steps: int,
    checkpointing: bool = False,
    compile: bool = False,
) -> dict[str, Any]:
    """One case: seconds per step of `batch` segments of two sources, and the peak memory."""
    import torch

    from audiosep.backbones.triple_path_unet import TriplePathUNet
    from audiosep.compiling import compile_network
    from audiosep.prior import JointPrior, Prior
    from audiosep.samplers import SAMPLES, Noise, build
    from audiosep.schedules import ve, vp_linear
    from audiosep.separator import LEAST_NOISE

    priors = []
    for num_classes in (1, 50):
        net = TriplePathUNet(num_classes, **NETWORKS[network], checkpointing=checkpointing)
        form, schedule = ("eps", vp_linear()) if network == "published" else ("edm", ve())
        prior = Prior(net, schedule, parameterization=form).to(device).eval().requires_grad_(False)
        if compile:
            compile_network(net, torch.device(device), round(SEGMENT * RATE))
        priors.append((prior, 0))
    end = LEAST_NOISE if preset == "default" else None  # as a separator has it
    full = len(build(JointPrior(priors), preset=preset, least_noise=end).times) * SAMPLES[preset]  # per source
    sampler = build(JointPrior(priors), preset=preset, steps=steps + 1)
    y = 0.1 * torch.randn(batch, round(SEGMENT * RATE), device=device)
    marks = []
    with torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32"):
        for state in sampler(y, Noise(range(batch))):
            if device != "cpu":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
            assert state.x.isfinite().all()
    step = (marks[-1] - marks[0]) / steps  # the first step warms up
    if device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    else:
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        "network": network,
        "parameters": sum(p.numel() for p in priors[1][0].backbone.parameters()),
        "preset": preset,
        "device": torch.cuda.get_device_name() if device != "cpu" else f"CPU, {torch.get_num_threads()} threads",
        "dtype": dtype,
        "checkpointing": checkpointing,
        "compiled": compile,
        "segments": batch,
        "step_s": round(step, 4),
        "evaluations_per_source": full,
        "real_time_factor": round(step * full / (batch * SEGMENT * (1 - OVERLAP)), 3),
        "peak_gib": round(peak, 2),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def cases(device: str) -> list[dict[str, Any]]:
    """What is measured on a device."""
    if device == "cpu":
        common: dict[str, Any] = {"device": device, "batch": 1}
        both = [
            {"network": "small", "preset": preset, "steps": steps, "dtype": dtype, "compile": compile, **common}
            for preset, steps in (("default", 8), ("published", 4))
            for dtype, compile in (("float32", False), ("bfloat16", False), ("bfloat16", True))
        ]
        large = {"network": "published", "steps": 1, "dtype": "float32", **common}
        return [*both, {**large, "preset": "default"}, {**large, "preset": "published", "checkpointing": True}]
    return [
        {
            "network": network,
            "preset": preset,
            "device": device,
            "dtype": dtype,
            "batch": batch,
            "steps": 10,
            "compile": compile,
        }
        for network in NETWORKS
        for preset in PRESETS
        for dtype, compile in (("float32", False), ("bfloat16", False), ("bfloat16", True))
        for batch in (1, 8)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    names = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("machine", "torch")]
    lines = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    """Run every case of the device, or the one given as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--network", choices=NETWORKS, help="of this network alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--case", help="one case as JSON, printed and not kept")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(**json.loads(arguments.case))))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "results.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    rows = {tuple(row.get(key, False) for key in CASE): row for row in map(json.loads, lines)}
    for case in cases(arguments.device):
        if arguments.network not in (None, case["network"]):
            continue
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        if done.returncode:
            print(f"failed: {case}\n{done.stderr[-2000:]}", file=sys.stderr)
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        print(json.dumps(row), flush=True)
        rows[tuple(row[key] for key in CASE)] = row
        log.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
    (arguments.out / "results.md").write_text(table(list(rows.values())), encoding="utf-8")


if __name__ == "__main__":
    main()
