"""Recordings in and out, block by block: memory does not grow with the length of a file.

Waves are float32 arrays (C, T), channels first, full scale +-1. soundfile (libsndfile) reads and
writes; PyAV, from the `media` extra, reads what soundfile can't (m4a, video, ...). torchaudio is
not used: its reader needs a TorchCodec that matches torch's build.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import soundfile as sf
import soxr

from audiosep.errors import AudioError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Wave = NDArray[np.float32]

log = logging.getLogger(__name__)

STDIO = "-"
BLOCK = 65536  # samples per channel handled at once; libsndfile's Vorbis coder needs small ones

# Suffix -> (libsndfile format, subtype when none is asked for). What can be written.
FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "aif": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "rf64": ("RF64", "PCM_16"),
    "w64": ("W64", "PCM_16"),
}
# Further suffixes that a directory is searched for. Video counts: its sound is separated.
_SUFFIXES = {f".{ext}" for ext in FORMATS} | {
    ".oga",
    ".m4a",
    ".aac",
    ".wma",
    ".webm",
    ".mka",
    ".mp4",
    ".mkv",
    ".mov",
    ".avi",
}
_INTEGER_BITS = {"PCM_S8": 8, "PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}
_FLOATS = {"FLOAT": np.float32, "DOUBLE": np.float64}
_UNKNOWN_FRAMES = 1 << 62  # libsndfile states SF_COUNT_MAX for a stream without a length
_WAV_LIMIT = (1 << 32) - (1 << 16)  # bytes; sizes in a WAV header have 32 bits
_MEDIA_HINT = "for m4a, video and other formats: pip install 'audiosep[media]'"
_REMEDY = "re-export it, or try: ffmpeg -i INPUT repaired.wav"


@dataclass(frozen=True)
class AudioInfo:
    """What a recording is. `frames` is its length in samples per channel."""

    sample_rate: int
    channels: int
    frames: int
    format: str
    subtype: str

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.frames / self.sample_rate


class Reader:
    """An open recording; see `open_reader`. Use it as a context manager."""

    def __init__(self, path: Path, name: str, *, temporary: bool = False) -> None:
        self._path, self._name, self._temporary = path, name, temporary
        try:
            self.info, self._decode = _probe(path, name)
        except BaseException:
            self.close()
            raise

    def blocks(self, n: int) -> Iterator[Wave]:
        """Yield float32 blocks (C, <= n), all but the last of n samples; each call starts anew.

        Raises AudioError where the file is corrupt or holds NaN or infinite samples.
        """
        done = 0
        for block in _regroup(self._decode(self._path, self._name), n):
            finite = np.isfinite(block).all(axis=0)
            if not finite.all():
                at = (done + int(np.argmin(finite))) / self.info.sample_rate
                raise AudioError(f"{self._name}: holds NaN or infinite samples (first at {at:.3f} s); {_REMEDY}")
            done += block.shape[1]
            yield block
        if done < self.info.frames:
            raise AudioError(f"{self._name}: corrupt: ends after {done} of {self.info.frames} samples; {_REMEDY}")

    def close(self) -> None:
        """Remove the temporary copy of stdin, if there is one."""
        if self._temporary:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_reader(path: str | os.PathLike[str]) -> Reader:
    """Open a recording, or stdin for "-" (spooled to a temporary file, since formats seek).

    Raises AudioError, in one line: missing, a directory, empty, without samples, corrupt, not
    audio, or in need of the `media` extra.
    """
    if os.fspath(path) == STDIO:
        return Reader(_spool_stdin(), "stdin", temporary=True)
    source = Path(path)
    name = printable(source)
    try:
        size = source.stat().st_size
    except FileNotFoundError:
        raise AudioError(f"{name}: no such file") from None
    except OSError as error:
        raise AudioError(f"{name}: can't be read: {error.strerror}") from None
    if source.is_dir():
        raise AudioError(f"{name}: is a directory, not a recording")
    if source.is_file() and size == 0:
        raise AudioError(f"{name}: is empty (0 bytes)")
    if not os.access(source, os.R_OK):
        raise AudioError(f"{name}: can't be read: Permission denied")
    return Reader(source, name)


def read(path: str | os.PathLike[str]) -> tuple[Wave, int]:
    """Read a whole recording: float32 (C, T) and its sample rate in Hz."""
    with open_reader(path) as reader:
        blocks = list(reader.blocks(BLOCK))
        return np.concatenate(blocks, axis=1), reader.info.sample_rate


class Writer:
    """Writes a recording block by block, and shows it under its name only when it is complete.

    The file grows as `.<name>.<random>.partial<suffix>` in the same directory; a clean exit of
    the context renames it, any exception (KeyboardInterrupt too) removes it. "-" is stdout.
    Integer subtypes are rounded to nearest; values beyond full scale are limited and counted in
    `clipped`, in all subtypes but FLOAT and DOUBLE, which keep them. `frames`, where known,
    lets a WAV above 4 GiB become RF64 under the same suffix. Raises AudioError naming the path.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sample_rate: int,
        channels: int,
        *,
        format: str | None = None,
        subtype: str | None = None,
        frames: int | None = None,
    ) -> None:
        self._stdout = os.fspath(path) == STDIO
        self.path = Path(path)
        self.name = "stdout" if self._stdout else printable(self.path)
        ext = format or ("wav" if self._stdout else self.path.suffix)
        self.format, self.subtype = check_format(ext, subtype)
        self.frames, self.clipped = 0, 0
        self._bytes_per_frame = channels * max(_INTEGER_BITS.get(self.subtype, 32), 8) // 8
        if self.subtype == "DOUBLE":
            self._bytes_per_frame = channels * 8
        if self.format == "WAV" and (frames or 0) * self._bytes_per_frame > _WAV_LIMIT:
            self.format = "RF64"
        self._partial = self._make_partial()
        try:
            self._file = sf.SoundFile(
                _native(self._partial), "w", sample_rate, channels, self.subtype, format=self.format
            )
        except (sf.SoundFileError, TypeError, ValueError) as error:
            self.discard()
            detail = str(error).rpartition(": ")[2].rstrip(".")
            raise AudioError(
                f"{self.name}: {self.format} {self.subtype} can't hold {channels} channels"
                f" at {sample_rate} Hz ({detail}); choose another --format"
            ) from None

    def _make_partial(self) -> Path:
        directory = Path(tempfile.gettempdir()) if self._stdout else self.path.parent
        stem, suffix = (self.path.stem[:40], self.path.suffix)
        partial = directory / f".{stem}.{secrets.token_hex(4)}.partial{suffix}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # Created here, since libsndfile would not say why it can't.
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except OSError as error:
            raise AudioError(f"{self.name}: can't be written: {error.strerror}") from None
        return partial

    def write(self, block: NDArray[np.floating[Any]]) -> None:
        """Append a float block (C, n)."""
        if not np.isfinite(block).all():
            raise AudioError(f"{self.name}: won't be written with NaN or infinite samples")
        for start in range(0, block.shape[1], BLOCK):
            data = self._quantised(block[:, start : start + BLOCK]).T
            self.frames += len(data)
            if self.format == "WAV" and self.frames * self._bytes_per_frame > _WAV_LIMIT:
                raise AudioError(f"{self.name}: a WAV file ends at 4 GiB; choose --format rf64 or flac")
            try:
                self._file.write(data)
            except (sf.SoundFileError, OSError, AssertionError):
                raise self._full() from None

    def _quantised(self, block: NDArray[np.floating[Any]]) -> NDArray[Any]:
        """The samples as libsndfile takes them for this subtype, limited and counted."""
        if self.subtype in _FLOATS:
            return block.astype(_FLOATS[self.subtype])
        bits = _INTEGER_BITS.get(self.subtype)
        if bits is None:
            limited = np.clip(block, -1.0, 1.0)
            self.clipped += int(np.count_nonzero(limited != block))
            return limited.astype(np.float32)
        rounded = np.rint(block.astype(np.float64) * 2.0 ** (bits - 1))
        limited = np.clip(rounded, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
        self.clipped += int(np.count_nonzero(limited != rounded))
        # libsndfile takes the top bits of an int16 or int32.
        width, dtype = (16, np.int16) if bits <= 16 else (32, np.int32)
        return np.left_shift(limited.astype(dtype), width - bits)

    def _full(self) -> AudioError:
        return AudioError(f"{self.name}: can't be written further (is the disk full?)")

    def close(self) -> None:
        """Finish the file and give it its name."""
        try:
            self._file.close()
            if self.format != "MP3" and sf.info(_native(self._partial)).frames < self.frames:
                raise self._full()
            if self._stdout:
                with self._partial.open("rb") as source:
                    shutil.copyfileobj(source, sys.stdout.buffer)
                sys.stdout.buffer.flush()
                self._partial.unlink()
            else:
                os.replace(self._partial, self.path)
        except (sf.SoundFileError, AssertionError):
            self.discard()
            raise self._full() from None
        except OSError as error:
            self.discard()
            raise AudioError(f"{self.name}: can't be written: {error.strerror}") from None
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Drop what was written; a file already under the name stays as it was."""
        if hasattr(self, "_file"):
            with contextlib.suppress(sf.SoundFileError):
                self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def write(
    path: str | os.PathLike[str],
    wave: NDArray[np.floating[Any]],
    sample_rate: int,
    subtype: str | None = None,
) -> None:
    """Write a wave (C, T); the suffix names the format. Limited samples are logged, not silent."""
    with Writer(path, sample_rate, wave.shape[0], subtype=subtype, frames=wave.shape[1]) as writer:
        writer.write(wave)
    if writer.clipped:
        log.warning("%s: %d samples beyond full scale were limited", writer.name, writer.clipped)


def check_format(format: str, subtype: str | None = None) -> tuple[str, str]:
    """Libsndfile's names for a format (a suffix, as in "flac" or ".flac") and a subtype.

    Raises UsageError that lists what there is.
    """
    ext = format.lower().lstrip(".")
    if ext not in FORMATS:
        raise UsageError(f"format {format!r} can't be written; choose from {', '.join(FORMATS)}")
    name, default = FORMATS[ext]
    chosen = (subtype or default).upper()
    if ext == "opus" and chosen != "OPUS":
        raise UsageError(f"subtype {subtype!r} does not go with opus")
    if not sf.check_format(name, chosen):
        valid = ", ".join(s for s in sf.available_subtypes(name) if s in _INTEGER_BITS | _FLOATS)
        raise UsageError(f"subtype {subtype!r} does not go with {ext}; choose from {valid or default}")
    return name, chosen


def subtype_for(info: AudioInfo, format: str) -> str:
    """The subtype that keeps the recording's resolution in a format (a suffix).

    The recording's own where the format has it; what was coded lossily has no word length, so
    it gets FLOAT, or the longest word of the format.
    """
    name, default = check_format(format)
    if info.subtype in _INTEGER_BITS | _FLOATS and sf.check_format(name, info.subtype):
        return info.subtype
    if info.subtype in ("PCM_S8", "PCM_U8"):  # each of them is missing in half of the formats
        return next(s for s in ("PCM_S8", "PCM_U8", default) if sf.check_format(name, s))
    return next(s for s in ("FLOAT", "PCM_24", default) if sf.check_format(name, s))


def resample(wave: NDArray[np.floating[Any]], sr_in: int, sr_out: int) -> Wave:
    """Resample (C, T) to (C, ceil(T * sr_out / sr_in)), soxr's high quality."""
    if sr_in == sr_out:
        return np.asarray(wave, dtype=np.float32)
    length = -(-wave.shape[1] * sr_out // sr_in)
    samples = np.ascontiguousarray(wave.T, dtype=np.float32)
    resampled = soxr.resample(samples, sr_in, sr_out, quality="HQ").T[:, :length]
    missing = length - resampled.shape[1]
    return np.ascontiguousarray(np.pad(resampled, ((0, 0), (0, missing))), dtype=np.float32)


def find_audio(paths: Iterable[str | os.PathLike[str]]) -> list[tuple[Path, Path]]:
    """(path, path relative to the argument it was found in) of every recording.

    Files, and "-", are taken as given; directories are searched recursively, in sorted order,
    by suffix, without hidden files. Raises AudioError for a directory without recordings.
    """
    found: list[tuple[Path, Path]] = []
    for given in map(Path, paths):
        if not given.is_dir():
            found.append((given, Path(given.name)))
            continue
        inside = [(p, p.relative_to(given)) for p in sorted(given.rglob("*")) if _is_audio(p)]
        inside = [item for item in inside if not any(s.startswith(".") for s in item[1].parts)]
        if not inside:
            raise AudioError(f"{printable(given)}: no recordings in this directory")
        found += inside
    return found


def printable(path: str | os.PathLike[str]) -> str:
    """A path that any terminal can print: bytes that are not text become escapes, on one line."""
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _native(path: Path) -> str | bytes:
    """The path as soundfile passes it on unharmed: names may hold bytes that are not text."""
    return str(path) if os.name == "nt" else os.fsencode(path)


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and path.is_file()


def _spool_stdin() -> Path:
    if sys.stdin is None or sys.stdin.isatty():
        raise AudioError("stdin: nothing is piped in; give a file, or: audiosep ... - < FILE")
    with tempfile.NamedTemporaryFile(prefix="audiosep-", delete=False) as spool:
        path = Path(spool.name)
        try:
            shutil.copyfileobj(sys.stdin.buffer, spool)
            size = spool.tell()
        except OSError as error:
            path.unlink()
            raise AudioError(f"stdin: can't be kept in {path.parent}: {error.strerror}") from None
        except BaseException:
            path.unlink()
            raise
    if size == 0:
        path.unlink()
        raise AudioError("stdin: is empty (0 bytes)")
    return path


def _probe(path: Path, name: str) -> tuple[AudioInfo, Any]:
    """What the file is, and the generator function that decodes it."""
    try:
        with sf.SoundFile(_native(path)) as file:
            _check_truncation(file, name)
            info = _info(file)
        decode: Any = _decode_soundfile
    except TypeError:  # soundfile wants to be told what a .raw file holds
        raise AudioError(f"{name}: raw samples without a header; convert it to wav first") from None
    except sf.SoundFileError as error:
        info, decode = _probe_media(path, name, str(error)), _decode_media
    if info.frames >= _UNKNOWN_FRAMES or decode is _decode_media:
        # Containers state no exact length; decoding costs little beside separating.
        frames = sum(block.shape[1] for block in decode(path, name))
        info = AudioInfo(info.sample_rate, info.channels, frames, info.format, info.subtype)
    if info.frames == 0:
        raise AudioError(f"{name}: holds no samples (0 s)")
    return info, decode


def _info(file: sf.SoundFile) -> AudioInfo:
    return AudioInfo(file.samplerate, file.channels, file.frames, file.format, file.subtype)


def _check_truncation(file: sf.SoundFile, name: str) -> None:
    """Raise where a WAV header promises more than the file holds; libsndfile would read on.

    A stream that was written before its length was known states 0 or the largest size: fine.
    """
    found = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if found is None:
        return
    promised, held = int(found[1]), int(found[2])
    if held < promised < 0x7FFFF000:
        raise AudioError(f"{name}: corrupt: holds {held} of {promised} bytes of samples; {_REMEDY}")


def _decode_soundfile(path: Path, name: str) -> Iterator[Wave]:
    try:
        with sf.SoundFile(_native(path)) as file:
            # 32-bit words don't fit into float32.
            dtype = "float64" if file.subtype in ("PCM_32", "DOUBLE") else "float32"
            while len(block := file.read(BLOCK, dtype=dtype, always_2d=True)):
                yield block.T
    except sf.SoundFileError as error:
        detail = str(error).rpartition(": ")[2].rstrip(".")
        raise AudioError(f"{name}: corrupt: {detail}; {_REMEDY}") from None


def _probe_media(path: Path, name: str, reason: str) -> AudioInfo:
    """Like `_info`, through PyAV; `reason` is why soundfile could not. Frames are not known."""
    try:
        import av
    except ImportError:
        reason = reason.rpartition(": ")[2].rstrip(".")
        known = path.suffix.lower().lstrip(".") in FORMATS
        text = "corrupt, or not audio" if known else "not audio that soundfile can read"
        raise AudioError(f"{name}: {text} ({reason}); {_MEDIA_HINT}") from None
    try:
        with path.open("rb") as file, av.open(file, "r") as container:
            if not container.streams.audio:
                raise AudioError(f"{name}: holds no sound")
            stream = container.streams.audio[0]
            codec = stream.codec_context
            rate, channels = codec.sample_rate, codec.channels
            kind, codec_name = container.format.name, codec.name
    except av.error.FFmpegError as error:
        raise AudioError(f"{name}: corrupt, or not audio ({error.strerror})") from None
    if not rate or not channels:
        raise AudioError(f"{name}: corrupt, or not audio (no sample rate)")
    return AudioInfo(rate, channels, 0, kind.upper(), codec_name.upper())


def _decode_media(path: Path, name: str) -> Iterator[Wave]:
    import av

    try:
        with path.open("rb") as file, av.open(file, "r") as container:
            stream = container.streams.audio[0]
            codec = stream.codec_context
            # Frames of a stream may change their format half way; the resampler evens that out.
            planar = av.AudioResampler(format="fltp", layout=codec.layout, rate=codec.sample_rate)
            for frame in container.decode(stream):
                frame.pts = None
                for part in planar.resample(frame):
                    yield part.to_ndarray().astype(np.float32, copy=False)
            for part in planar.resample(None):
                yield part.to_ndarray().astype(np.float32, copy=False)
    except (av.error.FFmpegError, ValueError) as error:
        detail = getattr(error, "strerror", None) or str(error)
        raise AudioError(f"{name}: corrupt: {detail}; {_REMEDY}") from None


def _regroup(blocks: Iterable[Wave], n: int) -> Iterator[Wave]:
    """The same samples in contiguous blocks (C, n); the last may be shorter."""
    waiting: list[Wave] = []
    count = 0
    for block in blocks:
        while count + block.shape[1] >= n:
            head, block = np.split(block, [n - count], axis=1)
            yield np.ascontiguousarray(np.concatenate([*waiting, head], axis=1))
            waiting, count = [], 0
        if block.shape[1]:
            waiting.append(block)
            count += block.shape[1]
    if count:
        yield np.ascontiguousarray(np.concatenate(waiting, axis=1))
