"""How well separators work: mixtures of a manifest's clips, a row per mixture as it is scored, a summary.

A recipe names the mixtures and the separators:

    [evaluate]              # keyword arguments of `Plan`
    manifest = "data/open16k.csv"
    tasks = ["1speech+1sound", "2sound"]
    count = 200

    [separators.default]    # `type` is one of MAKERS, the rest its keyword arguments; beside them `tasks` and `count`
    models = "speech,sound" # that it is kept to, and `optional`: left out where its checkpoint isn't there

    [published.paper]       # figures to print beside ours: task -> {column -> number}
    "2sound" = { si_sdr_permuted = 10.44 }

Two SI-SDRs are always given: with the estimates in the order asked for ("fixed", what a user gets who names the
classes), and in the best order ("permuted", as the UnaSDiff paper scores every task). The other scores are taken in the
best order. Every mixture, and the noise of its separation, follows from the recipe's seed and the mixture's number, so
the rows are the same whichever process makes them, and a run that was killed goes on where it was. A row belongs to
everything that it follows from (version, settings, weights, clips); rows of anything else in the file are left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from audiosep import __version__, distributed, hub, metrics, results
from audiosep.baselines import ORACLES
from audiosep.data import MixtureDataset, parse_task, read_manifest
from audiosep.direct import load
from audiosep.errors import AudiosepError, ModelError, UsageError
from audiosep.guidance import FALLS, LARGEST, STEERED
from audiosep.lowrank import LAST, UPDATES, VAGUE
from audiosep.mixing import BANDS, RATE, best_permutation
from audiosep.progress import Callback
from audiosep.recipe import build, check_tables
from audiosep.refiner import BOUND, MOST_SOURCES
from audiosep.separator import (
    AGAIN,
    LEAD,
    LIKENESS,
    RANKS,
    REST_RANK,
    Separates,
    Separation,
    mix_seed,
    restarts_for,
    shares_for,
)

__all__ = ["MAKERS", "Plan", "Unprocessed", "run", "score"]

# Rows hold decibels within +-100: beyond that lies rounding, and JSON has no infinity.
LIMIT_DB = 100.0
TABLES = ("evaluate", "separators", "published")
SPEECH_ONLY = ("pesq", "estoi")


log = logging.getLogger("audiosep.evaluate")


@dataclass(frozen=True)
class Plan:
    """Which mixtures, and what is taken of them: the recipe's [evaluate].

    Args:
        manifest: the clean recordings, as a recipe's `prepare.py` lists them.
        tasks: what each mixture holds, as in "1speech+2sound".
        count: mixtures per task.
        seed: chooses clips, offsets and levels.
        split: of the manifest.
        root: folder that the manifest's paths are relative to; None is the manifest's own.
        segment: seconds of a mixture.
        labels: ask for sounds by their class; otherwise the same sounds are asked for as "sound".
        classes: classes of sound to draw from, or the checkpoint whose classes they are; None is what all separators
            with classes know, or any.
        metrics: scores beside SI-SDR: "sdr", "pesq" and "estoi" (these two of speech).
        stems: keep every separation as FLAC, to be listened to.
        page: separators whose best, median and worst mixtures `report.html` plays; None is the first one.
    """

    manifest: str
    tasks: Sequence[str] = ("1speech+1sound",)
    count: int = 20
    seed: int = 0
    split: str = "test"
    root: str | None = None
    segment: float = 4.0
    labels: bool = True
    classes: Sequence[str] | str | None = None
    metrics: Sequence[str] = ()
    stems: bool = True
    page: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str) or not self.tasks:
            raise UsageError(f'tasks is a list such as ["1speech+1sound"], got {self.tasks!r}')
        for task in self.tasks:
            parse_task(task)
        if self.count < 1:
            raise UsageError(f"count is at least 1, got {self.count}")
        check_metrics(self.metrics)


def check_metrics(names: Any) -> None:
    """UsageError for what isn't a list of scores beside SI-SDR."""
    known = [name for name in metrics.METRICS if name != "si_sdr"]
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UsageError(f'metrics is a list such as ["{known[0]}"], got {names!r}')
    unknown = [str(name) for name in names if name not in known]
    if unknown:
        raise UsageError(f"metrics beside SI-SDR are {', '.join(known)}; got {', '.join(unknown)}")


