"""Checkpoints: a name or a folder to a prior or a separating model, and back.

A checkpoint is a folder of three files: `config.json` (names and constructor arguments of backbone
and schedule, what the prior is for, hash of the weights), `model.safetensors`, and `README.md` (the
model card). Loading one runs no code of its own: names are looked up in the dicts below. The config
of a model that separates by itself (supervised networks, NMF) has "model" in place of the prior's parts.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import pickle
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from audiosep import __version__
from audiosep.backbones.diffwave import DiffWave
from audiosep.backbones.mlp import MLP
from audiosep.backbones.triple_path_unet import TriplePathUNet
from audiosep.backbones.wiener import Wiener
from audiosep.baselines import NMF
from audiosep.errors import ModelError
from audiosep.prior import Prior
from audiosep.refiner import Refiner
from audiosep.schedules import Schedule, ve, vp_linear
from audiosep.supervised.conv_tasnet import ConvTasNet
from audiosep.supervised.expert import Expert
from audiosep.supervised.tf_locoformer import TFLocoformer
from audiosep.tagger import Tagger

__all__ = [
    "BACKBONES",
    "NETWORKS",
    "SCHEDULES",
    "UNASDIFF_CARD",
    "download",
    "find",
    "import_unasdiff",
    "list_checkpoints",
    "load_model",
    "load_prior",
    "push",
    "read_config",
    "save_model",
    "save_prior",
]

log = logging.getLogger(__name__)

# A new backbone, schedule or supervised network is one line here.
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "triple_path_unet": TriplePathUNet,
    "diffwave": DiffWave,
    "mlp": MLP,
    "wiener": Wiener,
}
SCHEDULES: dict[str, Callable[..., Schedule]] = {"vp_linear": vp_linear, "ve": ve}
NETWORKS: dict[str, Callable[..., nn.Module]] = {"conv_tasnet": ConvTasNet, "tf_locoformer": TFLocoformer}

MODELS: dict[str, Callable[..., nn.Module]] = {"expert": Expert, "nmf": NMF, "refiner": Refiner, "tagger": Tagger}

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = 1

_PACKAGE = Path(__file__).resolve().parent
# In a wheel the checkpoints lie within the package, in a source checkout beside it.
_SHELVES = (_PACKAGE / "checkpoints", _PACKAGE.parent / "checkpoints")
_HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)

_SHIPPED_RATE = 16000  # of the shipped priors, in Hz; only priors of one rate separate together

# The published sound model's labels 0..40 (FSD-Kaggle2018); rows 41..49 of its table are unused.
FSD_LABELS = (
    "Hi-hat",
    "Saxophone",
    "Trumpet",
    "Cello",
    "Clarinet",
    "Snare_drum",
    "Laughter",
    "Fart",
    "Flute",
    "Bass_drum",
    "Squeak",
    "Double_bass",
    "Shatter",
    "Fireworks",
    "Applause",
    "Acoustic_guitar",
    "Violin_or_fiddle",
    "Tearing",
    "Oboe",
    "Gong",
    "Knock",
    "Writing",
    "Cough",
    "Bark",
    "Tambourine",
    "Burping_or_eructation",
    "Cowbell",
    "Harmonica",
    "Drawer_open_or_close",
    "Meow",
    "Electric_piano",
    "Gunshot_or_gunfire",
    "Microwave_oven",
    "Keys_jangling",
    "Telephone",
    "Computer_keyboard",
    "Finger_snapping",
    "Chime",
    "Bus",
    "Scissors",
    "Glockenspiel",
)

UNASDIFF_CARD = {
    "title": "UnaSDiff source prior, imported",
    "description": "Weights published with UnaSDiff (Shi et al., AAAI 2026, arXiv 2512.07226).",
    "licence": "none stated by its authors: for your own use, not to be passed on",
    "data": "VCTK 0.92 (speech) or FSD-Kaggle2018 (sound), as the paper says",
}


def load_prior(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Prior:
    """The prior of a checkpoint: a folder, a shipped name, or `org/name[@revision]` on the Hub.

    Raises ModelError, in one line, when there is none or it is not what its config.json says.
    """
    folder = find(name)
    config = read_config(folder)
    if "model" in config:
        raise ModelError(f"{folder}: {config['kind']} separates by itself, it is no prior to combine with others")
    backbone = _build("backbone", BACKBONES, config, folder)
    schedule = _build("schedule", SCHEDULES, config, folder)
    _load_weights(backbone, folder, config)
    try:
        prior = Prior(
            backbone,
            schedule,
            sample_rate=config["sample_rate"],
            classes=config["classes"],
            level=config["level"],
            kind=config["kind"],
            parameterization=config["parameterization"],
            label_dropout=config.get("label_dropout", 0.1),  # as all that don't say it were trained
        )
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG}: {error}") from error
    rows = getattr(backbone, "num_classes", 0)
    if len(prior.classes) > rows:
        raise ModelError(f"{folder / CONFIG}: names {len(prior.classes)} classes, the backbone has {rows}")
    prior = prior.to(device) if dtype is None else prior.to(device, dtype)
    prior.origin = _origin(folder, config)
    return prior.eval().requires_grad_(False)


def is_prior(name: str | Path) -> bool:
    """Whether a checkpoint is a prior, rather than a model that separates by itself."""
    return "model" not in read_config(find(name))


def load_model(name: str | Path, device: str | torch.device = "cpu") -> Any:
    """The model of a checkpoint that separates by itself; names and errors as of `load_prior`."""
    folder = find(name)
    config = read_config(folder)
    if "model" not in config:
        raise ModelError(f"{folder}: a prior of {config['kind']}, which separates only beside another one")
    parts = dict(config["model"])
    if isinstance(parts.get("network"), dict):
        parts["network"] = _build("network", NETWORKS, parts, folder)
    model = _build("model", MODELS, {"model": parts}, folder)
    _load_weights(model, folder, config)
    model.origin = _origin(folder, config)
    return model.to(device).eval().requires_grad_(False)


def save_prior(
    prior: Prior,
    folder: str | Path,
    card: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a checkpoint folder; it appears under its name when it is complete.

    `card` may hold `title, description, licence, data, attribution` (text or list), `metrics` (a
    list of rows, each a dict), `cost` (rows, too) and `training`; `licence, data, metrics, training` go into
    config.json too. A
    checkpoint that lies there is replaced, another folder is not.
    """
    return _save(folder, prior.backbone, _config(prior, card), card, dtype)


