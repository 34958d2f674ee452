"""Train a prior or a supervised network from a recipe: what `audiosep.train` doesn't know.

A recipe's tables are keyword arguments: [prior] of `Prior`, [backbone] and [schedule] of what their `name` says in
`hub`, [data] of `read_manifest` and `SourceDataset`, [train] of `train.Options`, [probe] of `Probe`, [card] of the
model card. A run of `fit(tables, "my-prior")` leaves the checkpoint in `my-prior`, and its log, its state, samples to
listen to and TensorBoard's files in `my-prior.run`.

A recipe of a tagger has [tagger] of `Tagger` and `TaggedMixtures`, with `of`, the prior whose classes it is to know,
and `tasks`; its [probe] is of `TaggerProbe`. That of a refiner has [refiner] of `Refiner` and `Stems` with the same
two, and its [probe] is of `RefinerProbe`. A recipe of a supervised network has [expert] of `Expert` and [network] of
what its `name` says in `hub` in place of the prior's tables; its [data] is of `read_manifest` and `MixtureDataset`, its
[probe] of `ExpertProbe`. One of NMF source models has [nmf] of `fit_nmf`, [data] and [card].
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audiosep import distributed, hub, report, train
from audiosep.baselines import fit_nmf
from audiosep.data import KINDS, Item, MixtureDataset, SourceDataset, Undecoded, class_names, parse_task, read_manifest
from audiosep.errors import AudioError, UsageError, at_least
from audiosep.evaluate import score
from audiosep.metrics import si_sdr
from audiosep.mixing import best_permutation
from audiosep.prior import Prior, precision
from audiosep.progress import Callback
from audiosep.recipe import build, check_tables, check_type
from audiosep.refiner import SUFFIX, Refiner, Stems, read_stems
from audiosep.separator import REFINE, Separator, choose_device
from audiosep.supervised.expert import Expert
from audiosep.tagger import COUNTS, TaggedMixtures, Tagger, leaked

__all__ = ["ExpertProbe", "Probe", "build_expert", "build_prior", "draw", "fit", "run_folder"]

TABLES = ("prior", "backbone", "schedule", "data", "train", "probe", "card")
TAGGER_TABLES = ("tagger", "data", "train", "probe", "card")
REFINER_TABLES = ("refiner", "data", "train", "probe", "card")
EXPERT_TABLES = ("expert", "network", "data", "train", "probe", "card")
MANIFEST = {"manifest": "str", "root": "str", "kind": "str", "least": "int"}  # keys of [data] not SourceDataset's
LOSS = ("label_dropout", "focus")  # keys of [prior] that are of its loss, not of its config
SHARES = ("alone", "masked")  # what [tagger] says of `TaggedMixtures`
STEMS = ("folder", "separated", "unnamed", "joined", "equaliser", "speed")  # what [refiner] says of `Stems`
REFINED_TASKS = ("1speech+1sound", "2sound", "1speech+1sound", "1speech+2sound", "3sound")
TAGGED_TASKS = ("1speech", "1sound", "2speech", "1speech+1sound", "2sound", "1speech+2sound", "3sound")
FOREVER = 2**40  # windows of a run whose budget is time

log = logging.getLogger("audiosep.fit")


def fit(
    tables: Mapping[str, Any],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    stop_minutes: float | None = None,
    progress: Callback | None = None,
) -> dict[str, Any]:
    """Train what a recipe describes and write its checkpoint to `out`; arguments and result as of `train.train`.

    Args:
        overwrite: replace a checkpoint in `out` that no run beside it has made.

    Raises:
        UsageError: a key of the recipe that nothing takes, a value that doesn't fit, a device that is not there.
    """
    out = Path(out)
    choose_device(device)
    run = run_folder(out)
    if (out / hub.CONFIG).exists():
        if not overwrite and not (run / train.STATE).exists():
            raise UsageError(
                f"{out} is a checkpoint that no run beside it has made; choose another -o, or say --overwrite"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there and not a checkpoint; choose another -o")
    how = {"resume": resume, "device": device, "stop_minutes": stop_minutes, "progress": progress}
    if "tagger" in tables:
        return _fit_tagger(tables, out, **how)
    if "refiner" in tables:
        return _fit_refiner(tables, out, **how)
    if "nmf" in tables:
        return _fit_nmf(tables, out, progress)
    return _fit_expert(tables, out, **how) if "expert" in tables else _fit_prior(tables, out, **how)


def _fit_prior(tables: Mapping[str, Any], out: Path, **how: Any) -> dict[str, Any]:
    check_tables(tables, TABLES)
    options = build(train.Options, tables.get("train", {}), "train")
    data = _Data(tables)
    classes = data.classes()
    torch.manual_seed(options.seed)
    prior = build_prior(tables, classes)
    windows = data.windows(data.train, (options.max_steps or FOREVER) * options.batch_size, options.seed, prior)
    probe = build(Probe, tables.get("probe", {}), "probe", data=data, prior=prior, folder=run_folder(out))
    card = build(_card, tables.get("card", {}), "card")
    started = _started(tables.get("prior", {}).get("start"))

    def save(average: torch.nn.Module, facts: dict[str, Any]) -> None:
        assert isinstance(average, Prior)
        rows = train.read_log(run_folder(out))
        made = {"metrics": probe.metrics(rows), "training": _facts(options, windows, facts, average)}
        if facts["final"]:
            made["cost"] = _cost(average, windows.segment)
        hub.save_prior(average, out, {**data.card(), **card, **made})

    return train.train(
        prior,
        windows,
        run_folder(out),
        options,
        save=save,
        probe=probe,
        level=lambda batch: prior.steps_of(batch["index"]) / (len(prior.schedule) - 1),
        about=_about("prior", prior, data, windows) | {f"prior.{name}": getattr(prior, name) for name in LOSS},
        start=started,
        **how,
    )


def _fit_expert(tables: Mapping[str, Any], out: Path, **how: Any) -> dict[str, Any]:
    check_tables(tables, EXPERT_TABLES)
    options = build(train.Options, tables.get("train", {}), "train")
    torch.manual_seed(options.seed)
    expert = build_expert(tables)
    data = _Data(tables, kind=None)
    count = (options.max_steps or FOREVER) * options.batch_size
    mixtures = data.mixtures(data.train, expert, count, options.seed)
    probe = build(ExpertProbe, tables.get("probe", {}), "probe", data=data, expert=expert)
    card = build(_card, tables.get("card", {}), "card")

    def save(average: torch.nn.Module, facts: dict[str, Any]) -> None:
        rows = probe.metrics(train.read_log(run_folder(out)))
        facts = _facts(options, mixtures, facts, average)
        hub.save_model(average, out, {**data.card(), **card, "metrics": rows, "training": facts})

    return train.train(
        expert,
        mixtures,
        run_folder(out),
        options,
        save=save,
        probe=probe,
        about=_about("expert", expert, data, mixtures),
        **how,
    )


def _fit_tagger(tables: Mapping[str, Any], out: Path, **how: Any) -> dict[str, Any]:
    check_tables(tables, TAGGER_TABLES)
    options = build(train.Options, tables.get("train", {}), "train")
    torch.manual_seed(options.seed)
    table = dict(tables["tagger"])
    prior, tasks = _named_by(table, "tagger", TAGGED_TASKS)
    shares = {name: table.pop(name, 0.0) for name in SHARES}
    for name, share in shares.items():
        check_type("float", share, f"tagger.{name}")
    start = table.pop("start", None)
    tagger = build(Tagger, table, "tagger", classes=prior.classes, sample_rate=prior.sample_rate)
    started = _start_model(tagger, "tagger", start)
    data = _Data(tables, kind=None)
    mixtures = data.tagged(data.train, tagger, tasks, _each(options, tasks), options.seed, **shares)
    probe = build(TaggerProbe, tables.get("probe", {}), "probe", data=data, tagger=tagger, tasks=tasks)
    card = build(_card, tables.get("card", {}), "card")

    def save(average: torch.nn.Module, facts: dict[str, Any]) -> None:
        assert isinstance(average, Tagger)
        rows = train.read_log(run_folder(out))
        average.threshold = probe.last(rows).get("threshold", tagger.threshold)
        facts = _facts(options, mixtures, facts, average)
        hub.save_model(average, out, {**data.card(), **card, "metrics": probe.metrics(rows), "training": facts})

    about = _about("tagger", tagger, data, mixtures) | {"tasks": list(tasks)} | shares
    return train.train(
        tagger, mixtures, run_folder(out), options, save=save, probe=probe, about=about, start=started, **how
    )


def _fit_refiner(tables: Mapping[str, Any], out: Path, **how: Any) -> dict[str, Any]:
    check_tables(tables, REFINER_TABLES)
    options = build(train.Options, tables.get("train", {}), "train")
    torch.manual_seed(options.seed)
    table = dict(tables["refiner"])
    prior, tasks = _named_by(table, "refiner", REFINED_TASKS)
    shares = {name: table.pop(name) for name in STEMS if name in table}
    start = table.pop("start", None)
    refiner = build(Refiner, table, "refiner", classes=prior.classes, sample_rate=prior.sample_rate)
    started = _start_model(refiner, "refiner", start)
    data = _Data(tables, kind=None)
    stems = data.stems(data.train, refiner, tasks, _each(options, tasks), options.seed, **shares)
    probe = build(RefinerProbe, tables.get("probe", {}), "probe")
    card = build(_card, tables.get("card", {}), "card")

    def save(average: torch.nn.Module, facts: dict[str, Any]) -> None:
        rows = probe.metrics(train.read_log(run_folder(out)))
        facts = _facts(options, stems, facts, average)
        hub.save_model(average, out, {**data.card(), **card, "metrics": rows, "training": facts})

    about = _about("refiner", refiner, data, stems) | {"tasks": list(tasks)} | shares
    return train.train(
        refiner, stems, run_folder(out), options, save=save, probe=probe, about=about, start=started, **how
    )


def _named_by(table: dict[str, Any], name: str, tasks: Sequence[str]) -> tuple[Prior, Sequence[str]]:
    """Takes `of` and `tasks` from a recipe's table `name`: the prior whose classes are meant, and the tasks."""
    of, tasks = table.pop("of", "sound"), table.pop("tasks", tasks)
    check_type("str", of, f"{name}.of")
    check_type("list[str]", tasks, f"{name}.tasks")
    if not tasks:
        raise UsageError(f"{name}.tasks is a list of what the mixtures hold, as in 1speech+1sound, got none")
    return hub.load_prior(of), tasks