class Unprocessed:
    """The mixture itself as every source: what any separator has to beat."""

    def __init__(self, sample_rate: int = 16000) -> None:
        self.sample_rate = sample_rate

    def __call__(self, wave: Any, sample_rate: int, sources: Sequence[str] | None = None) -> Separation:
        """The mixture, once per source asked for."""
        stems = {f"{name}_{k}": wave for k, name in enumerate(sources or ())}
        return Separation(stems, sample_rate, wave - wave, {})


class Oracle:
    """An upper bound that takes the references: no separator, and marked wherever it is shown.

    Args:
        mask: one of `baselines.ORACLES`.
        sample_rate: in Hz.
    """

    oracle = True

    def __init__(self, mask: str = "oracle-ratio-mask", sample_rate: int = 16000) -> None:
        if mask not in ORACLES:
            raise UsageError(f"mask is one of {', '.join(ORACLES)}, got {mask!r}")
        self.mask, self.sample_rate = ORACLES[mask], sample_rate

    def __call__(
        self, wave: Tensor, sample_rate: int, sources: Sequence[str] | None = None, references: Tensor | None = None
    ) -> Separation:
        """The masked mixture wave (1, T), with the references (K, T) of the sources."""
        assert references is not None
        stems = self.mask(wave[0], references)
        named = {f"{name}_{k}": stem[None] for k, (name, stem) in enumerate(zip(sources or (), stems))}
        return Separation(named, sample_rate, wave - stems.sum(0), {})


def _checkpoints(
    models: str | Sequence[str] = "speech,sound",
    preset: str = "default",
    sampler: str | None = None,
    steps: int | None = None,
    samples: int | None = None,
    guidance: float | None = None,
    low_rank: float | None = None,
    refine: float | None = None,
    restarts: int | None = None,
    least_noise: float | None = None,
    combine: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    segment: float | None = None,
    overlap: float = 0.25,
    seed: int | None = None,
    consistent: bool = True,
    batch: int | None = None,
    checkpointing: bool | None = None,
    compile: bool = False,
    dtype: str = "auto",
    device: str = "auto",
) -> Separates:
    """What `direct.load` makes of checkpoints: priors with a sampler, or what separates by itself."""
    options = {key: value for key, value in locals().items() if key != "models" and value is not None}
    return load(models, **options)


# `type` in a recipe's [separators.NAME] -> what makes it.
MAKERS: dict[str, Callable[..., Separates]] = {
    "checkpoints": _checkpoints,
    "unprocessed": Unprocessed,
    "oracle": Oracle,
}


@dataclass
class Trial:
    """One separator on one task."""

    name: str
    separator: Separates
    dataset: MixtureDataset
    labels: bool
    metrics: Sequence[str]
    header: dict[str, Any]
    seed: int
    stems: Path | None
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Says which rows are this trial's: a digest of everything that they follow from."""
        return hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def missing(self) -> list[int]:
        """The mixtures that nobody has tried yet."""
        return [i for i in range(len(self.dataset)) if i not in self.rows and i not in self.failed]

    @property
    def ordered(self) -> list[dict[str, Any]]:
        """The rows by mixture."""
        return [self.rows[index] for index in sorted(self.rows)]

    @property
    def errors(self) -> int:
        """Mixtures that could not be separated."""
        return len(self.failed.keys() - self.rows.keys())

    def stem_folder(self, index: int) -> Path | None:
        """Where the estimates of a mixture go, a file each, in the best order."""
        return None if self.stems is None else self.stems / self.key / f"{index:05d}"


