"""What could be won, and is, by moving regions of finished stems, on held-out mixtures.

SI-SDR in dB, labels fixed, of the stems as the default without a refiner leaves them (`before`), moved by shares of the
refiner's field, and moved by an oracle: the best smooth field of 12 bands by 2.5 nodes a second that a gradient finds
which knows the sources. Writes a line per task.

    python recipes/open16k/stems.py --split valid --seed 5 --count 10 -o data/stems-valid
    python recipes/open16k/refined.py refiner -o recipes/open16k/results/refined.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from audiosep import hub
from audiosep.metrics import si_sdr
from audiosep.mixing import change_of_shares, grid, log_power
from audiosep.refiner import SMOOTH, SUFFIX, Refiner, read_stems
from audiosep.stft import istft, stft

SHARES = (0.25, 0.5, 0.75, 1.0)
LAPS = 60  # of the oracle's gradient


def oracle(stems: Tensor, sources: Tensor, sample_rate: int) -> float:
    """SI-SDR of stems (K, N) moved by the best field between few nodes."""
    n_fft, hop_length = Refiner.n_fft, Refiner.hop_length
    bins = stft(stems, n_fft, hop_length)
    log = log_power(bins, SMOOTH)
    rows, columns = grid(sample_rate, log.shape[-2], log.shape[-1], stems.shape[-1])
    field = torch.zeros(len(stems), rows.shape[1], columns.shape[1], requires_grad=True)
    adam, best = torch.optim.Adam([field], 0.3), -torch.inf
    for _ in range(LAPS):
        move = change_of_shares(log, rows @ field @ columns.T) * bins.sum(0)
        score = si_sdr(stems + istft(move, n_fft, hop_length, stems.shape[-1]), sources).mean()
        best = max(best, score.item())
        adam.zero_grad()
        (-score).backward()
        adam.step()
    return best


def scores(refiner: Refiner, stems: Tensor, sources: Tensor, names: list[str]) -> dict[str, float]:
    """Of one mixture."""
    found = {"before": si_sdr(stems, sources).mean().item()}
    for share in SHARES:
        with torch.no_grad():
            (moved,) = refiner.refine([stems[None]], refiner.numbers(names)[None], share)
        found[f"{share:g} of the field"] = si_sdr(moved[0], sources).mean().item()
    return found | {"oracle": oracle(stems, sources, refiner.sample_rate)}


def main() -> None:
    """Write a line per task, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("refiner", help="a checkpoint")
    parser.add_argument("--stems", type=Path, default="data/stems-valid", help="default: %(default)s")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    refiner = hub.load_model(options.refiner)
    found: dict[str, list[dict[str, float]]] = {}
    for path in sorted(options.stems.glob(f"*{SUFFIX}")):
        rows = read_stems(path, refiner)
        own = [scores(refiner, *rows[k]) for k in range(len(rows))]
        found.setdefault(path.name.partition(".")[0], []).extend(own)
    lines = []
    for task, own in found.items():
        means = {name: round(sum(row[name] for row in own) / len(own), 2) for name in own[0]}
        about = {"task": task, "mixtures": len(own), "refiner": refiner.origin["sha256"]}
        lines.append(json.dumps(about | means))
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