def _each(options: train.Options, tasks: Sequence[str]) -> int:
    """How many mixtures of each task a run takes at most."""
    return -(-(options.max_steps or FOREVER) * options.batch_size // len(tasks))


def _fit_nmf(tables: Mapping[str, Any], out: Path, progress: Callback | None) -> dict[str, Any]:
    check_tables(tables, ("nmf", "data", "card"))
    data = _Data(tables, kind=None)
    if data.table:
        raise UsageError(f"data.{min(data.table)}: no such setting; [data] takes manifest, root, kind")
    card = build(_card, tables.get("card", {}), "card")
    model = build(fit_nmf, tables["nmf"], "nmf", items=data.train, progress=progress)
    hub.save_model(model, out, {**data.card(), **card})
    return {"step": 0, "finished": True}


def run_folder(out: str | Path) -> Path:
    """Where the run of a checkpoint keeps its state and its log; UsageError where it would have no name."""
    if Path(out).name in ("", ".."):
        raise UsageError(f"{out} has no name that a run's folder could have; choose another -o")
    return Path(out).with_name(f"{Path(out).name}.run")


def build_prior(tables: Mapping[str, Any], classes: Sequence[str]) -> Prior:
    """The prior of a recipe: untrained, or with the weights of the checkpoint that `prior.start` names."""
    table = dict(tables.get("prior", {}))
    start = table.pop("start", None)
    check_type("str | None", start, "prior.start")
    more = {} if "num_classes" in tables.get("backbone", {}) else {"num_classes": len(classes)}
    backbone = _named(hub.BACKBONES, tables, "backbone", "triple_path_unet", **more)
    if len(classes) > backbone.num_classes:
        raise UsageError(f"backbone.num_classes is {backbone.num_classes}, the recordings have {len(classes)} classes")
    schedule = _named(hub.SCHEDULES, tables, "schedule", "ve")
    prior = build(Prior, table, "prior", backbone=backbone, schedule=schedule, classes=classes)
    if start is not None:
        _start(prior, hub.load_prior(start), start)
    return prior


def build_expert(tables: Mapping[str, Any]) -> Expert:
    """The untrained supervised network of a recipe; its number of outputs follows from the task."""
    table = dict(tables.get("expert", {}))
    if "task" not in table:
        raise UsageError("expert.task is missing: what the mixtures hold, as in 1speech+1sound")
    n_sources = sum(parse_task(table["task"]))
    network = _named(hub.NETWORKS, tables, "network", "conv_tasnet", n_sources=n_sources)
    return build(Expert, table, "expert", network=network)


def _start(prior: Prior, other: Prior, name: str) -> None:
    """Take over the weights of `other`; classes by their names, one that it doesn't know begins as its null class."""
    mine, theirs = _settled(prior), _settled(other)
    differs = [
        f"{key} = {theirs.get(key)!r}, the recipe has {mine.get(key)!r}"
        for key in mine | theirs
        if mine.get(key) != theirs.get(key)
    ]
    if differs:
        raise UsageError(f"prior.start: {name} was trained with {'; '.join(differs)}: set what {name} has")
    known = {label.casefold(): i for i, label in enumerate(other.classes)}
    rows = [known.get(label.casefold(), other.null) for label in prior.classes]
    rows += [other.null] * (prior.null + 1 - len(rows))
    weights = {
        key: value[rows] if key.startswith("class_embeddings.") else value
        for key, value in other.backbone.state_dict().items()
    }
    prior.backbone.load_state_dict(weights)


def _settled(prior: Prior) -> dict[str, Any]:
    """What a prior's weights are for: with other settings they may fit, and be told wrong noise levels."""
    config = prior.config
    settings = {f"prior.{key}": config[key] for key in ("sample_rate", "level", "parameterization")}
    settings |= {f"{part}.{key}": value for part in ("schedule", "backbone") for key, value in config[part].items()}
    del settings["backbone.num_classes"]
    return settings


def _start_model(model: Tagger | Refiner, name: str, start: str | None) -> dict[str, Any]:
    """Take over the weights of the checkpoint `start`, and a tagger's threshold; what the card says of it.

    It must be what the recipe describes, a tagger's loss aside.
    """
    check_type("str | None", start, f"{name}.start")
    if start is None:
        return {}
    other = hub.load_model(start)
    own = {key: value for key, value in model.config.items() if key in ("threshold", "among")}
    if type(other) is not type(model) or other.config | own != model.config:
        raise UsageError(f"{name}.start: {start} is no {name} of the recipe's classes and settings")
    model.load_state_dict(other.state_dict())
    if isinstance(model, Tagger) and isinstance(other, Tagger):
        model.threshold = other.threshold
    return _started(start)


def _started(name: str | None) -> dict[str, Any]:
    """What the card says of the checkpoint that training began with, and of its own training."""
    if name is None:
        return {}
    config = hub.read_config(hub.find(name))
    before = config.get("training", {}).get("steps")
    return {
        "started from": f"{Path(name).name} ({config['sha256'][:12]})",
        **({"steps before": before} if before else {}),
    }


def _named(makers: Mapping[str, Any], tables: Mapping[str, Any], table: str, default: str, **more: Any) -> Any:
    arguments = dict(tables.get(table, {}))
    name = arguments.pop("name", default)
    check_type("str", name, f"{table}.name")
    if name not in makers:
        raise UsageError(f"{table}.name is one of {', '.join(makers)}, got {name!r}")
    return build(makers[name], arguments, table, **more)


def _about(
    name: str,
    model: Prior | Expert | Tagger | Refiner,
    data: _Data,
    items: SourceDataset | MixtureDataset | TaggedMixtures | Stems,
) -> dict[str, Any]:
    """What a run that goes on must have as it had it: else the card would tell of the last settings alone."""
    about = {name: model.config, "recordings": data.fingerprint()}
    about |= {f"data.{key}": value for key, value in items.settings.items()}
    plain: dict[str, Any] = json.loads(json.dumps(about))
    return plain


class _Data:
    """The recordings that a recipe's [data] names: of one kind for a prior, of all for a supervised network."""

    def __init__(self, tables: Mapping[str, Any], kind: str | None = "sound") -> None:
        self.table = dict(tables.get("data", {}))
        own = [key for key in MANIFEST if key in self.table and (kind or key != "least")]
        self.own = {key: self.table.pop(key) for key in own}
        for key, value in self.own.items():
            check_type(MANIFEST[key], value, f"data.{key}")
        if "manifest" not in self.own:
            raise UsageError("data.manifest is missing: the file that a recipe's prepare.py writes")
        named = tables.get("prior", {}).get("kind")
        self.kind = self.own.get("kind", named if named in KINDS else kind)
        self.train = self.items("train")
        try:
            self.valid = self.items("valid")
        except UsageError as error:
            log.warning("no held-out losses: %s", error)
            self.valid = []

    def items(self, split: str, kind: str | None = None) -> list[Item]:
        return read_manifest(self.own["manifest"], self.own.get("root"), split, kind or self.kind)

    def classes(self) -> list[str]:
        return build(
            class_names, {key: self.own[key] for key in ("least",) if key in self.own}, "data", items=self.train
        )

    def windows(self, items: Sequence[Item], count: int, seed: int, prior: Prior) -> SourceDataset:
        return build(
            SourceDataset,
            self.table,
            "data",
            items=items,
            count=count,
            seed=seed,
            sample_rate=prior.sample_rate,
            classes=prior.classes,
        )

    def mixtures(self, items: Sequence[Item], expert: Expert, count: int, seed: int) -> MixtureDataset:
        return build(
            MixtureDataset,
            self.table,
            "data",
            items=items,
            task=expert.task,
            count=count,
            seed=seed,
            sample_rate=expert.sample_rate,
            skip=Undecoded(items),
        )

    def tagged(
        self,
        items: Sequence[Item],
        tagger: Tagger,
        tasks: Sequence[str],
        count: int,
        seed: int,
        **shares: float,
    ) -> TaggedMixtures:
        """Mixtures of the tagger's classes, `count` of each task; `shares` are `TaggedMixtures`' own."""
        return TaggedMixtures(self._of_tasks(items, tagger, tasks, count, seed), tagger.labels, **shares)

    def stems(
        self, items: Sequence[Item], refiner: Refiner, tasks: Sequence[str], count: int, seed: int, **shares: Any
    ) -> Stems:
        """Stems of the refiner's classes, `count` of each task; `shares` are `Stems`' own."""
        datasets = self._of_tasks(items, refiner, tasks, count, seed)
        return build(Stems, shares, "refiner", datasets=datasets, refiner=refiner)

    def _of_tasks(
        self, items: Sequence[Item], model: Tagger | Refiner, tasks: Sequence[str], count: int, seed: int
    ) -> list[MixtureDataset]:
        common = {"items": items, "count": count, "classes": model.classes, "sample_rate": model.sample_rate}
        common["skip"] = Undecoded(items)
        # A task that is named twice is to give other mixtures the second time.
        return [
            build(MixtureDataset, self.table, "data", task=task, seed=seed + k, **common)
            for k, task in enumerate(tasks)
        ]

    def fingerprint(self) -> str:
        names = "\n".join(f"{item.label} {item.id} {item.duration}" for item in self.train)
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    def card(self) -> dict[str, Any]:
        """What the model card says of the recordings, unless the recipe says more."""
        hours = sum(item.duration for item in self.train) / 3600
        labels = len({item.label for item in self.train})
        name = Path(self.own["manifest"]).name
        return {"data": f"{len(self.train)} recordings, {hours:.2f} h, {labels} labels (train split of {name})"}


class Probe:
    """Where a run is going: the denoising loss of held-out windows by noise level, samples, a separation score (of one
    posterior sample each, where the separator takes the mean of several).

    Args:
        windows: held-out windows.
        levels: noise levels at which their loss is taken, evenly spaced in the steps of the schedule.
        samples: sounds drawn from the prior, in `samples/` as a page of spectrograms and players.
        steps: network evaluations per sample.
        mixtures: held-out mixtures that are separated.
        partner: a checkpoint of the other kind: mixtures are then one speech and one sound, else two of the own kind.
        batch: windows in one forward pass.
    """

    def __init__(
        self,
        data: _Data,
        prior: Prior,
        folder: Path,
        windows: int = 32,
        levels: int = 8,
        samples: int = 4,
        steps: int = 50,
        mixtures: int = 4,
        partner: str | None = None,
        batch: int = 8,
    ) -> None:
        at_least(0, windows=windows, samples=samples, mixtures=mixtures)
        at_least(1, levels=levels, steps=steps, batch=batch)
        self.folder, self.samples, self.steps, self.batch = folder / "samples", samples, steps, batch
        self.segment = float(data.table.get("segment", 4.0))
        assert data.kind is not None
        self.kind = data.kind
        self.partner: Prior | None = None
        top = len(prior.schedule) - 1
        self.levels = [top * (k + 0.5) / levels for k in range(levels)]
        self.windows: list[dict[str, Any]] = []
        if data.valid and windows:
            self.windows = _held_out("no held-out losses", data.windows, data.valid, windows, 0, prior)
        self.mixtures: list[dict[str, Any]] = []
        self.named = False
        if data.valid and mixtures:
            self._mix(data, prior, mixtures, partner)

    def __call__(self, average: torch.nn.Module, step: int, board: Any) -> dict[str, float]:
        assert isinstance(average, Prior)
        found = {f"denoising_{k}": loss for k, loss in enumerate(self._losses(average))}
        if found:
            found["denoising"] = sum(found.values()) / len(found)
        if self.samples:
            self._draw(average, step, board)
        if self.mixtures:
            found["si_sdr"] = self._separate(average)
        return found

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows of the model card from the last probe in the log."""
        probed = [row for row in rows if any(key.startswith("probe/") for key in row)]
        if not probed:
            return []
        last = {key.removeprefix("probe/"): value for key, value in probed[-1].items()}
        table = [
            {"metric": f"held-out denoising loss at step {t:.0f} of the schedule", "value": last[f"denoising_{k}"]}
            for k, t in enumerate(self.levels)
            if f"denoising_{k}" in last
        ]
        if "denoising" in last:
            table.append({"metric": "the same, mean", "value": last["denoising"]})
        if "si_sdr" in last and self.mixtures:
            what = f"SI-SDR in dB, {self.task}, {len(self.mixtures)} held-out mixtures"
            table.append({"metric": what, "value": last["si_sdr"]})
        return table

    def _mix(self, data: _Data, prior: Prior, count: int, partner: str | None) -> None:
        items, self.task = list(data.valid), f"2{self.kind}"
        known: Sequence[str] = prior.classes
        self.named = bool(partner) or (self.kind == "sound" and bool(known))
        if partner:
            other = next(kind for kind in KINDS if kind != self.kind)
            self.partner, self.task = hub.load_prior(partner), "1speech+1sound"
            items += data.items("valid", other)
            known = (*prior.classes, *self.partner.classes)
        self.known = {name.casefold() for name in known}
        make = partial(MixtureDataset, classes=known or None, skip=Undecoded(items))
        self.mixtures = _held_out(
            "no separation score", make, items, self.task, count, 0, self.segment, prior.sample_rate
        )

    @torch.no_grad()
    def _losses(self, prior: Prior) -> list[float]:
        device = next(prior.parameters()).device
        losses = []
        for k, t in enumerate(self.levels if self.windows else []):
            generator = torch.Generator(device).manual_seed(k)
            total = 0.0
            for first in range(0, len(self.windows), self.batch):
                rows = self.windows[first : first + self.batch]
                wave = torch.stack([row["wave"] for row in rows]).to(device)
                label = torch.tensor([row["label"] for row in rows], device=device)
                steps = torch.full((len(rows),), t, dtype=torch.float64)
                loss = prior.loss_at({"wave": wave, "label": label}, steps, None, generator)
                total += float(loss.sum())
            losses.append(total / len(self.windows))
        return losses

    def _draw(self, prior: Prior, step: int, board: Any) -> None:
        spread = max(1, len(prior.classes) // self.samples)
        labels = [(k * spread) if k * spread < len(prior.classes) else prior.null for k in range(self.samples)]
        waves = draw(prior, labels, round(self.segment * prior.sample_rate), self.steps).cpu()
        names = [prior.classes[label] if label < len(prior.classes) else prior.kind for label in labels]
        tracks = [(name, wave[None].numpy(), prior.sample_rate) for name, wave in zip(names, waves)]
        self.folder.mkdir(parents=True, exist_ok=True)
        page = self.folder / f"step-{step:07d}.html"
        report.write_page(page, f"Samples at step {step}", {"step": step, "evaluations": self.steps}, tracks)
        for k, (name, wave, rate) in enumerate(tracks):
            picture = report.mel_picture(wave, rate)[::-1]
            shown = (picture - picture.max()) / report.RANGE_DB + 1
            board.add_image(f"samples/{k}_{name}", shown.clip(0, 1)[None], step)
            board.add_audio(f"samples/{k}_{name}", wave, step, rate)

    def _separate(self, prior: Prior) -> float:
        """Mean SI-SDR; as named where names tell the sources apart, otherwise in the best order."""
        priors = {self.kind: prior}
        if self.partner is not None:
            priors[next(kind for kind in KINDS if kind != self.kind)] = self.partner
        separator = Separator(priors, samples=1, device=next(prior.parameters()).device)
        scores = []
        for item in self.mixtures:
            asked = [self._name(name) for name in item["names"]]
            result = separator(item["mixture"][None], prior.sample_rate, sources=asked)
            estimates = torch.stack([torch.as_tensor(stem)[0] for stem in result.sources.values()])
            found = score(estimates.cpu(), item["sources"], item["mixture"])
            scores += found["si_sdr" if self.named else "si_sdr_permuted"]
        return sum(scores) / len(scores)

    def _name(self, name: str) -> str:
        """What to ask a separator for: a class that a prior knows, or any sound."""
        return name if name == "speech" or name.casefold() in self.known else "sound"


class ExpertProbe:
    """Where a supervised run is going: SI-SDR on held-out mixtures.

    Args:
        mixtures: held-out mixtures; 0 for none.
        batch: mixtures in one forward pass.
    """

    def __init__(self, data: _Data, expert: Expert, mixtures: int = 32, batch: int = 4) -> None:
        at_least(0, mixtures=mixtures)
        at_least(1, batch=batch)
        self.batch, self.task = batch, expert.task
        self.mixtures: list[dict[str, Any]] = []
        if data.valid and mixtures:
            self.mixtures = _held_out("no held-out scores", data.mixtures, data.valid, expert, mixtures, 0)

    @torch.no_grad()
    def __call__(self, average: torch.nn.Module, step: int, board: Any) -> dict[str, float]:
        assert isinstance(average, Expert)
        if not self.mixtures:
            return {}
        device = next(average.parameters()).device
        total = torch.zeros(2)
        for first in range(0, len(self.mixtures), self.batch):
            rows = self.mixtures[first : first + self.batch]
            mixture = torch.stack([row["mixture"] for row in rows]).to(device)
            sources = torch.stack([row["sources"] for row in rows]).to(device)
            scores = average.scores(average(mixture).float(), sources)
            before = average.scores(mixture[:, None].expand_as(sources), sources)
            total += torch.stack((scores.mean(1), (scores - before).mean(1))).sum(1).cpu()
        score, gain = (total / len(self.mixtures)).tolist()
        return {"si_sdr": score, "si_sdri": gain}

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows of the model card from the last probe in the log."""
        probed = [row for row in rows if "probe/si_sdr" in row]
        if not probed or not self.mixtures:
            return []
        what = f"{self.task}, {len(self.mixtures)} held-out mixtures, dB"
        return [
            {"metric": f"{name}, {what}", "value": probed[-1][f"probe/{key}"]}
            for name, key in (("SI-SDR", "si_sdr"), ("SI-SDRi", "si_sdri"))
        ]


class RefinerProbe:
    """What a refiner adds to held-out stems, in dB of SI-SDR, labels fixed.

    Args:
        folder: of stems that `refiner.write_stems` wrote; None for none.
        share: of the field by which they are moved.
    """

    def __init__(self, folder: str | None = None, share: float = REFINE) -> None:
        self.share = share
        self.files = [] if folder is None else sorted(Path(folder).glob(f"*{SUFFIX}"))
        if folder is not None and not self.files:
            raise UsageError(f"probe.folder: no stems in {folder}; recipes/open16k/stems.py writes some")
        if not 0 <= share <= 1:
            raise UsageError(f"share lies in 0..1, got {share}")

    @torch.no_grad()
    def __call__(self, average: torch.nn.Module, step: int, board: Any) -> dict[str, float]:
        assert isinstance(average, Refiner)
        device = next(average.parameters()).device
        found: dict[str, list[float]] = {}
        for path in self.files:
            rows = read_stems(path, average)
            for stems, sources, names in (rows[k] for k in range(len(rows))):
                before, labels = stems[None].to(device), average.numbers(names)[None].to(device)
                (after,) = average.refine([before], labels, self.share)
                scores = [si_sdr(x[0].cpu(), sources).mean().item() for x in (before, after)]
                task = path.name.partition(".")[0]
                found.setdefault(f"si_sdr/{task}", []).append(scores[1])
                found.setdefault(f"gain/{task}", []).append(scores[1] - scores[0])
        return {name: statistics.mean(values) for name, values in found.items()}

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows of the model card from the last probe in the log."""
        probed = [row for row in rows if any(key.startswith("probe/gain") for key in row)]
        last = probed[-1] if probed else {}
        return [
            {"metric": f"SI-SDR of held-out stems, {task}: dB gained", "value": last[key]}
            for key in last
            if (task := key.removeprefix("probe/gain/")) != key
        ]


class TaggerProbe:
    """How well a tagger names the sources of held-out mixtures, as `-s auto` does, and stems, as a separator does.

    Two sources at least are named. The threshold is the one that calls most classes rightly, less the wrong ones, on
    every second mixture; the others are scored with it, and counted when it tells all their stems of sounds apart,
    given the classes, though each stem holds the other sources 10 dB fainter, as a separator leaves them.

    Args:
        mixtures: held-out mixtures of each task; 0 for none.
        batch: mixtures in one forward pass.
    """

    def __init__(self, data: _Data, tagger: Tagger, tasks: Sequence[str], mixtures: int = 40, batch: int = 16) -> None:
        at_least(1, batch=batch)
        if mixtures < 0 or mixtures == 1:
            raise UsageError(f"mixtures is 0, or at least 2: half of them choose the threshold, got {mixtures}")
        self.batch, self.count = batch, mixtures // 2
        self.tasks = [task for task in dict.fromkeys(tasks) if sum(parse_task(task)) > 1]
        self.mixtures: list[dict[str, Any]] = []
        if data.valid and mixtures and self.tasks:
            self.mixtures = _held_out("no held-out scores", self._heard, data, tagger, mixtures)

    def _heard(self, data: _Data, tagger: Tagger, count: int) -> Iterator[dict[str, Any]]:
        """What is kept of held-out mixtures, task by task; the stems, too, where sounds are to be told apart."""
        mixtures = data.tagged(data.valid, tagger, self.tasks, count, 0)
        for task, dataset in zip(self.tasks, mixtures.datasets):
            for i in range(count):
                item, scored = dataset[i], i % 2 == 1
                row = {"task": task, "scored": scored, "mixture": item["mixture"]}
                row["tags"] = mixtures.tags(item["names"]).bool().tolist()
                if scored and dataset.n_sound > 1:
                    row["names"] = item["names"][dataset.n_speech :]
                    row["stems"] = leaked(item, 10.0)[dataset.n_speech :]
                yield row

    @torch.no_grad()
    def __call__(self, average: torch.nn.Module, step: int, board: Any) -> dict[str, float]:
        assert isinstance(average, Tagger)
        if not self.mixtures:
            return {}
        device = next(average.parameters()).device
        scores: list[list[float]] = []
        for first in range(0, len(self.mixtures), self.batch):
            waves = [item["mixture"] for item in self.mixtures[first : first + self.batch]]
            scores += average(torch.stack(waves).to(device)).float().tolist()
        truth = [item["tags"] for item in self.mixtures]
        tuning = [i for i, item in enumerate(self.mixtures) if not item["scored"]]
        grid = [k / 20 for k in range(2, 20)]

        def gained(threshold: float) -> int:
            """Classes called rightly less those called wrongly."""
            found = [self.compare(average, scores[i], truth[i], threshold) for i in tuning]
            return sum(right - wrong for _, right, wrong, _ in found)

        average.threshold = max(grid, key=gained)
        found = {"threshold": average.threshold}
        for task in self.tasks:
            rest = [i for i, item in enumerate(self.mixtures) if item["task"] == task and item["scored"]]
            compared = [self.compare(average, scores[i], truth[i], average.threshold) for i in rest]
            number, right, wrong, sounds = (sum(column) for column in zip(*compared))
            found[f"number/{task}"] = number / len(rest)
            if sounds:
                found[f"called/{task}"] = (right + wrong) / sounds
                found[f"right/{task}"] = right / max(1, right + wrong)
            if sounds > len(rest):
                found[f"told/{task}"] = sum(self.told(average, self.mixtures[i]) for i in rest) / len(rest)
        return found

    @staticmethod
    def told(tagger: Tagger, item: Mapping[str, Any]) -> bool:
        """Whether the sounds of a mixture are all given to their classes."""
        stems = item["stems"][None].to(next(tagger.parameters()).device)
        return best_permutation(tagger.fits(stems, item["names"]))[0].tolist() == list(range(len(item["names"])))

    @staticmethod
    def compare(
        tagger: Tagger, scores: Sequence[float], tags: Sequence[bool], threshold: float
    ) -> tuple[bool, int, int, int]:
        """Numbers of voices and sounds right; classes called rightly, wrongly; sounds there are."""
        tagger.threshold = threshold
        chosen = tagger.choose(scores, ("speech", "sound", *tagger.classes))
        there = [label for label, tag in zip(tagger.labels, tags) if tag]
        voices = sum(label in COUNTS["speech"] for label in there)
        sounds = sum(label in COUNTS["sound"] for label in there)
        called = [name for name in chosen if name not in COUNTS]
        right = sum(name in there for name in called)
        number = chosen.count("speech") == voices and len(chosen) == voices + sounds
        return number, right, len(called) - right, sounds

    def last(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the log's last probe found."""
        probed = [row for row in rows if "probe/threshold" in row]
        return {key.removeprefix("probe/"): value for key, value in probed[-1].items()} if probed else {}

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rows of the model card from the last probe in the log."""
        last = self.last(rows)
        return [
            {
                "task": task,
                "held-out mixtures": self.count,
                "numbers of voices and sounds right": last[f"number/{task}"],
                "sounds called by a class": last.get(f"called/{task}", ""),
                "rightly": last.get(f"right/{task}", ""),
                "all stems told apart": last.get(f"told/{task}", ""),
            }
            for task in self.tasks
            if f"number/{task}" in last
        ]


@torch.no_grad()
def draw(prior: Prior, labels: Sequence[int], length: int, steps: int = 50, seed: int = 0) -> Tensor:
    """Sounds (B, length) of the prior itself, one per label, by the probability-flow equation in `steps` Euler steps.

    x_next = D + (s_next / s) (x - D), D = E[x_0 | x] (Jiaming Song et al., "Denoising Diffusion Implicit Models", 2020,
    https://arxiv.org/abs/2010.02502, equation 12, in terms of s = sigma / alpha).
    """
    device = next(prior.parameters()).device
    label = torch.tensor(labels, device=device)
    times = torch.linspace(len(prior.schedule) - 1, 0, steps, dtype=torch.float64)
    ratios = [*prior.schedule.ratio_at(times).tolist(), 0.0]
    noise = torch.randn(len(labels), length, generator=torch.Generator().manual_seed(seed))
    x = ratios[0] * noise.to(device)
    for t, s, following in zip(times, ratios, ratios[1:]):
        alpha = float(prior.schedule.alpha_of(torch.tensor(s)))
        clean = prior.denoise(alpha * x, t.expand(len(labels)), label)
        x = clean + following / s * (x - clean)
    return x


def _held_out(without: str, make: Callable[..., Any], *arguments: Any) -> list[dict[str, Any]]:
    """The items that the first process probes with; none, and a warning, where the recordings don't do for them."""
    try:
        items = make(*arguments)
        return list(items) if distributed.rank() == 0 else []
    except (AudioError, UsageError) as error:
        log.warning("%s: %s", without, error)
        return []


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _card(
    title: str | None = None,
    description: str | None = None,
    licence: str | None = None,
    licence_id: str | None = None,
    data: str | None = None,
    attribution: str | list[str] | None = None,
) -> dict[str, Any]:
    """[card]: what `hub.save_prior` writes into the model card."""
    return {key: value for key, value in locals().items() if value is not None}


def _facts(
    options: train.Options,
    items: SourceDataset | MixtureDataset | TaggedMixtures | Stems,
    facts: Mapping[str, Any],
    trained: torch.nn.Module,
) -> dict[str, Any]:
    """The card's section on training."""
    seen = facts["step"] * options.batch_size * items.segment / 3600
    settings = facts["settings"]
    return {
        "steps": facts["step"],
        "windows per step": f"{options.batch_size} of {items.segment:g} s ({seen:.1f} h in all)",
        "optimiser": _since(settings, "AdamW, learning rate {learning_rate:g}, {decay}"),
        "average of the weights": _since(settings, "exponential, {ema:g} a step"),
        "precision": _since(settings, "{precision}"),
        "minutes": facts["seconds"] / 60,
        "device": _device_name(next(trained.parameters()).device),
        **({"recordings left out, as they can't be decoded": len(items.failed)} if items.failed else {}),
        **facts["start"],
    }


def _since(settings: Sequence[tuple[int, Mapping[str, Any]]], form: str) -> str:
    """What a run was set to, and from which step on where that was changed when it was resumed."""
    said = [(first, form.format(**chosen)) for first, chosen in settings]
    changes = [next(same) for _, same in groupby(said, key=lambda row: row[1])]
    return "; ".join(f"from step {first} on {text}" if first else text for first, text in changes)


@torch.no_grad()
def _cost(prior: Prior, seconds: float) -> list[dict[str, Any]]:
    """The card's table of cost: an evaluation of one window, timed, and what those of the default preset come to."""
    device = next(prior.parameters()).device
    separator = Separator({prior.kind: prior}, device=device)
    evaluations = separator.settings["steps"] * separator.samples
    wave = prior.power**0.5 * torch.randn(1, round(seconds * prior.sample_rate), device=device)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        with precision(device, separator.dtype):
            estimate = prior.denoise(wave, torch.zeros(1, dtype=torch.float64))
        estimate.sum().item()  # what a GPU still has to do is waited for
        times.append(time.perf_counter() - began)
    took = statistics.median(times[1:])  # the first one warms up
    return [
        {
            "device": _device_name(device),
            "number format": str(separator.dtype).removeprefix("torch."),
            f"seconds of a network evaluation, {seconds:g} s of a source": f"{took:.3g}",
            "network evaluations per source, default preset": evaluations,
            "real-time factor of these": f"{took * evaluations / seconds:.3g}",
        }
    ]
