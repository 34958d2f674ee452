"""A list of recordings through one separator: which files are written, and one result for each.

A bad file fails alone; the others go on.
"""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, Protocol

import numpy as np

from audiosep import audio, report
from audiosep.errors import AudioError, AudiosepError, ModelError, UsageError
from audiosep.progress import Callback, Display

log = logging.getLogger(__name__)

TEMPLATE = "{track}/{stem}.{ext}"
PAGE_SECONDS = 120.0  # of each track that a page holds: it lies in memory, and in one file


class SeparatesFiles(Protocol):
    """What a batch needs of a separator."""

    def source_names(self, sources: list[str] | None) -> list[str]: ...

    def separate_file(
        self,
        path: Path | str,
        out: Any,
        sources: list[str] | None = None,
        *,
        format: str | None = None,
        subtype: str | None = None,
        residual: bool = False,
        progress: Callback | None = None,
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Options:
    """What is written, and where. `out` "-" sends the first stem to stdout."""

    out: Path = Path("separated")
    model: str = ""
    template: str = TEMPLATE
    sources: list[str] | None = None
    format: str = "wav"
    subtype: str | None = None
    residual: bool = False
    page: bool = False
    existing: str = "refuse"  # or "skip", "overwrite"

    @property
    def to_stdout(self) -> bool:
        """Whether the first stem goes to stdout and nothing else is kept."""
        return os.fspath(self.out) == audio.STDIO

    def path(self, track: str, stem: str, ext: str) -> Path:
        """Where a stem, or a report, of a track goes."""
        name = self.template.format(track=track, stem=_safe(stem), ext=ext)
        return self.out / _safe(self.model) / name


@dataclass(frozen=True)
class Job:
    """One recording and the stems it is to give."""

    source: Path
    track: str
    stems: dict[str, Path]

    @property
    def name(self) -> str:
        """The recording's name for messages."""
        return "stdin" if os.fspath(self.source) == audio.STDIO else audio.printable(self.source)


@dataclass
class Result:
    """What became of one recording."""

    input: str
    status: str  # done, skipped, planned, failed
    stems: dict[str, str] = field(default_factory=dict)
    report: str | None = None
    page: str | None = None
    seconds: float | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)


def check(options: Options) -> None:
    """Raise UsageError if the template, the format or the subtype can't be used."""
    audio.check_format(options.format, options.subtype)
    try:
        fields = {name for _, name, _, _ in Formatter().parse(options.template) if name is not None}
    except ValueError as error:
        raise UsageError(f"--filename {options.template!r}: {error}") from None
    if options.to_stdout and options.sources == ["auto"]:
        raise UsageError("-o - writes the first stem: name it, as in -s speech,dog")
    if not {"stem", "ext"} <= fields or not fields <= {"track", "stem", "ext"}:
        raise UsageError(f"--filename {options.template!r}: must hold {{stem}} and {{ext}}, may hold {{track}}")


def plan(inputs: Sequence[str], stems: list[str], options: Options) -> tuple[list[Job], list[Result]]:
    """The jobs of the inputs (directories are searched), and a failure for each that gives none.

    Raises UsageError if two recordings would be written to the same place.
    """
    if options.to_stdout and (len(inputs) > 1 or Path(inputs[0]).is_dir()):
        raise UsageError("-o - writes one stem of one recording; give a directory for more")
    names = [*stems, "residual"] if options.residual else stems
    jobs, failures, seen = [], [], set()
    for given in inputs:
        try:
            found = audio.find_audio([given])
        except AudioError as error:
            failures.append(Result(given, "failed", error=str(error)))
            continue
        own = (options.out / _safe(options.model)).resolve()
        if Path(given).is_dir():  # without our own stems of an earlier run
            found = [pair for pair in found if not pair[0].resolve().is_relative_to(own)]
            if not found:
                failures.append(Result(given, "failed", error=f"{audio.printable(Path(given))}: holds results only"))
        tracks = Counter(_track(relative) for _, relative in found)
        for source, relative in found:
            if source.resolve() in seen:
                continue  # given twice
            seen.add(source.resolve())
            track = _track(relative)
            if tracks[track] > 1:  # song.wav beside song.flac
                track = relative.as_posix()
            paths = {name: options.path(track, name, options.format) for name in names}
            jobs.append(Job(source, track, paths))
    _check_clashes(jobs, options)
    return jobs, failures


def _check_clashes(jobs: list[Job], options: Options) -> None:
    taken: dict[Path, Job] = {}
    for job in jobs:
        for path in _marks(job, options):
            other = taken.setdefault(path, job)
            if other is not job:
                raise UsageError(
                    f"{other.name} and {job.name} would both be written to {path};"
                    " separate them into two directories (-o)"
                )


