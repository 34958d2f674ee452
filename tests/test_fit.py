"""From a recipe and a folder of recordings to a checkpoint that separates, through the real command."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audiosep import hub, recipe
from audiosep.cli import main
from audiosep.errors import UsageError
from audiosep.fit import build_prior, draw
from audiosep.refiner import write_stems
from audiosep.separator import Separator
from audiosep.train import read_log

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")

RATE = 16000
ROOT = Path(__file__).parents[1]
RECIPE = """
[prior]
kind = "sound"
parameterization = "edm"

[backbone]
name = "triple_path_unet"
width = 8
depth = [1, 1, 1, 1, 1]
heads = 2
condition_dim = 16
squeeze = 4
n_fft = 126
head = "mask"
adaln_zero = true

[schedule]
name = "ve"

[data]
manifest = "manifest.csv"
segment = 0.5
least = 3

[train]
max_steps = 4
batch_size = 2
log_every = 2
save_every = 2
probe_every = 4

[probe]
windows = 4
levels = 3
samples = 2
steps = 3
mixtures = 1

[card]
title = "Tones"
licence = "CC0-1.0"
"""


@pytest.fixture(autouse=True)
def corpus(tmp_path, monkeypatch):
    """Two classes of tones and a rare one; the current folder is theirs."""
    monkeypatch.chdir(tmp_path)
    rows = [["path", "split", "kind", "speaker_or_class", "duration_s", "group"]]
    n = np.arange(RATE // 2) / RATE
    for label, frequency, count in (("Beep", 1000, 5), ("Hum", 200, 5), ("Rare", 3000, 1)):
        for i in range(count):
            name = f"{label}{i}.wav"
            soundfile.write(name, 0.1 * np.sin(2 * np.pi * (frequency + 10 * i) * n), RATE)
            rows.append([name, "valid" if i == 4 else "train", "sound", label, 0.5, name])
    with open("manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    Path("tones.toml").write_text(RECIPE)


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code


def test_a_recipe_becomes_a_checkpoint(capsys):
    assert run("train", "tones.toml", "-o", "tones", "-d", "cpu", "--progress", "none") == 0
    assert capsys.readouterr().out == "tones\n"
    prior = hub.load_prior("tones")
    assert prior.classes == ("Beep", "Hum")
    assert prior.backbone.num_classes == 2
    rows = read_log("tones.run")
    probes = [row for row in rows if "probe/denoising" in row]
    assert [row["step"] for row in probes] == [0, 4]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    config = hub.read_config(Path("tones"))
    assert config["licence"] == "CC0-1.0"
    assert len(config["metrics"]) == 5
    assert config["metrics"][3]["value"] == pytest.approx(probes[-1]["probe/denoising"])
    card = Path("tones/README.md").read_text()
    for said in ("# Tones", "9 recordings", "2sound, 1 held-out mixtures", "| steps | 4 |"):
        assert said in card
    names, _, row = (line.strip("| ").split(" | ") for line in card.split("## Cost\n\n")[1].splitlines()[:3])
    cost = dict(zip(names, row, strict=True))
    took = float(cost["seconds of a network evaluation, 0.5 s of a source"])
    assert 0 < took < 60
    assert float(cost["real-time factor of these"]) == pytest.approx(took * 24 / 0.5, rel=0.02)
    assert cost["device"] == f"CPU, {torch.get_num_threads()} threads"
    assert cost["network evaluations per source, default preset"] == "24"
    page = Path("tones.run/samples/step-0000004.html").read_text()
    assert page.count("<audio") == 2
    assert "Beep" in page
    result = Separator.from_pretrained("tones", device="cpu", steps=2)(torch.randn(1, 8000) / 10, RATE, ["beep", "hum"])
    assert list(result.sources) == ["beep", "hum"]


def test_a_run_may_start_from_another_prior(tiny_prior, capsys):
    net = {"width": 8, "depth": [1] * 5, "heads": 2, "condition_dim": 16, "squeeze": 4, "n_fft": 126, "head": "mask"}
    other = tiny_prior(num_classes=3, classes=["Gong", "HUM", "Beep"])
    hub.save_prior(other, "other", {}, torch.float32)
    tables = {"prior": {"start": "other", "parameterization": "edm"}, "backbone": net}
    prior = build_prior(tables, ["Beep", "Hum", "New"])
    mine, theirs = prior.backbone.class_embeddings[0].weight, other.backbone.class_embeddings[0].weight
    assert torch.equal(mine, theirs[[2, 1, 3, 3]])
    assert torch.equal(prior.backbone.stem.weight, other.backbone.stem.weight)
    settings = [
        word for s in ("probe.mixtures=0", "probe.samples=0", "backbone.adaln_zero=false") for word in ("--set", s)
    ]
    settings += ["-d", "cpu", "-q"]
    made = ["-o", "made", *settings]
    assert run("train", "tones.toml", "--set", "prior.start=other", *made, "--set", "train.max_steps=2") == 0
    started = hub.read_config(Path("made"))["training"]["started from"]
    assert started == f"other ({hub.read_config(Path('other'))['sha256'][:12]})"
    assert run("train", "tones.toml", *made, "--resume", "--set", "train.decay=constant") == 0
    facts = hub.read_config(Path("made"))["training"]
    assert (facts["started from"], facts["steps"], facts["precision"]) == (started, 4, "no")
    rate = "AdamW, learning rate 0.001"
    assert facts["optimiser"] == f"{rate}, cosine; from step 2 on {rate}, constant"
    assert run("train", "tones.toml", "--set", "prior.start=other", *settings, "--set", "backbone.width=16") == 2
    assert "other was trained with backbone.width = 8, the recipe has 16: set what other has" in capsys.readouterr().err
    assert run("train", "tones.toml", "--set", "prior.start=none", *settings) == 3


SHORT = """
[data]
manifest = "manifest.csv"
segment = 0.5