def run(
    tables: Mapping[str, Any],
    out: str | Path | None = None,
    progress: Callback | None = None,
    separators: Mapping[str, Separates] | None = None,
) -> list[dict[str, Any]]:
    """Separate and score what a recipe asks for, and return one summary per separator and task.

    Of several processes the first one summarises, when the others have done their shares; these return nothing.

    Args:
        tables: the recipe, see the module's text.
        out: folder for `rows.jsonl`, `stems`, and the summary as JSON, Markdown, CSV and a page; None keeps nothing.
            Rows that are there already are kept, and those of other settings are left alone.
        progress: called with (mixtures done, mixtures in all, what is done).
        separators: name -> separator, beside those of the recipe.

    A mixture that can't be separated is logged, counted in the summary, and tried again by the next run.

    Raises:
        UsageError: a key that nothing takes, a task that the recordings can't give, separators that can't be compared.
        AudiosepError: a separator failed on every mixture of a task; what the others did is summarised before.
    """
    check_tables(tables, TABLES)
    plan = build(Plan, tables.get("evaluate", {}), "evaluate")
    published = tables.get("published", {})
    _check_published(published, plan)
    if distributed.world_size() > 1 and out is None:
        raise UsageError("several processes share their rows in a folder: name one with -o")
    trials = _trials(plan, tables.get("separators", {}), separators or {}, None if out is None else Path(out))
    file = None if out is None else Path(out) / "rows.jsonl"
    if file is not None:
        _read(file, trials)
    for done, total, trial, index in _todo(trials):
        if progress is not None:
            progress(done, total, f"{trial.name}, {trial.header['task']}")
        try:
            row = _row(trial, index)
            trial.rows[index] = row
        except AudiosepError as error:
            log.error("%s", error)
            row = {"run": trial.key, "index": index, "error": str(error)}
            trial.failed[index] = str(error)
        if file is not None:
            _append(file, row)
    if distributed.rank() > 0:
        return []
    if file is not None:
        _wait(file, trials)
    scored = [({**trial.header, "errors": trial.errors}, trial.ordered) for trial in trials if trial.rows]
    summaries = results.summarise(scored)
    if out is not None and scored:
        rows = {(header["separator"], header["task"]): found for header, found in scored}
        results.write(Path(out), summaries, rows, published, _examples(plan, trials))
    for trial in trials:  # after the others' results are written
        if not trial.rows and trial.failed:
            kept = f"; what others did is in {out}" if out is not None and scored else ""
            name, why = f"{trial.name}, {trial.header['task']}", next(iter(trial.failed.values()))
            raise AudiosepError(f"{name}: failed on every mixture: {why}{kept}")
    return summaries


def score(estimates: Tensor, references: Tensor, mixture: Tensor) -> dict[str, Any]:
    """SI-SDRs in dB of estimates (K, T) against references (K, T), lists of K floats.

    `permutation[k]` is the estimate that fits reference k best.
    """
    pairs = _limited(metrics.si_sdr(estimates[:, None], references[None]))
    index = best_permutation(pairs[None])[0]
    return {
        "si_sdr": pairs.diagonal().tolist(),
        "si_sdr_permuted": pairs[index, torch.arange(len(pairs))].tolist(),
        "permutation": index.tolist(),
        "mixture_si_sdr": _limited(metrics.si_sdr(mixture, references)).tolist(),
    }


# What is run --------------------------------------------------------------------------------------


def guidance_facts(step: float) -> dict[str, Any]:
    """What stems that class guidance steered follow from besides the networks."""
    return {
        **({"labels of priors": "none"} if step else {}),
        "step": step,
        "falls": FALLS,
        "ends at noise": STEERED,
        "bands": BANDS,
        "nodes a second": RATE,
        "largest": LARGEST,
    }