def save_model(
    model: nn.Module,
    folder: str | Path,
    card: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write the checkpoint folder of a model that separates by itself; as `save_prior`."""
    return _save(folder, model, _model_config(model, card), card, dtype)


def _save(
    folder: str | Path, module: nn.Module, config: dict[str, Any], card: Mapping[str, Any], dtype: torch.dtype
) -> Path:
    folder = Path(folder)
    if folder.exists() and not _replaceable(folder):
        raise ModelError(f"{folder} is there and not a checkpoint; choose another name")
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    try:
        _sweep(folder)
        partial.mkdir(parents=True)
        (partial / WEIGHTS).write_bytes(save(_stored(module, dtype)))
        config = config | {"sha256": _sha256(partial / WEIGHTS)}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
        (partial / CARD).write_text(_card(config, card), encoding="utf-8")
        _replace(folder, partial)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: can't be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def find(name: str | Path) -> Path:
    """The folder of a checkpoint: a shipped name, an existing folder, or from the Hub.

    A bare name is the shipped checkpoint even where a folder is called so; ./name is always the folder.
    """
    path = Path(name)
    for shelf in _SHELVES:
        if str(name) == path.name and (shelf / path / CONFIG).is_file():
            return shelf / path
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(
            f"{name} is a file, a checkpoint is a folder; "
            "`audiosep models import` turns published UnaSDiff weights into one"
        )
    match = _HUB_NAME.fullmatch(str(name))
    if match:
        return _from_hub(match[1], match[2])
    shipped = ", ".join(entry["name"] for entry in list_checkpoints()) or "none"
    raise ModelError(f"no checkpoint {str(name)!r}: give a folder, org/name, or one of those shipped ({shipped})")


def download(name: str) -> Path:
    """Fetch `org/name[@revision]` as it is on the Hub now; the folder in the cache. ModelError when it can't be had.

    What is damaged in the cache is fetched anew. Where the Hub can't be reached, a sound copy fetched before does, and
    a warning names its revision.
    """
    match = _HUB_NAME.fullmatch(name)
    if not match:
        raise ModelError(f"{name!r} is not org/name or org/name@revision")
    folder = _fetch(match[1], match[2])
    if _damaged(folder):
        _fetch_anew(match[1], folder)
    _read_weights(folder, read_config(folder), "it is the same on the Hub: tell who published it")
    _warn_of_old(match[1], match[2], folder)
    return folder


def push(folder: str | Path, name: str, *, private: bool = False) -> str:
    """Put a checkpoint on the Hub as `org/name`, made if it isn't there; the address of the commit.

    Config, weights and card go up in one commit: others see all or nothing. What an interrupted push has already sent
    is not sent again. ModelError when the folder is no sound checkpoint or the Hub refuses.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    match = _HUB_NAME.fullmatch(name)
    if not match or match[2]:
        raise ModelError(f"{name!r} is not org/name")
    _read_weights(folder, read_config(folder))
    api = HfApi(library_name="audiosep", library_version=__version__)
    with _hub_errors(name):
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[CONFIG, WEIGHTS, CARD],
            commit_message=f"audiosep {__version__}: {_what(read_config(folder))}",
        )
    return commit.commit_url


