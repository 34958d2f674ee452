"""One training loop, for anything with `.loss(batch) -> (B,)`.

A run is a pure function of its options: step s takes the items s * batch_size ... of the dataset, whatever the number
of processes or of micro-batches, and each item brings the number (`seed`) that its randomness is drawn from. So a run
that was killed and resumed goes on with the losses of one that was not: on a CPU to the last bit, on a GPU as far as
its kernels are deterministic. Only a budget in minutes depends on the clock.

A run's folder holds `state.safetensors` (weights, their average, the optimiser, the step), `log.jsonl` (a row every
`log_every` steps, and one per probe) and TensorBoard's files. Started with torchrun or `accelerate launch`, the
processes share each step's items.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from audiosep import distributed
from audiosep.compiling import compile_blocks
from audiosep.errors import AudiosepError, UsageError
from audiosep.progress import Callback

__all__ = ["LOG", "STATE", "Options", "read_log", "train"]

STATE, LOG = "state.safetensors", "log.jsonl"
LEVELS = 8  # bins of the noise level in the log
PREFETCH = 2  # batches that a worker prepares ahead, in shared memory
# What options must be at least.
LEAST = dict.fromkeys(("max_steps", "batch_size", "accumulate", "log_every", "save_every"), 1)
LEAST |= dict.fromkeys(("learning_rate", "weight_decay", "warmup", "workers", "seed", "probe_every"), 0)
TOLD = ("learning_rate", "decay", "ema", "precision")  # what a resumed run may change and a card tells of
AGREE = 10  # steps between two agreements of several processes on time and signals

log = logging.getLogger("audiosep.train")

Batch = dict[str, Any]


class Items(Protocol):
    """A dataset: item i is a dict of tensors and numbers."""

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Options:
    """What a recipe's [train] may set.

    Args:
        max_steps: steps of the optimiser.
        max_minutes: minutes of training, over all resumed runs. The schedule follows whichever budget is nearer
            its end.
        batch_size: items per step, over all processes and micro-batches.
        accumulate: micro-batches per step and process.
        learning_rate: of AdamW, after the warm-up.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup: steps over which the learning rate rises from 0.
        decay: "cosine" (to `floor` times the learning rate at the end) or "constant".
        floor: see `decay`.
        clip: largest norm of the gradient.
        ema: decay per step of the average of the weights; shorter while it warms up, (1 + step) / (10 + step).
        precision: "no" (float32), "bf16" or "fp16".
        compile: compile each block with torch.compile.
        workers: processes that read the data, per training process; 0 reads in the training process.
        seed: of the data and of all noise.
        log_every: steps per row of the log.
        save_every: steps between two states on the disk.
        probe_every: steps between two probes, 0 for none.
    """

    max_steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 100
    decay: str = "cosine"
    floor: float = 0.01
    clip: float = 1.0
    ema: float = 0.998
    precision: str = "no"
    compile: bool = False
    workers: int = 0
    seed: int = 0
    log_every: int = 20
    save_every: int = 500
    probe_every: int = 1000

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_minutes is None:
            raise UsageError("max_steps or max_minutes has to be set")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise UsageError(f"{name} is at least {least}, got {value}")
        for name in ("max_minutes", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is above 0, got {value}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas are two numbers in 0..1, below 1, got {list(self.betas)}")
        if not 0 <= self.floor <= 1:
            raise UsageError(f"floor lies in 0..1, got {self.floor}")
        if self.decay not in ("cosine", "constant"):
            raise UsageError(f"decay is 'cosine' or 'constant', got {self.decay!r}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise UsageError(f"precision is 'no', 'bf16' or 'fp16', got {self.precision!r}")
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema lies in 0..1, got {self.ema}")

    def rate(self, step: int, fraction: float) -> float:
        """Learning rate of a step, at a fraction 0..1 of the budget."""
        shape = 1.0
        if self.decay == "cosine":
            shape = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
        return self.learning_rate * shape * min(1.0, (step + 1) / max(1, self.warmup))

    def fraction(self, step: int, seconds: float) -> float:
        """How much of the budget is used up; 1 or more is the end."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        return max(by_steps, seconds / 60 / self.max_minutes if self.max_minutes else 0.0)


