"""What `audiosep blind` does: read a recording of channels, find its sources, write them and a page about them."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from audiosep import audio, blind, report
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
TABLES = {".csv": ",", ".tsv": "\t", ".txt": None}  # None: white space


@dataclass(frozen=True)
class Recording:
    """samples (T, m); the channels' names and samples per second, where they have any; info, for audio."""

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
    recording = read(path)
    estimator = build(method, n_sources, options or {}, seed)
    if progress is not None and hasattr(estimator, "progress"):
        estimator.progress = progress
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator.fit(recording.samples)
    seconds = time.monotonic() - start
    facts = _facts(estimator, method, recording, seconds)
    facts["warnings"] = [str(w.message) for w in caught if w.category.__name__ == "ConvergenceWarning"]
    facts["files"] = [os.fspath(p) for p in write(Path(path), Path(out), recording, estimator)]
    page = Path(out) / "report.html"
    _write_page(page, Path(path).name, facts, recording, estimator)
    return {**facts, "page": os.fspath(page)}


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


def read(path: str | os.PathLike[str]) -> Recording:
    """A recording of one of these kinds: audio; csv, tsv, txt with a column per channel; npy; mat; edf."""
    source = Path(path)
    reader = READERS.get(source.suffix.lower())
    if reader is None:
        return _read_audio(source)
    if not source.is_file():
        raise AudioError(f"{source}: no such file")
    try:
        return reader(source)
    except UsageError:
        raise
    except Exception as error:  # of whatever kind the file made the format's reader stumble
        raise AudioError(f"{source}: can't be read: {' '.join(str(error).split())}") from error


def _read_audio(path: Path) -> Recording:
    with audio.open_reader(path) as reader:
        wave = np.concatenate(list(reader.blocks(audio.BLOCK)), axis=1)
        return Recording(wave.T.astype(np.float64), rate=reader.info.sample_rate, info=reader.info)


def _read_table(path: Path) -> Recording:
    delimiter = TABLES[path.suffix.lower()]
    with path.open(encoding="utf-8-sig") as file:
        first = file.readline().strip()
    cells = [cell.strip().strip('"') for cell in first.split(delimiter)]
    named = not all(_is_number(cell) for cell in cells)
    samples = np.loadtxt(path, delimiter=delimiter, skiprows=int(named), ndmin=2, encoding="utf-8-sig")
    return Recording(samples, tuple(cells) if named else ())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_npy(path: Path) -> Recording:
    return Recording(_two_axes(np.load(path, allow_pickle=False)))


def _read_mat(path: Path) -> Recording:
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


def _read_edf(path: Path) -> Recording:
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
    return values.astype(np.float64)


# How files of each kind are read; all others are audio.
READERS: dict[str, Callable[[Path], Recording]] = {
    **dict.fromkeys(TABLES, _read_table),
    ".npy": _read_npy,
    ".mat": _read_mat,
    ".edf": _read_edf,
}


def write(path: Path, out: Path, recording: Recording, estimator: Any) -> list[Path]:
    """The sources as files of the recording's kind, and the mixing matrix as csv."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AudioError(f"{out}: can't be written: {error.strerror}") from error
    sources = estimator.sources_
    written = []
    if recording.info is not None:
        suffix = path.suffix.lower().lstrip(".")
        suffix = suffix if suffix in audio.FORMATS else "wav"
        subtype = audio.subtype_for(recording.info, suffix)
        for j, wave in enumerate(heard(estimator).T, start=1):
            written.append(out / f"source_{j}.{suffix}")
            audio.write(written[-1], wave[None], recording.info.sample_rate, subtype)
    else:
        written.append(_write_array(out / f"sources{path.suffix.lower()}", sources, recording.rate))
        if hasattr(estimator, "sources_std_"):
            deviations = out / f"sources_std{path.suffix.lower()}"
            written.append(_write_array(deviations, estimator.sources_std_, recording.rate))
    if hasattr(estimator, "mixing_"):
        written.append(_write_array(out / "mixing.csv", estimator.mixing_))
    return written


def heard(estimator: Any) -> Array:
    """The sources (T, n) at the level they have in the channel where each is strongest."""
    if not hasattr(estimator, "mixing_"):  # those for rooms keep the level of the first channel
        return np.asarray(estimator.sources_)
    return np.asarray(estimator.sources_ * np.abs(estimator.mixing_).max(0))


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
    for name in ("length_scales_", "ar_coef_", "innovation_std_", "rho_", "df_"):
        if hasattr(estimator, name):
            facts[name.rstrip("_").replace("_", " ")] = [float(v) for v in getattr(estimator, name)]
    if hasattr(estimator, "mixing_"):
        names = recording.names or [f"channel {i}" for i in range(channels)]
        facts["mixing"] = {name: [float(v) for v in row] for name, row in zip(names, estimator.mixing_)}
    return facts


def _write_page(path: Path, name: str, facts: dict[str, Any], recording: Recording, estimator: Any) -> None:
    samples = len(recording.samples)
    end, unit = (samples / recording.rate, "s") if recording.rate else (float(samples), "samples")
    tracks, plots = [], []
    if recording.info:
        rate = recording.info.sample_rate
        tracks = [(f"source {j}", wave[None], rate) for j, wave in enumerate(heard(estimator).T, start=1)]
    for j, source in enumerate(estimator.sources_.T):
        label = f"source {j + 1}"
        bands = {}
        if hasattr(estimator, "sources_std_"):
            reach = 1.96 * estimator.sources_std_[:, j]
            bands = {label: (source - reach, source + reach)}
        plots.append(report.Plot(f"{label}, with its 95 % band" if bands else label, {label: source}, unit, end, bands))
    if hasattr(estimator, "loss_curve_"):
        plots.append(report.Plot("loss", {"loss": estimator.loss_curve_}, "iterations", estimator.n_iter_))
        for key, trace in estimator.traces_.items():
            columns = trace.T if trace.ndim == 2 else trace[None]
            curves = {f"source {j + 1}" if trace.ndim == 2 else key: column for j, column in enumerate(columns)}
            title = key.rstrip("_").replace("_", " ")
            plots.append(report.Plot(title, curves, "iterations", estimator.n_iter_))
    report.write_page(path, f"Sources of {name}", facts, tracks, plots)
