"""Self-contained pages: a table of facts, curves, and a spectrogram with a player for each track.

One HTML file that needs no network: pictures and sound lie in it as data. It follows the
reader's light or dark setting, and everything works from the keyboard.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile as sf

from audiosep.errors import AudioError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Track = tuple[str, "NDArray[np.floating[Any]]", int]

WIDTH, HEIGHT = 1000, 192  # of a picture, in pixels; HEIGHT is the number of mel bands
RANGE_DB = 80.0
PLOT_POINTS, PLOT_HEIGHT = 2000, 160
_LINES = (
    "#a3245f",
    "#2a78b5",
    "#c77700",
    "#3a8a3a",
    "#7a55c7",
    "#8a6d3b",
    "#0f8f8f",
    "#b54a2a",
    "#5c6b73",
    "#c2185b",
    "#4b6a00",
    "#1a4f9c",
)  # legible on both grounds
# Dark violet to pale yellow, evenly rising in lightness: red, green, blue at equal distances.
_COLOURS = np.array(
    [
        (8, 6, 30),
        (52, 18, 94),
        (112, 31, 116),
        (174, 48, 104),
        (226, 84, 76),
        (250, 148, 62),
        (253, 210, 98),
        (254, 252, 205),
    ],
    dtype=float,
)


@dataclass(frozen=True)
class Plot:
    """Curves over one axis: name -> (N,) values, and name -> (low, high) of the band around a curve.

    `points` are drawn as dots: name -> (N, 2) places (x, y).
    """

    title: str
    curves: Mapping[str, NDArray[np.floating[Any]]]
    x_label: str
    x_end: float
    bands: dict[str, tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]] = field(default_factory=dict)
    x_start: float = 0.0
    points: Mapping[str, NDArray[np.floating[Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Spectrum:
    """The spectrogram of a series (T,) that is no sound: frequencies from 0 to half the rate, evenly spaced.

    rate in samples per second, None if the samples have no time: frequencies are then in cycles per sample.
    """

    title: str
    series: NDArray[np.floating[Any]]
    rate: float | None = None


def write_page(
    path: str | os.PathLike[str],
    title: str,
    report: dict[str, Any],
    tracks: Sequence[Track] = (),
    plots: Sequence[Plot] = (),
    tables: Sequence[Sequence[Sequence[str]]] = (),
    spectra: Sequence[Spectrum] = (),
) -> None:
    """Write a page: tables (rows of cells, the first names the columns), plots, spectrograms of series, tracks.

    A track is its name, wave (C, T) and rate in Hz; the pictures of tracks share one colour scale, so that a faint stem
    looks faint. Raises AudioError if
    the file can't be written.
    """
    pictures = [mel_picture(wave, rate) for _, wave, rate in tracks]
    top = max((float(picture.max()) for picture in pictures), default=0.0)
    figures = [_plot(plot) for plot in plots]
    figures += [_spectrum(spectrum) for spectrum in spectra]
    figures += [_figure(track, picture, top) for track, picture in zip(tracks, pictures)]
    page = _PAGE.format(
        title=html.escape(_printable(title)),
        table=_table(report),
        tables="\n".join(_grid(rows) for rows in tables),
        figures="\n".join(figures),
        style=_STYLE,
        script=_SCRIPT,
    )
    write_text(Path(path), page)


def mel_picture(wave: NDArray[np.floating[Any]], sample_rate: int) -> NDArray[np.floating[Any]]:
    """Mel spectrogram in dB, (HEIGHT bands low to high, at most WIDTH columns), of a (C, T)."""
    import librosa

    mono = np.asarray(wave, dtype=np.float32).mean(axis=0)
    hop = max(64, -(-mono.size // WIDTH))
    # About 50 ms see both pitch and syllables; a long recording's columns leave no gap.
    n_fft = 1 << max(round(np.log2(0.05 * sample_rate)), (hop - 1).bit_length())
    mono = np.pad(mono, (0, max(0, n_fft - mono.size)))
    power = np.abs(librosa.stft(mono, n_fft=n_fft, hop_length=hop, pad_mode="constant")) ** 2
    weights = librosa.filters.mel(sr=sample_rate, n_fft=n_fft, n_mels=HEIGHT, norm=None)
    # A low band may lie between two bins: it takes the nearest one, so that no row stays black.
    for band in np.flatnonzero(weights.sum(axis=1) == 0):
        centres = librosa.mel_frequencies(HEIGHT + 2, fmax=sample_rate / 2)
        weights[band, round(centres[band + 1] * n_fft / sample_rate)] = 1.0
    return 10 * np.log10(np.maximum(weights @ power, 1e-12))


def line_picture(series: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Spectrogram in dB, (frequencies low to high, at most WIDTH columns), of a series (T,), its mean taken out."""
    size = int(np.clip(1 << max(0, len(series) // 16).bit_length(), 16, 2 * HEIGHT))
    padded = np.pad(series - np.mean(series), (0, max(0, size - len(series))))
    begins = np.linspace(0, len(padded) - size, min(WIDTH, len(padded) - size + 1)).astype(int)
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[begins] * np.hanning(size)
    return 10 * np.log10(np.maximum(np.abs(np.fft.rfft(frames)).T ** 2, 1e-300))


def png(picture: NDArray[np.floating[Any]]) -> bytes:
    """A PNG file of values in 0..1, (rows from the bottom, columns), in our colours."""
    places = np.linspace(0, 1, len(_COLOURS))
    palette = np.stack([np.interp(np.linspace(0, 1, 256), places, _COLOURS[:, c]) for c in range(3)], axis=1)
    indices = np.rint(np.clip(picture[::-1], 0, 1) * 255).astype(np.uint8)
    rows = np.pad(indices, ((0, 0), (1, 0)))  # each row begins with its filter: none
    header = struct.pack(">IIBBBBB", picture.shape[1], picture.shape[0], 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", np.rint(palette).astype(np.uint8).tobytes()),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _sound(wave: NDArray[np.floating[Any]], sample_rate: int) -> tuple[str, bytes]:
    """MIME type and bytes of the track: Ogg Vorbis, or FLAC for a rate that Vorbis refuses."""
    samples = np.clip(np.asarray(wave, dtype=np.float32)[:2], -1, 1).T  # players play two
    for kind, subtype, mime in (("OGG", "VORBIS", "audio/ogg"), ("FLAC", "PCM_16", "audio/flac")):
        buffer = io.BytesIO()
        try:
            with sf.SoundFile(buffer, "w", sample_rate, samples.shape[1], subtype, format=kind) as file:
                for start in range(0, len(samples), 65536):
                    file.write(samples[start : start + 65536])
        except sf.SoundFileError:
            continue
        return mime, buffer.getvalue()
    raise AudioError(f"a page can't hold sound at {sample_rate} Hz")


def _figure(track: Track, picture: NDArray[np.floating[Any]], top: float) -> str:
    name, wave, rate = track
    mime, sound = _sound(wave, rate)
    level = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) if wave.size else 0.0
    decibels = f"{20 * np.log10(level):.1f} dBFS" if level > 0 else "silent"
    channels = {1: "mono", 2: "stereo"}.get(wave.shape[0], f"{wave.shape[0]} channels")
    shown = png((picture - top) / RANGE_DB + 1)
    return _FIGURE.format(
        name=html.escape(_printable(name)),
        facts=f"{wave.shape[1] / rate:.2f} s, {rate} Hz, {channels}, {decibels}",
        picture=_data("image/png", shown),
        sound=_data(mime, sound),
        half=f"{_mel_middle(rate) / 1000:.1f}",
        nyquist=f"{rate / 2000:g}",
        end=f"{wave.shape[1] / rate:.1f}",
    )


def _spectrum(spectrum: Spectrum) -> str:
    picture = line_picture(spectrum.series)
    shown = png(np.maximum((picture - picture.max()) / RANGE_DB + 1, 0))
    rate, unit = (spectrum.rate, "Hz") if spectrum.rate else (1.0, "per sample")
    return _SPECTRUM.format(
        title=html.escape(_printable(spectrum.title)),
        picture=_data("image/png", shown),
        half=f"{rate / 4:g}",
        nyquist=f"{rate / 2:g}",
        unit=unit,
    )


def _plot(plot: Plot) -> str:
    """An SVG of the curves, at most PLOT_POINTS points each, on a common scale."""
    values = [*plot.curves.values(), *(edge for band in plot.bands.values() for edge in band)]
    values += [places[:, 1] for places in plot.points.values()]
    low = min((float(np.nanmin(v)) for v in values if len(v)), default=0.0)
    high = max((float(np.nanmax(v)) for v in values if len(v)), default=1.0)
    span = (high - low) or 1.0

    def points(curve: NDArray[np.floating[Any]]) -> list[str]:
        chosen = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), PLOT_POINTS)).astype(int))
        x = chosen / max(len(curve) - 1, 1) * WIDTH
        y = PLOT_HEIGHT * (1 - (np.asarray(curve, dtype=float)[chosen] - low) / span)
        return [f"{a:.1f},{b:.1f}" for a, b in zip(x, y)]

    shapes, labels, dots = [], [], []
    for index, (name, curve) in enumerate(plot.curves.items()):
        hue = _LINES[index % len(_LINES)]
        if name in plot.bands:
            lower, upper = plot.bands[name]
            outline = " ".join([*points(lower), *reversed(points(upper))])
            shapes.append(f'<polygon points="{outline}" fill="{hue}" opacity=".25"/>')
        line = " ".join(points(curve))
        shapes.append(f'<polyline points="{line}" stroke="{hue}"/>')
        labels.append(f'<span style="color:{hue}">{html.escape(_printable(name))}</span>')
    for index, (name, places) in enumerate(plot.points.items()):
        hue = _LINES[index % len(_LINES)]
        for x, y in places:
            across = 100 * (x - plot.x_start) / ((plot.x_end - plot.x_start) or 1.0)
            dots.append(f'<i style="left:{across:.2f}%;bottom:{100 * (y - low) / span:.2f}%;background:{hue}"></i>')
        labels.append(f'<span style="color:{hue}">{html.escape(_printable(name))}</span>')
    return _CHART.format(
        title=html.escape(_printable(plot.title)),
        labels=" ".join(labels) if len(labels) > 1 else "",
        width=WIDTH,
        height=PLOT_HEIGHT,
        shapes="".join(shapes),
        low=f"{low:.4g}",
        high=f"{high:.4g}",
        dots="".join(dots),
        start=f"{plot.x_start:.6g}",
        end=f"{plot.x_end:.6g}",
        unit=html.escape(_printable(plot.x_label)),
    )


