"""Write the manifest of VCTK 0.92: 100 speakers to train on, of which 5 to validate with, and 10 to test with.

    python recipes/vctk/prepare.py --root DIR [-o data/vctk.csv]

DIR is the unpacked corpus: it holds `wav48_silence_trimmed/p225/p225_001_mic1.flac` and so on. Both microphones are
taken. The 10 test speakers are the fixed list below, the same on every machine.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from pathlib import Path

import soundfile

from audiosep.data import write_manifest

COLUMNS = ("path", "split", "kind", "speaker_or_class", "duration_s", "group")
AUDIO = "wav48_silence_trimmed"
SPEAKERS = 110
# What the shuffle of the UnaSDiff code (seed 17) leaves for testing when all 110 folders are there. Whether the
# published weights were trained without them is not known.
TEST = ("p249", "p264", "p265", "p273", "p280", "p297", "p330", "p343", "p351", "p361")
VALID = ("p226", "p237", "p253", "p288", "s5")
NAME = re.compile(r"([ps]\d+)_(\d+)_mic([12])\.flac")
Row = dict[str, str]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(description="Write the manifest of VCTK 0.92.")
    parser.add_argument("--root", type=Path, required=True, help=f"folder that holds {AUDIO}/")
    default = Path("data/vctk.csv")
    parser.add_argument("-o", "--output", type=Path, default=default, help=f"default: {default}")
    parser.add_argument("--partial", action="store_true", help="take the speakers that are there")
    options = parser.parse_args(arguments)
    try:
        rows = read(options.root, options.output.parent, options.partial)
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
        speakers = len({row["speaker_or_class"] for row in chosen})
        print(f"{split:5} {len(chosen):6} clips {hours:6.2f} h {speakers:4} speakers")
    print(options.output)
    return 0


def read(root: Path, folder: Path, partial: bool) -> list[Row]:
    """A row per clip, with paths relative to `folder`."""
    audio = root / AUDIO
    if not audio.is_dir():
        raise SystemExit(f"{audio}: not there; README.md says where VCTK-Corpus-0.92.zip comes from")
    speakers = sorted(p.name for p in audio.iterdir() if p.is_dir() and re.fullmatch(r"[ps]\d+", p.name))
    check(speakers, audio, partial)
    rows, odd = [], Counter[str]()
    for speaker in speakers:
        for path in sorted((audio / speaker).glob("*.flac")):
            match = NAME.fullmatch(path.name)
            if match is None or match[1] != speaker:
                odd["files of another name"] += 1
                continue
            try:
                duration = soundfile.info(path).duration
            except soundfile.SoundFileError:
                odd["files that can't be opened"] += 1
                continue
            split = "test" if speaker in TEST else "valid" if speaker in VALID else "train"
            row = {"path": Path(os.path.relpath(path, folder)).as_posix(), "split": split, "kind": "speech"}
            row |= {"speaker_or_class": speaker, "duration_s": f"{duration:.3f}", "group": f"{speaker}_{match[2]}"}
            rows.append(row)
    for what, count in odd.items():
        print(f"left out: {count} {what}", file=sys.stderr)
    if not rows:
        raise SystemExit(f"{audio}: no recordings such as p225/p225_001_mic1.flac")
    return rows


def check(speakers: list[str], audio: Path, partial: bool) -> None:
    """All speakers are there, with the test and validation speakers among them, and all have recordings."""
    wrong = [f"{len(speakers)} of {SPEAKERS} speakers"] if len(speakers) < SPEAKERS else []
    absent = [name for name in (*TEST, *VALID) if name not in speakers]
    if absent:
        wrong.append(f"no {', '.join(absent)}, which are for testing and validation")
    empty = [name for name in speakers if not any((audio / name).glob("*_mic1.flac"))]
    if empty:
        wrong.append(f"no *_mic1.flac of {', '.join(empty)}")
    if wrong and not partial:
        raise SystemExit(f"{audio}: {'; '.join(wrong)}. No manifest written; --partial takes what is there")


if __name__ == "__main__":
    sys.exit(main())