def low_rank_facts(share: float, sounds: int, labels: bool) -> dict[str, Any]:
    """The same of low-rank guidance: the last step among several sounds, the rank of one without a class."""
    facts = {"share": share, "ranks": RANKS, "updates": UPDATES, "most noise": VAGUE}
    if sounds > 1:
        return facts | {"last": LAST}
    return facts if labels else facts | {"rest": REST_RANK}


def refinement_facts(share: float, restarts: int | None, again: int, task: str, labels: bool) -> dict[str, Any]:
    """The same of refinement; empty where sources are called alike, or too many: it isn't asked there."""
    voices, sounds = parse_task(task)
    apart = voices < 2 and (labels or sounds < 2) and 1 < voices + sounds <= MOST_SOURCES
    if not share or not apart:
        return {}
    restarts = restarts_for(voices + sounds, restarts)
    facts: dict[str, Any] = {"shares": shares_for(share, restarts, labels), "restarts": restarts}
    if restarts:
        facts["steps"] = again
    return facts if labels else facts | {"bound": BOUND}


def _trials(plan: Plan, tables: Mapping[str, Any], given: Mapping[str, Separates], out: Path | None) -> list[Trial]:
    asked = {name: table for name, table in tables.items() if set(_tasks(name, table, plan)) & set(plan.tasks)}
    if len(asked) < len(tables):
        log.warning("left out, being for other tasks: %s", ", ".join(name for name in tables if name not in asked))
    made = {name: found for name, table in asked.items() if (found := _make(name, table)) is not None}
    separators = {**{name: separator for name, (separator, _) in made.items()}, **given}
    if not separators:
        raise UsageError("no separator to evaluate: the recipe has no table [separators.NAME] for these tasks")
    unknown = set(plan.page or ()) - set(separators) - set(tables)
    if unknown:
        raise UsageError(f"page names separators that the recipe hasn't: {', '.join(sorted(unknown))}")
    rates = {name: separator.sample_rate for name, separator in separators.items()}
    if len(set(rates.values())) > 1:
        raise UsageError(f"separators that are compared must share a sample rate, got {rates}")
    if "pesq" in plan.metrics and set(rates.values()) != {16000}:
        raise UsageError(f"PESQ is of signals at 16000 Hz, the separators' are {rates}; leave it out of metrics")
    items = read_manifest(plan.manifest, plan.root, plan.split)
    classes = _asked_classes(plan) or _shared_classes(separators)
    trials = []
    for task in plan.tasks:
        for name, separator in separators.items():
            own = dict(made[name][1]) if name in made else {}
            if task not in own.pop("tasks", plan.tasks):
                continue
            count = min(plan.count, own.pop("count", plan.count))
            rate = separator.sample_rate
            dataset = MixtureDataset(items, task, count, plan.seed, plan.segment, rate, classes=classes)
            labels = plan.labels and bool(_classes(separator))
            settings = getattr(separator, "settings", None)
            tagged = dataset.n_sound > 0 and (labels or dataset.n_speech > 0)
            classifier = getattr(separator, "classifier", None) if tagged else None
            header = {
                "audiosep": __version__,
                "separator": name,
                "oracle": bool(getattr(separator, "oracle", False)),
                "task": task,
                "seed": plan.seed,
                "segment": plan.segment,
                "labels": labels,
                "metrics": sorted(plan.metrics),
                "options": {key: str(value) for key, value in sorted(own.items())} if settings is None else settings,
                "weights": _hashes(getattr(separator, "priors", {})),
                "items": dataset.fingerprint(),
            }
            own_seed = getattr(separator, "seed", 0)
            if own_seed:
                header["separator's seed"] = own_seed
            if classifier is not None:
                sounds = [f"sound {k}" if labels else "sound" for k in range(dataset.n_sound)]
                header["classifiers"] = _hashes(classifier.asked(["speech"] * dataset.n_speech + sounds))
                header["exchange"] = {"likeness": LIKENESS, "lead": LEAD}
                header["guidance"] = guidance_facts(getattr(separator, "guidance", 0.0))
            share = getattr(separator, "low_rank", 0.0)
            if share and dataset.n_sound:
                header["low rank"] = low_rank_facts(share, dataset.n_sound, labels)
            share, restarts = getattr(separator, "refine", 0.0), getattr(separator, "restarts", 0)
            again = getattr(separator, "again", AGAIN)
            refinement = refinement_facts(share, restarts, again, dataset.task, labels)
            refiner: Any = getattr(separator, "refiner", None) if refinement else None
            if refiner is not None:
                header |= {"refiner": _hashes({"refiner": refiner}), "refinement": refinement}
            stems = out / "stems" if out is not None and plan.stems else None
            seed = mix_seed(plan.seed, own_seed)
            trials.append(Trial(name, separator, dataset, labels, plan.metrics, header, seed, stems))
    return trials


