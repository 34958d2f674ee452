"""Audio source separation with diffusion source priors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from audiosep.errors import AudiosepError
    from audiosep.hub import load_prior
    from audiosep.separator import Separation, Separator

# Public name -> module. Resolved on first use, so that `audiosep --help` need not import torch.
_PUBLIC = {
    "AudiosepError": "audiosep.errors",
    "Separation": "audiosep.separator",
    "Separator": "audiosep.separator",
    "load_prior": "audiosep.hub",
}

__all__ = ["AudiosepError", "Separation", "Separator", "__version__", "load_prior"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'audiosep' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