def list_checkpoints() -> list[dict[str, Any]]:
    """The shipped checkpoints: their configurations with `name` and `path`."""
    found = {}
    for shelf in reversed(_SHELVES):
        for file in sorted(shelf.glob(f"*/{CONFIG}")):
            path = file.parent
            found[path.name] = {"name": path.name, "path": str(path), **read_config(path)}
    return [found[name] for name in sorted(found)]


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json, checked; ModelError when it is absent or wrong."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder} is no checkpoint: it has no {CONFIG}") from error
    except ValueError as error:
        raise ModelError(f"{path}: can't be read ({error}); {_remedy(folder)}") from error
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ModelError(f"{path}: not a checkpoint of audiosep, or of a newer version than this")
    for key, kind in (_MODEL_FIELDS if "model" in config else _FIELDS).items():
        value = config.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ModelError(f"{path}: {key} is missing or of the wrong type")
    if not all(isinstance(label, str) for label in config.get("classes", [])):
        raise ModelError(f"{path}: classes are not all names")
    if config["sample_rate"] <= 0:
        raise ModelError(f"{path}: sample_rate is above 0, got {config['sample_rate']}")
    return config


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "sample_rate": int,
    "level": (int, float),
    "parameterization": str,
    "classes": list,
    "backbone": dict,
    "schedule": dict,
    "sha256": str,
}
_MODEL_FIELDS: dict[str, type | tuple[type, ...]] = {"kind": str, "sample_rate": int, "model": dict, "sha256": str}


