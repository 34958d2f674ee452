"""Each recipe's prepare.py, on a small made tree with the layout of the real one."""

import csv
import importlib.util
import os
from pathlib import Path

import pytest

from audiosep.data import read_manifest

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def prepare(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXTRA = ["source_repo", "source_path", "licence", "fsd41", "age_gender", "native_sr", "rms_dbfs"]
HEADER = ["path", "split", "kind", "speaker_or_class", "duration_s", "group", *EXTRA]


@pytest.fixture
def open16k(tmp_path):
    """200 speakers of 2 clips, a class of 200 recordings of 2 clips, a rare one, a crowd."""
    root = tmp_path / "corpus"
    rows = []

    def add(path, split, kind, label, group, source="org/repo"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
        row = dict.fromkeys(HEADER, "") | {"licence": "CC0, no strings", "source_repo": source}
        row |= {"path": path, "split": split, "kind": kind, "speaker_or_class": label}
        rows.append(row | {"group": group, "duration_s": "1.5"})

    for i in range(200):
        for take in "ab":
            add(f"speech/s{i}/{take}.ogg", "train", "speech", f"s{i}", f"g{i}")
            add(f"sound/Bark/{i}{take}.ogg", "train", "sound", "Bark", f"bark{i}")
    for i in range(4):
        add(f"sound/Agogo/{i}.ogg", "train", "sound", "Agogo", f"agogo{i}", "other/repo")
    for i in range(50):
        add(f"speech/pv_crowd/pv_{i}.ogg", "train", "speech", "pv_crowd", "crowd")
        add(f"speech/t{i}/a.flac", "test", "speech", f"t{i}", f"h{i}")
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER)
        writer.writeheader()
        writer.writerows(rows)
    return root


def labels(items):
    return {item.label for item in items}


def test_open16k_carves_out_a_validation_split(open16k, tmp_path, capsys):
    manifest = tmp_path / "manifest.csv"
    assert prepare("open16k").main(["--root", str(open16k), "-o", str(manifest)]) == 0
    assert str(manifest) in capsys.readouterr().out
    items = read_manifest(manifest)
    assert len(items) == 904
    assert all(item.path.is_file() for item in items)
    train = [item for item in items if item.split == "train"]
    valid = [item for item in items if item.split == "valid"]
    speakers = labels(item for item in valid if item.kind == "speech")
    assert 4 <= len(speakers) <= 18
    assert not speakers & labels(train)
    recordings = {item.group for item in valid if item.kind == "sound"}
    assert 4 <= len(recordings) <= 18
    assert not recordings & {item.group for item in train}
    assert sum(item.label == "Agogo" for item in train) == 4
    assert len([label for label in labels(train) if label.startswith("pv_crowd/")]) == 50
    assert sum(item.split == "test" for item in items) == 50


def test_open16k_is_the_same_each_time_and_anywhere(open16k, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = prepare("open16k")
    elsewhere = tmp_path / "made/here.csv"
    assert module.main(["--root", str(open16k)]) == 0
    assert module.main(["--root", os.path.relpath(open16k), "-o", str(elsewhere)]) == 0
    one, other = read_manifest("data/open16k.csv"), read_manifest(elsewhere)
    assert [item.split for item in one] == [item.split for item in other]
    assert all(item.path.is_file() for item in other)
    text = elsewhere.read_text()
    assert "CC0, no strings" in text
    assert [p.name for p in elsewhere.parent.iterdir()] == ["here.csv"]
    assert {p.name for p in open16k.iterdir()} == {"manifest.csv", "speech", "sound"}


def test_open16k_says_what_is_missing(open16k, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = prepare("open16k")
    (open16k / "sound/Agogo/2.ogg").unlink()
    assert module.main(["--root", str(open16k)]) == 1
    said = capsys.readouterr().err
    assert "1 of 904 recordings are missing" in said
    assert "sound/Agogo/2.ogg" in said
    assert not Path("data").exists()
    for path in (open16k / "sound").rglob("*.ogg"):
        path.unlink()
    assert module.main(["--root", str(open16k)]) == 1
    said = capsys.readouterr().err
    assert "org/repo: 400, such as sound/Bark/" in said
    assert "other/repo: 4, such as sound/Agogo/" in said


def test_open16k_without_the_corpus(tmp_path, capsys):
    module = prepare("open16k")
    assert module.main(["--root", str(tmp_path / "none")]) == 1
    assert "manifest.csv: not there" in capsys.readouterr().err
    (tmp_path / "manifest.csv").write_text("path,split\n")
    assert module.main(["--root", str(tmp_path)]) == 1
    assert "no column kind" in capsys.readouterr().err
