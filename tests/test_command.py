"""The real command on real bytes: command line, batch, separator, checkpoints on the disk, files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from audiosep import hub

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, tiny_prior):
    """Two tiny checkpoints, called "voice" and "noise", and two seconds of noise at 22.05 kHz."""
    for name, seed in (("voice", 1), ("noise", 2)):
        hub.save_prior(tiny_prior(kind=name, seed=seed), tmp_path / name, {"licence": "MIT"})
    wave = 0.01 * np.random.default_rng(0).standard_normal((2 * 22050, 2))
    sf.write(tmp_path / "רעש 雑音.flac", wave, 22050, subtype="PCM_24")
    return tmp_path


def start(folder, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "audiosep", "separate", "-n", "./voice,./noise", "-d", "cpu", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **streams)


def separate(folder, *arguments):
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def left(folder):
    """Whatever was written, hidden files included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_batch_separates_what_it_can_and_names_what_it_cannot(folder):
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("no audio")
    sf.write(folder / "silent.wav", np.zeros(8000), 16000)
    names = ["empty.wav", "רעש 雑音.flac", "text.wav", "silent.wav", "gone.wav"]
    code, out, err = separate(folder, *names, "--steps", "2", "--json", "--samples", "2")
    assert code == 1
    results = {Path(row["input"]).name: row for row in map(json.loads, out.splitlines())}
    assert {name: row["status"] for name, row in results.items()} == {
        "empty.wav": "failed",
        "text.wav": "failed",
        "gone.wav": "failed",
        "silent.wav": "done",
        "רעש 雑音.flac": "done",
    }
    assert "Traceback" not in err
    assert any("silent" in note for note in results["silent.wav"]["notes"])
    stems = [sf.read(folder / "separated/voice+noise/רעש 雑音" / f"{name}.wav")[0] for name in ("voice", "noise")]
    original, _ = sf.read(folder / "רעש 雑音.flac")
    assert np.abs(sum(stems) - original).max() <= 1.01 / 2**23
    assert sf.info(folder / "separated/voice+noise/רעש 雑音/voice.wav").subtype == "PCM_24"
    assert (folder / "separated/voice+noise/רעש 雑音/voice_best.wav").exists()
    report = json.loads((folder / "separated/voice+noise/רעש 雑音/report.json").read_text(encoding="utf-8"))
    assert report["sampler"]["steps"] == 2
    assert set(report["models"]["voice"]) >= {"name", "sha256"}


def test_interrupted_it_leaves_nothing_behind(folder):
    process = start(folder, "רעש 雑音.flac", "--steps", "2000", "--progress", "json")
    assert process.stderr.readline()  # the work has begun
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not [name for name in left(folder) if name.startswith("separated")]


def test_a_broken_checkpoint_is_no_model(folder):
    weights = folder / "voice" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = separate(folder, "רעש 雑音.flac")
    assert code == 3
    assert err.count("\n") == 1
    assert "model.safetensors" in err


def test_a_full_disk_is_one_line_and_no_file(folder):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("w") as full:
        process = start(folder, "רעש 雑音.flac", "--steps", "1", "-o", "-", stdout=full)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert not [name for name in left(folder) if name.startswith("separated")]


def test_a_directory_may_lie_in_the_output_folder(folder):
    (folder / "album").mkdir()
    (folder / "רעש 雑音.flac").rename(folder / "album" / "song.flac")
    sf.write(folder / "album" / "song.wav", np.full(4000, 0.01), 16000)
    code, out, err = separate(folder, "album", "-o", "album", "--steps", "1")
    assert code == 0, err
    assert len(out.splitlines()) == 4
    code, out, err = separate(folder, "album", "-o", "album", "--steps", "1", "--skip-existing")
    assert code == 0, err
    assert left(folder / "album") == sorted(
        ["song.flac", "song.wav"]
        + [
            f"voice+noise/song.{kind}/{name}"
            for kind in ("flac", "wav")
            for name in ("voice.wav", "noise.wav", "report.json")
        ]
    )


def test_one_source_alone_is_a_usage_error(folder):
    code, _, err = separate(folder, "רעש 雑音.flac", "-s", "voice")
    assert code == 2
    assert "whole recording" in err