def import_unasdiff(source: str | Path | Mapping[str, Any]) -> Prior:
    """A prior from a published UnaSDiff checkpoint, {"model", "ema"}: a file or what is in it.

    The averaged weights ("ema") are taken, as its authors do. The embedding table tells the model:
    50 classes and the null row for sound, of which 41 have names, 1 and the null row for speech.
    The speech model was only ever used with its one class: the null row becomes a copy of it, so
    that "speech" without a label is what its authors ran.
    """
    content = source if isinstance(source, Mapping) else _load_pickle(Path(source))
    where = "the checkpoint" if isinstance(source, Mapping) else str(source)
    state = content.get("ema") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise ModelError(f'{where}: no "ema" weights; a published checkpoint holds model and ema')
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f'{where}: "ema" holds something else than tensors')
    table = state.get("y_embedder_1.embedding_table.weight")
    if table is None or table.ndim != 2 or len(table) < 2:
        raise ModelError(f"{where}: no class embedding table; not a UnaSDiff network")
    num_classes = len(table) - 1
    backbone = TriplePathUNet(num_classes=num_classes)
    state = _renamed(state, backbone)
    _check_state(state, backbone, where)
    backbone.load_state_dict(state)
    speech = num_classes == 1
    if speech:
        with torch.no_grad():
            for name, weight in backbone.named_parameters():
                if name.startswith("class_embeddings."):
                    weight[1] = weight[0]
    classes = () if speech else FSD_LABELS[:num_classes]
    schedule = vp_linear(steps=200, beta_start=1e-4, beta_end=2e-2)
    kind = "speech" if speech else "sound"
    # What its null row for sound was trained on isn't known.
    facts: dict[str, Any] = {"sample_rate": 16000, "classes": classes, "level": -22.5, "kind": kind}
    return Prior(backbone, schedule, **facts, label_dropout=0.0).eval()


# Part of a published name -> ours; embeddings are counted from 1 there.
_UNASDIFF_NAMES: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"^conv_1\.": "stem.",
    r"^(en|de)coder_level_(\d)\.": r"\1coder_\2.",
    r"^down1_2\.body\.": "down_1.conv.",
    r"^down2_3\.body\.": "down_2.conv.",
    r"^up3_2\.body\.": "up_2.conv.",
    r"^up2_1\.body\.": "up_1.conv.",
    r"^reduce_chan_level(\d)\.": r"merge_\1.",
    r"^t_embedder_out\.": "t_embedder_6.",
    r"^t_embedder_(\d)\.": lambda match: f"time_embeddings.{int(match[1]) - 1}.",
    r"^y_embedder_(\d)\.embedding_table\.": (lambda match: f"class_embeddings.{int(match[1]) - 1}."),
    r"^out_conv\.": "head_conv.",
    r"^final_layer\.out_proj\.": "head_out.",
    r"^final_layer\.adaLN_modulation\.1\.": "head_modulation.linear.",
    r"\.fullatt\.sup_conv\.": ".global_temporal.fold.",
    r"\.recov_conv\.": ".unfold.",
    r"\.fullatt\.": ".global_temporal.",
    r"\.freatt\.": ".intra_frame.",
    r"\.timeatt\.": ".intra_frequency.",
    r"\.sup_conv\.": ".gate.",
    r"\.attn\.to_": ".attention.",
    r"\.mlp\.fc1\.": ".feed_forward.expand.",
    r"\.mlp\.fc2\.": ".feed_forward.contract.",
    r"\.mlp\.0\.": ".first.",
    r"\.mlp\.2\.": ".second.",
    r"\.adaLN_modulation\.1\.": ".modulation.linear.",
    r"\.adaLN_modulation_att\.1\.": ".attention_modulation.linear.",
    r"\.adaLN_modulation_mlp\.1\.": ".feed_forward_modulation.linear.",
}