def _tasks(name: str, table: Any, plan: Plan) -> Sequence[str]:
    """The tasks that a separator of the recipe is for."""
    if not isinstance(table, Mapping):
        raise UsageError(f"[separators.{name}] is a table, got {table!r}")
    tasks: Any = table.get("tasks", plan.tasks)
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise UsageError(f'separators.{name}.tasks is a list such as ["2sound"], got {tasks!r}')
    for task in tasks:
        parse_task(task)
    count = table.get("count", 1)
    if type(count) is not int or count < 1:
        raise UsageError(f"separators.{name}.count is a whole number of mixtures, got {count!r}")
    return tasks


def _check_published(published: Mapping[str, Any], plan: Plan) -> None:
    for name, table in published.items():
        if not isinstance(table, Mapping):
            raise UsageError(f"[published.{name}] is a table, got {table!r}")
        for task, row in table.items():
            if task == "note":
                continue
            parse_task(task)
            if not isinstance(row, Mapping):
                raise UsageError(f"published.{name}.{task} is a table of columns, got {row!r}")
            unknown = set(row) - set(results.COLUMNS)
            if unknown:
                raise UsageError(f"published.{name}.{task}: no column {', '.join(sorted(unknown))}")


def _asked_classes(plan: Plan) -> list[str] | None:
    if not isinstance(plan.classes, str):
        return None if plan.classes is None else [name.casefold() for name in plan.classes]
    return [name.casefold() for name in hub.read_config(hub.find(plan.classes)).get("classes", [])]


def _make(name: str, table: Mapping[str, Any]) -> tuple[Separates, dict[str, Any]] | None:
    """A separator and its table; None for an optional one whose checkpoint isn't there."""
    options = dict(table)
    kind, optional = options.pop("type", "checkpoints"), options.pop("optional", False)
    if kind not in MAKERS:
        raise UsageError(f"separators.{name}.type is one of {', '.join(MAKERS)}, got {kind!r}")
    arguments = {key: value for key, value in options.items() if key not in ("count", "tasks")}
    models = arguments.get("models", [])
    for model in (models.split(",") if isinstance(models, str) else models) if optional else ():
        try:
            hub.find(model.strip())
        except ModelError as error:
            log.warning("%s is left out: %s", name, error)
            return None
    return build(MAKERS[kind], arguments, f"separators.{name}"), {**options, "type": kind}


def _classes(separator: Separates) -> list[str]:
    """Class names of the separator's priors; none for a separator without priors or labels."""
    priors = getattr(separator, "priors", {})
    return [name for prior in priors.values() for name in getattr(prior, "classes", ())]


def _shared_classes(separators: Mapping[str, Separates]) -> list[str] | None:
    """Classes that every separator with classes knows, so that all are given the same mixtures; None is any class."""
    known = [{name.casefold() for name in _classes(separator)} for separator in separators.values()]
    known = [names for names in known if names]
    return sorted(set.intersection(*known)) if known else None


