"""Checkpoints: what is saved is what is loaded, and nothing else is."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from audiosep import hub
from audiosep.backbones.triple_path_unet import TriplePathUNet
from audiosep.cli import main
from audiosep.errors import ModelError
from audiosep.prior import Prior
from audiosep.schedules import vp_linear

TINY = {
    "width": 8,
    "depth": (1, 1, 1, 1, 1),
    "heads": 2,
    "condition_dim": 8,
    "squeeze": 2,
    "n_fft": 62,
}
CARD = {
    "title": "Tiny prior",
    "licence": "CC BY 4.0",
    "data": ["made up", "from nothing"],
    "attribution": "Thanks to **nobody**.",
    "metrics": [{"task": "1speech+1sound", "SI-SDR": 1.234}, {"task": "2sound", "SI-SDR": -0.5}],
}


def tiny_prior(classes=("Bark", "Door")):
    torch.manual_seed(0)
    backbone = TriplePathUNet(num_classes=len(classes), **TINY)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    schedule = vp_linear(50, 1e-4, 3e-2)
    return Prior(backbone, schedule, sample_rate=8000, classes=classes, level=-20.0, parameterization="edm")


@pytest.fixture
def folder(tmp_path):
    return hub.save_prior(tiny_prior(), tmp_path / "tiny", CARD)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, state):
    """Other weights with the hash that belongs to them."""
    save_file(state, folder / "model.safetensors")
    edit(folder, sha256=hub._sha256(folder / "model.safetensors"))


# Saving and loading


def test_what_is_saved_is_loaded(folder):
    prior, loaded = tiny_prior(), hub.load_prior(folder)
    assert isinstance(loaded, Prior)
    for name in ("sample_rate", "classes", "level", "kind", "parameterization"):
        assert getattr(loaded, name) == getattr(prior, name)
    assert loaded.backbone.config == prior.backbone.config
    assert loaded.schedule.config == prior.schedule.config
    assert not loaded.training
    assert loaded.origin["sha256"] == json.loads((folder / "config.json").read_text())["sha256"]
    for name, value in prior.backbone.state_dict().items():
        stored = loaded.backbone.state_dict()[name]
        assert stored.dtype == torch.float32
        assert torch.equal(stored, value.half().float())
    x, t = torch.randn(2, 600), torch.tensor([3.0, 40.0])
    label = torch.tensor([0, 2])
    with torch.no_grad():
        expected, actual = prior.denoise(x, t, label), loaded.denoise(x, t, label)
    assert (expected - actual).abs().max() < 1e-2 * expected.abs().max()


def test_dtype_and_exact_storage(tmp_path):
    folder = hub.save_prior(tiny_prior(), tmp_path / "exact", CARD, dtype=torch.float32)
    loaded = hub.load_prior(folder)
    for name, value in tiny_prior().backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[name], value)
    half = hub.load_prior(folder, dtype=torch.bfloat16)
    assert next(half.backbone.parameters()).dtype == torch.bfloat16


def test_the_folder_holds_three_files_and_the_weights_are_half(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert {v.dtype for v in load_file(folder / "model.safetensors").values()} == {torch.float16}
    config = json.loads((folder / "config.json").read_text())
    assert config["backbone"]["name"] == "triple_path_unet"
    assert config["schedule"]["name"] == "vp_linear"
    assert config["licence"] == "CC BY 4.0"
    assert config["metrics"] == CARD["metrics"]


def test_the_card_has_front_matter_metrics_and_attribution(folder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "audiosep"
    assert card.data.license == "other"
    assert "audiosep" in card.data.tags
    assert "# Tiny prior" in card.text
    assert "| 1speech+1sound | 1.23 |" in card.text
    assert "Thanks to **nobody**." in card.text
    assert "- from nothing" in card.text
    assert "Bark, Door" in card.text


@pytest.mark.parametrize(("kind", "classes"), [("speech", ()), ("sound", ()), ("sound", ("Door bell", "Rain"))])
def test_the_command_of_a_priors_card_separates(kind, classes, tiny_prior, tmp_path, monkeypatch, capsys):
    assert {hub.read_config(hub.find(name))["sample_rate"] for name in ("speech", "sound")} == {hub._SHIPPED_RATE}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_SHELVES", (tmp_path / "shelf",))  # tiny ones are quicker
    for other in ("speech", "sound"):
        hub.save_prior(tiny_prior(kind=other), tmp_path / "shelf" / other, CARD)
    hub.save_prior(tiny_prior(len(classes), kind, classes=classes), "./mine", CARD)
    soundfile.write("mix.wav", 0.1 * np.random.default_rng(0).standard_normal(3200), 16000)
    (line,) = re.findall(r"^audiosep separate .*", (tmp_path / "mine/README.md").read_text(), re.MULTILINE)
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line.replace("FOLDER_OR_NAME", "./mine"))[1:])
    assert ended.value.code == 0, capsys.readouterr().err
    found = {path.stem for path in tmp_path.glob("separated/*/mix/*.wav")}
    # Without a label a stem is called as its prior is.
    assert found == {"speech": {"mine", "sound"}, "sound": {"speech", classes[0].lower() if classes else "mine"}}[kind]


def test_the_card_of_another_rate_or_kind_asks_for_another_prior(folder, tmp_path, tiny_prior):
    other = hub.save_prior(tiny_prior(kind="machine"), tmp_path / "machine", CARD)
    for where in (folder, other):
        assert "audiosep separate mix.wav -n FOLDER_OR_NAME,OTHER_PRIOR\n" in (where / "README.md").read_text()


def test_a_checkpoint_is_replaced_another_folder_is_not(folder, tmp_path):
    hub.save_prior(tiny_prior(("Rain",)), folder, CARD)
    assert hub.load_prior(folder).classes == ("Rain",)
    (tmp_path / "music").mkdir()
    (tmp_path / "music/song.wav").touch()
    with pytest.raises(ModelError, match="not a checkpoint"):
        hub.save_prior(tiny_prior(), tmp_path / "music", CARD)
    (tmp_path / "empty").mkdir()
    hub.save_prior(tiny_prior(), tmp_path / "empty", CARD)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"tiny", "music", "empty"}


def full(*_):
    raise OSError(28, "No space left on device")


def test_a_failed_save_leaves_the_old_checkpoint_and_no_rubbish(folder, tmp_path, monkeypatch):
    before = (folder / "config.json").read_bytes()
    monkeypatch.setattr(hub, "save", full)
    with pytest.raises(ModelError, match="No space left"):
        hub.save_prior(tiny_prior(("Rain",)), folder, CARD)
    assert (folder / "config.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.skipif(sys.platform != "linux", reason="two renames elsewhere")
def test_a_checkpoint_is_there_while_it_is_replaced(folder, tmp_path):
    (tmp_path / "other").mkdir()
    if not hub._exchange(tmp_path / "other", folder):
        pytest.skip("this file system can't exchange folders")
    hub._exchange(tmp_path / "other", folder)
    ended, missed = threading.Event(), []

    def look():
        while not ended.is_set():
            if not (folder / "config.json").is_file():
                missed.append(time.monotonic())

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for i in range(300):
            shutil.copytree(folder, tmp_path / f"{i}.partial")
            hub._replace(folder, tmp_path / f"{i}.partial")
    finally:
        ended.set()
        reader.join()
    assert not missed


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_killed_saves_left_is_put_back_or_goes(exchanges, folder, tmp_path, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    others = [".tiny.notes", f".tiny-2.{gone.pid}.partial", f".tiny.{os.getppid()}.partial"]
    for name in (*others, f".tiny.{gone.pid}.partial", f".tiny.{os.getpid()}.partial"):
        (tmp_path / name).mkdir()
    before = (folder / "config.json").read_bytes()
    folder.rename(tmp_path / f".tiny.{gone.pid}.old")
    if not exchanges:
        monkeypatch.setattr(hub, "_exchange", lambda *_: False)
    with monkeypatch.context() as patch:
        patch.setattr(hub, "save", full)
        with pytest.raises(ModelError, match="No space left"):
            hub.save_prior(tiny_prior(("Rain",)), folder, CARD)
    assert (folder / "config.json").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"tiny", *others}
    hub.save_prior(tiny_prior(("Rain",)), folder, CARD)
    assert hub.load_prior(folder).classes == ("Rain",)
    assert {p.name for p in tmp_path.iterdir()} == {"tiny", *others}


def test_diverged_weights_are_not_saved(tmp_path):
    prior = tiny_prior()
    with torch.no_grad():
        prior.backbone.stem.weight[0] = 1e6
    with pytest.raises(ModelError, match=r"stem\.weight holds values that are not finite"):
        hub.save_prior(prior, tmp_path / "x", CARD)
    assert list(tmp_path.iterdir()) == []


# What is refused


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (len(whole) - 1, 100, 3, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="truncated or damaged") as caught:
            hub.load_prior(folder)
        assert "\n" not in str(caught.value)


def test_changed_weights(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="sha256"):
        hub.load_prior(folder)


def test_weights_of_another_network(folder):
    state = load_file(folder / "model.safetensors")
    wrong = state | {"stem.weight": torch.zeros(8, 2, 5, 5)}
    rewrite(folder, wrong)
    with pytest.raises(ModelError, match=re.escape("stem.weight has shape (8, 2, 5, 5)")):
        hub.load_prior(folder)
    rewrite(folder, {name: value for name, value in state.items() if name != "stem.weight"})
    with pytest.raises(ModelError, match=r"1 names missing and 0 unknown \(missing stem.weight\)"):
        hub.load_prior(folder)
    rewrite(folder, state | {"more": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"unknown more"):
        hub.load_prior(folder)
    rewrite(folder, state | {"stem.weight": torch.full_like(state["stem.weight"], torch.nan)})
    with pytest.raises(ModelError, match="NaN"):
        hub.load_prior(folder)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint was run",))


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_and_not_run(folder, name, zipped):
    (folder / "model.safetensors").unlink()
    if zipped:
        torch.save({"weight": Bomb()}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps({"weight": Bomb()}))
    with pytest.raises(ModelError, match="a pickle"):
        hub.load_prior(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        hub.load_prior(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 99}, "newer version"),
        ({"backbone": {"name": "os.system", "command": "x"}}, "no backbone 'os.system'"),
        ({"backbone": {"name": "triple_path_unet", "widht": 8}}, "widht"),
        ({"schedule": {"name": "cosine"}}, "no schedule 'cosine'"),
        ({"classes": "Bark"}, "classes"),
        ({"classes": [1]}, "classes"),
        ({"sample_rate": 0}, "sample_rate"),
        ({"sha256": None}, "sha256"),
        ({"parameterization": "v"}, "parameterization"),
        ({"classes": ["Bark", "Door", "Rain"]}, "3 classes"),
    ],
)
def test_a_wrong_config(folder, changes, says):
    edit(folder, **changes)
    with pytest.raises(ModelError, match=says):
        hub.load_prior(folder)


def test_no_config_or_no_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="can't be read"):
        hub.load_prior(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no checkpoint: it has no config\.json"):
        hub.load_prior(folder)


# Finding


def test_shipped_checkpoints_are_found_by_name(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_SHELVES", (tmp_path / "none", tmp_path))
    assert hub.find("tiny") == folder
    assert hub.load_prior("tiny").classes == ("Bark", "Door")
    (entry,) = hub.list_checkpoints()
    assert entry["name"] == "tiny"
    assert entry["path"] == str(folder)
    assert entry["kind"] == "sound"
    with pytest.raises(ModelError, match=r"no checkpoint 'tyni'.*shipped \(tiny\)"):
        hub.find("tyni")


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "sound_source.pt").touch()
    with pytest.raises(ModelError, match="audiosep models import"):
        hub.find(tmp_path / "sound_source.pt")


def test_hub_names_go_to_the_cache_first_and_then_to_the_hub(folder, monkeypatch):
    calls = []

    def snapshot_download(repo, *, revision, allow_patterns, local_files_only):
        calls.append((repo, revision, local_files_only))
        if local_files_only and len(calls) == 1:
            raise FileNotFoundError("not cached")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.find("org/name@v1.0") == folder
    assert hub.find("org/name") == folder
    assert calls == [
        ("org/name", "v1.0", True),
        ("org/name", "v1.0", False),
        ("org/name", None, True),
    ]


def test_a_hub_name_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"org/name: no such folder, not in the cache, .* HF_HUB_OFFLINE is set"):
        hub.find("org/name")
    with pytest.raises(ModelError, match=r"no such folder, .*no name that the Hub allows: .*'\.git'"):
        hub.find("org/name.git")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_what_an_interrupted_download_left_is_not_taken_for_the_whole(file, folder, tmp_path, monkeypatch):
    """Without the list of files that newer clients keep, the client returns it when the network is gone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--org--tiny"
    (folder / file).unlink()
    shutil.copytree(folder, cache / "snapshots" / ("1" * 40))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("1" * 40)
    for get in (hub.download, hub.find):
        with pytest.raises(ModelError, match=r"org/tiny: .*not in the cache, and the Hub is not asked"):
            get("org/tiny")


