"""Models that answer in one pass, through the door that the diffusion separator has."""

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiosep import evaluate, hub
from audiosep.cli import main
from audiosep.direct import Direct, load
from audiosep.errors import ModelError, UsageError
from audiosep.supervised.conv_tasnet import ConvTasNet
from audiosep.supervised.expert import Expert

RATE = 16000
TINY = {"kernel": 32, "filters": 32, "bottleneck": 8, "hidden": 8, "layers": 1, "stacks": 1}


class Bands:
    """Sources below and above a frequency, in an order that changes from call to call where they are alike."""

    sample_rate, evaluations, origin = RATE, 1, {}

    def __init__(self, kinds=("sound", "sound"), edge=2000):
        self.kinds, self.edge, self.calls = list(kinds), edge, 0

    def resolve(self, sources):
        return self.kinds

    def separate(self, mixture, kinds):
        bins = torch.fft.rfft(mixture)
        low = torch.fft.rfftfreq(mixture.shape[-1], 1 / RATE) < self.edge
        sources = torch.stack([torch.fft.irfft(bins * keep, mixture.shape[-1]) for keep in (low, ~low)], 1)
        self.calls += 1
        return sources.flip(1) if self.calls % 2 and self.kinds[0] == self.kinds[1] else sources


def tones(seconds, rate=RATE):
    n = np.arange(round(seconds * rate)) / rate
    low = 0.1 * np.sin(2 * np.pi * 440 * n) * (1.5 + np.sin(9 * n))
    high = 0.05 * np.sin(2 * np.pi * 3000 * n)
    return torch.tensor(np.stack((low, high)), dtype=torch.float32)


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2)])
def test_a_long_recording_keeps_its_stems_apart(rate, channels):
    sources = tones(7.3, rate)
    mixture = sources.sum(0).expand(channels, -1)
    separator = Direct(Bands(), segment=1.0)
    result = separator(mixture, rate)
    assert list(result.sources) == ["sound_1", "sound_2"]
    stems = torch.stack(list(result.sources.values()))
    assert torch.allclose(stems.sum(0), mixture, atol=1e-6)
    # The first call gives the high tone first, and what is on a stem stays there.
    for stem, source in zip(stems, sources.flip(0)):
        inner = slice(rate // 4, -rate // 4)
        assert torch.allclose(stem[:, inner], source[inner].expand(channels, -1), atol=0.01)
    assert result.report["network_evaluations"] == channels * result.report["segments"]
    rows = result.report["sources"].values()
    assert [(row["class"], "class_told" in row) for row in rows] == [("sound", False)] * 2


def test_silence_stays_silence():
    result = Direct(Bands())(torch.zeros(1, 8000), RATE)
    assert all((stem == 0).all() for stem in result.sources.values())


def test_an_expert_comes_back_from_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    expert = Expert(ConvTasNet(3, **TINY), "1speech+2sound", 8000)
    folder = hub.save_model(expert, tmp_path / "tiny", {"title": "Tiny", "licence": "CC0"}, torch.float32)
    config = hub.read_config(folder)
    assert (config["kind"], config["parameters"]) == (
        "conv_tasnet for 1speech+2sound",
        sum(p.numel() for p in expert.parameters()),
    )
    assert "# Tiny" in (folder / "README.md").read_text()
    separator = load(str(folder), "cpu")
    assert isinstance(separator, Direct)
    assert separator.sample_rate == 8000
    assert separator.source_names() == ["speech", "sound_1", "sound_2"]
    mixture = torch.randn(2, 8000)
    assert torch.equal(separator.model.separate(mixture, expert.kinds), expert.separate(mixture, expert.kinds))
    with pytest.raises(ModelError, match="separates by itself"):
        hub.load_prior(folder)
    with pytest.raises(ModelError, match="a prior of speech"):
        hub.load_model("speech")
    with pytest.raises(UsageError, match="can't be combined"):
        load([str(folder), "speech"])
    with pytest.raises(UsageError, match="classifier says what a recording or a stem holds: it can't separate"):
        load("classifier", "cpu")
    with pytest.raises(UsageError, match="has no steps"):
        load(str(folder), "cpu", steps=20)
    with pytest.raises(ModelError, match="not in the tables"):
        hub.save_model(torch.nn.Identity(), tmp_path / "x", {})


RECIPE = """
[expert]
task = "2sound"
[network]
name = "conv_tasnet"
kernel = 32
filters = 32
bottleneck = 8
hidden = 8
layers = 2
stacks = 1
start = "stft"
[data]
manifest = "manifest.csv"
segment = 0.5
[train]
max_steps = 6
batch_size = 2
learning_rate = 0.01
log_every = 2
probe_every = 6
[probe]
mixtures = 2
"""


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Two classes of tones; the current folder is theirs."""
    monkeypatch.chdir(tmp_path)
    rows = [["path", "split", "kind", "speaker_or_class", "duration_s", "group"]]
    n = np.arange(RATE // 2) / RATE
    for label, frequency in (("Beep", 3000), ("Hum", 200)):
        for i, split in enumerate(("train", "train", "valid", "test")):
            name = f"{label}{i}.wav"
            soundfile.write(name, 0.1 * np.sin(2 * np.pi * (frequency + 10 * i) * n), RATE)
            rows.append([name, split, "sound", label, 0.5, name])
    with open("manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    Path("rival.toml").write_text(RECIPE)


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code


def test_a_recipe_becomes_an_expert_that_separates(corpus, capsys):
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    assert run("train", "rival.toml", "-o", "rival", "-d", "cpu", "--progress", "none") == 0
    config = hub.read_config(Path("rival"))
    assert config["model"]["network"]["name"] == "conv_tasnet"
    assert [row["metric"].split(",")[0] for row in config["metrics"]] == ["SI-SDR", "SI-SDRi"]
    assert run("train", "rival.toml", "--set", "data.least=3", "-o", "x", "-d", "cpu") == 2
    assert "data.least: no such setting" in capsys.readouterr().err
    assert run("train", "rival.toml", "--set", "network.name=tasnet", "-o", "x", "-d", "cpu") == 2
    assert "network.name is one of conv_tasnet" in capsys.readouterr().err
    assert run("separate", "Beep3.wav", "-n", "./rival", "-d", "cpu", "--progress", "none") == 0
    assert sorted(p.name for p in Path("separated/rival/Beep3").glob("*.wav")) == ["sound_1.wav", "sound_2.wav"]
    recipe = {
        "evaluate": {"manifest": "manifest.csv", "tasks": ["2sound"], "count": 2, "seed": 1, "segment": 0.5},
        "separators": {"rival": {"models": "./rival", "device": "cpu"}},
    }
    (summary,) = evaluate.run(recipe)
    assert summary["labels"] is False
    assert summary["evaluations"] == 1
    assert summary["si_sdr_permuted"]["mean"] >= summary["si_sdr"]["mean"]