def run(
    separator: SeparatesFiles,
    jobs: Sequence[Job],
    options: Options,
    display: Display,
    *,
    parallel: int = 1,
) -> Generator[Result, None, None]:
    """Separate each recording, `parallel` at a time, and yield its result when it is finished.

    UsageError and ModelError concern every file, so they end the run; so does KeyboardInterrupt,
    after which no half-written file is left.
    """
    if parallel == 1 or len(jobs) < 2:
        for job in jobs:
            result = _one(separator, job, options, display.file(job.name))
            display.ended(job.name)
            yield result
        return
    stop = threading.Event()

    def guarded(job: Job) -> Result:
        shown = display.file(job.name)

        def callback(done: int, total: int | None, message: str) -> None:
            if stop.is_set():  # unwinds the writers of this thread, too
                raise KeyboardInterrupt
            shown(done, total, message)

        result = _one(separator, job, options, callback)
        display.ended(job.name)
        return result

    with ThreadPoolExecutor(parallel) as pool:
        try:
            for future in as_completed([pool.submit(guarded, job) for job in jobs]):
                yield future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _one(separator: SeparatesFiles, job: Job, options: Options, progress: Callback) -> Result:
    result = Result(os.fspath(job.source), "done")
    start = time.monotonic()
    try:
        if options.to_stdout:
            _to_stdout(separator, job, options, progress, result)
        elif options.existing == "skip" and _is_done(job, options):
            result.status = "skipped"
            result.stems = {stem: os.fspath(path) for stem, path in job.stems.items()}
        else:
            _to_files(separator, job, options, progress, result)
    except (UsageError, ModelError):
        raise
    except AudioError as error:
        result.status, result.error = "failed", str(error)
    except AudiosepError as error:
        result.status, result.error = "failed", f"{job.name}: {error}"
    except Exception as error:  # one file must not end the batch
        log.debug("%s", job.name, exc_info=True)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        result.status, result.error = "failed", f"{job.name}: {text} (-v shows where)"
    if result.status == "failed":
        result.stems = {}
    result.seconds = round(time.monotonic() - start, 3)
    return result


def _to_files(separator: SeparatesFiles, job: Job, options: Options, progress: Callback, result: Result) -> None:
    written: dict[str, Path] = {}

    def place(stem: str) -> Path:
        path = job.stems.get(stem) or options.path(job.track, stem, options.format)
        _refuse_existing(path, options)
        written[stem] = path
        return path

    for path in job.stems.values():
        _refuse_existing(path, options)
    facts = separator.separate_file(
        job.source,
        place,
        options.sources,
        format=options.format,
        subtype=options.subtype,
        residual=options.residual,
        progress=progress,
    )
    result.stems = {stem: os.fspath(path) for stem, path in written.items()}
    result.notes = _notes(facts)
    json_path = options.path(job.track, "report", "json")
    report.write_json(json_path, facts)
    result.report = os.fspath(json_path)
    if options.page:
        html_path = options.path(job.track, "report", "html")
        _write_page(html_path, job, written, facts)
        result.page = os.fspath(html_path)


def _notes(facts: dict[str, Any]) -> list[str]:
    """The report's notes, and one for each stem that did not fit its integer format."""
    counts = facts.get("clipped_samples", {})
    return facts.get("notes", []) + [
        f"{stem}: {count} samples beyond full scale were limited; --subtype float keeps them"
        for stem, count in counts.items()
        if count
    ]


def _to_stdout(separator: SeparatesFiles, job: Job, options: Options, progress: Callback, result: Result) -> None:
    first = next(iter(job.stems))
    with tempfile.TemporaryDirectory(prefix="audiosep-") as rest:
        facts = separator.separate_file(
            job.source,
            lambda stem: Path("-") if stem == first else Path(rest, f"{_safe(stem)}.wav"),
            options.sources,
            format=options.format,
            subtype=options.subtype,
            residual=options.residual,
            progress=progress,
        )
    result.notes = _notes(facts)


def dry(jobs: Sequence[Job], options: Options) -> Generator[Result, None, None]:
    """What `run` would do, after a look at each recording; nothing is written."""
    for job in jobs:
        stems = {stem: os.fspath(path) for stem, path in job.stems.items()}
        result = Result(os.fspath(job.source), "planned", stems)
        try:
            with audio.open_reader(job.source):
                pass
            if options.existing == "skip" and _is_done(job, options):
                result.status = "skipped"
            elif not options.to_stdout:
                for path in job.stems.values():
                    _refuse_existing(path, options)
        except AudioError as error:
            result = Result(os.fspath(job.source), "failed", error=str(error))
        yield result


def _write_page(path: Path, job: Job, stems: dict[str, Path], facts: dict[str, Any]) -> None:
    tracks = [] if os.fspath(job.source) == audio.STDIO else [("mixture", *_excerpt(job.source))]
    tracks += [(stem, *_excerpt(stem_path)) for stem, stem_path in stems.items()]
    report.write_page(path, job.track, facts, tracks)


def _excerpt(path: Path) -> tuple[np.ndarray, int]:
    """The first PAGE_SECONDS of a recording: (C, T) and its rate."""
    with audio.open_reader(path) as reader:
        rate = reader.info.sample_rate
        return next(reader.blocks(math.ceil(PAGE_SECONDS * rate))), rate


def _is_done(job: Job, options: Options) -> bool:
    return all(path.exists() for path in _marks(job, options))


def _marks(job: Job, options: Options) -> list[Path]:
    """The files that a separation leaves: the stems; the report where they are known once the recording is heard."""
    return list(job.stems.values()) if options.sources != ["auto"] else [options.path(job.track, "report", "json")]


def _refuse_existing(path: Path, options: Options) -> None:
    if options.existing == "refuse" and path.exists():
        raise AudioError(f"{audio.printable(path)}: exists; choose --overwrite, --skip-existing or another -o")


def _track(relative: Path) -> str:
    if os.fspath(relative) == audio.STDIO:
        return "stdin"
    return relative.with_suffix("").as_posix()


def _safe(name: str) -> str:
    """A name of a class or a model as one part of a path."""
    return re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", name).lstrip(".") or "_"
