"""Write the manifest of FSDKaggle2018: its 41 classes, its own train and test set, and a validation split.

    python recipes/fsdkaggle2018/prepare.py --root DIR [-o data/fsdkaggle2018.csv] [--valid 0.05]

DIR is where the four archives were unpacked: it holds `FSDKaggle2018.audio_train`, `FSDKaggle2018.audio_test` and
`FSDKaggle2018.meta`. Of train, about 5 % become `valid`, by a hash of the clip's Freesound number;
with `--valid 0` all of it is for training.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import sys
from collections import defaultdict
from pathlib import Path

import soundfile

from audiosep.data import write_manifest

COLUMNS = ("path", "split", "kind", "speaker_or_class", "duration_s", "group", "licence")
CLASSES = 41
META = "FSDKaggle2018.meta"
SETS = {  # split: (list, folder)
    "train": ("train_post_competition.csv", "FSDKaggle2018.audio_train"),
    "test": ("test_post_competition_scoring_clips.csv", "FSDKaggle2018.audio_test"),
}
Row = dict[str, str]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(description="Write the manifest of FSDKaggle2018.")
    parser.add_argument("--root", type=Path, required=True, help=f"folder that holds {META}/")
    default = Path("data/fsdkaggle2018.csv")
    parser.add_argument("-o", "--output", type=Path, default=default, help=f"default: {default}")
    parser.add_argument("--verified", action="store_true", help="of train only clips whose label was checked by hand")
    parser.add_argument("--valid", type=float, default=0.05, help="share of train held out, default: 0.05")
    options = parser.parse_args(arguments)
    if not 0 <= options.valid < 1:
        parser.error(f"--valid is a share, 0..1, got {options.valid}")
    try:
        rows = read(options.root, options.output.parent, options.verified, options.valid)
        write_manifest(rows, COLUMNS, options.output)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except SystemExit as error:
        print(error, file=sys.stderr)
        return 1
    for split in ("train", "valid", "test"):
        chosen = [row for row in rows if row["split"] == split]
        hours = sum(float(row["duration_s"]) for row in chosen) / 3600
        classes = len({row["speaker_or_class"] for row in chosen})
        print(f"{split:5} {len(chosen):6} clips {hours:6.2f} h {classes:4} classes")
    print(options.output)
    return 0


def read(root: Path, folder: Path, verified: bool, valid: float) -> list[Row]:
    """A row per clip of both sets, with paths relative to `folder`."""
    parts = [root / part for name, audio in SETS.values() for part in (f"{META}/{name}", audio)]
    missing = [str(part) for part in parts if not part.exists()]
    if missing:
        raise SystemExit("not there: " + ", ".join(missing) + "; README.md says which archives they come from")
    rows, absent = [], defaultdict(list)
    for split, (name, audio) in SETS.items():
        with (root / META / name).open(newline="", encoding="utf-8-sig") as file:
            listed = list(csv.DictReader(file))
        if not listed or not {"fname", "label"} <= listed[0].keys():
            raise SystemExit(f"{root / META / name}: no columns fname and label")
        for entry in listed:
            path = root / audio / entry["fname"]
            if split == "train" and verified and entry.get("manually_verified") != "1":
                continue
            if not path.is_file():
                absent[audio].append(entry["fname"])
                continue
            rows.append(row(entry, path, split, valid, folder))
    empty = [r["path"] for r in rows if float(r["duration_s"]) == 0]
    if empty:
        print(f"left out: {len(empty)} that hold no sound, such as {empty[0]}", file=sys.stderr)
        rows = [r for r in rows if r["path"] not in empty]
    if absent:
        lines = [f"{len(names)} of {root / audio}, such as {names[0]}" for audio, names in absent.items()]
        raise SystemExit("recordings are missing: " + "; ".join(lines) + ". No manifest written")
    classes = {r["speaker_or_class"] for r in rows}
    if len(classes) != CLASSES:
        print(f"note: {len(classes)} classes, the whole set has {CLASSES}", file=sys.stderr)
    return rows


def row(entry: Row, path: Path, split: str, valid: float, folder: Path) -> Row:
    """The manifest's row of a clip, held out with a chance of `valid`; a duration of 0 when it can't be opened."""
    try:
        duration = soundfile.info(path).duration
    except soundfile.SoundFileError:
        duration = 0.0
    group = entry.get("freesound_id") or path.stem
    if split == "train" and chosen(group, valid):
        split = "valid"
    return {
        "path": Path(os.path.relpath(path, folder)).as_posix(),
        "split": split,
        "kind": "sound",
        "speaker_or_class": entry["label"],
        "duration_s": f"{duration:.3f}",
        "group": group,
        "licence": entry.get("license", ""),
    }


def chosen(name: str, share: float) -> bool:
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return number < share * 2**64


if __name__ == "__main__":
    sys.exit(main())