[train]
max_steps = 4
batch_size = 2
log_every = 2
probe_every = 4

[probe]
mixtures = 2
"""

EXPERT = f"""
[expert]
task = "2sound"

[network]
name = "conv_tasnet"
kernel = 32
filters = 16
bottleneck = 16
hidden = 16
layers = 1
stacks = 1
{SHORT}
[card]
title = "Two sounds"
"""

TAGGER = f"""
[tagger]
of = "./tones"
width = 8
tasks = ["2sound"]
{SHORT}"""


REFINER = f"""
[refiner]
of = "./tones"
width = 8
mels = 16
tasks = ["2sound"]
{SHORT}"""


@pytest.fixture
def beeps_and_hums(tiny_prior):
    """A refiner's recipe, the prior that it names, and stems of the two classes."""
    hub.save_prior(tiny_prior(num_classes=2, classes=["Beep", "Hum"]), "tones", {}, torch.float32)
    Path("recipe.toml").write_text(REFINER.replace("mixtures = 2", 'folder = "stems"'))
    Path("stems").mkdir()
    generator = torch.Generator().manual_seed(0)
    stems, sources = (0.1 * torch.randn(2, 8000, generator=generator) for _ in "ab")
    write_stems(Path("stems/2sound.00000.safetensors"), [(stems, sources, ["Hum", "Beep"])], 16000)
    return ["train", "recipe.toml", "-d", "cpu", "-q", "--set", "refiner.folder=stems"]


def test_a_refiner_is_trained_and_probed(beeps_and_hums, capsys):
    assert run(*beeps_and_hums, "-o", "made") == 0
    refiner = hub.load_model("made")
    assert refiner.labels == ("speech", "sound", "Beep", "Hum")
    assert refiner.out.weight.any()  # it began with zeros
    probes = [row for row in read_log("made.run") if "probe/gain/2sound" in row]
    assert [row["step"] for row in probes] == [0, 4]
    assert abs(probes[0]["probe/gain/2sound"]) < 1e-3  # it began by leaving stems as they are
    card = Path("made/README.md").read_text()
    assert "SI-SDR of held-out stems, 2sound: dB gained" in card
    assert "## Use" not in card
    # What has been trained can be trained on.
    assert run(*beeps_and_hums, "-o", "on", "--set", "refiner.start=./made") == 0
    assert hub.read_config(Path("on"))["training"]["steps before"] == 4
    assert run(*beeps_and_hums, "-o", "other", "--set", "refiner.start=./made", "--set", "refiner.width=4") == 2
    assert "refiner.start: ./made is no refiner of the recipe's" in capsys.readouterr().err
    assert run("separate", "Beep0.wav", "-n", "./made") == 2
    assert "can't separate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("refiner.folder=none", "none: no stems of 2sound"),
        ("refiner.separated=2", "[refiner]: separated is a share"),
        ("refiner.separated=much", "refiner.separated is a number, got 'much'"),
        ("refiner.width=3", "[refiner]: width and mels are even numbers"),
        ("refiner.tasks=[]", "refiner.tasks is a list of what the mixtures hold"),
        ("refiner.flavour=1", "refiner.flavour: no such setting"),
        ("probe.share=2", "[probe]: share lies in 0..1, got 2"),
        ("probe.folder=none", "probe.folder: no stems in none"),
    ],
)
def test_a_refiners_settings_are_checked(beeps_and_hums, capsys, setting, said):
    assert run(*beeps_and_hums, "-o", "made", "--set", setting) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", [RECIPE, EXPERT, TAGGER, REFINER], ids=["prior", "expert", "tagger", "refiner"])
