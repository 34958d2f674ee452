"""What this installation has: versions, devices, checkpoints, optional parts; and what is amiss."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import audiosep

CORE = (
    "torch",
    "torchaudio",
    "numpy",
    "soundfile",
    "soxr",
    "librosa",
    "huggingface_hub",
    "safetensors",
    "typer",
    "rich",
)
# The extras of pyproject.toml that users need; a test compares the two.
EXTRAS = {
    "media": ("av",),
    "eval": ("pesq", "pystoi", "fast-bss-eval", "torchmetrics", "matplotlib"),
    "train": ("accelerate", "tensorboard", "matplotlib"),
    "blind": ("scikit-learn", "scipy", "edfio", "numba"),
}


def examine() -> dict[str, Any]:
    """The facts, as JSON types. Imports torch, and never torchaudio."""
    versions = {name: _version(name) for name in CORE}
    extras = {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()}
    warnings = _mismatch(versions["torch"], versions["torchaudio"])
    warnings += [f"{name} is missing: pip install audiosep" for name in CORE if not versions[name]]
    checkpoints, trouble = _checkpoints()
    return {
        "audiosep": audiosep.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "devices": _devices() if versions["torch"] else [],
        "checkpoints": checkpoints,
        "extras": extras,
        "warnings": warnings + trouble,
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts as lines for people."""
    lines = [f"audiosep {facts['audiosep']}, Python {facts['python']}, {facts['platform']}"]
    lines += [f"  {name} {version or 'missing'}" for name, version in facts["versions"].items()]
    lines += ["devices", *(f"  {device}" for device in facts["devices"])]
    lines += ["checkpoints", *(f"  {c['name']}  {c['path']}" for c in facts["checkpoints"])]
    lines.append("optional parts")
    for extra, packages in facts["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        have = f"lacks {', '.join(missing)}: pip install 'audiosep[{extra}]'"
        lines.append(f"  {extra}: {have if missing else 'complete'}")
    lines += [f"warning: {warning}" for warning in facts["warnings"]]
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _mismatch(torch: str | None, torchaudio: str | None) -> list[str]:
    """A warning if this torchaudio won't import beside this torch; it isn't tried."""
    if not torch or not torchaudio:
        return []
    release, _, build = torch.partition("+")
    audio_release, _, audio_build = torchaudio.partition("+")
    same = release.split(".")[:2] == audio_release.split(".")[:2]
    # A wheel without a build label is PyPI's, which is linked against CUDA.
    cpu_only = build == "cpu" and audio_build != "cpu"
    if same and not cpu_only:
        return []
    wanted = ".".join(release.split(".")[:2])
    return [
        f"torchaudio {torchaudio} does not go with torch {torch} (training may need it, separating"
        f" does not): pip install 'torchaudio=={wanted}.*' from where torch came from"
    ]


def _devices() -> list[str]:
    import torch

    devices = [f"cpu: {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        devices.append(f"cuda:{index}: {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _checkpoints() -> tuple[list[dict[str, str]], list[str]]:
    """Name and path of each checkpoint that is here, and what is wrong with them."""
    try:
        from audiosep import hub

        found = [{"name": str(c["name"]), "path": str(c.get("path", ""))} for c in hub.list_checkpoints()]
    except Exception as error:  # a doctor reports what others raise
        return [], [f"checkpoints can't be listed: {error}"]
    return found, [] if found else ["no checkpoints are here; see: audiosep models import --help"]
