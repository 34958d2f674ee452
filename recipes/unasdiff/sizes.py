"""Parameters and cost of every network that the recipes of this folder train: sizes.json and sizes.md.

    python recipes/unasdiff/sizes.py

The cost is that of a forward pass for a mixture of 4 s, in GFLOP (a multiplication and an addition are two), counted by
torch on tensors without values. A prior takes one such pass per source and step, and in gradient samplers a backward
pass, which costs about as much again.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from audiosep import fit, recipe

HERE = Path(__file__).parent
OTHERS = (HERE.parent / "open16k/speech.toml", HERE.parent / "vctk/paper.toml")
SAMPLES = 64_000


def main() -> None:
    rows = []
    for path in [*sorted(HERE.glob("*.toml")), *OTHERS]:
        tables = recipe.load(path)
        if "prior" not in tables and "expert" not in tables:
            continue
        expert = "expert" in tables
        network = fit.build_expert(tables).network if expert else fit.build_prior(tables, []).backbone
        # Attention as plain products: the counter knows no fused kernel of a CPU.
        with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            inputs = [torch.empty(1, SAMPLES)] if expert else [torch.empty(1, SAMPLES), torch.zeros(1)]
            with FlopCounterMode(display=False) as counter:
                network(*inputs)
        row = {"recipe": f"{path.parent.name}/{path.stem}", "what": "expert" if expert else "prior"}
        row["parameters"] = sum(p.numel() for p in network.parameters())
        row["gflop_4s"] = round(counter.get_total_flops() / 1e9, 1)
        rows.append(row)
    (HERE / "sizes.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    lines = ["| recipe | what | parameters | GFLOP per pass over 4 s |", "|---|---|---|---|"]
    lines += [f"| {r['recipe']} | {r['what']} | {r['parameters']:,} | {r['gflop_4s']:,} |" for r in rows]
    (HERE / "sizes.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