def test_recordings_that_cannot_be_decoded_end_no_run(text, tiny_prior, capsys):
    hub.save_prior(tiny_prior(num_classes=2, classes=["Beep", "Hum"]), "tones", {}, torch.float32)
    Path("recipe.toml").write_text(text)
    for i in (0, 1, 2, 4):  # to train with; the only one of its class to probe with
        Path(f"Beep{i}.wav").write_bytes(b"RIFF")
    settings = ["--set", "probe.samples=0"] if text is RECIPE else []
    if text is REFINER:  # which is probed with stems
        Path("recipe.toml").write_text(text.replace("mixtures = 2", ""))
    with pytest.warns(UserWarning, match="can't be decoded") as caught:
        assert run("train", "recipe.toml", "-o", "made", "-d", "cpu", "--progress", "none", *settings) == 0
    named = {re.match(r"left out of training: (Beep\d\.wav)", str(w.message))[1] for w in caught}
    told = capsys.readouterr().err
    assert text is REFINER or re.search(
        r"no (held-out|separation) scores?: Beep4\.wav: silent or can't be decoded", told
    )
    assert not {"probe/si_sdr", "probe/threshold"} & {key for row in read_log("made.run") for key in row}
    facts = hub.read_config(Path("made"))["training"]
    assert facts["recordings left out, as they can't be decoded"] == len(named - {"Beep4.wav"}) > 0


@pytest.mark.parametrize(
    ("tables", "differs"),
    [
        ({"schedule": {"sigma_max": 2.6}}, r"schedule\.sigma_max = 1\.5, the recipe has 2\.6: set"),
        (
            {"schedule": {"name": "vp_linear"}},
            r"schedule\.name = 've', the recipe has 'vp_linear'; schedule\.beta_start",
        ),
        ({"backbone": {"adaln_zero": True}}, r"backbone\.adaln_zero = False, the recipe has True"),
        ({"prior": {"level": -30}}, r"prior\.level = -22\.5, the recipe has -30"),
        ({"prior": {"sample_rate": 8000}}, r"prior\.sample_rate = 16000, the recipe has 8000"),
        ({"prior": {"parameterization": "direct"}}, r"prior\.parameterization = 'edm', the recipe has 'direct'"),
    ],
)
def test_a_run_starts_from_no_prior_of_other_settings(tables, differs, tiny_prior):
    hub.save_prior(tiny_prior(), "other", {}, torch.float32)
    net = {key: value for key, value in tiny_prior().backbone.config.items() if key != "name"}
    plain = {"prior": {"start": "other", "parameterization": "edm"}, "backbone": net}
    tables = plain | {name: plain.get(name, {}) | table for name, table in tables.items()}
    with pytest.raises(UsageError, match=f"prior.start: other was trained with .*{differs}"):
        build_prior(tables, [])


@pytest.mark.parametrize("name", ["sound", "speech"])
def test_your_own_sounds_may_start_from_a_shipped_prior(name):
    tables = recipe.load(ROOT / "recipes/own/sound.toml", [f"prior.start={name}"])
    prior = build_prior(tables, ["Bark", "Gargle"])
    assert torch.equal(prior.backbone.stem.weight, hub.load_prior(name).backbone.stem.weight)


def test_held_out_recordings_that_cannot_be_decoded_end_no_run(capsys):
    for name in ("Beep4.wav", "Hum4.wav"):
        Path(name).write_bytes(b"RIFF")
    for more in ([], ["--set", "data.cache=cache"]):
        with pytest.warns(UserWarning, match="can't be decoded"):
            assert run("train", "tones.toml", "-o", f"made{len(more)}", "-d", "cpu", "--progress", "none", *more) == 0
        assert re.search(r"no held-out losses: .*\n.*no separation score: ", capsys.readouterr().err)


