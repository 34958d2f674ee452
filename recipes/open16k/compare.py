"""What the shipped default has over earlier ones (results/earlier/*) and over the shipped rivals
(../unasdiff/results/rivals), on the mixtures that both separated.

- earlier-refiner: a refiner trained on fewer stems, none of which restarts had left; its field was followed the whole
  way each time.
- refined-once: an earlier one still, three quarters of whose field moved the stems once.
- unrefined: as in all that follow, nothing corrected the stems in the end.
- unnamed-unrefined: the same of a voice and a sound without a class; compared with results/unnamed.
- unnamed: sounds without a class had neither refinement nor low-rank guidance; compared with results/unnamed, too.
- labels: the sound prior was told the classes, as in all that follow.
- deterministic: the sampler that renewed no noise; sounds as they came out; the sound prior after 6,630 steps.
- unguided: no class guidance, and the tagger alone named the stems.
- even-leaks: as all that follow, the classifier was trained without faulty masks.
- even-guidance: as all that follow, class guidance took steps of 0.3 at all noise, and where a voice was low-rank
  guidance had no last step.
- sampled: as all that follow, on to noise of 0.002 in 24 steps, twice as many; low-rank guidance had no last
  step at all.
- class-guidance: no low-rank guidance, and log-odds of more than 13.8 guided nothing.
- tagger: like that, and the tagger alone guided and named the stems; classifier: the classifier alone did.

The same seeds and recordings. Writes results/earlier/differences.jsonl: SI-SDR in dB, mean of both and of the paired
difference, with its 95 % interval. Run: python recipes/open16k/compare.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from audiosep.metrics import paired_interval

RESULTS = Path(__file__).parent / "results"


RIVALS = RESULTS.parents[1] / "unasdiff/results/rivals"

Rows = dict[int, dict[str, Any]]


def rows(folder: Path) -> dict[tuple[str, str], Rows]:
    """Rows of an evaluation by separator and task, then by the mixture's number."""
    found: dict[tuple[str, str], Rows] = {}
    for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "error" not in row:
            found.setdefault((row["separator"], row["task"]), {})[row["index"]] = row
    return found


def others() -> dict[tuple[str, str], Rows]:
    """What the default is compared with, by name and task."""
    found = {}
    for folder in sorted(path.parent for path in RESULTS.glob("earlier/*/*/rows.jsonl")):
        (found[folder.parent.name, folder.name],) = rows(folder).values()
    return found | {key: own for key, own in rows(RIVALS).items() if key[0] in ("Conv-TasNet", "NMF")}


def main() -> None:
    """Write the file."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = []
    for (name, task), before in others().items():
        (now,) = rows(RESULTS / "unnamed" / task if name.startswith("unnamed") else RESULTS / task).values()
        both = [i for i in now if i in before and now[i]["ids"] == before[i]["ids"]]
        for score in ("si_sdr", "si_sdr_permuted"):
            new, old = (np.array([np.mean(table[i][score]) for i in both]) for table in (now, before))
            low, high = paired_interval(new, old)
            numbers = {"default": new.mean(), "before": old.mean(), "difference": (new - old).mean()}
            numbers |= {"low": low, "high": high}
            about = {"earlier": name, "task": task, "score": score, "mixtures": len(both)}
            found.append(about | {key: round(float(value), 2) for key, value in numbers.items()})
    text = "\n".join(json.dumps(row) for row in found)
    (RESULTS / "earlier/differences.jsonl").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
