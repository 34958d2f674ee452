"""Blind separation: one multichannel recording in, its sources out, as scikit-learn estimators.

X has shape (n_samples, n_channels): rows are time, columns are channels. Needs the `blind` extra.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from audiosep.errors import UsageError

if TYPE_CHECKING:
    from audiosep.blind.ar_flow_vae import ARFlowVAE
    from audiosep.blind.blocks import separate_in_blocks
    from audiosep.blind.classical import AMUSE, JADE, SOBI, FastICA, Picard
    from audiosep.blind.convolutive import ILRMA, AuxIVA, FastMNMF2
    from audiosep.blind.gp_vae import GPVAE
    from audiosep.blind.skr_vae import SKRVAE
    from audiosep.blind.stradiff import StrADiff

# Public name -> module. Resolved on first use: scikit-learn and torch are slow to import.
_PUBLIC = {
    "AMUSE": "audiosep.blind.classical",
    "ARFlowVAE": "audiosep.blind.ar_flow_vae",
    "AuxIVA": "audiosep.blind.convolutive",
    "FastICA": "audiosep.blind.classical",
    "FastMNMF2": "audiosep.blind.convolutive",
    "GPVAE": "audiosep.blind.gp_vae",
    "ILRMA": "audiosep.blind.convolutive",
    "JADE": "audiosep.blind.classical",
    "Picard": "audiosep.blind.classical",
    "SKRVAE": "audiosep.blind.skr_vae",
    "SOBI": "audiosep.blind.classical",
    "StrADiff": "audiosep.blind.stradiff",
    "separate_in_blocks": "audiosep.blind.blocks",
}

__all__ = [
    "AMUSE",
    "GPVAE",
    "ILRMA",
    "JADE",
    "SKRVAE",
    "SOBI",
    "ARFlowVAE",
    "AuxIVA",
    "FastICA",
    "FastMNMF2",
    "Picard",
    "StrADiff",
    "separate_in_blocks",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'audiosep.blind' has no attribute {name!r}")
    try:
        return getattr(import_module(_PUBLIC[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("sklearn", "scipy"):
            raise
        raise UsageError(f"{error.name} is not installed: pip install 'audiosep[blind]'") from error


def __dir__() -> list[str]:
    return sorted(__all__)