@pytest.mark.slow
def test_two_processes_train_one_prior():
    settings = [
        word
        for s in ("probe.mixtures=0", "probe.samples=0", "train.save_every=9", "data.cache=cache")
        for word in ("--set", s)
    ]
    words = ["-m", "audiosep", "train", "tones.toml", *settings, "-d", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = subprocess.run([*launch, *words, "-o", "two"], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert two.stdout == "two\n"
    subprocess.run([sys.executable, *words, "-o", "one"], env=environment, stdout=subprocess.DEVNULL, check=True)
    for ours, theirs in zip(read_log("two.run"), read_log("one.run"), strict=True):
        for key in ours.keys() & {"loss", "gradient", "probe/denoising"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


def test_a_prior_of_any_sound_without_classes():
    settings = ["--set", "data.least=99", "--set", "train.max_steps=1", "--set", "probe.samples=0"]
    assert run("train", "tones.toml", *settings, "-d", "cpu", "-q") == 0
    assert hub.load_prior("runs/tones").classes == ()
    assert np.isfinite(read_log("runs/tones.run")[-1]["probe/si_sdr"])


def test_a_run_goes_on(capsys):
    settings = ["--set", "probe.mixtures=0", "--set", "probe.samples=0", "-d", "cpu", "-q"]
    assert run("train", "tones.toml", *settings, "--stop-after", "0") == 0
    assert run("train", "tones.toml", *settings) == 2
    assert "--resume" in capsys.readouterr().err
    for setting, told in {
        "data.segment=0.25": "data.segment 0.5, here 0.25",
        "data.level=[-30, -20]": "data.level [-25.0, -20.0], here [-30, -20]",
        "data.speed=0.1": "data.speed 0.0, here 0.1",
        "prior.label_dropout=0": "prior.label_dropout 0.1, here 0",
        "prior.focus=0.6": "prior.focus 0.0, here 0.6",
    }.items():
        assert run("train", "tones.toml", *settings, "--resume", "--set", setting) == 2
        assert f"a run with {told}; it can't go on" in capsys.readouterr().err
    Path("manifest.csv").rename("moved.csv")
    settings += ["--set", "data.manifest=moved.csv", "--set", "data.speed=0", "--set", "data.cache=cache"]
    assert run("train", "tones.toml", *settings, "--resume", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoint"] == "runs/tones"
    assert (result["step"], result["finished"]) == (4, True)
    assert run("train", "tones.toml", *settings, "--resume", "--set", "backbone.width=16") == 2
    assert "a run with prior" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.batchsize=4", "train.batchsize: no such setting (did you mean batch_size?)"),
        ("backbone.widht=4", "backbone.widht: no such setting (did you mean width?)"),
        ("backbone.name=unet", "backbone.name is one of triple_path_unet"),
        ("backbone.num_classes=1", "backbone.num_classes is 1, the recordings have 2 classes"),
        ("schedule.name=vp", "schedule.name is one of"),
        ("data.sgment=4", "data.sgment: no such setting (did you mean segment?)"),
        ("data.manifest=none.csv", "none.csv: no such manifest"),
        ("prior.parameterization=x", "[prior]: parameterization is 'eps', 'edm' or 'direct'"),
        ("probe.window=3", "probe.window: no such setting (did you mean windows?)"),
        ("card.license=MIT", "card.license: no such setting (did you mean licence?)"),
        ("tarin.batch_size=4", "tarin: no such table"),
        ("train.max_steps=0", "[train]: max_steps is at least 1, got 0"),
        ("train.max_steps=-3", "[train]: max_steps is at least 1, got -3"),
        ("train.max_minutes=0", "[train]: max_minutes is above 0, got 0"),
        ("train.learning_rate=-1", "[train]: learning_rate is at least 0, got -1"),
        ("train.learning_rate=inf", "[train]: learning_rate is at least 0, got inf"),
        ("train.betas=[0.9]", "train.betas is a list of two numbers, got [0.9]"),
        ("train.betas=[0.9, 1]", "[train]: betas are two numbers in 0..1, below 1, got [0.9, 1]"),
        ("train.workers=-1", "[train]: workers is at least 0, got -1"),
        ("train.clip=0", "[train]: clip is above 0, got 0"),
        ("train.floor=2", "[train]: floor lies in 0..1, got 2"),
        ("train.seed=-1", "[train]: seed is at least 0, got -1"),
        ("data.segment=0", "[data]: segment is seconds above 0, got 0"),
        ("data.segment=-1", "[data]: segment is seconds above 0, got -1"),
        ("data.level=[-25]", "data.level is a list of two numbers, got [-25]"),
        ("data.level=[-20, -25]", "[data]: level is two numbers in dBFS, the lower first, got -20 and -25"),
        ("data.join=5", "[data]: join is a share in 0..1 and balance at least 0, got 5 and 0.5"),
        ("data.manifest=5", "data.manifest is text, got 5"),
        ("data.root=[]", "data.root is text, got []"),
        ("prior.start=5", "prior.start is text or left out, got 5"),
        ("data.least=many", "data.least is a whole number, got 'many'"),
        ("probe.batch=0", "[probe]: batch is at least 1, got 0"),
        ("probe.mixtures=-1", "[probe]: mixtures is at least 0, got -1"),
        ("backbone.heads=3", "[backbone]: 8 channels can't be shared by 3 heads"),
        ("backbone.width=7", "[backbone]: width is even, not 7"),
        ("backbone.depth=[1, 1]", "[backbone]: depth is five numbers and patch two"),
        ("backbone.width=0", "[backbone]: width is at least 1, got 0"),
        ("backbone.name=[]", "backbone.name is text, got []"),
        ("data.kind=5", "data.kind is text, got 5"),
        ("schedule.steps=0", "[schedule]: steps is at least 1 and 0 < sigma_min < sigma_max, not 0"),
        ("schedule.sigma_max=0", "[schedule]: steps is at least 1 and 0 < sigma_min < sigma_max, not 200, 0.001, 0"),
        ("prior.label_dropout=2", "[prior]: label_dropout lies in 0..1, not 2"),
        ("card.attribution=5", "card.attribution is text or a list of texts or left out, got 5"),
    ],
)
def test_what_nothing_takes_is_named(setting, said, capsys):
    assert run("train", "tones.toml", "--set", setting, "-d", "cpu") == 2
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_folder_that_is_no_checkpoint_is_left_alone(capsys):
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    assert run("train", "tones.toml", "-o", "mine", "-d", "cpu") == 2
    assert "not a checkpoint" in capsys.readouterr().err
    assert [p.name for p in Path("mine").iterdir()] == ["thesis.txt"]
    assert run("train", "tones.toml", "-o", "mine/thesis.txt", "-d", "cpu") == 2
    assert "not a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("out", [".", "..", "/", "mine/.."])
def test_a_run_needs_a_name(out, capsys):
    assert run("train", "tones.toml", "-o", out, "-d", "cpu") == 2
    assert f"{out} has no name that a run's folder could have; choose another -o" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "gpu"])
