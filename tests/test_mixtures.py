"""Mixtures as files, and scores of files."""

import csv
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from audiosep import hub
from audiosep.cli import main
from audiosep.data import MixtureDataset, read_manifest
from audiosep.errors import UsageError
from audiosep.metrics import si_sdr
from audiosep.mixtures import SavedMixtures, known_classes, stem_names, write
from audiosep.stems import run as score_stems
from audiosep.stems import score_folders

RATE = 16000


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    rows = [["path", "split", "kind", "speaker_or_class", "duration_s", "group"]]
    labels = [("speech", "ann"), ("speech", "bob"), ("sound", "Bark"), ("sound", "Door"), ("sound", "Rain/Wind")]
    for i, (kind, label) in enumerate(labels):
        name = f"{label.replace('/', '-')}.wav"
        soundfile.write(root / name, np.random.default_rng(i).normal(0, 0.1, RATE // (1 + i % 2)), RATE)
        rows.append([name, "test", kind, label, 1.0, label])
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root / "manifest.csv"


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code


@pytest.mark.parametrize("task", ["1speech+1sound", "1speech+2sound", "2sound", "3sound", "2speech", "2speech+3sound"])
def test_files_hold_what_the_dataset_makes(task, manifest, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("mix", manifest, "--task", task, "--count", 3, "--seed", 5, "--length", 1.5, "-o", out) == 0
    assert capsys.readouterr().out == f"{out}/mixtures.jsonl\n"
    made = MixtureDataset(read_manifest(manifest), task, 3, 5, 1.5)
    saved = SavedMixtures(out)
    assert len(saved) == 3
    for k in range(3):
        one, other = made[k], saved[k]
        assert torch.equal(one["mixture"], other["mixture"])
        assert torch.equal(one["sources"], other["sources"])
        for key in ("names", "labels", "ids", "starts", "lengths", "gains"):
            assert one[key] == other[key]
        for source, start, length, gain in zip(one["sources"], one["starts"], one["lengths"], one["gains"]):
            outside = torch.cat((source[:start], source[start + length :]))
            assert (outside == 0).all()
            assert 0.01 < gain < 10
            assert -25.01 < 10 * source.square().mean().log10() < -19.99


def test_each_source_overlaps_the_one_before(manifest):
    for item in MixtureDataset(read_manifest(manifest), "3sound", 20, 0, 2.0):
        ends = [a + b for a, b in zip(item["starts"], item["lengths"])]
        assert all(start < end for start, end in zip(item["starts"][1:], ends))


def test_what_was_drawn_is_on_record_and_a_killed_call_goes_on(manifest, tmp_path):
    options = {"task": "1speech+1sound", "seed": 1, "segment": 1.0}
    whole = write(manifest, tmp_path / "whole", count=4, **options)
    path = write(manifest, tmp_path / "killed", count=4, **options)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])
    shutil.rmtree(path.parent / "references/0003")
    soundfile.write(path.parent / "mixtures/0000.wav", np.zeros(10), RATE)  # is not made again
    write(manifest, tmp_path / "killed", count=4, **options)
    assert path.read_text() == whole.read_text()
    assert (path.parent / "references/0003/speech.wav").exists()
    assert soundfile.info(path.parent / "mixtures/0000.wav").frames == 10
    header, first = (json.loads(line) for line in lines[:2])
    assert header | {"clips": ""} == {
        "task": "1speech+1sound",
        "count": 4,
        "seed": 1,
        "segment": 1.0,
        "sample_rate": RATE,
        "level_dbfs": [-25.0, -20.0],
        "split": "test",
        "clips": "",
    }
    assert first["stems"][0] == "speech"
    with pytest.raises(UsageError, match="seed 1, here 2"):
        write(manifest, tmp_path / "whole", count=4, **options | {"seed": 2})
    with pytest.raises(UsageError, match="of other clips"):
        write(manifest, tmp_path / "whole", count=4, **options, classes=["Bark"])
    path.write_text("".join(lines[:3]))
    with pytest.raises(UsageError, match="2 of 4 mixtures"):
        SavedMixtures(path.parent)
    with pytest.raises(UsageError, match="not there"):
        SavedMixtures(tmp_path)


def test_names_are_those_of_a_separators_stems():
    assert stem_names(["speech", "Bark", "speech"]) == ["speech_1", "bark", "speech_2"]
    assert stem_names(["Rain/Wind"]) == ["rain-wind"]
    assert known_classes(["speech", "sound"]) == hub.read_config(hub.find("sound"))["classes"]
    assert known_classes(["speech"]) is None


@pytest.fixture
def stems(tmp_path):
    """Orthogonal references of one item, and stems at 20 dB and 14 dB."""
    n = np.arange(RATE) / RATE
    truth = {"speech": np.sin(2 * np.pi * 300 * n), "bark": np.sin(2 * np.pi * 1000 * n)}
    error = np.sin(2 * np.pi * 2000 * n)
    for name, wave in truth.items():
        (tmp_path / "true/0000").mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / f"true/0000/{name}.wav", 0.1 * wave, RATE, "FLOAT")
    (tmp_path / "made/0000").mkdir(parents=True)
    for name, wave, amount in (("Speech", truth["speech"], 0.1), ("bark", truth["bark"], 0.2)):
        soundfile.write(tmp_path / f"made/0000/{name}.wav", 0.05 * (wave + amount * error), RATE, "FLOAT")
    soundfile.write(tmp_path / "made/0000/residual.wav", np.zeros(5), RATE)
    return tmp_path


