"""Write the manifest of the open16k corpus: its train and test split, and a validation split.

    python recipes/open16k/prepare.py --root DIR [-o data/open16k.csv] [--valid 0.05] [--least 5]

DIR holds `manifest.csv`, `speech/` and `sound/` (README.md says where they come from). About 5 % of
train becomes `valid`: whole speakers of speech, whole original recordings (`group`) of sound, by a
hash of their names, so that every machine chooses the same. A larger --valid and a smaller --least
hold out more, and rarer classes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

from audiosep.data import write_manifest

COLUMNS = ("path", "split", "kind", "speaker_or_class", "duration_s", "group")
EXTRA = ("licence", "source_repo")  # for attribution; audiosep does not read them
Row = dict[str, str]

# One label, many unnamed voices: each clip gets a label of its own, so that voices are never
# joined, and all stay in train, as nobody knows which voices recur.
CROWDS = ("pv_crowd",)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(description="Write the manifest of the open16k corpus.")
    parser.add_argument("--root", type=Path, required=True, help="folder of the corpus")
    # Not in the corpus's own folder: that may be shared, or meant to stay as it is.
    default = Path("data/open16k.csv")
    parser.add_argument("-o", "--output", type=Path, default=default, help=f"default: {default}")
    parser.add_argument("--valid", type=float, default=0.05, help="share of train held out, default: 0.05")
    least = "a class with fewer original recordings keeps them all for training, default: 5"
    parser.add_argument("--least", type=int, default=5, help=least)
    options = parser.parse_args(arguments)
    if not 0 <= options.valid < 1 or options.least < 1:
        parser.error(f"--valid is a share, 0..1, --least at least 1, got {options.valid} and {options.least}")
    output = options.output
    try:
        rows = read(options.root / "manifest.csv")
        missing = [row for row in rows if not (options.root / row["path"]).is_file()]
        if missing:
            raise SystemExit(describe(missing, len(rows), options.root))
        split(rows, options.valid, options.least)
        write(rows, options.root, output)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except SystemExit as error:
        print(error, file=sys.stderr)
        return 1
    counts = Counter((row["kind"], row["split"]) for row in rows)
    for (kind, name), count in sorted(counts.items()):
        hours = sum(float(row["duration_s"]) for row in rows if is_in(row, kind, name)) / 3600
        labels = len({row["speaker_or_class"] for row in rows if is_in(row, kind, name)})
        print(f"{kind:6} {name:5} {count:5} clips {hours:5.2f} h {labels:4} labels")
    print(output)
    return 0


def is_in(row: Row, kind: str, name: str) -> bool:
    return (row["kind"], row["split"]) == (kind, name)


def read(path: Path) -> list[Row]:
    """The corpus's own manifest."""
    if not path.is_file():
        raise SystemExit(f"{path}: not there; README.md says how the corpus is gathered")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        absent = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if absent:
            raise SystemExit(f"{path}: no column {', '.join(absent)}")
        return list(reader)


def describe(missing: list[Row], total: int, root: Path) -> str:
    """What is not there: by source, and each file when they are few."""
    lines = [f"{root}: {len(missing)} of {total} recordings are missing; no manifest written"]
    if len(missing) <= 20:
        return "\n".join([*lines, *(f"  {row['path']}" for row in missing)])
    by_source: dict[str, list[Row]] = defaultdict(list)
    for row in missing:
        by_source[row.get("source_repo") or "unknown source"].append(row)
    for source, rows in sorted(by_source.items()):
        lines.append(f"  {source}: {len(rows)}, such as {rows[0]['path']}")
    return "\n".join(lines)


def split(rows: list[Row], valid: float, least: int) -> None:
    """Move about the share `valid` of train to "valid", and give clips of a crowd their own labels; in place.

    Crowds stay, and classes with fewer than `least` original recordings.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["split"] == "train":
            groups[row["speaker_or_class"]].add(row["group"])
    rare = {group for label, members in groups.items() for group in members if len(members) < least}
    for row in rows:
        if row["split"] != "train":
            continue
        if row["speaker_or_class"] in CROWDS:
            row["speaker_or_class"] += "/" + Path(row["path"]).stem
        elif row["kind"] == "speech":
            row["split"] = "valid" if chosen(row["speaker_or_class"], valid) else "train"
        elif row["group"] not in rare:
            row["split"] = "valid" if chosen(row["group"], valid) else "train"


def chosen(name: str, share: float) -> bool:
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return number < share * 2**64


def write(rows: list[Row], root: Path, output: Path) -> None:
    """The manifest, with paths relative to its own folder; complete or not at all."""
    columns = [*COLUMNS, *(name for name in EXTRA if name in rows[0])]
    prefix = Path(os.path.relpath(root, output.parent))
    ordered = sorted(rows, key=lambda row: row["path"])
    placed = [row | {"path": (prefix / row["path"]).as_posix()} for row in ordered]
    write_manifest([{name: row[name] for name in columns} for row in placed], columns, output)


if __name__ == "__main__":
    sys.exit(main())