# The published checkpoints


@pytest.fixture(scope="module")
def published():
    """A state dict with the published names and shapes, as far as the tests need them: all 651."""
    return _published(1)


def _published(num_classes):
    """Our network's state under the published names; random numbers."""
    torch.manual_seed(0)
    state = TriplePathUNet(num_classes=num_classes).state_dict()
    return {published_name(name): _as_published(name, value) for name, value in state.items()}


def published_name(name):
    parts = name.split(".")
    head, rest = parts[0], parts[1:]
    if head == "time_embeddings":
        which = "out" if rest[0] == "5" else int(rest[0]) + 1
        return f"t_embedder_{which}.mlp.{0 if rest[1] == 'first' else 2}.{rest[2]}"
    if head == "class_embeddings":
        return f"y_embedder_{int(rest[0]) + 1}.embedding_table.weight"
    flat = {
        "stem": "conv_1",
        "down_1": "down1_2.body",
        "down_2": "down2_3.body",
        "up_1": "up2_1.body",
        "up_2": "up3_2.body",
        "merge_1": "reduce_chan_level1",
        "merge_2": "reduce_chan_level2",
        "head_conv": "out_conv",
        "head_out": "final_layer.out_proj",
        "head_modulation": "final_layer.adaLN_modulation.1",
    }
    if head in flat:
        return f"{flat[head]}.{parts[-1]}"
    stage = head.replace("coder_", "coder_level_")
    path = {"global_temporal": "fullatt", "intra_frame": "freatt", "intra_frequency": "timeatt"}
    layer = {
        "gate": "sup_conv",
        "fold": "sup_conv",
        "unfold": "recov_conv",
        "attention.qkv": "attn.to_qkv",
        "attention.out": "attn.to_out",
        "feed_forward.expand": "mlp.fc1",
        "feed_forward.contract": "mlp.fc2",
        "modulation.linear": "adaLN_modulation.1",
        "attention_modulation.linear": "adaLN_modulation_att.1",
        "feed_forward_modulation.linear": "adaLN_modulation_mlp.1",
    }[".".join(rest[2:-1])]
    return f"{stage}.{rest[0]}.{path[rest[1]]}.{layer}.{rest[-1]}"


