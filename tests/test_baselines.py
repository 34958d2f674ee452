"""Classical methods: templates found again, masks that do what they say, oracles that nobody separates with."""

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiosep import hub
from audiosep.baselines import NMF, ORACLES, SpectralGating, fit_nmf, ideal_ratio_mask
from audiosep.cli import main
from audiosep.data import read_manifest
from audiosep.direct import load
from audiosep.errors import UsageError
from audiosep.metrics import si_sdr

RATE = 16000


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Speech of low notes, and two classes of sounds with spectra of their own."""
    pytest.importorskip("sklearn")
    root = tmp_path_factory.mktemp("corpus")
    rows = [["path", "split", "kind", "speaker_or_class", "duration_s", "group"]]
    rng = np.random.default_rng(0)
    n = np.arange(RATE) / RATE
    for kind, label, notes in (
        ("speech", "ann", (200, 300)),
        ("sound", "Bell", (3000, 4000)),
        ("sound", "Hum", (1000, 1100)),
    ):
        for i in range(5):
            wave = sum(np.sin(2 * np.pi * f * n) * np.abs(np.sin((3 + i) * n + rng.uniform(0, 6))) for f in notes)
            name = f"{label}{i}.wav"
            soundfile.write(root / name, 0.1 * wave + 1e-4 * rng.normal(size=RATE), RATE)
            rows.append([name, "train", kind, label, 1.0, name])
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root / "manifest.csv"


@pytest.fixture(scope="module")
def model(manifest):
    items = read_manifest(manifest)
    return fit_nmf(items, rank=4, kind_rank=6, n_fft=256, hop_length=128, seconds=5, kind_seconds=5)


def tone(*notes):
    n = torch.arange(RATE) / RATE
    return 0.1 * sum(torch.sin(6.283185 * f * n + f) for f in notes) * (1.2 + torch.sin(20 * n + notes[0]))


def test_nmf_tells_what_it_learned_apart(model):
    assert model.classes == ("Bell", "Hum")
    truth = torch.stack((tone(200, 300), tone(3000, 4000), tone(1000, 1100)))
    names = model.resolve(["SPEECH", "bell", "Hum"])
    assert names == ["speech", "Bell", "Hum"]
    found = model.separate(truth.sum(0)[None], names)[0]
    assert (si_sdr(found, truth) > 15).all()
    assert torch.allclose(found.sum(0), truth.sum(0), atol=1e-5)
    with pytest.raises(UsageError, match=r"unknown source 'bark'.*speech, sound, Bell, Hum"):
        model.resolve(["bark"])


def test_nmf_is_blind_to_level_and_to_what_it_was_asked_twice(model):
    mixture = tone(200, 3000)[None]
    quiet, loud = (model.separate(g * mixture, ["speech", "sound"]) for g in (1e-4, 10.0))
    assert torch.allclose(quiet * 1e5, loud, atol=1e-3)
    twice = model.separate(mixture, ["sound", "speech", "sound"])[0]
    assert torch.allclose(twice[0], twice[2])
    assert torch.allclose(2 * twice[0], model.separate(mixture, ["speech", "sound"])[0, 1], atol=1e-6)
    assert (model.separate(torch.zeros(1, 4000), ["speech", "sound"]) == 0).all()


def test_nmf_is_a_checkpoint_like_others(manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = "[nmf]\nrank = 2\nkind_rank = 3\nn_fft = 128\nhop_length = 64\nseconds = 2\nkind_seconds = 2\n"
    Path("nmf.toml").write_text(f'{recipe}[data]\nmanifest = "{manifest}"\n[card]\ntitle = "Tones"\n')

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        return caught.value.code

    assert run("train", "nmf.toml", "-o", "nmf", "--progress", "none") == 0
    config = hub.read_config(Path("nmf"))
    assert (config["kind"], config["classes"]) == ("nmf", ["Bell", "Hum"])
    separator = load("./nmf", "cpu")
    truth = torch.stack((tone(200, 300), tone(3000, 4000)))
    result = separator(truth.sum(0)[None], RATE, ["speech", "bell"])
    assert (si_sdr(torch.stack([result.sources[name][0] for name in ("speech", "bell")]), truth) > 10).all()
    assert result.report["network_evaluations"] == 0
    assert run("train", "nmf.toml", "--set", "data.segment=4", "-o", "x") == 2
    assert "data.segment: no such setting" in capsys.readouterr().err


def test_templates_are_what_they_were_learned_from():
    """One note gives one template: its own spectrum."""
    model = NMF(["Bell"], rank=1)
    assert model.templates("Bell").shape == (1, 257)
    pytest.importorskip("sklearn")
    from audiosep.baselines import _factorise

    truth = np.abs(np.random.default_rng(0).normal(size=(2, 40)))
    truth[0, :20] = truth[1, 20:] = 0
    frames = np.abs(np.random.default_rng(1).normal(size=(60, 2))) @ truth
    found = _factorise(frames, None, 2, 500)[1]
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    likeness = found @ (truth / np.linalg.norm(truth, axis=1, keepdims=True)).T
    assert likeness.max(0) == pytest.approx([1, 1], abs=1e-3)


def test_gating_parts_bursts_from_a_hum():
    pytest.importorskip("noisereduce")
    torch.manual_seed(0)
    bursts = tone(2000).repeat(4)
    bursts[torch.arange(4 * RATE) // (RATE // 4) % 8 != 0] = 0
    hum = 0.02 * torch.randn(4 * RATE)
    separator = load("spectral-gating", "cpu", guidance=None)  # as the command asks
    assert load("spectral-gating", "cpu", guidance=0.0).guidance == 0
    with pytest.raises(UsageError, match="it has no guidance"):
        load("spectral-gating", "cpu", guidance=0.3)
    with pytest.raises(UsageError, match="it has no restarts"):
        load("spectral-gating", "cpu", restarts=2)
    with pytest.raises(UsageError, match="it has no least_noise"):
        load("spectral-gating", "cpu", least_noise=0.01)
    stems = separator((bursts + hum)[None], RATE).sources
    assert list(stems) == ["speech", "sound"]
    before = si_sdr(bursts + hum, bursts)
    assert si_sdr(stems["speech"][0], bursts) > before + 3
    assert torch.allclose(stems["speech"] + stems["sound"], (bursts + hum)[None], atol=1e-6)
    with pytest.raises(UsageError, match="two stems"):
        SpectralGating().resolve(["sound", "sound"])


def test_the_oracles_are_exact_where_sources_do_not_overlap():
    truth = torch.stack((tone(200), tone(3000)))
    for oracle in ORACLES.values():
        assert (si_sdr(oracle(truth.sum(0), truth), truth) > 25).all()


def test_the_ratio_mask_is_the_ratio():
    torch.manual_seed(0)
    source = torch.randn(4000)
    references = torch.stack((source, 3 * source))
    found = ideal_ratio_mask(references.sum(0), references)
    assert torch.allclose(found, references, atol=1e-4)  # magnitudes 1 : 3 of 4 times the source
    squares = ideal_ratio_mask(references.sum(0), references, power=2)
    assert torch.allclose(squares, torch.stack((0.4 * source, 3.6 * source)), atol=1e-4)


def test_nobody_separates_with_an_oracle():
    for name in ORACLES:
        with pytest.raises(UsageError, match="needs the true sources"):
            load(name)
