"""Each recipe's prepare.py, on a small made tree with the layout of the real one."""

import csv
import importlib.util
import inspect
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiosep import evaluate, fit, hub, recipe, separator, train
from audiosep.baselines import fit_nmf
from audiosep.cli import main
from audiosep.data import Item, MixtureDataset, SourceDataset, read_manifest
from audiosep.refiner import Refiner, write_stems
from audiosep.samplers import build as build_sampler
from audiosep.tagger import Tagger

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def prepare(name, file="prepare"):
    spec = importlib.util.spec_from_file_location(name, RECIPES / name / f"{file}.py")
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


def test_open16k_holds_out_as_much_as_is_asked_for(open16k, tmp_path):
    manifest = tmp_path / "manifest.csv"
    options = ["--valid", "0.5", "--least", "2"]
    assert prepare("open16k").main(["--root", str(open16k), "-o", str(manifest), *options]) == 0
    held = {item.group for item in read_manifest(manifest, split="valid", kind="sound")}
    assert not held & {item.group for item in read_manifest(manifest, split="train", kind="sound")}
    assert 80 <= len(held) <= 130  # of 204 recordings
    rare = [item.split for item in read_manifest(manifest) if item.label == "Agogo"]
    assert {"train", "valid"} == set(rare)
    for wrong in (["--valid", "5"], ["--least", "0"]):
        with pytest.raises(SystemExit):
            prepare("open16k").main(["--root", str(open16k), "-o", str(tmp_path / "no.csv"), *wrong])
    assert not (tmp_path / "no.csv").exists()


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


# VCTK


def touch_audio(path, seconds=0.1, rate=8000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(round(seconds * rate), 0.1), rate)


@pytest.fixture(scope="module")
def vctk(tmp_path_factory):
    """All speakers, with one sentence and their microphones; a stray file."""
    root = tmp_path_factory.mktemp("vctk")
    module = prepare("vctk")
    for speaker in module.SPEAKERS:
        for mic in (1, 2):
            if mic == 1 or speaker not in ("p280", "p315"):
                touch_audio(root / f"wav48_silence_trimmed/{speaker}/{speaker}_001_mic{mic}.flac")
    (root / "wav48_silence_trimmed/p225/notes.flac").touch()
    (root / "wav48_silence_trimmed/log.txt").touch()
    return root


def test_vctk_has_ten_speakers_to_test_with(vctk, tmp_path, capsys):
    manifest = tmp_path / "made/vctk.csv"
    assert prepare("vctk").main(["--root", str(vctk), "-o", str(manifest)]) == 0
    said = capsys.readouterr()
    assert said.err == "left out: 1 files of another name\n"
    items = read_manifest(manifest)
    assert len(items) == 218
    assert all(item.path.is_file() and item.kind == "speech" for item in items)
    by_split = {split: labels(i for i in items if i.split == split) for split in ("train", "valid", "test")}
    assert [len(names) for names in by_split.values()] == [95, 5, 10]
    assert "p280" in by_split["test"]
    assert "s5" in by_split["valid"]
    pair = [item for item in items if item.label == "p227"]
    assert len({item.group for item in pair}) == 1
    assert pair[0].duration == pytest.approx(0.1)
    # The published setting validates with none.
    assert prepare("vctk").main(["--root", str(vctk), "-o", str(manifest), "--valid", "0"]) == 0
    everything = read_manifest(manifest)
    assert labels(i for i in everything if i.split == "train") == by_split["train"] | by_split["valid"]
    assert [i for i in everything if i.split == "test"] == [i for i in items if i.split == "test"]
    with pytest.raises(SystemExit):
        prepare("vctk").main(["--root", str(vctk), "-o", str(manifest), "--valid", "0.1"])


def test_the_test_speakers_of_vctk_are_those_that_the_published_code_leaves():
    module = prepare("vctk")
    shuffled = sorted(module.SPEAKERS)
    random.Random(17).shuffle(shuffled)
    assert len(set(shuffled)) == 110
    assert sorted(shuffled[100:]) == list(module.TEST)
    assert not set(module.VALID) & set(module.TEST)