_CONVOLUTIONS = ("gate", "fold", "expand", "contract", "merge_1", "merge_2")


def _as_published(name, value):
    convolution = value.ndim == 2 and name.split(".")[-2] in _CONVOLUTIONS
    return value[..., None, None] if convolution else value


def test_import_takes_the_averaged_weights(published):
    assert len(published) == 651
    other = {name: torch.zeros_like(value) for name, value in published.items()}
    prior = hub.import_unasdiff({"model": other, "ema": published})
    assert (prior.kind, prior.classes, prior.sample_rate) == ("speech", (), 16000)
    assert (prior.level, prior.parameterization) == (-22.5, "eps")
    assert prior.backbone.num_classes == 1
    assert sum(p.numel() for p in prior.backbone.parameters()) == 37_212_016
    for name, value in prior.backbone.state_dict().items():
        expected = published[published_name(name)]
        if name.startswith("class_embeddings"):
            # Without a label the speech model is asked for its one class.
            assert torch.equal(value, expected[[0, 0]])
        else:
            assert torch.equal(_as_published(name, value), expected)
    assert np.allclose(prior.schedule.alpha[149] ** 2, 0.3204, atol=1e-4)


def test_import_of_the_sound_model_names_its_41_classes(published):
    state = dict(published)
    for i in range(1, 6):
        state[f"y_embedder_{i}.embedding_table.weight"] = torch.zeros(51, 128)
    prior = hub.import_unasdiff({"ema": state})
    assert prior.kind == "sound"
    assert prior.backbone.num_classes == 50
    assert len(prior.classes) == 41
    assert (prior.classes[0], prior.classes[23], prior.classes[40]) == (
        "Hi-hat",
        "Bark",
        "Glockenspiel",
    )


def test_import_from_a_file(published, tmp_path):
    path = tmp_path / "speech_source.pt"
    torch.save({"model": {}, "ema": published}, path)
    assert hub.import_unasdiff(path).kind == "speech"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="truncated or not a torch checkpoint"):
        hub.import_unasdiff(path)
    torch.save({"ema": Bomb()}, path)
    with pytest.raises(ModelError, match="more than tensors"):
        hub.import_unasdiff(path)
    with pytest.raises(ModelError, match="no such file"):
        hub.import_unasdiff(tmp_path / "none.pt")


def test_import_of_something_else(published):
    with pytest.raises(ModelError, match='no "ema" weights'):
        hub.import_unasdiff({"model": published})
    with pytest.raises(ModelError, match="not a UnaSDiff network"):
        hub.import_unasdiff({"ema": {"weight": torch.zeros(1)}})
    fewer = {name: value for name, value in published.items() if name != "conv_1.weight"}
    with pytest.raises(ModelError, match="1 names missing"):
        hub.import_unasdiff({"ema": fewer})
    wrong = published | {"conv_1.weight": torch.zeros(72, 2, 5, 5)}
    with pytest.raises(ModelError, match="shape"):
        hub.import_unasdiff({"ema": wrong})
