"""How fast training windows are made, with each recording decoded every time and from the cache of decoded ones.

Writes loading.jsonl, a row per kind of source: 4 s windows a second of one core (its own time, whatever else the
machine does), and what the cache takes. Run: python recipes/benchmark/loading.py [MANIFEST]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from audiosep.data import SourceDataset, read_manifest

MANIFEST = "data/open16k.csv"  # written by recipes/open16k/prepare.py
SECONDS = 10.0


def rate(dataset: SourceDataset) -> float:
    """Windows a second of this process's time."""
    start, done = time.process_time(), 0
    while time.process_time() < start + SECONDS:
        dataset[done]
        done += 1
    return done / (time.process_time() - start)


def measured(manifest: str, kind: str) -> dict[str, Any]:
    """One kind's row."""
    items = read_manifest(manifest, split="train", kind=kind)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        cached = SourceDataset(items, 10**6, cache=folder)
        spent = time.process_time() - start  # of all threads
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        row = {
            "kind": kind,
            "recordings": len(items),
            "decoded_each_time": round(rate(SourceDataset(items, 10**6))),
            "from_the_cache": round(rate(cached)),
            "cache_gb": round(size / 1e9, 2),
            "cache_made_in_s": round(spent, 1),
        }
    return row


def main() -> None:
    """Measure both kinds and write the file."""
    manifest = sys.argv[1] if len(sys.argv) > 1 else MANIFEST
    rows = [json.dumps(measured(manifest, kind)) for kind in ("speech", "sound")]
    (Path(__file__).parent / "loading.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