def train(
    model: nn.Module,
    dataset: Items,
    folder: str | Path,
    options: Options,
    *,
    save: Callable[[nn.Module, dict[str, Any]], object] | None = None,
    probe: Callable[[nn.Module, int, Any], Mapping[str, float]] | None = None,
    level: Callable[[Batch], Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | None = None,
    resume: bool = False,
    device: str = "auto",
    stop_minutes: float | None = None,
    progress: Callback | None = None,
) -> dict[str, Any]:
    """Train `model` in place and return the last row of the log, with "finished" saying whether the budget is used up.

    SIGINT and SIGTERM end the run after the current step, with its state on the disk.

    Args:
        model: has `loss(batch) -> (B,)`. A batch is what `dataset` gives, collated, with `index` (list of B item
            numbers) and `seed` (list of B 63-bit numbers, for each item's own randomness).
        dataset: item i is a dict; it needs max_steps * batch_size items.
        folder: of the run, see the module's text.
        options: see `Options`.
        save: save(average, facts) writes what others load: called with the averaged weights whenever the state was
            written, and at the end, when facts["final"] is true. facts["start"] is what the run once started from,
            facts["settings"] a list of [step, options], a row for those of `TOLD` that hold from this step on.
        probe: probe(average, step, board) -> numbers for the log; `board` is TensorBoard's writer.
        level: level(batch) -> (B,) noise levels in 0..1: the log then has the loss in 8 bins of it.
        about: facts that a resumed run must share, as JSON types.
        start: facts about the weights that the run starts from, as JSON types; a resumed run keeps its own, and must be
            told the same or none.
        resume: go on from the folder's state, if it has one.
        device: "auto", "cpu" or a device of torch.
        stop_minutes: end this process after so long, to be resumed.
        progress: called with (steps or seconds done, in all, message).

    Raises:
        UsageError: options that don't fit the processes, the data or the state in the folder; a folder of which the
            processes don't see the same state.
        AudiosepError: the loss is not finite; the final state can't be written.
    """
    world = distributed.world_size()
    share = _share(options, world)
    if options.max_steps and len(dataset) < options.max_steps * options.batch_size:
        raise UsageError(
            f"the dataset has {len(dataset)} items, the run needs {options.max_steps * options.batch_size}"
        )
    folder = Path(folder)
    if (folder / STATE).exists() and not resume:
        raise UsageError(f"{folder} holds a run: resume it (--resume), or choose another folder")
    same = {"seed": options.seed, "batch_size": options.batch_size, **(about or {})}
    last = options.max_steps or len(dataset) // options.batch_size
    with _accelerator(options, device) as accelerator:
        run = _Run(model, folder, options, accelerator, same, dict(start or {}), save, probe)
        batches = _batches(dataset, options, share, range(run.step, last), accelerator.device)
        if run.step == 0 and options.probe_every:
            run.examine()
        started, seconds, stopping = run.step, run.seconds(), False
        with _signals() as signalled:
            while True:
                if world == 1 or run.step % AGREE == 0:
                    seconds = run.seconds()
                    stopping = bool(signalled) or (stop_minutes is not None and run.here() > 60 * stop_minutes)
                    if world > 1:
                        seconds, stopping = _agreed(accelerator.device, seconds, stopping)
                fraction = options.fraction(run.step, seconds)
                finished = fraction >= 1 or run.step >= last
                if finished or stopping:
                    break
                run.advance(batches, fraction, level)
                if run.step % options.log_every == 0:
                    run.report()
                if progress is not None and run.main:
                    _show(progress, options, run.step, run.seconds(), run.row)
                if options.probe_every and run.step % options.probe_every == 0:
                    run.examine()
                if run.step % options.save_every == 0:
                    run.keep()
            if finished and options.probe_every and run.step % options.probe_every and run.step > started:
                run.examine()
            run.keep(final=True)
        run.close()
    return {"step": run.step, **run.row, "finished": finished}


class _Run:
    """The parts of a run, and what changes from step to step."""

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        options: Options,
        accelerator: Any,
        same: dict[str, Any],
        start: dict[str, Any],
        save: Callable[[nn.Module, dict[str, Any]], object] | None,
        probe: Callable[[nn.Module, int, Any], Mapping[str, float]] | None,
    ) -> None:
        self.folder, self.options, self.accelerator = folder, options, accelerator
        self.same, self.start = same, start
        self.settings: list[Any] = []
        self.save, self.probe = save, probe
        self.main = distributed.rank() == 0
        self.model = model.to(accelerator.device).train()
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(
            self.trained,
            options.learning_rate,
            options.betas,
            weight_decay=options.weight_decay,
            fused=accelerator.device.type == "cuda",
        )
        self.step, self.earlier, self.log_bytes = 0, 0.0, 0
        self.row: dict[str, float] = {}
        self.sums = torch.zeros(3 + 2 * LEVELS, device=accelerator.device)
        if (folder / STATE).exists():
            self._restore(folder / STATE)
        self._agree()
        chosen = {name: getattr(options, name) for name in TOLD}
        self.settings = [row for row in self.settings if row[0] < self.step]
        if not self.settings or self.settings[-1][1] != chosen:
            self.settings.append([self.step, chosen])
        if options.compile:
            compile_blocks(model)
        self.stepper, self.optimizer = accelerator.prepare(_Loss(model), self.adam)
        # Not before: with several processes the weights lie elsewhere from here on.
        self.averaged, self.weights = _pairs(self.average, model)
        accelerator.wait_for_everyone()
        if self.main:
            folder.mkdir(parents=True, exist_ok=True)
            _cut(folder / LOG, self.log_bytes)
            self.board = _board(folder, self.step)
        self.began = self.window = time.monotonic()
        self.waited, self.aside = 0.0, 0.0

    def here(self) -> float:
        """Seconds in this process."""
        return time.monotonic() - self.began

    def seconds(self) -> float:
        """Seconds of training, in earlier processes too; probes and saving left out."""
        return self.earlier + self.here() - self.aside

    def advance(self, batches: Iterator[Batch], fraction: float, level: Callable[[Batch], Tensor] | None) -> None:
        """One step of the optimiser."""
        options, accelerator = self.options, self.accelerator
        self.rate = options.rate(self.step, fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        for micro in range(options.accumulate):
            asked = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - asked
            last = micro == options.accumulate - 1
            torch.manual_seed(_mixed(options.seed, self.step, micro, distributed.rank()))
            with contextlib.nullcontext() if last else accelerator.no_sync(self.stepper):
                losses = self.stepper(batch)
                accelerator.backward(losses.mean() / options.accumulate)
            _count(self.sums, losses.detach(), None if level is None else level(batch))
        norm = accelerator.clip_grad_norm_(self.trained, options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        _follow(self.averaged, self.weights, min(options.ema, (1 + self.step) / (10 + self.step)))
        self.sums[2] += torch.as_tensor(norm, device=self.sums.device).float() / distributed.world_size()
        self.step += 1

    def report(self) -> None:
        """A row of the log about the steps since the last one."""
        every = self.options.log_every
        row = _row(self.accelerator.reduce(self.sums.clone(), "sum").tolist(), every)
        self.sums.zero_()
        self._check(row["loss"], row["gradient"])
        now = time.monotonic()
        row["learning_rate"] = self.rate
        row["items_per_second"] = every * self.options.batch_size / (now - self.window)
        row["waiting_for_data"] = self.waited / (now - self.window)
        row["minutes"] = self.seconds() / 60
        self.window, self.waited, self.row = now, 0.0, row
        self._record(row)

    def examine(self) -> None:
        """Probe the averaged weights. A probe that fails ends the run at its start only, not after hours."""
        with self._aside():
            if self.probe is not None and self.main:
                try:
                    found = self.probe(self.average, self.step, self.board)
                    self._record({f"probe/{name}": value for name, value in found.items()})
                except Exception as error:
                    if self.step == 0:
                        raise
                    log.warning("step %d can't be probed, training goes on: %s", self.step, error)
                    self._new_board()
            self.accelerator.wait_for_everyone()

    def keep(self, final: bool = False) -> None:
        """Put the state on the disk. Of what can't be written the earlier state stays; at the end it is an error."""
        with self._aside():
            sums = self.accelerator.reduce(self.sums.clone(), "sum") / distributed.world_size()
            self._check(float(sums[1]), float(sums[2]))
            if not self.main:
                return
            scaler = self.accelerator.scaler
            facts = {
                "step": self.step,
                "seconds": self.seconds(),
                "log_bytes": self.log_bytes,
                "sums": sums.tolist(),
                "scaler": {} if scaler is None else scaler.state_dict(),
                "same": self.same,
                "start": self.start,
                "settings": self.settings,
            }
            try:
                _write(self.folder / STATE, _tensors(self.model, self.average, self.adam), facts)
                if self.save is not None:
                    told = {name: facts[name] for name in ("step", "seconds", "start", "settings")}
                    self.save(self.average, {**told, "final": final, **self.row})
            except (OSError, SafetensorError, AudiosepError) as error:
                if final:
                    raise AudiosepError(f"{self.folder}: step {self.step} can't be written: {error}") from error
                log.warning("step %d can't be written, training goes on: %s", self.step, error)

    def close(self) -> None:
        if self.main:
            with contextlib.suppress(OSError):
                self.board.close()

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Time that is not training's: neither its throughput nor its budget."""
        paused = time.monotonic()
        yield
        self.aside += time.monotonic() - paused
        self.window += time.monotonic() - paused

    def _check(self, loss: float, gradient: float) -> None:
        # With fp16 a gradient that overflows is nothing unusual: its step is left out.
        if not math.isfinite(loss) or (math.isnan(gradient) and self.options.precision != "fp16"):
            raise AudiosepError(
                f"step {self.step}: the loss is not finite; the state in {self.folder} is an earlier one: resume it "
                "with a lower learning_rate"
            )

    def _record(self, values: Mapping[str, float]) -> None:
        if not self.main:
            return
        _append(self.folder / LOG, {"step": self.step, **values})
        self.log_bytes = (self.folder / LOG).stat().st_size
        try:
            for name, value in values.items():
                self.board.add_scalar(name, value, self.step)
        except OSError as error:
            log.warning("%s: TensorBoard's file can't be written: %s", self.folder, error)
            self._new_board()

    def _new_board(self) -> None:
        """A writer that has failed once, on a full disk, never writes again."""
        with contextlib.suppress(OSError):
            self.board = _board(self.folder, self.step)

    def _restore(self, path: Path) -> None:
        """Go on from a state; UsageError when it is another run's."""
        facts, tensors = _read(path)
        for key, value in self.same.items():
            have = facts["same"].get(key, value)  # older states tell of less
            if have != value:
                raise UsageError(f"{path}: a run with {key} {have!r}, here {value!r}; it can't go on")
        start = facts.get("start", self.start)
        if self.start and self.start != start:
            raise UsageError(
                f"{path}: a run with start {_words(start)}, here {_words(self.start)}; resume it without start"
            )
        self.start, self.settings = start, facts.get("settings", [])

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        try:
            self.model.load_state_dict(part("model."))
            self.average.load_state_dict(part("average."))
        except RuntimeError as error:
            raise UsageError(f"{path}: the weights of another network: {error}") from error
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in part("adam.").items():
            i, key = name.split(".")
            # The optimiser keeps what it is given, and a part of the file would keep all of it.
            states.setdefault(int(i), {})[key] = value.clone()
        self.adam.load_state_dict({"state": states, "param_groups": self.adam.state_dict()["param_groups"]})
        if self.accelerator.scaler is not None and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.step, self.earlier, self.log_bytes = facts["step"], facts["seconds"], facts["log_bytes"]
        self.sums += torch.tensor(facts["sums"], device=self.sums.device)

    def _agree(self) -> None:
        """UsageError, in all processes, when they don't go on from the same step: they don't see the same state."""
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise UsageError(
                f"{self.folder}: the processes would go on from steps {', '.join(map(str, steps))}; the run's folder "
                f"has to be one that all of them see: share it, or copy the first one's {STATE} to the other machines"
            )


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's log."""
    try:
        return [json.loads(line) for line in (Path(folder) / LOG).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: no log of a run: {error}") from error


class _Loss(nn.Module):
    """`model.loss` as a forward pass: what several processes synchronise, and mixed precision wraps, is `forward`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        loss: Any = self.model.loss
        return loss(batch)


# Processes and devices


@contextlib.contextmanager
def _accelerator(options: Options, device: str) -> Iterator[Any]:
    """Devices, processes and precision; several processes part at the end if they met here."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise UsageError("training needs more packages: pip install 'audiosep[train]'") from error
    import torch.distributed as dist

    met = dist.is_available() and dist.is_initialized()
    if device.startswith("cuda:") and distributed.world_size() == 1:
        torch.cuda.set_device(device)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=options.precision)
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield accelerator
        accelerator.wait_for_everyone()
    finally:
        if dist.is_available() and dist.is_initialized() and not met:
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def _share(options: Options, world: int) -> int:
    """Items of one micro-batch."""
    share, rest = divmod(options.batch_size, world * options.accumulate)
    if rest:
        raise UsageError(
            f"batch_size {options.batch_size} can't be shared by {world} processes x {options.accumulate} micro-batches"
        )
    return share


def _agreed(device: torch.device, seconds: float, stopping: bool) -> tuple[float, bool]:
    """The first process's clock, and whether any process was told to stop."""
    import torch.distributed as dist

    clock = torch.tensor([seconds], device=device, dtype=torch.float32)
    told = torch.tensor([float(stopping)], device=device)
    dist.broadcast(clock, 0)
    dist.all_reduce(told)
    return float(clock), bool(told > 0)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in the list it gives; a second one is acted upon as usual."""
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


# Data


class _Items(Dataset[dict[str, Any]]):
    """Items with their number and the number that their randomness is drawn from."""

    def __init__(self, dataset: Items, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "index": index, "seed": _mixed(self.seed, index)}


def _mixed(*numbers: int) -> int:
    """A 63-bit number that nothing but its arguments decides."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _collate(items: list[dict[str, Any]]) -> Batch:
    numbers = {key: [item.pop(key) for item in items] for key in ("index", "seed")}
    return {**default_collate(items), **numbers}


def _batches(dataset: Items, options: Options, share: int, steps: range, device: torch.device) -> Iterator[Batch]:
    """This process's micro-batches of these steps, on the device."""
    rank, world = distributed.rank(), distributed.world_size()

    def numbers() -> Iterator[list[int]]:
        for step in steps:
            for micro in range(options.accumulate):
                first = step * options.batch_size + (micro * world + rank) * share
                yield list(range(first, first + share))

    on_gpu = device.type == "cuda"
    loader = DataLoader(
        _Items(dataset, options.seed),
        batch_sampler=numbers(),
        num_workers=options.workers,
        collate_fn=_collate,
        pin_memory=on_gpu,
        prefetch_factor=PREFETCH if options.workers else None,
    )
    for batch in loader:
        yield {
            key: value.to(device, non_blocking=on_gpu) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }


# The average


def _pairs(average: nn.Module, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    averaged, weights = average.state_dict(), model.state_dict()
    return list(averaged.values()), [weights[name] for name in averaged]


def _follow(averaged: list[Tensor], weights: list[Tensor], decay: float) -> None:
    """Move the average a step towards the weights; what isn't a real number is copied."""
    real = [i for i, value in enumerate(averaged) if value.is_floating_point()]
    if real:
        torch._foreach_lerp_([averaged[i] for i in real], [weights[i] for i in real], 1 - decay)
    for mine, other in zip(averaged, weights):
        if not mine.is_floating_point():
            mine.copy_(other)


# The log


def _count(sums: Tensor, losses: Tensor, level: Tensor | None) -> None:
    """Add a micro-batch to the sums: items, loss, norm of the gradient; loss and items per bin of the level."""
    sums[0] += len(losses)
    sums[1] += losses.sum()
    if level is not None:
        bins = (level * LEVELS).long().clamp(0, LEVELS - 1)
        member = torch.nn.functional.one_hot(bins, LEVELS).to(losses.device, losses.dtype, non_blocking=True)
        sums[3 : 3 + LEVELS] += losses @ member
        sums[3 + LEVELS :] += member.sum(0)


def _row(sums: list[float], steps: int) -> dict[str, float]:
    row = {"loss": sums[1] / max(1.0, sums[0]), "gradient": sums[2] / steps}
    for i in range(LEVELS):
        if sums[3 + LEVELS + i]:
            row[f"loss/level_{i}"] = sums[3 + i] / sums[3 + LEVELS + i]
    return row


def _show(progress: Callback, options: Options, step: int, seconds: float, row: Mapping[str, float]) -> None:
    loss = f"loss {row['loss']:.4f}, {row['items_per_second']:.0f} items/s" if row else ""
    by_time = options.max_minutes is not None and seconds / 60 / options.max_minutes > step / (
        options.max_steps or 1e18
    )
    if by_time and options.max_minutes is not None:
        progress(int(seconds), int(60 * options.max_minutes), f"step {step}, {loss}")
    else:
        progress(step, options.max_steps, loss)


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("training needs more packages: pip install 'audiosep[train]'") from error
    return SummaryWriter(str(folder), purge_step=step or None)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        os.truncate(path, size)  # no half rows
        log.warning("%s: can't be written: %s", path, error)


def _cut(path: Path, size: int) -> None:
    """Rows after the state that a run resumes from come again."""
    path.touch()
    if path.stat().st_size > size:
        os.truncate(path, size)


# The state


def _words(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items()) or "none"


def _tensors(model: nn.Module, average: nn.Module, adam: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for i, state in adam.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """The whole file or none of it: also when the machine stops half way, also when the disk is full."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(save(dict(tensors), {"state": json.dumps(facts)}))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a state."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["state"])
            return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: not the state of a run: {error}") from error
