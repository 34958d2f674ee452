"""What `audiosep blind` does: read a recording of channels, find its sources, write them and a page about them."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from audiosep import audio, blind, report
from audiosep.blind import blocks
from audiosep.blind.base import RecordingError
from audiosep.errors import AudioError, UsageError
from audiosep.progress import Callback

Array = NDArray[np.float64]

METHODS = {
    "sobi": "SOBI",
    "amuse": "AMUSE",
    "jade": "JADE",
    "fastica": "FastICA",
    "picard": "Picard",
    "ar-flow-vae": "ARFlowVAE",
    "gp-vae": "GPVAE",
    "skr-vae": "SKRVAE",
    "stradiff": "StrADiff",
    "auxiva": "AuxIVA",
    "ilrma": "ILRMA",
    "fastmnmf2": "FastMNMF2",
}
ROOMS = ("auxiva", "ilrma", "fastmnmf2")  # they separate the recording that they are fitted to, whole
TABLES = {".csv": ",", ".tsv": "\t", ".txt": None}  # None: white space


# Numbers in a recording above which it stays on disk and is separated in blocks: smoothing takes many times its memory.
LONG = 20_000_000
UNEVEN = 0.05  # of the mean step: in times rounded to few digits
SHORT = 30  # rows below which a signal may rise evenly by chance
LINES = 50_000  # of a table that are read at once
SHOWN = 2_000_000  # numbers of a long recording's sources that are on the page
# What this command writes into its folder, perhaps with more sources or as another kind in an earlier run.
OURS = re.compile(r"source_\d+\.\w+|sources(_std)?\.\w+|mixing\.csv")


@dataclass(frozen=True)
class Recording:
    """samples (T, m), long ones mapped from disk; the channels' names and samples per second, if any; info of audio."""

    samples: Array
    names: tuple[str, ...] = ()
    rate: float | None = None
    info: audio.AudioInfo | None = None


def run(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: str = "sobi",
    n_sources: int | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    progress: Callback | None = None,
) -> dict[str, Any]:
    """Separate the recording at `path`; write its sources and report.html into the folder `out`.

    options are the estimator's parameters. Returns facts, with the written files as "files".
    Raises UsageError for an unknown method or option, AudioError or RecordingError for the recording.
    """
    with tempfile.TemporaryDirectory(prefix="audiosep-", ignore_cleanup_errors=True) as scratch:
        recording = read(path, Path(scratch))
        _check(recording, os.fspath(path))
        estimator = build(method, n_sources, options or {}, seed)
        if progress is not None and hasattr(estimator, "progress"):
            estimator.progress = progress
        start = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sources = _separate(estimator, method, recording, Path(scratch))
            seconds = time.monotonic() - start
            written = write(Path(path), Path(out), recording, estimator, sources)
        told = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        facts = _facts(estimator, method, recording, seconds)
        facts["warnings"] = list(dict.fromkeys([*told, *_left_over(Path(out), written)]))
        facts["files"] = [os.fspath(p) for p in written]
        page = Path(out) / "report.html"
        _write_page(page, Path(path).name, facts, recording, estimator, sources)
    return {**facts, "page": os.fspath(page)}


def _check(recording: Recording, name: str) -> None:
    """A RecordingError if there is a single channel, or a column that counts the rows."""
    if recording.samples.shape[1] == 1:
        raise RecordingError(
            f"{name} has one channel (mono), and blind separation compares channels: at least two are needed "
            "(`audiosep separate` takes recordings of one)"
        )
    if recording.info is not None:
        return
    rows = np.asarray(recording.samples[:LINES], dtype=np.float64)
    steps = np.diff(rows, axis=0)
    even = np.abs(steps - steps.mean(0)).max(0, initial=0) <= UNEVEN * np.abs(steps.mean(0))
    if len(rows) >= SHORT and (even & (steps.mean(0) != 0)).any():
        column = int(np.flatnonzero(even & (steps.mean(0) != 0))[0])
        title = f"{column + 1} ({recording.names[column]})" if recording.names else f"{column + 1}"
        raise RecordingError(
            f"column {title} of {name} rises or falls by the same step from row to row, as times and row numbers do: "
            "leave it out of the file, as it is no signal"
        )


