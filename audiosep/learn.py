"""Learn priors from folders of recordings that are never clean: a TOML file and its folders to checkpoint folders.

    [sources.room]               # arguments of `multiview_start.Source`, but name and prior
    [sources.bird]

    [views.alone]                # a folder of recordings, and the gain of every source in it:
    folder = "recordings/room"   # a number, or a list with a number per channel
    gains = { room = 1.0 }

    [views.both]
    folder = "recordings/room-with-bird"
    gains = { room = 1.0, bird = 1.0 }

    [learn]                      # these may be left out: arguments of `Settings`,
    sample_rate = 8000

    [plan]                       # of `multiview.Plan`,
    max_steps = 800

    [backbone]                   # and as in a training recipe
    name = "wiener"

Recordings are cut into blocks, which are learned from as vectors. What is left out is as in the audio experiment of
recipes/ddprism: blocks of a second, sources that start as spectra of frames of 16 ms, networks of Wiener gains.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audiosep import audio, hub, report
from audiosep.errors import AudioError, UsageError
from audiosep.multiview import LOG, Lap, Plan, doubts, learn
from audiosep.multiview_start import Source, Stage, View
from audiosep.operators import Mixing
from audiosep.prior import Prior
from audiosep.recipe import build, check_tables
from audiosep.samplers import DEFAULT_LEVELS
from audiosep.schedules import ve

__all__ = ["Settings", "read_views", "run", "stages_of"]

TABLES = ("learn", "plan", "backbone", "sources", "views")
LEVEL = -22.5  # dBFS of a source, as the shipped priors have it
SHOWN = 6.0  # seconds of every view on the page
# For signals of that level, whose RMS is 0.075: where `Plan` has settings for vectors of unit size.
PLAN = {
    "sigma_min": 2e-3,
    "sigma_max": 0.22,
    "again": 0.22,
    "steps": 10,
    "corrections": 0,
    "iterations": 3,
    "rows": 20,
    "max_steps": 1500,
    "batch_size": 16,
    "start_laps": 10,
}
SPECTRA = {"covariance": "frames", "components": 16}

log = logging.getLogger("audiosep.learn")


@dataclass(frozen=True)
class Settings:
    """What [learn] may set.

    Args:
        sample_rate: of the priors, in Hz.
        block: samples that are one vector; None: 63 frames, about a second.
        laps: of every stage.
        noise_db: level of the noise that recordings are taken to have, relative to them.
        most: blocks of a view, at most; they are then taken evenly from all of it.
    """

    sample_rate: int = 16000
    block: int | None = None
    laps: int = 2
    noise_db: float = -40.0
    most: int = 20000

    def __post_init__(self) -> None:
        if self.sample_rate < 1000:
            raise UsageError(f"sample_rate is in Hz, 1000 at least, got {self.sample_rate}")
        if self.size < 2 or self.laps < 1 or self.most < 1:
            raise UsageError("laps and most are at least 1, block at least 2")
        if not -80 <= self.noise_db <= 0:
            raise UsageError(
                f"noise_db is from -80 to 0, got {self.noise_db}: with less the equations are not to be solved"
            )

    @property
    def frame(self) -> int:
        """Samples of a frame of 16 ms, an even number."""
        return 2 * round(0.008 * self.sample_rate)

    @property
    def size(self) -> int:
        """Samples of a block."""
        return 63 * self.frame if self.block is None else self.block


def run(
    tables: Mapping[str, Any],
    out: str | Path,
    *,
    device: str = "cpu",
    progress: Callable[[int, int | None, str], None] | None = None,
) -> dict[str, Any]:
    """Learn all sources of a file's tables into checkpoint folders below `out`; goes on where an earlier run stopped.

    Returns:
        Paths of the checkpoints and of the page, recordings left out, and a row per lap.

    Raises:
        UsageError: tables or recordings that don't fit.
        AudiosepError: training or sampling has failed for good.
    """
    check_tables(tables, TABLES)
    for name, table in tables.get("sources", {}).items():
        if not isinstance(table, Mapping):
            raise UsageError(f"sources.{name} is a table, [sources.{name}], got {table!r}")
        if name in ("", ".", "..", "run") or set(name) & set("/\\:"):
            raise UsageError(f"a source named {name!r} can't have a folder of that name in {out}; choose another name")
    out, settings = Path(out), build(Settings, tables.get("learn", {}), "learn")
    plan = build(Plan, {**PLAN, **tables.get("plan", {})}, "plan", device=device)
    names = list(tables.get("sources", {}))
    views, left_out = read_views(tables.get("views", {}), names, settings)
    torch.manual_seed(plan.seed)
    sources = []
    for name in names:
        table = {"centred": True, "frame": settings.frame, **tables["sources"][name]}
        if "covariance" not in table:
            table = SPECTRA | table
        prior = _prior(name, tables.get("backbone", {}), plan, settings)
        sources.append(build(Source, table, f"sources.{name}", name=name, prior=prior))
    stages = stages_of(views, names, settings.laps)
    total = sum(stage.laps for stage in stages)
    warnings = doubts(views)
    for lap in learn(views, sources, stages, plan, out / "run"):
        done = sum(stage.laps for stage in stages[: lap.stage]) + lap.lap
        if progress is not None:
            progress(done, total, f"lap {lap.lap} of {', '.join(stages[lap.stage].learn)}")
        if lap.lap:
            learned = [source for source in sources if source.name in stages[lap.stage].learn]
            for source in learned:
                _save(source, out, views, {"stage": lap.stage, "lap": lap.lap, **lap.facts})
    # The run's own log, since an earlier call may have done some of the laps.
    rows = [json.loads(line) for line in (out / "run" / LOG).read_text().splitlines()]
    page = out / "report.html"
    _write_page(page, views, lap, rows, left_out, warnings, settings)
    return {
        "checkpoints": [str(out / name) for name in names],
        "page": str(page),
        "left_out": left_out,
        "warnings": warnings,
        "laps": rows,
    }


def read_views(
    tables: Mapping[str, Any], names: Sequence[str], settings: Settings
) -> tuple[list[View], dict[str, str]]:
    """The views of [views], at one common level, and what was left out and why.

    Raises UsageError when a view names no gains, unknown sources or has no recording that can be used.
    """
    if not names:
        raise UsageError("no source named: each is a table [sources.NAME]")
    if not tables:
        raise UsageError("no view named: each is a table [views.NAME] with folder and gains")
    blocks: dict[str, Tensor] = {}
    mixings: dict[str, tuple[tuple[str, ...], Tensor]] = {}
    left_out: dict[str, str] = {}
    for name, table in tables.items():
        folder, gains = (table.get(key) for key in ("folder", "gains")) if isinstance(table, Mapping) else (None, None)
        if not isinstance(folder, str) or not isinstance(gains, dict) or not gains or set(table) - {"folder", "gains"}:
            raise UsageError(
                f"[views.{name}] takes folder, a path, and gains, as in gains = {{ {names[0]} = 1.0 }}: "
                "how strongly each source is in its recordings has to be known"
            )
        unknown = set(gains) - set(names)
        if unknown:
            raise UsageError(f"[views.{name}] has gains of {', '.join(sorted(unknown))}: no such source")
        mixings[name] = (tuple(gains), torch.from_numpy(_matrix(name, gains)))
        found, bad = _read_folder(name, Path(folder), len(mixings[name][1]), settings)
        left_out |= bad
        if not len(found):
            reasons = "".join(f"; {path}: {reason}" for path, reason in bad.items())
            raise UsageError(f"[views.{name}]: no recording in {folder} can be used{reasons}")
        blocks[name] = found
    power = {name: float(y.square().mean()) for name, y in blocks.items()}
    # One gain for all views, so that their sources keep their levels: the strongest view has that of its sources.
    loudest = max(power, key=lambda name: power[name])
    expected = float(mixings[loudest][1].square().sum() / len(mixings[loudest][1])) * 10 ** (LEVEL / 10)
    gain = (expected / max(power[loudest], 1e-20)) ** 0.5
    views = []
    for name, y in blocks.items():
        if power[name] < 1e-12:
            raise UsageError(f"[views.{name}]: all recordings in {tables[name]['folder']} are silent")
        noise = 10 ** (settings.noise_db / 20) * gain * max(power[name], 1e-20) ** 0.5
        views.append(View(name, mixings[name][0], gain * y, Mixing(mixings[name][1]), noise))
    for path, reason in left_out.items():
        log.warning("%s: left out: %s", path, reason)
    return views, left_out


def _matrix(view: str, gains: Mapping[str, Any]) -> np.ndarray:
    """A view's gains as a mixing matrix (C, K)."""
    columns = []
    for source, gain in gains.items():
        values = gain if isinstance(gain, list) else [gain]
        if not values or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            raise UsageError(
                f"[views.{view}]: gains are finite numbers, or lists with one per channel, got {source} = {gain!r}"
            )
        columns.append(values)
    if len({len(values) for values in columns}) > 1:
        raise UsageError(f"[views.{view}]: the sources' gains have different numbers of channels")
    matrix = np.array(columns, dtype=float).T
    if not matrix.any():
        raise UsageError(f"[views.{view}]: all gains are 0, so nothing of its sources is in its recordings")
    return matrix