def _hashes(models: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of checkpoints: names can get other weights tomorrow."""
    return {name: getattr(model, "origin", {}).get("sha256", "") for name, model in models.items()}


def _todo(trials: Sequence[Trial]) -> Iterator[tuple[int, int, Trial, int]]:
    """(done, in all, trial, mixture): this process's share of what has no row yet.

    What failed before is tried again by the first process, which so need not guess whose failures are old.
    """
    # Shared out before looking at what is done: what another process has done meanwhile must not move the shares.
    every = [(trial, index) for trial in trials for index in range(len(trial.dataset))]
    share = {(trial.key, index) for trial, index in distributed.shard(every)}
    first = distributed.rank() == 0
    todo = []
    for trial, index in every:
        mine = first if index in trial.failed else (trial.key, index) in share
        if mine and index not in trial.rows:
            todo.append((trial, index))
    for done, (trial, index) in enumerate(todo):
        yield done, len(todo), trial, index


def _estimates(trial: Trial, item: Mapping[str, Any], index: int) -> tuple[Tensor, Mapping[str, Any]]:
    """A mixture's sources (K, T) as the separator orders them, the same whenever it is asked, and its report."""
    names, separator = item["names"], trial.separator
    asked = [name if trial.labels or name == "speech" else "sound" for name in names]
    more = {"references": item["sources"]} if trial.header["oracle"] else {}
    with _seeded(separator, mix_seed(trial.seed, index)):
        result = separator(item["mixture"][None], separator.sample_rate, sources=asked, **more)
    stems = [torch.as_tensor(stem)[0].cpu() for stem in result.sources.values()]
    if len(stems) != len(names):
        raise UsageError(f"asked for {len(names)} sources, got {len(stems)}")
    if len({len(stem) for stem in stems}) > 1:
        raise UsageError(f"stems differ in length: {[len(stem) for stem in stems]} samples")
    return torch.stack(stems), result.report


@contextlib.contextmanager
def _seeded(separator: Separates, seed: int) -> Iterator[None]:
    """Another seed for a while, where it takes one: its own says to whom the rows belong."""
    if not hasattr(separator, "seed"):
        yield
        return
    own, separator.seed = separator.seed, seed
    try:
        yield
    finally:
        separator.seed = own


def _row(trial: Trial, index: int) -> dict[str, Any]:
    item = trial.dataset[index]
    names, separator = item["names"], trial.separator
    device = torch.device(getattr(separator, "device", "cpu"))
    _reset_peak(device)
    start = time.perf_counter()
    try:
        estimates, report = _estimates(trial, item, index)
        seconds = time.perf_counter() - start
        scores = score(estimates, item["sources"], item["mixture"])
        ordered = estimates[scores["permutation"]]
        scores |= {
            name: score_one(name, ordered, item["sources"], names, separator.sample_rate) for name in trial.metrics
        }
    except AudiosepError as error:
        clips = ", ".join(item["ids"])
        raise type(error)(f"{trial.name}, mixture {index} ({clips}): {error}") from error
    _keep(trial.stem_folder(index), ordered, names, separator.sample_rate)
    return {
        "run": trial.key,
        "separator": trial.name,
        "task": trial.header["task"],
        "index": index,
        "ids": item["ids"],
        "names": names,
        **scores,
        "evaluations": report.get("network_evaluations"),
        "seconds": seconds,
        "memory_gib": _peak(device),
    }


def score_one(name: str, estimates: Tensor, references: Tensor, names: Sequence[str], rate: int) -> list[float | None]:
    """One metric of each source; None where it is not defined: PESQ and ESTOI of what isn't speech, or is too short."""
    found: list[float | None] = []
    for estimate, reference, source in zip(estimates, references, names):
        if name in SPEECH_ONLY and source != "speech":
            found.append(None)
            continue
        try:
            value = float(metrics.METRICS[name](estimate, reference, rate))
            found.append(max(-LIMIT_DB, min(LIMIT_DB, value)))
        except UsageError as error:
            if "not installed" in str(error):
                raise
            log.warning("%s left out of the %s: %s", source, name.upper(), error)
            found.append(None)
    return found


def _limited(decibels: Tensor) -> Tensor:
    return decibels.clamp(-LIMIT_DB, LIMIT_DB)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the highest resident size


def _peak(device: torch.device) -> float | None:
    """GiB at most since `_reset_peak`: of the GPU, or of the whole process where the system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM:")), None)


# What is kept -------------------------------------------------------------------------------------


def _read(path: Path, trials: Sequence[Trial]) -> None:
    """Give every trial the rows that it has in the file; a line that a killed run left unfinished counts for none."""
    if not path.exists():
        return
    wanted = {trial.key: trial for trial in trials}
    try:
        # A kill can fall into the middle of a character.
        *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error}") from error
    understood = 0
    for line in lines:
        try:
            row = json.loads(line)
            trial, index = wanted.get(row["run"]), row["index"]
        except (ValueError, KeyError, TypeError):
            continue
        understood += 1
        if trial is None or not 0 <= index < len(trial.dataset):
            continue
        if "error" in row:
            trial.failed[index] = row["error"]
        elif "si_sdr_permuted" in row:
            trial.rows[index] = row
    if lines and not understood:
        raise UsageError(f"{path}: not a file of rows; choose another folder")


def _append(path: Path, row: Mapping[str, Any]) -> None:
    """One write per row: several processes may append to one file. A half line before it is closed first.

    Another's row looks like a half line while it is written: an empty line may come of it, which readers pass over.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            close = b"\n" if size and os.pread(handle, 1, size - 1) != b"\n" else b""
            os.write(handle, close + json.dumps(row).encode() + b"\n")
        finally:
            os.close(handle)
    except OSError as error:
        raise UsageError(f"{path}: can't be written: {error}") from error


def _wait(path: Path, trials: Sequence[Trial]) -> None:
    """The first of several processes waits for the others' rows; a launcher ends it when one of them fails."""
    while any(trial.missing for trial in trials):
        time.sleep(0.5)
        _read(path, trials)


def _keep(folder: Path | None, stems: Tensor, names: Sequence[str], rate: int) -> None:
    if folder is None or folder.exists():
        return
    partial = folder.with_suffix(f".{os.getpid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for k, (stem, name) in enumerate(zip(stems.clamp(-1, 1).numpy(), names)):
        safe = re.sub(r"[^\w-]", "_", name)
        soundfile.write(partial / f"{k}_{safe}.flac", stem, rate, format="FLAC", subtype="PCM_16")
    partial.replace(folder)


def _kept(trial: Trial, row: Mapping[str, Any]) -> Tensor:
    """A mixture's estimates (K, T) in the best order: those on the disk, or made again where none were kept."""
    index, names = row["index"], row["names"]
    folder = trial.stem_folder(index)
    assert folder is not None
    if not folder.exists():
        estimates, _ = _estimates(trial, trial.dataset[index], index)
        _keep(folder, estimates[row["permutation"]], names, trial.separator.sample_rate)
    paths = sorted(folder.iterdir(), key=lambda path: int(path.name.split("_")[0]))
    return torch.from_numpy(np.stack([soundfile.read(path, dtype="float32")[0] for path in paths]))


def _examples(plan: Plan, trials: Sequence[Trial]) -> list[results.Example]:
    """Best, median and worst mixture of the separators that the page plays."""
    chosen = [trials[0].name] if plan.page is None else list(plan.page)
    examples = []
    for trial in trials:
        if trial.name not in chosen or not trial.rows or trial.stems is None:
            continue
        ranked = sorted(trial.rows.values(), key=lambda row: sum(row["si_sdr_permuted"]) / len(row["names"]))
        picks = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
        for which, row in picks.items():
            item = trial.dataset[row["index"]]
            title = f"{trial.name}, {trial.header['task']}, {which}"
            examples.append(results.Example(title, row, item, _kept(trial, row), trial.separator.sample_rate))
    return examples
