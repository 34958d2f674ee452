"""Separate with a model that answers in one pass: supervised networks, NMF source models, spectral gating.

Level, rate, channels, length, alignment of interchangeable stems and the residual are treated as the diffusion
separator treats them: only what happens within a segment differs.

S segments, C channels, K sources, N samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from audiosep import hub
from audiosep.baselines import ORACLES, SpectralGating
from audiosep.errors import UsageError
from audiosep.prior import precision
from audiosep.progress import Callback
from audiosep.refiner import Refiner
from audiosep.separator import (
    SEGMENT,
    SILENCE,
    Job,
    Separator,
    Source,
    choose_device,
    choose_dtype,
    numbered,
)
from audiosep.tagger import Tagger

__all__ = ["Direct", "Model", "load"]

# What only a sampler has.
SAMPLERS_OWN = (
    "preset",
    "sampler",
    "steps",
    "samples",
    "guidance",
    "low_rank",
    "refine",
    "restarts",
    "least_noise",
    "combine",
    "sampling",
    "mixing",
    "checkpointing",
    "compile",
)

# Methods without a checkpoint.
WITHOUT_WEIGHTS = {"spectral-gating": SpectralGating}


class Model(Protocol):
    """Something that separates mixtures of one sample rate.

    Attributes:
        sample_rate: in Hz.
        evaluations: passes through a network per mixture.
        origin: where it was loaded from, for reports.
    """

    sample_rate: int
    evaluations: int
    origin: dict[str, Any]

    def resolve(self, sources: Sequence[str] | None) -> list[str]:
        """What to find, one word per stem (sources of one word can be taken for each other); UsageError if it can't."""
        ...

    def separate(self, mixture: Tensor, kinds: Sequence[str]) -> Tensor:
        """Sources (B, K, N) in the order of `kinds` for mixtures (B, N) of any level."""
        ...


class Direct(Separator):
    """A separator around a model; methods and the other arguments are those of `Separator`.

    Args:
        model: see `Model`.
        name: of the model, for reports.
    """

    def __init__(
        self,
        model: Model,
        name: str = "model",
        *,
        segment: float | None = None,
        overlap: float = 0.25,
        consistent: bool = True,
        batch: int | None = None,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
    ) -> None:
        if not 0 <= overlap <= 0.5:
            raise UsageError(f"overlap must lie in 0..0.5 of a segment, got {overlap}")
        if segment is not None and segment < 0.1:
            raise UsageError(f"segment must be at least 0.1 s, got {segment} s")
        self.device = torch.device(device)
        self.model = model.to(self.device).eval() if isinstance(model, torch.nn.Module) else model
        # The name that a diffusion separator has for its models: evaluation looks there for classes and hashes.
        self.priors = {name: self.model}  # type: ignore[dict-item]
        self.sample_rate = model.sample_rate
        self.segment, self.overlap, self.consistent = segment or SEGMENT, overlap, consistent
        self.batch = batch or (1 if self.device.type == "cpu" else 16)
        self.dtype = choose_dtype("float32" if dtype == "auto" else dtype, self.device)
        self.samples, self.combine, self.seed, self.rank, self.mixing = 1, "mean", 0, False, None
        self.exchanges, self.guidance, self.low_rank = False, 0.0, 0.0
        self.refine, self.restarts = 0.0, 0

    @property
    def settings(self) -> dict[str, Any]:
        """What its stems follow from besides weights and input; plain data."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"segment": self.segment, "overlap": self.overlap, "consistent": self.consistent, "dtype": dtype}

    def resolve(self, sources: Sequence[str] | None) -> list[Source]:
        """Look source names up: a model knows those that it was made for."""
        if isinstance(sources, str):
            sources = sources.split(",")
        return numbered([Source(kind.casefold(), kind, None) for kind in self.model.resolve(sources)])

    def listen(self, blocks: Iterable[np.ndarray], sample_rate: int) -> tuple[list[str], dict[str, Any]]:
        """Refused: a model finds what it was made for."""
        raise UsageError("auto chooses among priors; this model separates what it was made for, leave the sources out")

    def _job(
        self, sources: Sequence[Source], sample_rate: int, frames: int | None, progress: Callback | None, share: bool
    ) -> Job:
        return _Job(self, sources, sample_rate, frames, progress, share)


class _Job(Job):
    separator: Direct

    def _prepare(self) -> int:
        return 1

    def _save_memory(self) -> bool:
        return False

    @torch.no_grad()
    def _draw(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Sources (1, S, K, C, N) of mixtures y (S, C, N), and a score that nothing asks for."""
        count, channels, length = y.shape
        rows = y.flatten(0, 1).to(self.separator.device)
        with precision(self.separator.device, self.separator.dtype):
            x = self.separator.model.separate(rows, [source.prior for source in self.sources]).float()
        silent = rows.square().mean(-1).sqrt() < SILENCE
        x = torch.where(silent[:, None, None], 0.0, x)
        self.done += count
        self.evaluations += len(rows) * self.separator.model.evaluations
        if self.progress is not None:
            self.progress(self.done, self.total, "segments")
        return x.view(1, count, channels, -1, length).transpose(2, 3).cpu(), torch.zeros(1, count)

    def _about(self) -> dict[str, Any]:
        return {"models": {name: {"name": name, **model.origin} for name, model in self.separator.priors.items()}}

    def _about_source(self, k: int) -> dict[str, Any]:
        return {"class": self.sources[k].prior}

    def _doubts(self) -> list[str]:
        return []


def load(names: str | Sequence[str] = "speech,sound", device: str | torch.device = "auto", **options: Any) -> Separator:
    """The separator that checkpoints make: of priors `Separator`, of a model that separates by itself `Direct`.

    Args:
        names: names, folders or Hub ids, a list or one string with commas; or "spectral-gating".
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        options: of `Separator` or `Direct`.

    Raises:
        ModelError: a checkpoint can't be had.
        UsageError: an option that this separator doesn't have, or models that can't be combined.
    """
    names = names.split(",") if isinstance(names, str) else names
    names = [str(name).strip() for name in names]
    for name in set(names) & set(ORACLES):
        raise UsageError(f"{name} needs the true sources: it is an upper bound for evaluations, not a separator")
    alone = [name for name in names if name in WITHOUT_WEIGHTS or not hub.is_prior(name)]
    if not alone:
        return Separator.from_pretrained(names, device, **options)
    if len(names) > 1:
        raise UsageError(f"{alone[0]} separates by itself: it can't be combined with other models")
    options.pop("seed", None)
    for name in SAMPLERS_OWN:
        value = options.pop(name, None)
        off = isinstance(value, int | float) and not value  # False, or no guidance
        if not (value is None or off or (isinstance(value, str) and value == "default")):
            raise UsageError(f"{alone[0]} separates in one pass: it has no {name}")
    model = WITHOUT_WEIGHTS[alone[0]]() if alone[0] in WITHOUT_WEIGHTS else hub.load_model(alone[0])
    if isinstance(model, Tagger):
        raise UsageError(f"{alone[0]} says what a recording or a stem holds: it can't separate")
    if isinstance(model, Refiner):
        raise UsageError(f"{alone[0]} corrects the stems of a mixture: it can't separate")
    return Direct(model, Path(alone[0]).name, device=choose_device(device), **options)