def _renamed(state: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Published names to ours. A 1x1 convolution (O, I, 1, 1) is a Linear (O, I) here."""
    expected = backbone.state_dict()
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in _UNASDIFF_NAMES.items():
            name = re.sub(pattern, replacement, name)
        if name in expected and value.shape == (*expected[name].shape, 1, 1):
            value = value[..., 0, 0]
        renamed[name] = value
    return renamed


# Reading


def _build(part: str, table: Mapping[str, Callable[..., Any]], config: dict, folder: Path) -> Any:
    arguments = dict(config[part])
    name = arguments.pop("name", None)
    if name not in table:
        known = ", ".join(table)
        raise ModelError(f"{folder / CONFIG}: no {part} {name!r} in this version (has {known})")
    try:
        return table[name](**arguments)
    except Exception as error:  # whatever wrong numbers lead to
        raise ModelError(f"{folder / CONFIG}: {part} {name} can't be built: {error}") from error


def _load_weights(module: nn.Module, folder: Path, config: dict[str, Any]) -> None:
    state = _read_weights(folder, config, _remedy(folder))
    _check_state(state, module, str(folder / WEIGHTS))
    module.load_state_dict(state)


def _origin(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """For reports: which weights these were. A snapshot's folder in the Hub's cache is named by its commit."""
    origin = {"path": str(folder), "sha256": config["sha256"]}
    return origin | ({"revision": folder.name} if _is_cached(folder) else {})


def _is_cached(folder: Path) -> bool:
    """Whether it is a snapshot in the Hub's cache: models--ORG--NAME/snapshots/COMMIT."""
    return folder.parent.name == "snapshots"


def _remedy(folder: Path) -> str:
    """What helps a checkpoint whose files are damaged."""
    if not _is_cached(folder):
        return "fetch it again"
    name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return f"`audiosep models download {name}@{folder.name}` fetches it anew"


def _damaged(folder: Path) -> bool:
    """Whether weights are not those of config.json, or that can't be read; not where there are none."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        return bool(_sha256(folder / WEIGHTS) != config["sha256"])
    except ValueError:
        return True
    except (OSError, LookupError, TypeError):  # no checkpoint of ours, which fetching won't change
        return False


def _read_weights(folder: Path, config: dict[str, Any], remedy: str = "fetch it again") -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in _PICKLE_SUFFIXES]
        if pickles:
            raise _pickle_error(folder / pickles[0])
        raise ModelError(f"{folder}: no {WEIGHTS}; {remedy}")
    try:
        with path.open("rb") as file:
            if file.read(4).startswith(_PICKLE_STARTS):
                raise _pickle_error(path)
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: truncated or damaged ({error}); {remedy}") from error
    if _sha256(path) != config["sha256"]:
        raise ModelError(f"{path}: not the weights that {CONFIG} names (sha256); {remedy}")
    return state


_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _pickle_error(path: Path) -> ModelError:
    return ModelError(f"{path}: a pickle, which can run code when loaded, so it is not; save the weights as {WEIGHTS}")


def _check_state(state: Mapping[str, Tensor], backbone: nn.Module, where: str) -> None:
    """Names, then shapes, then numbers."""
    expected = backbone.state_dict()
    missing, extra = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or extra:
        example = f"missing {min(missing)}" if missing else f"unknown {min(extra)}"
        raise ModelError(
            f"{where}: weights of another network, {len(missing)} names missing and {len(extra)} unknown ({example})"
        )
    for name, value in expected.items():
        have, want = tuple(state[name].shape), tuple(value.shape)
        if have != want:
            raise ModelError(f"{where}: {name} has shape {have}, the network needs {want}")
        if not torch.isfinite(state[name]).all():
            raise ModelError(f"{where}: {name} holds NaN or infinite values")


def _load_pickle(path: Path) -> Any:
    """Tensors and plain containers only: `weights_only` refuses anything that would run."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path}: holds more than tensors; not loaded, as it could run") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: truncated or not a torch checkpoint: {reason}") from error


def _from_hub(repo: str, revision: str | None) -> Path:
    """The snapshot in the Hub's cache; only what is not there yet is fetched."""
    try:
        cached = _snapshot(repo, revision, local=True)
        if (cached / CONFIG).is_file() and (cached / WEIGHTS).is_file():
            return cached
    except (OSError, ValueError):
        pass
    return _fetch(repo, revision)


def _fetch(repo: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi

    with _hub_errors(_as_asked(repo, revision), "no such folder, not in the cache, and "):
        folder = _snapshot(repo, revision, local=False)
        if not all((folder / file).is_file() for file in (CONFIG, WEIGHTS)):
            # The Hub hasn't got them, or it wasn't reached and an interrupted download left these: then this fails.
            HfApi().model_info(repo, revision=folder.name)
    return folder


def _warn_of_old(repo: str, revision: str | None, folder: Path) -> None:
    """Say that a snapshot may be an old one: the client passes over a Hub that doesn't answer when it has a copy."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or revision == folder.name:  # as asked for, or never another
        return
    try:
        with _hub_errors(_as_asked(repo, revision)):
            HfApi().model_info(repo, revision=revision)
    except ModelError as error:
        log.warning("%s; this is the copy fetched before, revision %s", error, folder.name)


def _as_asked(repo: str, revision: str | None) -> str:
    return f"{repo}@{revision}" if revision else repo


def _fetch_anew(repo: str, folder: Path) -> None:
    """Fetch config and weights of a snapshot again: the client keeps what its cache has, as it is."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(f"{repo}@{folder.name}", "damaged in the cache, and "):
        for file in (CONFIG, WEIGHTS):
            hf_hub_download(repo, file, revision=folder.name, force_download=True)


def _snapshot(repo: str, revision: str | None, local: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [CONFIG, WEIGHTS, CARD]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, local_files_only=local))