def test_a_device_that_is_not_there_is_not_trained_on(device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert run("train", "tones.toml", "-d", device) == 2
    assert re.search(f"device '{device}'( is not there|; use auto)", capsys.readouterr().err)
    assert not Path("runs").exists()


def test_a_checkpoint_of_something_else_is_left_alone(tiny_prior, capsys):
    hub.save_prior(tiny_prior(), "mine", {}, torch.float32)
    settings = ["--set", "probe.mixtures=0", "--set", "probe.samples=0", "--set", "train.max_steps=1"]
    command = ["train", "tones.toml", "-o", "mine", "-d", "cpu", "-q", *settings]
    before = Path("mine/config.json").read_bytes()
    for more in ([], ["--resume"]):
        assert run(*command, *more) == 2
        told = "mine is a checkpoint that no run beside it has made; choose another -o, or say --overwrite"
        assert told in capsys.readouterr().err
    assert Path("mine/config.json").read_bytes() == before
    assert run(*command, "--overwrite") == 0
    assert hub.read_config(Path("mine"))["classes"] == ["Beep", "Hum"]
    assert run(*command, "--resume") == 0  # its own
    assert run(*command, "--overwrite") == 2
    assert "mine.run holds a run: resume it" in capsys.readouterr().err


def test_no_recipe_says_to_train_into_the_shipped_checkpoints():
    for path in [*ROOT.glob("recipes/**/*.toml"), *ROOT.glob("recipes/**/*.md")]:
        assert "-o checkpoints" not in path.read_text(encoding="utf-8"), path


def test_drawing_from_the_exact_prior_of_white_noise_gives_its_level():
    class Zero(torch.nn.Module):
        num_classes, config = 0, {}

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t, label=None):
            return 0 * x

    prior = build_prior({}, [])
    prior.backbone, prior.parameterization, prior.level = Zero(), "edm", -20.0
    waves = draw(prior, [0, 0], 20000, steps=100)
    assert waves.square().mean(-1).sqrt() == pytest.approx([0.1, 0.1], rel=0.05)
