"""Compare two runs of `audiosep evaluate -o` on the same mixtures: the paired difference of mean SI-SDR.

Run: python recipes/open16k/compare.py ROWS_A ROWS_B -o FILE.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from audiosep.metrics import paired_interval


def rows(path: Path) -> dict[str, float]:
    """Mean SI-SDR, labels fixed, by the mixture's clips."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return {" ".join(line["ids"]): float(np.mean(line["si_sdr"])) for line in lines}


def main() -> None:
    """Write the mean of A - B with its 95 % bootstrap interval."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    first, second = rows(arguments.first), rows(arguments.second)
    if first.keys() != second.keys():
        raise SystemExit("the two files hold different mixtures")
    a, b = (np.array([table[key] for key in first]) for table in (first, second))
    found = {
        "first": arguments.first.stem,
        "second": arguments.second.stem,
        "mixtures": len(a),
        "difference_db": float((a - b).mean()),
        "interval_95": [float(x) for x in paired_interval(a, b)],
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
