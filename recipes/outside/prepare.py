"""Write the manifest of recordings from outside the training corpus: nine freely licensed Debian packages.

    python recipes/outside/prepare.py --root DIR [-o data/outside.csv]

DIR is where the packages were unpacked (README.md has the commands): it holds `usr/share/...`. All rows are `test`.
The telephone prompts are G.722, which only FFmpeg reads (`pip install 'audiosep[media]'`): they are decoded to FLAC in
the folder `outside` beside the manifest. Everything else stays where it is. Nothing is written into DIR.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import soundfile

from audiosep import audio
from audiosep.data import active_spans, load_clip, write_manifest
from audiosep.errors import AudioError

COLUMNS = ("path", "split", "kind", "speaker_or_class", "duration_s", "group", "licence", "package")
# Seconds at least. Shorter speech is single letters and digits.
LEAST = {"speech": 1.0, "sound": 0.5}
Row = dict[str, str]


class Source(NamedTuple):
    """A package, the folder of it that is taken, the licence of what is taken."""

    package: str
    folder: str
    licence: str


ASTERISK = (
    Source("asterisk-core-sounds-en-g722", "usr/share/asterisk/sounds/en_US_f_Allison", "CC-BY-SA-3.0"),
    Source("asterisk-core-sounds-es-g722", "usr/share/asterisk/sounds/es_MX_f_Allison", "CC-BY-SA-3.0"),
    Source("asterisk-core-sounds-fr-g722", "usr/share/asterisk/sounds/fr_CA_f_June", "CC-BY-SA-3.0"),
    Source("asterisk-core-sounds-it-g722", "usr/share/asterisk/sounds/it_IT_m_Carlo", "CC-BY-3.0"),
    Source("asterisk-core-sounds-ru-g722", "usr/share/asterisk/sounds/ru_RU_f_IvrvoiceRU", "CC-BY-3.0"),
)
FILLETS = Source("fillets-ng-data-cs", "usr/share/games/fillets-ng/sound", "GPL-2.0")
STAMPS = Source("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps", "GPL-2.0")
SCRATCH = Source("scratch", "usr/share/scratch/Media/Sounds", "CC-BY-SA-3.0")
THEME = Source("sound-theme-freedesktop", "usr/share/sounds/freedesktop/stereo", "CC-BY-SA-3.0")
SOURCES = (*ASTERISK, FILLETS, STAMPS, SCRATCH, THEME)

# Among the prompts, but not speech.
TONES = {"beep", "beeperr", "ascending-2tone", "descending-2tone", "tt-monkeys"}
# The two who talk in nearly every level of the game: `bar-m-barel.ogg` is the small fish, `bar-v-co.ogg` the big one.
FISH = re.compile(r"[^-]+-([mv])-.+\.ogg")
# A voice per language of the stamps' spoken names; one volunteer is credited with Belarusian and with Russian.
VOICES = {name: name for name in ("bg", "ca", "da", "el", "es", "fr", "ro")} | {"be": "be_ru", "ru": "be_ru"}
NAMED = re.compile(r".+_desc_([a-z]{2})\.ogg")

# Class: file names without suffix. The first part of each table has the shipped sound prior's classes.
STAMP_SOUNDS = {
    "Big_cat": "lion tiger",
    "Bird": "blackbird cuckoo lark quetzal tucan",
    "Camera": "camera_35mm",
    "Cello": "cello",
    "Cow": "bull cow cow_white",
    "Cymbal": "cymbal_crash",
    "Dog": "dog",
    "Duck": "drake duck",
    "Fireworks": "fireworks",
    "Glass": "glass",
    "Goat": "goat mountaingoat",
    "Hen": "hen",
    "Horse": "horse",
    "Insect": "bee grasshopper hornet mosquito",
    "Meow": "blackcat",
    "Pig": "pig pig_golden pig_golden2",
    "Rooster": "rooster",
    "Scissors": "scissors_small_closed scissors_small_open",
    "Sheep": "ram sheep sheep_lamb",
    "Siren": "firetruck",
    "Thunder": "lightningbolt",
    "Tom": "drum_tomtom_floor",
    "Vacuum_cleaner": "vacuum_cleaner",
    "Violin_or_fiddle": "violin",
    # not among the prior's classes
    "Ape": "chimp gorilla",
    "Badger": "badger",
    "Bassoon": "bassoon",
    "Bat": "bat_left",
    "Bear": "bear",
    "Beaver": "beaver",
    "Bison": "bison",
    "Camel": "camel dromedary",
    "Crow": "crow",
    "Deer": "caribou deer doe",
    "Dolphin": "dolphin",
    "Donkey": "donkey",
    "Elephant": "elephant",
    "Ferret": "ferret",
    "Fox": "fox",
    "Frog": "frog",
    "Goose": "gander",
    "Hammer": "hammer mallet_metal",
    "Heron": "heron_greatblue_flying",
    "Hippopotamus": "hippopotamus",
    "Kettle": "kettle",
    "Koala": "koala",
    "Mouse": "mouse",
    "Owl": "owl",
    "Penguin": "penguin",
    "Rubber_duck": "rubberduck",
    "Sawing": "saw",
    "Sea_lion": "sea_lion",
    "Seagull": "seagull",
    "Squirrel": "squirrel",
    "Toilet_shower": "toilet",
    "Turkey": "turkey",
    "Vulture": "vulture",
    "Washing_machine": "Washing-machine",
    "Whale": "orca whale",
    "Wombat": "wombat",
    "Zebra": "zebra",
}
SCRATCH_SOUNDS = {
    "Acoustic_guitar": "GuitarStrum",
    "Balloon": "BalloonScratch",
    "Church_bells": "BellToll",
    "Computer_keyboard": "Typing",
    "Cough": "Cough-female Cough-male",
    "Crowd": "PartyNoise",
    "Crying_baby": "BabyCry",
    "Cymbal": "CymbalCrash RideCymbal",
    "Door": "DoorClose DoorCreak",
    "Engine": "CarPassing MotorcyclePassing",
    "Footsteps": "Footsteps-1 Footsteps-2",
    "Gong": "Gong",
    "Horse": "Horse",
    "Insect": "Crickets",
    "Laughter": "Laugh-female Laugh-male1 Laugh-male2 Laugh-male3",
    "Meow": "Cat Kitten Meow",
    "Rooster": "Rooster",
    "Screaming": "Scream-female Scream-male1 Scream-male2",
    "Shaker": "Shaker",
    "Sneeze": "Sneeze-female Sneeze-male",
    "Splash": "Plunge",
    "Trumpet": "Trumpet1 Trumpet2",
    "Water": "Ripples WaterRunning",
    "Wolf": "WolfHowl",
    # not among the prior's classes
    "Bubbles": "Bubbles",
    "Didgeridoo": "Dijjeridoo",
    "Gallop": "HorseGallop",
    "Owl": "Owl",
    "Rattle": "Rattle",
    "Sea_lion": "SeaLion",
    "Sewing_machine": "SewingMachine",
    "Slurp": "Slurp",
    "Tambura": "Tambura",
}
THEME_SOUNDS = {"Alarm": "alarm-clock-elapsed", "Camera": "camera-shutter"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(description="Write the manifest of recordings from Debian packages.")
    parser.add_argument("--root", type=Path, required=True, help="where the packages were unpacked: it holds usr/")
    default = Path("data/outside.csv")
    parser.add_argument("-o", "--output", type=Path, default=default, help=f"default: {default}")
    options = parser.parse_args(arguments)
    try:
        check(options.root)
        rows = read(options.root, options.output.parent)
        write_manifest(rows, COLUMNS, options.output)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except (AudioError, soundfile.SoundFileError, SystemExit) as error:
        print(error, file=sys.stderr)
        return 1
    for kind, what in (("speech", "speakers"), ("sound", "classes")):
        chosen = [row for row in rows if row["kind"] == kind]
        minutes = sum(float(row["duration_s"]) for row in chosen) / 60
        print(f"{kind:6} {len(chosen):5} clips {minutes:6.1f} min {len(labels(chosen)):4} {what}")
    print(options.output)
    return 0


def labels(rows: list[Row]) -> set[str]:
    """Speakers or classes."""
    return {row["speaker_or_class"] for row in rows}


def check(root: Path) -> None:
    """Every package is there; else say which are not, and how to get them."""
    missing = [source.package for source in SOURCES if not (root / source.folder).is_dir()]
    if missing:
        raise SystemExit(
            f"{root}: {len(missing)} of {len(SOURCES)} packages are missing; no manifest written. To get them:\n"
            f"  apt-get download {' '.join(missing)}\n"
            f'  for package in *.deb; do dpkg -x "$package" {root}; done'
        )


def read(root: Path, folder: Path) -> list[Row]:
    """A row per recording, with paths relative to `folder`; what can't be used is counted on stderr."""
    rows, odd, seen = [], Counter[str](), set[str]()
    for source, path, kind, label in found(root):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        if content in seen:
            odd["copies of another file"] += 1
            continue
        seen.add(content)
        duration = seconds(path)
        if duration < LEAST[kind]:
            odd[f"{kind} shorter than {LEAST[kind]} s"] += 1
            continue
        used = decoded(path, root, folder) if path.suffix == ".g722" else path
        if not active_spans(load_clip(used, 16000), 16000):
            odd["silent"] += 1
        else:
            row = {"path": Path(os.path.relpath(used, folder)).as_posix(), "split": "test", "kind": kind}
            row |= {"speaker_or_class": label, "duration_s": f"{duration:.3f}"}
            row |= {"group": f"{source.package}/{path.stem}", "licence": source.licence, "package": source.package}
            rows.append(row)
    for what, count in odd.items():
        print(f"left out: {count} {what}", file=sys.stderr)
    return rows