def _mel_middle(sample_rate: int) -> float:
    """The frequency in Hz half way up a picture."""
    import librosa

    return float(librosa.mel_frequencies(3, fmax=sample_rate / 2)[1])


def _data(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def _table(report: dict[str, Any]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(_printable(key))}</th><td>{_cell(value)}</td></tr>'
        for key, value in report.items()
    )
    return f"<table>\n{rows}\n</table>" if rows else ""


def _grid(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["".join(f'<th scope="col">{html.escape(_printable(cell))}</th>' for cell in head)]
    lines += ["".join(f"<td>{html.escape(_printable(cell))}</td>" for cell in row) for row in body]
    return f'<div class="grid"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _cell(value: Any) -> str:
    """A value as HTML; a dict or a list of them becomes a list."""
    if isinstance(value, dict):
        items = (f"<li>{html.escape(_printable(k))}: {_cell(v)}</li>" for k, v in value.items())
        return f"<ul>{''.join(items)}</ul>"
    if isinstance(value, (list, tuple)):
        if not any(isinstance(item, (dict, list, tuple)) for item in value):
            return ", ".join(_cell(item) for item in value)
        return f"<ul>{''.join(f'<li>{_cell(item)}</li>' for item in value)}</ul>"
    if isinstance(value, float):
        return f"{value:.4g}"
    return html.escape(_printable(str(value)))


def _printable(text: str) -> str:
    """Names of files may hold bytes that are not text."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it; AudioError when that can't be done."""
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w",
            encoding="utf-8",
            errors="backslashreplace",
            dir=path.parent,
            prefix=".",
            suffix=".partial",
            delete=False,
        ) as file:
            partial = Path(file.name)
            file.write(text)
        partial.chmod(0o644)
        os.replace(partial, path)
    except OSError as error:
        raise AudioError(f"{path}: can't be written: {error.strerror}") from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON, under a temporary name first; what is no number becomes null."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """The value in JSON's types."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{tables}
{figures}
<section aria-labelledby="facts"><h2 id="facts">Facts</h2>
{table}</section>
</main>
<script>{script}</script>
</body>
</html>
"""

_FIGURE = """<figure>
<figcaption><h2>{name}</h2> <span>{facts}</span></figcaption>
<div class="plot">
<div class="scale" aria-hidden="true">
<span>{nyquist} kHz</span><span>{half} kHz</span><span>0</span></div>
<div class="picture"><img src="{picture}" alt="Spectrogram of {name}, {end} s, 0 to {nyquist} kHz">
<div class="head"></div></div>
</div>
<audio controls preload="metadata" src="{sound}" aria-label="{name}"></audio>
</figure>"""

_SPECTRUM = """<figure>
<figcaption><h2>{title}</h2> <span>{unit}</span></figcaption>
<div class="plot">
<div class="scale" aria-hidden="true"><span>{nyquist}</span><span>{half}</span><span>0</span></div>
<div class="picture still"><img src="{picture}" alt="Spectrogram of {title}, 0 to {nyquist} {unit}"></div>
</div>
</figure>"""

_CHART = """<figure>
<figcaption><h2>{title}</h2> {labels}</figcaption>
<div class="plot">
<div class="scale" aria-hidden="true"><span>{high}</span><span>{low}</span></div>
<div class="chart"><svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img"
 aria-label="{title}, from {start} to {end} {unit}, values {low} to {high}">{shapes}</svg>{dots}</div>