def test_stems_are_scored_by_name(stems):
    (row,) = score_folders(stems / "made", stems / "true")
    assert row["names"] == ["bark", "speech"]
    assert row["labels"] is True
    assert row["si_sdr"] == pytest.approx([20 * np.log10(5), 20], abs=0.01)
    assert row["mixture_si_sdr"] == pytest.approx([0, 0], abs=0.01)
    (alone,) = score_folders(stems / "made/0000", stems / "true/0000")
    assert alone["si_sdr"] == row["si_sdr"]


def test_one_stem_of_another_name_is_the_one_that_is_left(stems):
    (stems / "made/0000/bark.wav").rename(stems / "made/0000/sound.wav")
    (row,) = score_folders(stems / "made", stems / "true")
    assert row["labels"] is True
    assert row["si_sdr"] == pytest.approx([20 * np.log10(5), 20], abs=0.01)


def test_stems_of_other_names_are_scored_in_the_best_order(stems):
    for name, new in (("Speech", "a"), ("bark", "b")):
        (stems / f"made/0000/{name}.wav").rename(stems / f"made/0000/{new}.wav")
    (row,) = score_folders(stems / "made", stems / "true")
    assert row["labels"] is False
    assert row["permutation"] == [1, 0]
    assert row["si_sdr_permuted"] == pytest.approx([20 * np.log10(5), 20], abs=0.01)


def test_the_command_writes_rows_tables_and_a_page(stems, capsys):
    folders = ["--estimates", stems / "made", "--references", stems / "true"]
    out = stems / "scores"
    assert run("evaluate", *folders, "--set", 'evaluate.metrics=["sdr"]', "-o", out) == 0
    assert "1speech+1sound" in capsys.readouterr().out
    names = ["report.html", "rows.jsonl", "summary.csv", "summary.json", "summary.md"]
    assert sorted(p.name for p in out.iterdir()) == names
    (summary,) = json.loads((out / "summary.json").read_text())["summaries"]
    assert (summary["separator"], summary["seconds"]) == ("made", None)
    assert summary["si_sdr"]["mean"] == pytest.approx((20 + 20 * np.log10(5)) / 2, abs=0.01)
    # Half the level, so an error of 1/4 of the power, and the noise on top.
    expected = np.mean([-10 * np.log10(0.25 * (1 + 0.1**2)), -10 * np.log10(0.25 * (1 + 0.2**2))])
    assert summary["sdr"]["mean"] == pytest.approx(expected, abs=0.01)
    assert run("evaluate", "--estimates", stems / "made") == 2
    assert "go together" in capsys.readouterr().err
    for more, match in (
        (["recipe.toml"], "a recipe and --estimates exclude each other"),
        (["--count", 3], "--count and --estimates exclude each other"),
        (["-n", "speech"], "-n and --estimates exclude each other"),
        (["--set", "evaluate.cuont=3"], "--set takes evaluate.metrics alone"),
        (["--set", 'evaluate.metrics=["stoi"]'], "metrics beside SI-SDR are sdr, pesq, estoi; got stoi"),
        (["--set", "evaluate.metrics=sdr"], "metrics is a list such as"),
    ):
        assert run("evaluate", *more, *folders) == 2
        assert match in " ".join(capsys.readouterr().err.split())