def test_vctk_says_what_is_missing(vctk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = prepare("vctk")
    assert module.main(["--root", str(tmp_path)]) == 1
    assert "wav48_silence_trimmed: not there" in capsys.readouterr().err
    part = tmp_path / "part/wav48_silence_trimmed"
    shutil.copytree(vctk / "wav48_silence_trimmed/p351", part / "p351")
    (part / "p225").mkdir()
    assert module.main(["--root", str(tmp_path / "part")]) == 1
    said = capsys.readouterr().err
    assert "2 of 110 speakers, without p226, p227, p228," in said
    assert "no *_mic1.flac of p225;" in said
    assert "no *_mic2.flac of p225." in said
    assert not Path("data").exists()
    assert module.main(["--root", str(tmp_path / "part"), "--partial"]) == 0
    assert labels(read_manifest("data/vctk.csv")) == {"p351"}


def test_vctk_names_a_speaker_and_second_microphones_that_are_missing(vctk, tmp_path, capsys):
    module = prepare("vctk")
    audio = shutil.copytree(vctk, tmp_path / "vctk") / "wav48_silence_trimmed"
    command = ["--root", str(audio.parent), "-o", str(tmp_path / "vctk.csv")]
    shutil.rmtree(audio / "p225")
    assert module.main(command) == 1
    assert "109 of 110 speakers, without p225. No manifest written" in capsys.readouterr().err
    shutil.copytree(audio / "p226", audio / "p225")
    for path in audio.glob("*/*_mic2.flac"):
        if path.parent.name != "s5":
            path.unlink()
    assert module.main(command) == 1
    said = capsys.readouterr().err
    assert "no *_mic2.flac of p225, p226," in said
    names = said.split("mic2.flac of ")[1].split(".")[0].split(", ")
    assert names == [name for name in module.SPEAKERS if name not in ("p280", "p315", "s5")]
    assert not (tmp_path / "vctk.csv").exists()
    for speaker in names:
        touch_audio(audio / f"{speaker}/{speaker}_002_mic2.flac")
    touch_audio(audio / "s5/s5_002_mic1.flac")
    assert module.main(command) == 0
    assert "note: one microphone only of" in capsys.readouterr().err


# FSDKaggle2018


@pytest.fixture
def fsd(tmp_path):
    """Two classes; 60 clips to train on, half of them checked; one is empty."""
    root = tmp_path / "fsd"
    meta = root / "FSDKaggle2018.meta"
    meta.mkdir(parents=True)
    train = [["fname", "label", "manually_verified", "freesound_id", "license"]]
    test = [["fname", "label", "usage", "freesound_id", "license"]]
    for i in range(60):
        touch_audio(root / f"FSDKaggle2018.audio_train/{i:08x}.wav", 0 if i == 7 else 0.1)
        train.append([f"{i:08x}.wav", ["Bark", "Violin_or_fiddle"][i % 2], i // 2 % 2, 1000 + i, "CC0"])
    for i in range(60, 64):
        touch_audio(root / f"FSDKaggle2018.audio_test/{i:08x}.wav")
        test.append([f"{i:08x}.wav", ["Bark", "Violin_or_fiddle"][i % 2], "Public", 1000 + i, "Attribution"])
    for name, rows in (("train_post_competition", train), ("test_post_competition_scoring_clips", test)):
        with (meta / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return root


def test_fsdkaggle2018_keeps_the_sets_of_its_authors(fsd, tmp_path, capsys):
    manifest = tmp_path / "fsd.csv"
    assert prepare("fsdkaggle2018").main(["--root", str(fsd), "-o", str(manifest)]) == 0
    said = capsys.readouterr().err
    assert "left out: 1 that hold no sound" in said
    assert "2 classes, the whole set has 41" in said
    items = read_manifest(manifest)
    assert sum(item.split == "test" for item in items) == 4
    assert 0 < sum(item.split == "valid" for item in items) < 12
    assert len(items) == 63
    assert labels(items) == {"Bark", "Violin_or_fiddle"}
    assert all(item.path.is_file() and item.kind == "sound" for item in items)
    assert "Attribution" in manifest.read_text()
    assert prepare("fsdkaggle2018").main(["--root", str(fsd), "-o", str(manifest), "--verified"]) == 0
    assert len(read_manifest(manifest)) == 4 + 29
    # The published setting trains on all.
    assert prepare("fsdkaggle2018").main(["--root", str(fsd), "-o", str(manifest), "--valid", "0"]) == 0
    assert [item.split for item in read_manifest(manifest)].count("train") == 59
    with pytest.raises(SystemExit):
        prepare("fsdkaggle2018").main(["--root", str(fsd), "-o", str(manifest), "--valid", "1"])


def test_fsdkaggle2018_says_what_is_missing(fsd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = prepare("fsdkaggle2018")
    (fsd / "FSDKaggle2018.audio_train/00000003.wav").unlink()
    assert module.main(["--root", str(fsd)]) == 1
    said = capsys.readouterr().err
    assert "1 of" in said
    assert "such as 00000003.wav" in said
    shutil.rmtree(fsd / "FSDKaggle2018.audio_test")
    (fsd / "FSDKaggle2018.meta/train_post_competition.csv").unlink()
    assert module.main(["--root", str(fsd)]) == 1
    said = capsys.readouterr().err
    assert "FSDKaggle2018.audio_test" in said
    assert "train_post_competition.csv" in said
    assert not Path("data").exists()


# Outside the corpus


@pytest.fixture
def packages(tmp_path):
    """What the nine packages hold, a little of each; G.722 is any bytes, 8000 of them a second."""
    root, rng = tmp_path / "root", np.random.default_rng(0)
    share = root / "usr/share"

    def add(path, seconds=1.2, level=0.1):
        (share / path).parent.mkdir(parents=True, exist_ok=True)
        wave = level * rng.standard_normal(round(8000 * seconds))
        soundfile.write(share / path, wave, 8000, format="WAV" if path.endswith(".wav") else "OGG")

    for name in ("en_US_f_Allison", "es_MX_f_Allison", "fr_CA_f_June", "it_IT_m_Carlo", "ru_RU_f_IvrvoiceRU"):
        folder = share / "asterisk/sounds" / name
        (folder / "silence").mkdir(parents=True)
        for file, size in (("added", 9600), ("beep", 9600), ("letters-a", 4000), ("silence/2", 16000)):
            (folder / f"{file}.g722").write_bytes(rng.bytes(size))
    for file in ("bar-m-co", "bar-v-co", "bar-x-nic"):
        add(f"games/fillets-ng/sound/barrel/cs/{file}.ogg")
    stamps = "tuxpaint/stamps/animals"
    for file in ("cow_white_desc_be", "cow_desc_ru", "cow_desc_fr", "cow_desc", "cow_desc_nl", "cow_white", "unknown"):
        add(f"{stamps}/{file}.ogg")
    add(f"{stamps}/cow.ogg", 0.4)
    add(f"{stamps}/bear.ogg", level=0.0)
    shutil.copy(share / stamps / "cow_white.ogg", share / stamps / "bull.ogg")
    (share / stamps / "dog.ogg").symlink_to("cow_white.ogg")
    add("scratch/Media/Sounds/Human/Laugh-male1.wav")
    add("scratch/Media/Sounds/Vocals/Singer1.wav")
    add("sounds/freedesktop/stereo/camera-shutter.oga", 0.6)
    return root


def test_outside_takes_voices_and_sounds_of_known_classes(packages, tmp_path, monkeypatch, capsys):
    module = prepare("outside")
    noise = np.full((1, 19200), 0.1, np.float32)
    read = module.audio.read
    monkeypatch.setattr(module.audio, "read", lambda path: (noise, 16000) if path.suffix == ".g722" else read(path))
    before = sorted(packages.rglob("*"))
    manifest = tmp_path / "made/outside.csv"
    assert module.main(["--root", str(packages), "-o", str(manifest)]) == 0
    said = capsys.readouterr()
    assert "5 speech shorter than 1.0 s" in said.err
    assert "1 sound shorter than 0.5 s" in said.err
    assert "1 silent" in said.err
    assert "1 copies of another file" in said.err
    assert sorted(packages.rglob("*")) == before
    speech, sound = (read_manifest(manifest, split="test", kind=kind) for kind in ("speech", "sound"))
    assert f"speech {len(speech):5} clips" in said.out
    fish = {"big_fish", "small_fish"}
    assert labels(speech) == {"Allison", "June", "Carlo", "IvrvoiceRU", *fish, "stamps_be_ru", "stamps_fr"}
    assert {item.path.name: item.label for item in sound} == {
        "bull.ogg": "Cow",
        "Laugh-male1.wav": "Laughter",
        "camera-shutter.oga": "Camera",
    }
    assert len(speech) == 5 + 2 + 3
    for item in (*speech, *sound):
        assert soundfile.info(item.path).duration == pytest.approx(item.duration, abs=0.001)
    text = manifest.read_text()
    assert "CC-BY-3.0,asterisk-core-sounds-ru-g722" in text
    assert "GPL-2.0,tuxpaint-stamps-default" in text


def test_outside_says_which_packages_are_missing(packages, tmp_path, capsys):
    module = prepare("outside")
    shutil.rmtree(packages / "usr/share/scratch")
    shutil.rmtree(packages / "usr/share/asterisk/sounds/it_IT_m_Carlo")
    manifest = tmp_path / "outside.csv"
    assert module.main(["--root", str(packages), "-o", str(manifest)]) == 1
    said = capsys.readouterr().err
    assert "2 of 9 packages are missing" in said
    assert "apt-get download asterisk-core-sounds-it-g722 scratch\n" in said
    assert "dpkg -x" in said
    assert not manifest.exists()


def test_the_classes_of_outside_that_the_shipped_prior_knows():
    """Enough of them to draw from, and named as the prior names them."""
    module = prepare("outside")
    known = set(hub.read_config(hub.find("sound"))["classes"])
    tables = (module.STAMP_SOUNDS, module.SCRATCH_SOUNDS, module.THEME_SOUNDS)
    ours = {label for table in tables for label in table}
    assert len(ours & known) >= 40
    assert not {name.casefold() for name in ours - known} & {name.casefold() for name in known}
    for table in tables:
        names = [name for line in table.values() for name in line.split()]
        assert len(names) == len(set(names))


def test_overlap_finds_a_resampled_coded_quieter_copy(tmp_path, capsys):
    rng, t = np.random.default_rng(0), np.arange(2 * 8000) / 8000

    def write(path, wave, rate=8000):
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, rate)

    def burst():
        return 0.3 * np.exp(-3 * t) * np.convolve(rng.standard_normal(t.size), np.ones(8) / 8, "same")

    copied, other, third = burst(), burst(), burst()
    write(tmp_path / "ours/Bark/copied.wav", copied)
    write(tmp_path / "ours/Meow/other.wav", other)
    late = np.concatenate([np.zeros(3210), -0.2 * copied])
    write(tmp_path / "corpus/Bark/cut.ogg", np.repeat(late, 2), 16000)
    write(tmp_path / "corpus/Bark/third.wav", third)
    for name in ("ours", "corpus"):
        assert prepare("own").main(["--root", str(tmp_path / name), "-o", str(tmp_path / f"{name}.csv")]) == 0
    capsys.readouterr()
    module = prepare("outside", "overlap")
    assert module.main([str(tmp_path / "ours.csv"), str(tmp_path / "corpus.csv")]) == 0
    first, second = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert float(first[0].strip("| ")) > 0.9
    assert first[1:] == ["copied.wav", "cut.ogg |"]
    assert float(second[0].strip("| ")) < 0.5


# Your own sounds


def test_own_sounds_from_folders_to_a_prior_that_separates(tmp_path, monkeypatch, capsys):
    """What recipes/README.md says, with a tiny network and a few steps."""
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    for i in range(10):
        touch_audio(Path(f"sounds/Bark/{i}.wav"), 0.3)
        touch_audio(Path(f"sounds/Meow/{i}.flac"), 0.3)
    Path("sounds/Meow/broken.wav").write_bytes(b"RIFF")
    assert prepare("own").main(["--root", "sounds"]) == 0
    said = capsys.readouterr()
    assert "Bark: 10 recordings, 0.0 min, 1 of them to validate with" in said.out
    assert "broken.wav" in said.err

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        assert caught.value.code == 0, capsys.readouterr().err

    small = ["backbone.width=8", "backbone.n_fft=126", "backbone.patch=[1,1]", "backbone.heads=2", "data.segment=0.4"]
    few = [
        "train.max_minutes=60",
        "train.max_steps=2",
        "train.batch_size=2",
        "probe.windows=2",
        "probe.steps=2",
        "probe.mixtures=0",
    ]
    settings = [word for setting in small + few for word in ("--set", setting)]
    run("train", RECIPES / "own/sound.toml", "-o", "my-prior", "-d", "cpu", *settings)
    assert len(list(Path("my-prior.run/samples").glob("*.html"))) == 2
    touch_audio(Path("recording.wav"), 0.5, 16000)
    run("separate", "recording.wav", "-n", "./my-prior", "-s", "bark,meow", "-d", "cpu", "--steps", "2")
    assert {p.name for p in Path("separated/my-prior/recording").glob("*.wav")} == {"bark.wav", "meow.wav"}
    run("models", "info", "./my-prior")
    assert "held-out denoising loss" in capsys.readouterr().out


def test_own_says_that_the_manifest_cannot_be_written(tmp_path, capsys):
    touch_audio(tmp_path / "sounds/Bark/a.wav")
    (tmp_path / "file").touch()
    for output in (tmp_path / "file/own.csv", tmp_path):
        assert prepare("own").main(["--root", str(tmp_path / "sounds"), "-o", str(output)]) == 1
        assert re.search(r"^/.*: (Not a directory|File exists|Is a directory)$", capsys.readouterr().err)


def test_own_voices_hold_out_whole_speakers(tmp_path, capsys):
    for i in range(10):
        touch_audio(tmp_path / f"voices/s{i}/take/a.wav")
        touch_audio(tmp_path / f"voices/s{i}/take/b.wav")
    manifest = tmp_path / "voices.csv"
    assert prepare("own").main(["--root", str(tmp_path / "voices"), "--kind", "speech", "-o", str(manifest)]) == 0
    valid = read_manifest(manifest, split="valid", kind="speech")
    assert len(valid) == 2
    assert len(labels(valid)) == 1
    assert not labels(valid) & labels(read_manifest(manifest, split="train"))
    assert len({item.group for item in read_manifest(manifest)}) == 10
    assert prepare("own").main(["--root", str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert prepare("own").main(["--root", str(tmp_path / "empty")]) == 1
    assert "no recordings" in capsys.readouterr().err


# TOML files


def test_the_recipe_of_nmf_is_taken():
    table = recipe.load(RECIPES / "unasdiff/nmf.toml")["nmf"]
    assert set(table) <= set(inspect.signature(fit_nmf).parameters) - {"items", "classes", "progress"}


TRAINED = {
    path: recipe.load(path)
    for path in sorted(RECIPES.glob("*/*.toml"))
    if "train" in recipe.load(path) and not {"tagger", "refiner"} & {*recipe.load(path)}
}
MILLIONS = {
    "paper": 37.2,
    "speech-paper": 37.2,
    "sound-paper": 37.2,
    "diffwave-large": 32.3,
    "conv-tasnet-small": 2.8,
    "conv-tasnet": 8.2,
    "conv-tasnet-paper": 5.0,
    "tf-locoformer": 8.6,
    "tf-locoformer-paper": 15.0,
}


@pytest.mark.parametrize(("path", "tables"), TRAINED.items(), ids=[f"{p.parent.name}/{p.stem}" for p in TRAINED])
def test_every_recipe_builds(path, tables):
    """Each key is taken by what the table stands for."""
    expert = "expert" in tables
    recipe.check_tables(tables, fit.EXPERT_TABLES if expert else fit.TABLES)
    options = recipe.build(train.Options, tables["train"], "train")
    kind = "speech" if expert else tables["prior"]["kind"]
    items = [Item(f"{name}.wav", Path(f"{name}.wav"), "train", kind, name, 4.0, name) for name in "ab"]
    window = {k: v for k, v in tables["data"].items() if k not in (*fit.MANIFEST, "cache")}
    with torch.device("meta"):
        model = fit.build_expert(tables) if expert else fit.build_prior(tables, ["a", "b"] if kind == "sound" else [])
    if expert:
        recipe.build(MixtureDataset, window, "data", items=items, task="2speech", count=1, seed=0)
        known = set(inspect.signature(fit.ExpertProbe).parameters) - {"data", "expert"}
    else:
        recipe.build(SourceDataset, window, "data", items=items, count=options.batch_size)
        known = set(inspect.signature(fit.Probe).parameters) - {"data", "prior", "folder"}
    weights = sum(p.numel() for p in model.parameters())
    assert weights == pytest.approx(1e6 * MILLIONS.get(path.stem, 8.7), rel=0.02)
    assert set(tables.get("probe", {})) <= known
    recipe.build(fit._card, tables["card"], "card")


@pytest.mark.parametrize("path", [path for path in TRAINED if path.stem.endswith("paper") and "prior" in TRAINED[path]])
def test_priors_of_the_published_setting_have_the_usual_betas(path):
    """The paper names AdamW and its rate only."""
    usual = inspect.signature(torch.optim.AdamW).parameters
    options = recipe.build(train.Options, TRAINED[path]["train"], "train")
    assert list(options.betas) == list(usual["betas"].default)
    assert options.weight_decay == usual["weight_decay"].default


def test_every_shipped_card_names_the_sources_of_its_recordings():
    made = prepare("open16k", "card")
    for entry in hub.list_checkpoints():
        text = Path(entry["path"], hub.CARD).read_text(encoding="utf-8")
        for kind in [entry["kind"]] if entry["kind"] in ("speech", "sound") else ["speech", "sound"]:
            assert all(f"- {source}\n" in text for source in made.sources(kind)), entry["name"]


@pytest.mark.parametrize("name", ["tagger", "classifier"])
def test_the_taggers_recipes_build(name):
    """The recipes make what is shipped."""
    tables = recipe.load(RECIPES / f"open16k/{name}.toml")
    recipe.check_tables(tables, fit.TAGGER_TABLES)
    recipe.build(train.Options, tables["train"], "train")
    own = {key: value for key, value in tables["tagger"].items() if key not in ("of", "tasks", *fit.SHARES)}
    tagger = recipe.build(Tagger, own, "tagger", classes=["a", "b"])
    assert sum(p.numel() for p in tagger.parameters()) < 1.5e6
    shipped = hub.load_model(name)
    ours = {"classes": list(shipped.classes), "threshold": shipped.threshold}
    assert shipped.config == tagger.config | ours
    assert set(tables["probe"]) <= set(inspect.signature(fit.TaggerProbe).parameters)
    recipe.build(fit._card, tables["card"], "card")


def test_the_refiners_recipe_builds():
    """The recipe makes what is shipped."""
    tables = recipe.load(RECIPES / "open16k/refiner.toml")
    recipe.check_tables(tables, fit.REFINER_TABLES)
    recipe.build(train.Options, tables["train"], "train")
    shipped = hub.load_model("refiner")
    own = {key: value for key, value in tables["refiner"].items() if key not in ("of", "tasks", *fit.STEMS)}
    refiner = recipe.build(Refiner, own, "refiner", classes=shipped.classes)
    assert shipped.config == refiner.config
    assert shipped.classes == hub.load_prior("sound").classes
    assert set(tables["probe"]) <= set(inspect.signature(fit.RefinerProbe).parameters)
    recipe.build(fit._card, tables["card"], "card")


def test_a_voice_and_all_the_rest():
    sources = torch.randn(3, 7)
    found = prepare("open16k", "stems").one_sound(["Bark", "speech", "Bell"], sources)
    assert found["names"] == ["speech", "sound"]
    torch.testing.assert_close(found["sources"], torch.stack((sources[1], sources[0] + sources[2])))


@pytest.mark.parametrize(
    ("names", "told", "count"), [("sound", False, 3), ("sound", True, 4), ("Bark,Balloon", True, 5)]
)
def test_stems_are_of_a_run_and_its_restarts(names, told, count):
    torch.manual_seed(0)
    apart = separator.Separator.from_pretrained("speech,sound", device="cpu", refine=0, steps=4, dtype="float32")
    asked, whole = ["speech", *names.split(",")], 0.05 * torch.randn(1, 16000)
    refiner = hub.load_model("refiner") if told else None
    with torch.no_grad():
        found = list(prepare("open16k", "stems").along(apart, whole, asked, np.random.default_rng(0), refiner))
    assert len(found) == count
    for one, x in enumerate(found):
        assert x.shape == (len(asked), 16000)
        assert not any(torch.equal(x, other) for other in found[:one])
        assert one < 2 or (x.sum(0) - whole).norm() < 0.2 * whole.norm()


def test_the_mean_of_two_refiners_is_a_checkpoint(tmp_path, monkeypatch):
    torch.manual_seed(0)
    refiners = [Refiner(["Low"], width=2, mels=4) for _ in range(2)]
    for refiner in refiners:
        torch.nn.init.normal_(refiner.out.weight)
    facts = {"data": "tones", "training": {"steps": 7}}
    for name, refiner in zip("ab", refiners):
        hub.save_model(refiner, tmp_path / name, facts, torch.float32)
    stems, sources = torch.randn(2, 2, 8000)
    write_stems(tmp_path / "1speech+1sound.0.safetensors", [(stems, sources, ["speech", "Low"])], 16000)
    arguments = ["mean", str(tmp_path / "a"), str(tmp_path / "b"), "--stems", str(tmp_path), "-o", str(tmp_path / "m")]
    monkeypatch.setattr("sys.argv", arguments)
    prepare("open16k", "mean").main()
    found, states = hub.load_model(tmp_path / "m"), [refiner.state_dict() for refiner in refiners]
    for key, mean in found.state_dict().items():
        expected = (states[0][key] + states[1][key]) / 2
        torch.testing.assert_close(mean, expected.to(mean.dtype), atol=1e-3, rtol=1e-3)
    config = hub.read_config(tmp_path / "m")
    assert config["training"]["mean with"].startswith("a (")
    (row,) = config["metrics"]
    assert row["metric"] == "SI-SDR of held-out stems, 1speech+1sound: dB gained"
    gain = fit.RefinerProbe(str(tmp_path))(found, 0, None)["gain/1speech+1sound"]
    assert row["value"] == pytest.approx(gain, abs=0.02)  # of weights that are stored in half precision
    assert abs(gain) > 1
    hub.save_model(Refiner(["High"], width=2, mels=4), tmp_path / "b", facts)
    with pytest.raises(SystemExit, match="are not two refiners of one size with the same classes"):
        prepare("open16k", "mean").main()


MEASURED = {path: recipe.load(path) for path in sorted(RECIPES.glob("*/*.toml")) if "evaluate" in recipe.load(path)}


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_recipes_of_evaluations_name_what_is_there(path, gaussian):
    tables = MEASURED[path]
    recipe.check_tables(tables, evaluate.TABLES)
    plan = recipe.build(evaluate.Plan, tables["evaluate"], "evaluate")
    for name, table in tables["separators"].items():
        assert set(table.get("tasks", plan.tasks)) <= set(plan.tasks), name
        kind = table.get("type", "checkpoints")
        known = inspect.signature(evaluate.MAKERS[kind]).parameters
        assert set(table) <= {*known, "type", "tasks", "count", "optional"}, name
        if kind == "checkpoints" and "optional" not in table:
            options = {key: table[key] for key in ("sampler", "preset", "steps") if key in table}
            build_sampler(gaussian.joint, **options, **separator.sampler_options(table.get("sampling", {})))
    evaluate._check_published(tables.get("published", {}), plan)


@pytest.mark.parametrize(
    ("path", "task"), [(path, task) for path, tables in MEASURED.items() for task in tables["evaluate"]["tasks"]]
)
def test_each_task_of_an_evaluation_can_be_run_alone(path, task):
    """With `--task`: separators of other tasks are left out, and some are left."""
    tables = MEASURED[path]
    plan = recipe.build(evaluate.Plan, {**tables["evaluate"], "tasks": [task]}, "evaluate")
    assert any(task in evaluate._tasks(name, table, plan) for name, table in tables["separators"].items())


def test_rivals_to_be_trained_are_looked_for_where_their_commands_put_them():
    folder = RECIPES / "unasdiff"
    texts = "\n".join(path.read_text(encoding="utf-8") for path in (folder / "rivals.md", *folder.glob("*.toml")))
    made = {re.sub(r"-\d?(speech|sound).*", "", name) for name in re.findall(r"-o (runs/[\w+-]+)", texts)}
    for path in folder.glob("table*.toml"):
        for table in recipe.load(path)["separators"].values():
            models = table.get("models", "")
            if "runs" in models:
                # "./": no name on the Hub, where a stranger's "runs/ct-2sound" would be another network.
                assert models.startswith("./runs/")
                assert re.sub(r"-\d?(speech|sound).*", "", models.removeprefix("./")) in made


def test_the_numbers_in_the_readme_are_those_of_the_files():
    made = prepare("open16k", "scores")
    mistaken = {
        "README.md": "| 1 speech + 2 sounds |",
        "recipes/open16k/README.md": "| classifier |",
        "recipes/unasdiff/README.md": "| DSG |",
        "recipes/unasdiff/rivals.md": "| spectral gating |",
    }
    assert set(made.TABLES) == {RECIPES.parent / path for path in mistaken}
    for path, cell in mistaken.items():
        text = (RECIPES.parent / path).read_text(encoding="utf-8")
        assert cell in text
        assert made.filled(RECIPES.parent / path, text) == text
        assert made.filled(RECIPES.parent / path, text.replace(cell, "| mistaken |")) == text
    with pytest.raises(SystemExit, match="no place for example"):
        made.filled(made.README, made.README.read_text(encoding="utf-8").replace("<!-- /example -->", ""))
    assert [made.number(x) for x in (-0.04, -0.06, 1.25, 2.0)] == ["0.0", "-0.1", "1.2", "2.0"]


def test_table_2_is_drawn_from_the_numbers_of_its_own_task(monkeypatch):
    made = prepare("open16k", "scores")
    monkeypatch.setitem(sys.modules, "scores", made)
    chart = prepare("open16k", "chart")
    tasks = {task: found for task in made.TASKS if (found := made.measured(task))}
    assert all(row["task"] == task for task, found in tasks.items() for row in found.values())
    names = chart.order(tasks)
    assert names.index("DPS") < names.index("default") < names.index("ideal ratio mask")
    published = chart.paper("1speech+1sound")
    assert published["hybrid, published"] == 14.31
    assert published.keys() - {"TF-Locoformer"} <= set(names)


def test_scores_of_other_classifiers_or_constants_are_refused():
    made = prepare("open16k", "scores")
    found = made.summaries(RECIPES / "open16k/results/2sound/summary.json")[0]
    assert made.current(found) is found
    others = (
        {"exchange": {"likeness": 5.0, "lead": 3.0}},
        {"low rank": found["low rank"] | {"updates": 1}},
        {"guidance": found["guidance"] | {"step": 0.2}},
        {"options": found["options"] | {"noise levels": [1.5, 0.002]}},
        {"refinement": found["refinement"] | {"shares": [0.1]}},
        {"refiner": None},
    )
    alone = {"tagger": found["classifiers"]["tagger"]}  # two sounds are told apart by both
    for other in (*others, *({"classifiers": listeners} for listeners in ({"tagger": "0"}, {}, alone))):
        with pytest.raises(SystemExit, match="default, 2sound: measured with other classifiers or constants"):
            made.current(found | other)
