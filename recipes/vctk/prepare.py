"""Write the manifest of VCTK 0.92: 100 speakers to train on, of which 5 to validate with, and 10 to test with.

    python recipes/vctk/prepare.py --root DIR [-o data/vctk.csv] [--valid 0]

DIR is the unpacked corpus: it holds `wav48_silence_trimmed/p225/p225_001_mic1.flac` and so on. Both microphones are
taken. The 10 test speakers are the fixed list below, the same on every machine, and so are the 5 of `valid`; with
`--valid 0` all 100 are for training.
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
# Of VCTK 0.92.
FOLDERS = """
    p225 p226 p227 p228 p229 p230 p231 p232 p233 p234 p236 p237 p238 p239 p240 p241 p243 p244 p245 p246 p247 p248
    p249 p250 p251 p252 p253 p254 p255 p256 p257 p258 p259 p260 p261 p262 p263 p264 p265 p266 p267 p268 p269 p270
    p271 p272 p273 p274 p275 p276 p277 p278 p279 p280 p281 p282 p283 p284 p285 p286 p287 p288 p292 p293 p294 p295
    p297 p298 p299 p300 p301 p302 p303 p304 p305 p306 p307 p308 p310 p311 p312 p313 p314 p315 p316 p317 p318 p323
    p326 p329 p330 p333 p334 p335 p336 p339 p340 p341 p343 p345 p347 p351 p360 p361 p362 p363 p364 p374 p376 s5
"""
SPEAKERS = tuple(FOLDERS.split())
ONE_MICROPHONE = ("p280", "p315")
# What the shuffle of the UnaSDiff code (seed 17) leaves for testing when all 110 folders are there. Whether the
# published weights were trained without them is not known.
TEST = ("p249", "p264", "p265", "p273", "p280", "p297", "p330", "p343", "p351", "p361")
VALID = ("p226", "p237", "p253", "p288", "s5")
VALID_SHARE = len(VALID) / (len(SPEAKERS) - len(TEST))
NAME = re.compile(r"([ps]\d+)_(\d+)_mic([12])\.flac")
Row = dict[str, str]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(description="Write the manifest of VCTK 0.92.")
    parser.add_argument("--root", type=Path, required=True, help=f"folder that holds {AUDIO}/")
    default = Path("data/vctk.csv")
    parser.add_argument("-o", "--output", type=Path, default=default, help=f"default: {default}")
    parser.add_argument("--partial", action="store_true", help="take the speakers that are there")
    share = f"share of train held out: {VALID_SHARE}, the default, or 0"
    parser.add_argument("--valid", type=float, default=VALID_SHARE, choices=(0.0, VALID_SHARE), help=share)
    options = parser.parse_args(arguments)
    try:
        rows = read(options.root, options.output.parent, VALID if options.valid else (), options.partial)
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


def read(root: Path, folder: Path, valid: tuple[str, ...], partial: bool) -> list[Row]:
    """A row per clip, with paths relative to `folder`; `valid` are speakers to validate with."""
    audio = root / AUDIO
    if not audio.is_dir():
        raise SystemExit(f"{audio}: not there; README.md says where VCTK-Corpus-0.92.zip comes from")
    speakers = [name for name in SPEAKERS if (audio / name).is_dir()]
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
            split = "test" if speaker in TEST else "valid" if speaker in valid else "train"
            row = {"path": Path(os.path.relpath(path, folder)).as_posix(), "split": split, "kind": "speech"}
            row |= {"speaker_or_class": speaker, "duration_s": f"{duration:.3f}", "group": f"{speaker}_{match[2]}"}
            rows.append(row)
    for what, count in odd.items():
        print(f"left out: {count} {what}", file=sys.stderr)
    if not rows:
        raise SystemExit(f"{audio}: no recordings such as p225/p225_001_mic1.flac")
    clips = Counter(row["group"] for row in rows if row["speaker_or_class"] not in ONE_MICROPHONE)
    single = [name for name, count in clips.items() if count == 1]
    if single:
        print(f"note: one microphone only of {len(single)} sentences, such as {single[0]}", file=sys.stderr)
    return rows


def check(speakers: list[str], audio: Path, partial: bool) -> None:
    """All speakers are there, and all have recordings of both microphones."""
    absent = [name for name in SPEAKERS if name not in speakers]
    wrong = [f"{len(speakers)} of {len(SPEAKERS)} speakers, without {', '.join(absent)}"] if absent else []
    for microphone in (1, 2):
        due = [name for name in speakers if microphone == 1 or name not in ONE_MICROPHONE]
        empty = [name for name in due if not any((audio / name).glob(f"*_mic{microphone}.flac"))]
        if empty:
            wrong.append(f"no *_mic{microphone}.flac of {', '.join(empty)}")
    if wrong and not partial:
        raise SystemExit(f"{audio}: {'; '.join(wrong)}. No manifest written; --partial takes what is there")


if __name__ == "__main__":
    sys.exit(main())
