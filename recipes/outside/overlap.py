"""Look for the sounds of outside.csv among those that the shipped priors were trained and tested on.

    python recipes/outside/overlap.py data/outside.csv data/open16k.csv [-o recipes/outside/overlap.md]

The loudest half second of every sound here is correlated, at 8 kHz, with the first ten seconds of every sound there, at
every lag; 1 is the same waveform up to its level. A cut, resampled or Vorbis-coded copy is found; one that was played
faster or slower isn't. The table has each sound's best match, the twenty best of all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, rfft

from audiosep.data import load_clip, read_manifest
from audiosep.errors import AudioError, UsageError

RATE = 8000
SHOWN = 20
FLOOR = 1e-6  # mean square: what is fainter counts as this loud, so that near silence matches nothing
Wave = NDArray[np.float32]
Spectra = NDArray[np.complex64]  # (parts, bins)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(description="Look for recordings of one manifest in another.")
    parser.add_argument("ours", type=Path, help="manifest of outside recordings")
    parser.add_argument("corpus", type=Path, help="manifest of the corpus that was trained on")
    parser.add_argument("-o", "--output", type=Path, help="write the table here instead of printing it")
    options = parser.parse_args(arguments)
    try:
        ours, corpus = (read_manifest(path, kind="sound") for path in (options.ours, options.corpus))
        parts = [loudest(load_clip(item.path, RATE)) for item in ours]
        best, where = np.zeros(len(ours)), [""] * len(ours)
        spectra: dict[int, Spectra] = {}
        for item in corpus:
            for i, value in enumerate(match(parts, load_clip(item.path, RATE, seconds=10), spectra)):
                if value > best[i]:
                    best[i], where[i] = value, item.id
    except (AudioError, UsageError) as error:
        print(error, file=sys.stderr)
        return 1
    lines = [
        f"{len(ours)} sounds against {len(corpus)}.",
        "",
        "| correlation | sound | in the corpus |",
        "|---|---|---|",
    ]
    lines += [f"| {best[i]:.2f} | {ours[i].path.name} | {where[i]} |" for i in np.argsort(-best)[:SHOWN]]
    text = "\n".join(lines) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def loudest(wave: Wave) -> Wave:
    """The half second of most energy, scaled to energy 1."""
    length = min(wave.size, RATE // 2)
    start = int(np.argmax(energies(wave, length)))
    part = wave[start : start + length]
    return part / np.linalg.norm(part)


def match(parts: list[Wave], wave: Wave, spectra: dict[int, Spectra]) -> list[float]:
    """The highest correlation of each part with the wave (T,), any lag, either sign; 0 where the part is longer.

    `spectra` keeps those of the parts from call to call, by the transform's size.
    """
    size = 1 << (wave.size + RATE // 2).bit_length()
    if size not in spectra:
        spectra[size] = np.stack([rfft(part, size).conj() for part in parts])
    found = []
    for part, products in zip(parts, irfft(rfft(wave, size) * spectra[size], size)):
        if part.size > wave.size:
            found.append(0.0)
            continue
        norms = np.sqrt(np.maximum(energies(wave, part.size), part.size * FLOOR))
        found.append(float((np.abs(products[: norms.size]) / norms).max()))
    return found


def energies(wave: Wave, length: int) -> NDArray[np.float64]:
    """Of every stretch of `length` samples: (T,) -> (T - length + 1,)."""
    total = np.concatenate([[0.0], np.cumsum(np.square(wave, dtype=np.float64))])
    return total[length:] - total[: total.size - length]


if __name__ == "__main__":
    sys.exit(main())