def _left_over(out: Path, written: Sequence[Path]) -> list[str]:
    """A warning that names the sources of an earlier run in the folder, if any."""
    names = sorted({p.name for p in out.iterdir() if OURS.fullmatch(p.name)} - {p.name for p in written})
    return [f"{out} also holds {', '.join(names)} of an earlier run"] if names else []


def _separate(estimator: Any, method: str, recording: Recording, scratch: Path) -> Array:
    """Fit, and the sources (T, n): those fitted, or of a long recording those found block by block, on disk."""
    X = recording.samples
    if X.size <= LONG:
        return np.asarray(estimator.fit(X).sources_)
    if method in ROOMS:
        raise UsageError(
            f"{method} separates whole recordings only, and {X.shape[0]} samples of {X.shape[1]} channels are too long "
            f"for it (at most {LONG // X.shape[1]}): cut it, or take another method"
        )
    blocks.fit_to_stretches(estimator, X)
    sources = np.memmap(scratch / "sources", np.float64, "w+", shape=(len(X), estimator.n_sources_))
    blocks.transform_in_blocks(estimator, X, sources)
    return sources


def build(method: str, n_sources: int | None, options: dict[str, Any], seed: int) -> Any:
    """The estimator of that name with these parameters."""
    if method not in METHODS:
        raise UsageError(f"method is {', '.join(METHODS)}, got {method!r}")
    estimator = getattr(blind, METHODS[method])(n_sources, random_state=seed)
    known = set(estimator.get_params()) - {"n_sources", "random_state"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(f"{method} has no option {unknown[0]}; it has {', '.join(sorted(known)) or 'none'}")
    return estimator.set_params(**options)


def parse(settings: Sequence[str]) -> dict[str, Any]:
    """Options from the command line: "name=value" each, the value as in JSON or else a word."""
    options = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise UsageError(f"{setting!r} is not NAME=VALUE")
        try:
            options[name.strip().replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            options[name.strip().replace("-", "_")] = value
    return options


def read(path: str | os.PathLike[str], scratch: Path | None = None) -> Recording:
    """A recording of one of these kinds: audio; csv, tsv, txt with a column per channel; npy; mat; edf.

    Long audio and tables are unpacked into the folder `scratch`, if there is one, and mapped from there.
    """
    source = Path(path)
    reader = READERS.get(source.suffix.lower())
    if reader is None:
        return _read_audio(source, scratch)
    if not source.is_file():
        raise AudioError(f"{source}: no such file")
    try:
        return reader(source, scratch)
    except UsageError:
        raise
    except Exception as error:  # of whatever kind the file made the format's reader stumble
        raise AudioError(f"{source}: can't be read: {' '.join(str(error).split())}") from error


def _gathered(parts: Iterable[NDArray[Any]], scratch: Path | None) -> Array:
    """All rows of the parts (n, m): in memory, or past LONG numbers in a file of scratch."""
    parts = iter(parts)
    first: list[NDArray[Any]] = []
    while sum(part.size for part in first) <= LONG or scratch is None:
        part = next(parts, None)
        if part is None:
            return np.concatenate(first).astype(np.float64)
        first.append(part)
    assert scratch is not None
    path = scratch / "recording"
    with path.open("wb") as file:
        for part in chain(first, parts):
            file.write(np.ascontiguousarray(part).tobytes())
    return np.memmap(path, first[0].dtype, "r").reshape(-1, first[0].shape[1])


def _read_audio(path: Path, scratch: Path | None) -> Recording:
    with audio.open_reader(path) as reader:
        samples = _gathered((block.T for block in reader.blocks(audio.BLOCK)), scratch)
        return Recording(samples, rate=reader.info.sample_rate, info=reader.info)


def _read_table(path: Path, scratch: Path | None) -> Recording:
    delimiter = TABLES[path.suffix.lower()]
    with path.open(encoding="utf-8-sig") as file:
        first = file.readline().strip()
    if not first:
        raise ValueError("the file is empty, or begins with an empty line")
    if delimiter == "," and "," not in first and ";" in first:
        raise ValueError("its columns are divided by semicolons; commas are needed")
    cells = [cell.strip().strip('"') for cell in first.split(delimiter)]
    named = not any(_is_number(cell) for cell in cells)
    samples = _gathered(_parts_of_table(path, delimiter, named), scratch)
    return Recording(samples, tuple(cells) if named else ())


def _parts_of_table(path: Path, delimiter: str | None, named: bool) -> Iterator[Array]:
    with path.open(encoding="utf-8-sig") as file:
        if named:
            file.readline()
        before = int(named)
        while lines := list(islice(file, LINES)):
            try:
                yield np.loadtxt(lines, delimiter=delimiter, ndmin=2)
            except ValueError as error:
                where = f"lines {before + 1} to {before + len(lines)}, rows counted from there"
                raise ValueError(f"{where}: {error}; every cell has to be a number") from error
            before += len(lines)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_npy(path: Path, scratch: Path | None) -> Recording:
    mapped = path.stat().st_size > LONG
    return Recording(_two_axes(np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)))


def _read_mat(path: Path, scratch: Path | None) -> Recording:
    from scipy.io import loadmat

    try:
        found = loadmat(path)
    except NotImplementedError as error:
        raise ValueError("files of MATLAB 7.3 are HDF5; save it with the option -v7") from error
    arrays = {k: v for k, v in found.items() if not k.startswith("__") and getattr(v, "ndim", 0) == 2}
    numbers = {k: v for k, v in arrays.items() if v.dtype.kind in "fiuc" and v.size > 1}
    if len(numbers) != 1:
        raise ValueError(f"a mat file with one matrix is needed, this has {sorted(numbers) or 'none'}")
    return Recording(_two_axes(next(iter(numbers.values()))))


def _edfio() -> Any:
    try:
        return import_module("edfio")
    except ModuleNotFoundError as error:
        raise UsageError("edf files need edfio: pip install 'audiosep[blind]'") from error


def _read_edf(path: Path, scratch: Path | None) -> Recording:
    signals = _edfio().read_edf(path).signals
    rates = {signal.sampling_frequency for signal in signals}
    if len(rates) != 1:
        raise ValueError(f"channels of one sampling rate are needed, these have {sorted(rates) or 'none'} Hz")
    return Recording(np.stack([s.data for s in signals], axis=1), tuple(s.label for s in signals), rates.pop())


def _two_axes(values: NDArray[Any]) -> Array:
    if values.ndim != 2:
        raise ValueError(f"rows are samples and columns channels; this has shape {values.shape}")
    if values.dtype.kind not in "fiu":
        raise ValueError(f"holds {values.dtype}, not real numbers")
    return values if values.size > LONG else values.astype(np.float64)


# How files of each kind are read; all others are audio.
READERS: dict[str, Callable[[Path, Path | None], Recording]] = {
    **dict.fromkeys(TABLES, _read_table),
    ".npy": _read_npy,
    ".mat": _read_mat,
    ".edf": _read_edf,
}


def write(path: Path, out: Path, recording: Recording, estimator: Any, sources: Array) -> list[Path]:
    """The sources (T, n) as files of the recording's kind, their deviations, and the mixing matrix as csv.

    Deviations of audio are sources_std.npy (T, n), at the level of the source files: samples of a wave round them.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AudioError(f"{out}: can't be written: {error.strerror}") from error
    written = []
    deviations = getattr(estimator, "sources_std_", np.empty(0))
    whole = deviations.shape == sources.shape  # not those of stretches
    if recording.info is not None:
        suffix = path.suffix.lower().lstrip(".")
        suffix = suffix if suffix in audio.FORMATS else "wav"
        subtype = audio.subtype_for(recording.info, suffix)
        for j, level in enumerate(levels(estimator)):
            written.append(out / f"source_{j + 1}.{suffix}")
            _write_wave(written[-1], sources[:, j], level, recording.info.sample_rate, subtype)
        if whole:
            written.append(_write_array(out / "sources_std.npy", deviations * levels(estimator)))
    else:
        written.append(_write_array(out / f"sources{path.suffix.lower()}", sources, recording.rate))
        if whole:
            written.append(_write_array(out / f"sources_std{path.suffix.lower()}", deviations, recording.rate))
    if hasattr(estimator, "mixing_"):
        written.append(_write_array(out / "mixing.csv", estimator.mixing_))
    return written


def levels(estimator: Any) -> Array:
    """What the sources are multiplied by to sound as in the channel where each is strongest: (n,)."""
    if not hasattr(estimator, "mixing_"):  # those for rooms keep the level of the first channel
        return np.ones(estimator.n_sources_)
    return np.asarray(np.abs(estimator.mixing_).max(0))


def _write_wave(path: Path, source: Array, level: float, rate: int, subtype: str) -> None:
    with audio.Writer(path, rate, 1, subtype=subtype, frames=len(source)) as writer:
        for begin in range(0, len(source), audio.BLOCK):
            writer.write(level * source[None, begin : begin + audio.BLOCK])
    if writer.clipped:
        warnings.warn(f"{path.name}: {writer.clipped} samples beyond full scale were limited", stacklevel=3)


def _write_array(path: Path, values: Array, rate: float | None = None) -> Path:
    try:
        if path.suffix == ".npy":
            np.save(path, values)
        elif path.suffix == ".mat":
            from scipy.io import savemat

            savemat(path, {path.stem: values})
        elif path.suffix == ".edf":
            edfio = _edfio()
            labels = [f"source {j}" for j in range(1, values.shape[1] + 1)]
            edfio.Edf([edfio.EdfSignal(v, rate, label=label) for label, v in zip(labels, values.T)]).write(path)
        else:
            delimiter = TABLES[path.suffix] or " "
            header = delimiter.join(f"source_{j}" for j in range(1, values.shape[1] + 1))
            np.savetxt(path, values, fmt="%.9g", delimiter=delimiter, header=header, comments="")
    except OSError as error:
        raise AudioError(f"{path}: can't be written: {error.strerror}") from error
    except ValueError as error:  # what the format can't hold
        raise AudioError(f"{path}: can't be written: {' '.join(str(error).split())}") from error
    return path


def _facts(estimator: Any, method: str, recording: Recording, seconds: float) -> dict[str, Any]:
    samples, channels = recording.samples.shape
    facts: dict[str, Any] = {
        "method": method,
        "samples": samples,
        "channels": channels,
        "sources": estimator.n_sources_,
        "seconds": seconds,
        "iterations": estimator.n_iter_,
    }
    for name in ("init_", "noise_", "elbo_"):
        value = getattr(estimator, name, None)
        if value is not None and value == value:  # NaN is what wasn't estimated, and no JSON
            facts[name.rstrip("_")] = value
    for name in ("length_scales_", "periods_", "ar_coef_", "innovation_std_", "rho_", "df_"):
        if hasattr(estimator, name):
            facts[name.rstrip("_").replace("_", " ")] = [float(v) for v in getattr(estimator, name)]
    if hasattr(estimator, "mixing_"):
        names = recording.names or [f"channel {i}" for i in range(channels)]
        facts["mixing"] = {name: [float(v) for v in row] for name, row in zip(names, estimator.mixing_)}
    return facts


def _write_page(
    path: Path, name: str, facts: dict[str, Any], recording: Recording, estimator: Any, sources: Array
) -> None:
    whole = sources.size <= LONG
    shown = sources if whole else sources[: SHOWN // sources.shape[1]]
    if not whole:
        facts = {**facts, "below": f"the first {len(shown)} samples"}
    end, unit = (len(shown) / recording.rate, "s") if recording.rate else (float(len(shown)), "samples")
    deviations = getattr(estimator, "sources_std_", None) if whole else None
    tracks, plots, spectra = [], [], []
    for j, source in enumerate(shown.T):
        label = f"source {j + 1}"
        bands = {}
        if deviations is not None:
            reach = 1.96 * deviations[:, j]
            bands = {label: (source - reach, source + reach)}
        band = "its 95 % band" if getattr(estimator, "bands_hold_", True) else "a band far too narrow (see warnings)"
        plots.append(report.Plot(f"{label}, with {band}" if bands else label, {label: source}, unit, end, bands))
        if recording.info:
            tracks.append((label, levels(estimator)[j] * source[None], recording.info.sample_rate))
        else:
            spectra.append(report.Spectrum(f"{label}, spectrogram", source, recording.rate))
    if hasattr(estimator, "loss_curve_"):
        plots.append(report.Plot("loss", {"loss": estimator.loss_curve_}, "iterations", estimator.n_iter_))
        for key, trace in estimator.traces_.items():
            columns = trace.T if trace.ndim == 2 else trace[None]
            curves = {f"source {j + 1}" if trace.ndim == 2 else key: column for j, column in enumerate(columns)}
            title = key.rstrip("_").replace("_", " ")
            plots.append(report.Plot(title, curves, "iterations", estimator.n_iter_))
    report.write_page(path, f"Sources of {name}", facts, tracks, plots, spectra=spectra)
