"""What could be won, and is, by moving regions of finished stems, on held-out mixtures.

SI-SDR in dB, labels fixed, of the stems as the default without a refiner leaves them (`before`), moved by shares of the
refiner's field, then after each of some restarts of the sampler, and moved by an oracle: the best smooth field of 12
bands by 2.5 nodes a second that a gradient finds which knows the sources. Writes a line per task.

    python recipes/open16k/stems.py --split valid --seed 5 --count 10 --unnamed 0 -o data/stems-valid
    python recipes/open16k/stems.py --split valid --seed 5 --count 5 --unnamed 1 \\
        --tasks 1speech+1sound,1speech+1sound,1speech+2sound -o data/stems-valid/unnamed
    python recipes/open16k/refined.py refiner -o recipes/open16k/results/refined.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from audiosep import Separator, hub
from audiosep.metrics import si_sdr
from audiosep.mixing import change_of_shares, grid, log_power
from audiosep.refiner import SMOOTH, SUFFIX, Refiner, read_stems
from audiosep.samplers import Noise
from audiosep.separator import REFINE
from audiosep.stft import istft, stft

SHARES = (0.25, 0.5, 0.75, 1.0)
LAST = (0.5, 1.0)  # of the field, after restarts
RESTARTS = 3
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


@torch.no_grad()
def restarted(separator: Separator, refiner: Refiner, stems: Tensor, names: list[str]) -> Iterator[list[Tensor]]:
    """Stems (K, N) after each of some restarts, moved by each share of `LAST`; of one run that goes on from them."""
    asked = separator.resolve(names)
    sampler, labels, noise = separator.sampler_for(asked), refiner.numbers(names)[None], Noise([0])
    gain = separator.gain(stems.sum(0)[None], asked)
    x = gain * stems[None]
    mixture = x.sum(1)
    for _ in range(RESTARTS):
        (moved,) = refiner.refine([x], labels, REFINE)
        *_, state = sampler(mixture, noise, (moved, len(sampler.times) - separator.again))
        x = state.x.float()
        yield [refiner.refine([x], labels, share)[0][0] / gain[0] for share in LAST]


def scores(
    separator: Separator, refiner: Refiner, stems: Tensor, sources: Tensor, names: list[str]
) -> dict[str, float]:
    """Of one mixture."""
    moved = {"before": stems}
    for share in SHARES:
        with torch.no_grad():
            (moved[f"{share:g} of the field"],) = refiner.refine([stems[None]], refiner.numbers(names)[None], share)
    for count, found in enumerate(restarted(separator, refiner, stems, names), 1):
        restarts = f"{count} restart{'s' * (count > 1)}"
        moved |= {f"{restarts}, {share:g} of the last field": x for share, x in zip(LAST, found)}
    gained = {name: si_sdr(x.view_as(sources), sources).mean().item() for name, x in moved.items()}
    return gained | {"oracle": oracle(stems, sources, refiner.sample_rate)}


def main() -> None:
    """Write a line per task, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("refiner", help="a checkpoint")
    parser.add_argument("--stems", type=Path, default="data/stems-valid", help="default: %(default)s")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    refiner = hub.load_model(options.refiner)
    separator = Separator.from_pretrained("speech,sound", device="cpu", refine=0)
    found: dict[str, list[dict[str, float]]] = {}
    for path in sorted(options.stems.rglob(f"*{SUFFIX}")):
        rows = read_stems(path, refiner)
        task = path.name.partition(".")[0] + ", no class" * ("sound" in rows.names[0])
        found.setdefault(task, []).extend(scores(separator, refiner, *rows[k]) for k in range(len(rows)))
    lines = []
    for task, own in found.items():
        means = {name: round(sum(row[name] for row in own) / len(own), 2) for name in own[0]}
        about = {"task": task, "mixtures": len(own), "refiner": refiner.origin["sha256"]}
        lines.append(json.dumps(about | means))
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