@contextlib.contextmanager
def _hub_errors(name: str, before: str = "") -> Iterator[None]:
    """The client's errors as a ModelError in one line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(f"{name}: access has to be asked for on its page; then set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name}: the Hub has the repository, but not this revision") from error
    except errors.RepositoryNotFoundError as error:
        reason = "no such folder, and no such repository on the Hub (or a private one: HF_TOKEN)"
        raise ModelError(f"{name}: {reason}") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{name}: {before}no name that the Hub allows: {' '.join(str(error).split())}") from error
    except ModelError:
        raise
    except Exception as error:  # the client's network errors have no common base
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            reason = "the Hub refuses; set HF_TOKEN to a token that may do this"
        elif status:
            reason = f"{before}the Hub answers {status}: {' '.join(str(error).split())}"
        elif constants.HF_HUB_OFFLINE:
            reason = f"{before}the Hub is not asked, as HF_HUB_OFFLINE is set"
        else:
            reason = f"{before}the Hub can't be reached ({type(error).__name__})"
        raise ModelError(f"{name}: {reason}") from error


# Writing


def _stored(backbone: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    state = {}
    for name, value in backbone.state_dict().items():
        value = value.detach().cpu()
        stored = value.to(dtype) if value.is_floating_point() else value
        if not torch.isfinite(stored).all():
            raise ModelError(f"{name} holds values that are not finite in {dtype}; not saved")
        state[name] = stored.clone().contiguous()
    return state


def _config(prior: Prior, card: Mapping[str, Any]) -> dict[str, Any]:
    arguments: Any = prior.backbone.config
    return {
        "format": FORMAT,
        "audiosep": __version__,
        "kind": prior.kind,
        "sample_rate": prior.sample_rate,
        "level": prior.level,
        "parameterization": prior.parameterization,
        "label_dropout": prior.label_dropout,
        "classes": list(prior.classes),
        "backbone": {"name": _name(BACKBONES, prior.backbone), **arguments},
        "schedule": dict(prior.schedule.config),
        "parameters": sum(p.numel() for p in prior.backbone.parameters()),
        "licence": card.get("licence", "unknown"),
        "data": card.get("data", "unknown"),
        "metrics": card.get("metrics", []),
        "training": card.get("training", {}),
    }


def _model_config(model: Any, card: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {"name": _name(MODELS, model), **model.config}
    if "network" in arguments:
        arguments["network"] = {"name": _name(NETWORKS, model.network), **arguments["network"]}
    return {
        "format": FORMAT,
        "audiosep": __version__,
        "kind": f"{arguments['network']['name']} for {model.task}" if "network" in arguments else arguments["name"],
        "sample_rate": model.sample_rate,
        "classes": list(getattr(model, "classes", ())),
        "model": arguments,
        "parameters": sum(p.numel() for p in model.parameters()) or sum(b.numel() for b in model.buffers()),
        "licence": card.get("licence", "unknown"),
        "data": card.get("data", "unknown"),
        "metrics": card.get("metrics", []),
        "training": card.get("training", {}),
    }


def _name(makers: Mapping[str, Any], made: object) -> str:
    for name, make in makers.items():
        if make is type(made):
            return name
    raise ModelError(f"{type(made).__name__} is not in the tables of hub.py")


def _what(config: Mapping[str, Any]) -> str:
    return config["kind"] if "model" in config else f"{config['kind']} prior"


def _card(config: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """The model card: YAML front matter (JSON strings are YAML) and Markdown."""
    title = card.get("title", _what(config))
    prior = "model" not in config
    about = ["diffusion", config["kind"]] if prior else [config["model"]["name"]]
    tags = json.dumps(["audiosep", "source-separation", *about])
    front = [
        "---",
        "library_name: audiosep",
        "pipeline_tag: audio-to-audio",
        f"license: {json.dumps(card.get('licence_id', 'other'))}",
        f"license_name: {json.dumps(config['licence'], ensure_ascii=False)}",
        f"tags: {tags}",
        "---",
    ]
    facts = {
        "Kind": config["kind"],
        "Sample rate": f"{config['sample_rate']} Hz",
        "Parameters": f"{config['parameters']:,}",
        "Licence": config["licence"],
    }
    if prior:
        facts |= {
            "Level": f"{config['level']} dBFS RMS",
            "Backbone": config["backbone"]["name"],
            "Schedule": config["schedule"]["name"],
            "Classes": f"{len(config['classes'])}",
        }
    default = "A diffusion prior over clean recordings" if prior else "A model that separates by itself"
    blocks = [
        "\n".join(front),
        f"# {title}",
        card.get("description", f"{default}, for `audiosep`."),
        _table([{"": key, "value": value} for key, value in facts.items()]),
    ]
    if config["kind"] not in ("tagger", "refiner"):
        blocks.append(f"## Use\n\n```\n{_use(config)}\n```")
    for heading, content in (
        ("Data", config["data"]),
        ("Training", config["training"]),
        ("Metrics", config["metrics"]),
        ("Cost", card.get("cost")),
        ("Classes", ", ".join(config.get("classes", []))),
        ("Attribution", card.get("attribution")),
    ):
        if content:
            blocks.append(f"## {heading}\n\n{_markdown(content)}")
    return "\n\n".join(blocks) + "\n"


def _use(config: Mapping[str, Any]) -> str:
    """The command that separates with a checkpoint: a prior needs another one, of what else is in the mixture."""
    command = "audiosep separate mix.wav -n"
    if "model" in config:
        return f"{command} FOLDER_OR_NAME"
    if config["kind"] not in ("speech", "sound") or config["sample_rate"] != _SHIPPED_RATE:
        return f"{command} FOLDER_OR_NAME,OTHER_PRIOR"
    if config["kind"] == "speech":
        return f"{command} FOLDER_OR_NAME,sound"
    example = f" -s speech,{shlex.quote(config['classes'][0])}" if config["classes"] else ""
    return f"{command} speech,FOLDER_OR_NAME{example}"


def _markdown(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        return _table([{"": key, "value": value} for key, value in content.items()])
    rows = list(content)
    if all(isinstance(row, Mapping) for row in rows):
        return _table(rows)
    return "\n".join(f"- {row}" for row in rows)


def _table(rows: list[Mapping[str, Any]]) -> str:
    headers = list(dict.fromkeys(key for row in rows for key in row))
    lines = [headers, ["---"] * len(headers)]
    lines += [[_cell(row.get(header, "")) for header in headers] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / CONFIG).is_file() or not any(folder.iterdir()))


def _replace(folder: Path, partial: Path) -> None:
    """Put the complete folder in its place; an older one goes when the new one is there."""
    if _exchange(folder, partial):
        return  # the older one lies in `partial` now, which goes in any case
    old = partial.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders at one stroke, so that there always is one; False where that can't be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _sweep(folder: Path) -> None:
    """Of what killed saves left, the older checkpoint goes back when there is no other, the rest goes."""
    for path in folder.parent.glob(".*"):
        match = re.fullmatch(rf"\.{re.escape(folder.name)}\.(\d+)\.(old|partial)", path.name)
        if match is None or _runs(int(match[1])):
            continue
        if match[2] == "old" and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    """Whether there is such a process, other than this one; taken to be so on Windows, where `os.kill` would end it."""
    if process == os.getpid():
        return False
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
