"""Print the README's tables from the files in results/: python recipes/ddprism/tables.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def curves() -> None:
    print(line("setting", "method", "source", "PSNR", "div, posterior", "pqm", "div, prior", "pqm"))
    print("|" + "---|" * 8)
    for setting in ("contrastive2", "contrastive3", "mixed-0", "mixed-0.1", "mixed-0.5"):
        found = rows(f"{setting}/rivals.jsonl")
        for method, path in (("Gibbs", f"{setting}-gibbs"), ("Joint", setting)):
            final = RESULTS / path / "final.json"
            found += [{"method": method, **row} for row in json.loads(final.read_text())] if final.exists() else []
        for row in found:
            keys = ("psnr", "posterior_divergence", "posterior_pqmass", "prior_divergence", "prior_pqmass")
            print(line(setting, row["method"], row["source"], *(row.get(key, "") for key in keys)))
    print()
    print(line("run", "stage", "lap", "PSNR of source in view", "minutes"))
    print("|" + "---|" * 5)
    for path in sorted(RESULTS.glob("*/scores.jsonl")):
        for row in rows(f"{path.parent.name}/scores.jsonl"):
            scores = ", ".join(
                f"{key[5:].replace(' in view ', ' in ')}: {row[key]:.1f}" for key in row if "psnr" in key
            )
            print(line(path.parent.name, row["stage"], row["lap"], scores, row["minutes"]))


def stall() -> None:
    names = ("exact", "64x1", "256x1", "64x8", "again")
    print(line("components of 1, 2", *names))
    print("|" + "---|" * 6)
    for row in rows("stall.jsonl"):
        print(line(", ".join(map(str, row["components"])), *(" / ".join(map(str, row[name])) for name in names)))


def digits() -> None:
    print(line("method", "PSNR", "Frechet, posterior", "Frechet, prior", "s"))
    print("|" + "---|" * 5)
    for row in rows("digits.jsonl"):
        print(line(row["method"], row["psnr"], row["frechet_posterior"], row["frechet_prior"], row["seconds"]))


if __name__ == "__main__":
    curves()
    print()
    stall()
    print()
    digits()
    audio = RESULTS / "audio" / "table.md"
    print(audio.read_text() if audio.exists() else "")