def found(root: Path) -> Iterator[tuple[Source, Path, str, str]]:
    """What there is: source, file, kind, and speaker or class; always in the same order."""
    for source in ASTERISK:
        speaker = source.folder.rpartition("_")[2]  # the same Allison in English and in Spanish
        for path in files(root, source):
            if path.suffix == ".g722" and path.parent.name != "silence" and path.stem not in TONES:
                yield source, path, "speech", speaker
    for path in files(root, FILLETS):
        if path.parent.name == "cs" and (match := FISH.fullmatch(path.name)):
            yield FILLETS, path, "speech", "small_fish" if match[1] == "m" else "big_fish"
    for path in files(root, STAMPS):
        if (match := NAMED.fullmatch(path.name)) and match[1] in VOICES:
            yield STAMPS, path, "speech", f"stamps_{VOICES[match[1]]}"
    for source, table in ((STAMPS, STAMP_SOUNDS), (SCRATCH, SCRATCH_SOUNDS), (THEME, THEME_SOUNDS)):
        classes = {name: label for label, names in table.items() for name in names.split()}
        for path in files(root, source):
            if path.suffix in (".ogg", ".oga", ".wav", ".mp3") and path.stem in classes:
                yield source, path, "sound", classes[path.stem]


def files(root: Path, source: Source) -> list[Path]:
    """The package's files; links to files are left out, they are another file's second name."""
    return sorted(path for path in (root / source.folder).rglob("*") if path.is_file() and not path.is_symlink())


def seconds(path: Path) -> float:
    """Length; of G.722, which has no header, by its 64 kbit/s."""
    return path.stat().st_size / 8000 if path.suffix == ".g722" else float(soundfile.info(path).duration)


def decoded(path: Path, root: Path, folder: Path) -> Path:
    """The recording as FLAC below `folder`; written once."""
    output = (folder / "outside" / path.relative_to(root / "usr/share")).with_suffix(".flac")
    if not output.exists():
        wave, rate = audio.read(path)
        audio.write(output, wave, rate)
    return output


if __name__ == "__main__":
    sys.exit(main())