def test_rows_of_an_evaluation_are_not_written_over(stems):
    file = stems / "rows.jsonl"
    file.write_text('{"run": "1234", "index": 0}\n')
    with pytest.raises(UsageError, match=r"rows.jsonl: holds the rows of an evaluation; choose another folder"):
        score_stems(stems / "made", stems / "true", stems)
    assert file.read_text() == '{"run": "1234", "index": 0}\n'
    out = stems / "scores"
    score_stems(stems / "made", stems / "true", out)
    score_stems(stems / "made", stems / "true", out)  # its own are


def test_names_in_some_items_only_fix_no_order(stems, caplog):
    for folder in ("true", "made"):
        shutil.copytree(stems / folder / "0000", stems / folder / "0001")
    for name in ("Speech", "bark"):
        (stems / f"made/0001/{name}.wav").rename(stems / f"made/0001/x{name}.wav")
    (summary,) = score_stems(stems / "made", stems / "true", metrics=["sdr"])
    assert "stems of 1 of 2 items have other names" in caplog.text
    assert summary["count"] == 2
    assert "si_sdr" not in summary
    assert summary["sdr"]["mean"] > 5


def test_a_score_of_speech_without_speech_is_named(stems, caplog):
    for folder, names in (("true", ("speech", "bark")), ("made", ("Speech", "bark"))):
        for k, name in enumerate(names):
            (stems / folder / f"0000/{name}.wav").rename(stems / folder / f"0000/s{k}.wav")
    score_folders(stems / "made", stems / "true", ["estoi"])
    assert "ESTOI left out: it is of speech, and no source is called speech" in caplog.text


def test_two_of_one_kind_are_one_task(manifest, tmp_path):
    write(manifest, tmp_path, task="2speech", count=2, seed=0, segment=1.0)
    (summary,) = score_stems(tmp_path / "references", tmp_path / "references")
    assert (summary["task"], summary["count"]) == ("2speech", 2)
    assert summary["si_sdr_by_kind"] == {"speech": 100.0}


def test_what_is_amiss_is_named(stems):
    def refused(match):
        with pytest.raises(UsageError, match=match):
            score_folders(stems / "made", stems / "true")

    speech = stems / "made/0000/Speech.wav"
    wave, _ = soundfile.read(speech)
    for change, match in (
        (lambda: soundfile.write(speech, wave[:-1], RATE), r"Speech.wav: has 1 channels of 15999 samples"),
        (lambda: soundfile.write(speech, wave, 8000), r"Speech.wav: is at 8000 Hz, the references are at 16000"),
        (lambda: speech.unlink(), r"0000: has stems bark, the references are bark, speech"),
        (lambda: (stems / "made/0000/bark.wav").unlink(), "0000: no stems"),
        (lambda: shutil.rmtree(stems / "made/0000"), "0000: no such folder"),
    ):
        change()
        refused(match)
    with pytest.raises(UsageError, match="no such folder"):
        score_folders(stems / "none", stems / "true")


def test_a_silent_reference_is_an_error(stems):
    soundfile.write(stems / "true/0000/speech.wav", np.zeros(RATE), RATE)
    with pytest.raises(UsageError, match=r"0000: a reference is silent"):
        score_folders(stems / "made", stems / "true")


def test_the_scores_are_the_metric_of_the_files(manifest, tmp_path):
    write(manifest, tmp_path, task="2speech", count=2, seed=0, segment=1.0)
    shutil.copytree(tmp_path / "references", tmp_path / "made")
    noisy, truth = tmp_path / "made/0001/speech_2.wav", tmp_path / "references/0001/speech_2.wav"
    wave, _ = soundfile.read(truth, dtype="float32")
    soundfile.write(noisy, wave + np.random.default_rng(0).normal(0, 0.01, wave.size), RATE, "FLOAT")
    rows = score_folders(tmp_path / "made", tmp_path / "references")
    assert rows[0]["si_sdr"] == [100, 100]
    expected = si_sdr(torch.from_numpy(soundfile.read(noisy)[0]), torch.from_numpy(wave))
    assert rows[1]["si_sdr"][1] == pytest.approx(expected.item(), abs=1e-3)
