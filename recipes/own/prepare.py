"""Write the manifest of your own recordings: one folder per class of sound, or per speaker.

    python recipes/own/prepare.py --root DIR [--kind sound] [-o data/own.csv]

`DIR/Bark/one.wav` is a recording of the class `Bark`; recordings that lie in DIR itself are of the class that DIR is
named after. About 10 % of each class become `valid`, by a hash of their names; with `--kind speech` whole speakers do.
Files that sound the same (cuts of one original) belong into one folder below the class's: they stay together.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path

import soundfile

from audiosep.data import write_manifest

COLUMNS = ("path", "split", "kind", "speaker_or_class", "duration_s", "group")
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus")
VALID_SHARE = 0.1
Row = dict[str, str]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(description="Write the manifest of a folder of recordings.")
    parser.add_argument("--root", type=Path, required=True, help="folder of the recordings")
    parser.add_argument("--kind", choices=("speech", "sound"), default="sound", help="default: sound")
    default = Path("data/own.csv")
    parser.add_argument("-o", "--output", type=Path, default=default, help=f"default: {default}")
    options = parser.parse_args(arguments)
    root: Path = options.root
    if not root.is_dir():
        print(f"{root}: no such folder", file=sys.stderr)
        return 1
    rows = read(root, options.kind, options.output.parent)
    if not rows:
        print(f"{root}: no recordings ({', '.join(SUFFIXES)}) that can be opened", file=sys.stderr)
        return 1
    hold_out(rows, options.kind)
    try:
        write_manifest(rows, COLUMNS, options.output)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    for label in sorted({row["speaker_or_class"] for row in rows}):
        chosen = [row for row in rows if row["speaker_or_class"] == label]
        valid = sum(row["split"] == "valid" for row in chosen)
        minutes = sum(float(row["duration_s"]) for row in chosen) / 60
        print(f"{label}: {len(chosen)} recordings, {minutes:.1f} min, {valid} of them to validate with")
    print(options.output)
    return 0


def read(root: Path, kind: str, folder: Path) -> list[Row]:
    """A row per recording, with paths relative to `folder`; what can't be opened is named and left out."""
    rows = []
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES):
        inside = path.relative_to(root).parts
        try:
            duration = soundfile.info(path).duration
        except soundfile.SoundFileError as error:
            print(f"left out: {path}: {error}", file=sys.stderr)
            continue
        if duration == 0:
            print(f"left out: {path}: empty", file=sys.stderr)
            continue
        row = {"path": Path(os.path.relpath(path, folder)).as_posix(), "split": "train", "kind": kind}
        row["speaker_or_class"] = inside[0] if len(inside) > 1 else root.resolve().name
        group = "/".join(inside[:-1] if len(inside) > 2 else inside)
        rows.append(row | {"duration_s": f"{duration:.3f}", "group": group})
    return rows


def hold_out(rows: list[Row], kind: str) -> None:
    """Move a tenth to `valid`, in place: the groups, or the speakers, whose hashes come first."""
    key = "speaker_or_class" if kind == "speech" else "group"
    for label in sorted({row["speaker_or_class"] for row in rows}) if kind == "sound" else [None]:
        members = [row for row in rows if label in (None, row["speaker_or_class"])]
        names = sorted({row[key] for row in members}, key=lambda name: hashlib.sha256(name.encode()).digest())
        chosen = set(names[: round(VALID_SHARE * len(names))])
        for row in members:
            row["split"] = "valid" if row[key] in chosen else "train"


if __name__ == "__main__":
    sys.exit(main())