</div>
<div class="axis" aria-hidden="true"><span>{start}</span><span>{end} {unit}</span></div>
</figure>"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1a22; --soft: #625d6b; --page: #fbfaf8;
  --line: #dcd8d2; --accent: #a3245f; }
@media (prefers-color-scheme: dark) { :root { --ink: #ece8f0; --soft: #a49eb0; --page: #16131b;
  --line: #383342; --accent: #ff8fbf; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0; display: inline; }
figure { margin: 0 0 2rem; }
figcaption span, .scale { color: var(--soft); font-size: .85rem; }
.plot { display: flex; gap: .5rem; margin: .4rem 0; }
.scale { display: flex; flex-direction: column; justify-content: space-between;
  width: 4.2rem; flex: none; text-align: right; line-height: 1; }
.picture { position: relative; flex: 1; height: 12rem; cursor: crosshair; overflow: hidden;
  border-radius: 4px; background: #08061e; }
.still { cursor: auto; }
.picture img { width: 100%; height: 100%; display: block; }
.head { position: absolute; top: 0; bottom: 0; left: 0; width: 2px; background: #fff;
  box-shadow: 0 0 0 1px #0008; }
.chart { flex: 1; height: 9rem; min-width: 0; border-bottom: 1px solid var(--line); position: relative; }
.chart svg { width: 100%; height: 100%; display: block; overflow: visible; }
.chart i { position: absolute; width: .7rem; height: .7rem; margin: 0 0 -.35rem -.35rem; border-radius: 50%; }
.grid { overflow-x: auto; margin-bottom: 2rem; }
.grid th, .grid td { width: auto; text-align: right; white-space: nowrap; }
.grid th:nth-child(-n+2), .grid td:nth-child(-n+2) { text-align: left; }
.chart polyline { fill: none; stroke-width: 1.2; vector-effect: non-scaling-stroke; }
.axis { display: flex; justify-content: space-between; margin-left: 4.7rem; color: var(--soft); font-size: .85rem; }
audio { display: block; width: calc(100% - 4.7rem); margin-left: 4.7rem; }
audio:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
section { border-top: 1px solid var(--line); padding-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin-top: .5rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 600; width: 12rem; }
td ul { margin: 0; padding-left: 1.1rem; }
@media (max-width: 40rem) { .scale { display: none; } audio { width: 100%; margin: 0; }
  th { width: 8rem; } }
"""

_SCRIPT = """
for (const figure of document.querySelectorAll('figure')) {
  const audio = figure.querySelector('audio');
  if (!audio) continue;
  const picture = figure.querySelector('.picture');
  const head = figure.querySelector('.head');
  const draw = () => {
    head.style.left = 100 * (audio.currentTime / (audio.duration || 1)) + '%';
    if (!audio.paused) requestAnimationFrame(draw);
  };
  for (const event of ['play', 'seeking', 'seeked', 'pause']) audio.addEventListener(event, draw);
  audio.addEventListener('play', () => {
    for (const other of document.querySelectorAll('audio')) if (other !== audio) other.pause();
  });
  picture.addEventListener('click', (event) => {
    const box = picture.getBoundingClientRect();
    audio.currentTime = (audio.duration || 0) * (event.clientX - box.left) / box.width;
  });
  audio.addEventListener('keydown', (event) => {
    const jump = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (event.key === 'Home') audio.currentTime = 0;
    else if (jump) audio.currentTime = Math.max(0, audio.currentTime + jump);
    else return;
    event.preventDefault();
  });
}
"""