def _read_folder(view: str, folder: Path, channels: int, settings: Settings) -> tuple[Tensor, dict[str, str]]:
    """Blocks (R, C, N) of a folder's recordings, and those left out with the reason."""
    if not folder.exists():
        raise UsageError(f"[views.{view}]: {folder}: no such folder")
    try:
        paths = [path for path, _ in audio.find_audio([folder])]
    except AudioError as error:
        raise UsageError(f"[views.{view}]: {error}") from error
    parts, left_out = [], {}
    for path in paths:
        try:
            wave, rate = audio.read(path)
        except AudioError as error:
            left_out[str(path)] = str(error).removeprefix(f"{path}: ")
            continue
        if not np.isfinite(wave).all():
            left_out[str(path)] = "it holds NaN or infinite samples"
        elif len(wave) != channels:
            left_out[str(path)] = f"it has {len(wave)} channels, the gains are for {channels}"
        elif wave.shape[1] * settings.sample_rate < settings.size * rate:
            left_out[str(path)] = f"it is shorter than a block of {settings.size} samples"
        else:
            low = torch.from_numpy(audio.resample(wave, rate, settings.sample_rate))
            parts.append(low[:, : low.shape[1] // settings.size * settings.size].unfold(1, *[settings.size] * 2))
    if not parts:
        return torch.zeros(0, channels, settings.size), left_out
    rows = torch.cat(parts, 1).transpose(0, 1).contiguous()
    chosen = torch.linspace(0, len(rows) - 1, min(len(rows), settings.most)).round().long()
    return rows[chosen], left_out


def stages_of(views: Sequence[View], names: Sequence[str], laps: int) -> list[Stage]:
    """One source after the other where each has a view that adds nothing else to those before it; else all at once."""
    stages, known = [], set[str]()
    while len(known) < len(names):
        fresh = [(view, set(view.sources) - known) for view in views]
        ready = sorted({next(iter(new)) for _, new in fresh if len(new) == 1})
        if not ready:
            return [Stage(tuple(names), tuple(view.name for view in views), laps)]
        stages.append(Stage((ready[0],), tuple(v.name for v, new in fresh if new == {ready[0]}), laps))
        known.add(ready[0])
    return stages


def _prior(name: str, table: Mapping[str, Any], plan: Plan, settings: Settings) -> Prior:
    """An untrained prior, for the noise levels of the plan and all that `separate` asks for."""
    low, high = DEFAULT_LEVELS
    arguments = dict(table)
    kind = arguments.pop("name", "wiener")
    if kind not in hub.BACKBONES:
        raise UsageError(f"backbone.name is one of {', '.join(hub.BACKBONES)}, got {kind!r}")
    if kind == "wiener":
        arguments = {"n_fft": 4 * settings.frame, "depth": 5, **arguments}
    more = {"mlp": {"dim": settings.size}, "wiener": {}}.get(kind, {"num_classes": 0})
    backbone = build(hub.BACKBONES[kind], arguments, "backbone", **more)
    return Prior(
        backbone,
        ve(200, min(low, plan.sigma_min), max(high, plan.sigma_max)),
        sample_rate=settings.sample_rate,
        level=LEVEL,
        kind=name,
        parameterization=getattr(backbone, "parameterization", "edm"),
    )


def _save(source: Source, out: Path, views: Sequence[View], row: Mapping[str, Any]) -> None:
    assert source.prior is not None
    heard = ", ".join(f"{len(view.y)} blocks of {view.name}" for view in views if source.name in view.sources)
    card = {
        "title": f"{source.name}, learned from mixtures",
        "description": "Learned from recordings in which it is never alone, by expectation maximisation (DDPRISM).",
        "licence": "that of the recordings",
        "data": heard,
        "training": {key: value for key, value in row.items() if not key.startswith(("drawn", "left"))},
    }
    hub.save_prior(source.prior, out / source.name, card, torch.float32)


def _write_page(
    path: Path,
    views: Sequence[View],
    lap: Lap,
    rows: Sequence[Mapping[str, Any]],
    left_out: Mapping[str, str],
    warnings: Sequence[str],
    settings: Settings,
) -> None:
    """Of every view the first seconds, and the sources drawn in them."""
    count = max(1, round(SHOWN * settings.sample_rate / settings.size))
    tracks: list[report.Track] = []
    for view in views:
        if view.name not in lap.samples:
            continue
        y, x = view.y[:count], lap.samples[view.name][:count].nan_to_num(0.0)
        tracks.append((view.name, y.transpose(0, 1).flatten(1).float().numpy(), settings.sample_rate))
        for k, name in enumerate(view.sources):
            tracks.append((f"{view.name}: {name}", x[:, k].flatten()[None].float().numpy(), settings.sample_rate))
    facts = {
        "views": {view.name: f"{len(view.y)} blocks of {', '.join(view.sources)}" for view in views},
        "left out": dict(left_out) or "nothing",
        "warnings": list(warnings) or "none",
        "laps": list(rows),
    }
    report.write_page(path, "Learned from mixtures", facts, tracks)
