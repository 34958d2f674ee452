"""Make the example mixture: a synthetic voice over synthetic chirps and shakers, 6 s at 16 kHz.

The voice is a formant synthesiser in the manner of D. Klatt, "Software for a cascade/parallel
formant synthesizer", J. Acoust. Soc. Am. 67 (1980): a glottal pulse train and noise through
second-order resonators that glide from phone to phone. The chirps are swinging
tones, the shakers bursts of high noise. Everything is computed here from a fixed seed: no
recording is used. speech.wav + sound.wav = mixture.wav exactly, in integers.

Run: python recipes/example/make.py [FOLDER]
"""

from __future__ import annotations

import sys
import wave
from pathlib import Path

import numpy as np

RATE = 16000
SECONDS = 6.0
LEVEL = -22.5  # dBFS, RMS, of each source
FRAME = 80  # samples (5 ms) between updates of the voice's parameters

# Phone: F1, F2, F3 in Hz; voicing, aspiration, frication (0..1); frication centre and width in
# Hz; seconds. Formants after G. E. Peterson and H. L. Barney (1952), rounded.
PHONES = {
    "IY": (280, 2250, 2950, 1.0, 0.02, 0.0, 0, 0, 0.11),
    "IH": (400, 1950, 2550, 1.0, 0.02, 0.0, 0, 0, 0.07),
    "EH": (550, 1800, 2480, 1.0, 0.02, 0.0, 0, 0, 0.10),
    "AE": (680, 1700, 2400, 1.0, 0.02, 0.0, 0, 0, 0.12),
    "AA": (730, 1100, 2450, 1.0, 0.02, 0.0, 0, 0, 0.13),
    "AO": (570, 850, 2400, 1.0, 0.02, 0.0, 0, 0, 0.13),
    "AH": (620, 1200, 2400, 1.0, 0.02, 0.0, 0, 0, 0.06),
    "OW": (460, 950, 2350, 1.0, 0.02, 0.0, 0, 0, 0.12),
    "UW": (310, 900, 2250, 1.0, 0.02, 0.0, 0, 0, 0.10),
    "ER": (480, 1350, 1700, 1.0, 0.02, 0.0, 0, 0, 0.11),
    "W": (290, 650, 2150, 0.7, 0.02, 0.0, 0, 0, 0.07),
    "Y": (270, 2150, 3000, 0.7, 0.02, 0.0, 0, 0, 0.06),
    "R": (320, 1080, 1500, 0.7, 0.02, 0.0, 0, 0, 0.07),
    "L": (330, 1050, 2800, 0.7, 0.02, 0.0, 0, 0, 0.07),
    "M": (250, 1050, 2200, 0.45, 0.0, 0.0, 0, 0, 0.08),
    "N": (260, 1650, 2550, 0.45, 0.0, 0.0, 0, 0, 0.07),
    "NG": (260, 2000, 2700, 0.45, 0.0, 0.0, 0, 0, 0.07),
    "V": (250, 1100, 2200, 0.5, 0.05, 0.05, 5000, 3000, 0.06),
    "Z": (260, 1600, 2550, 0.4, 0.0, 0.25, 5200, 1500, 0.07),
    "S": (300, 1600, 2550, 0.0, 0.0, 0.55, 5500, 1600, 0.11),
    "SH": (300, 1800, 2550, 0.0, 0.0, 0.6, 3300, 1400, 0.11),
    "HH": (500, 1500, 2500, 0.1, 0.5, 0.0, 0, 0, 0.06),
    "B": (250, 900, 2200, 0.15, 0.0, 0.0, 0, 0, 0.06),
    "D": (250, 1700, 2600, 0.15, 0.0, 0.0, 0, 0, 0.05),
    "T": (300, 1700, 2600, 0.0, 0.0, 0.0, 0, 0, 0.05),
    "K": (300, 1900, 2300, 0.0, 0.0, 0.0, 0, 0, 0.06),
    "t": (300, 1700, 2600, 0.0, 0.2, 0.6, 4500, 2500, 0.02),  # the burst that ends T, D
    "k": (300, 1900, 2300, 0.0, 0.3, 0.5, 2000, 900, 0.025),  # the burst that ends K
    ",": (450, 1500, 2500, 0.0, 0.0, 0.0, 0, 0, 0.22),
    ".": (450, 1500, 2500, 0.0, 0.0, 0.0, 0, 0, 0.38),
}
# "Hello, we are listening to a small machine. It says her voice was never recorded."
TEXT = (
    ", HH EH L OW , W IY AA R L IH S AH N IH NG T t UW AH S M AO L M AH SH IY N . "
    "IH T t S EH Z HH ER V OY S , W AH Z N EH V ER R IH K k AO R D AH D t ."
)
TEXT = TEXT.replace("OY", "AO IY")
STRESSED = {"AO", "AE", "EH", "OW", "IY", "ER", "AA"}


def resonate(x: np.ndarray, hz: np.ndarray, width: np.ndarray) -> np.ndarray:
    """A two-pole resonator with unit gain at 0 Hz; hz and width per frame of FRAME samples."""
    r = np.exp(-np.pi * width / RATE)
    b = 2 * r * np.cos(2 * np.pi * hz / RATE)
    c = -(r**2)
    y = np.empty_like(x)
    y1 = y2 = 0.0
    for i, value in enumerate(x):
        k = i // FRAME
        y1, y2 = (1 - b[k] - c[k]) * value + b[k] * y1 + c[k] * y2, y1
        y[i] = y1
    return y


def glottis(f0: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Flow derivative of a Rosenberg pulse train, and how open the glottis is; f0 per sample."""
    phase = np.cumsum(f0 / RATE)
    cycle = np.floor(phase).astype(int)
    shimmer = 1 + 0.06 * generator.standard_normal(cycle[-1] + 2)
    within = phase - cycle
    opening, closing = 0.42, 0.17  # shares of a period
    flow = np.where(
        within < opening,
        0.5 * (1 - np.cos(np.pi * within / opening)),
        np.cos(0.5 * np.pi * np.clip((within - opening) / closing, 0, 1)),
    )
    return np.diff(flow * shimmer[cycle], prepend=0.0), flow


def tracks() -> tuple[np.ndarray, np.ndarray]:
    """Parameters of the voice (frames, 8) and the pitch in Hz (frames,), from TEXT."""
    targets, pitch = [], []
    for phrase in TEXT.split("."):
        phones = [*phrase.split(), "."] if phrase.strip() else []
        for i, phone in enumerate(phones):
            *values, seconds = PHONES[phone]
            stressed = phone in STRESSED
            frames = round(seconds * (1.15 if stressed else 0.95) * RATE / FRAME)
            targets += [values] * frames
            decline = 138 - 38 * i / len(phones)  # pitch falls over a phrase
            pitch += [decline + (14 if stressed else 0)] * frames
    glide = np.hanning(13)[1:-1] / np.hanning(13)[1:-1].sum()  # 60 ms
    table, f0 = np.array(targets, dtype=float), np.array(pitch)
    quick = np.hanning(9)[1:-1] / np.hanning(9)[1:-1].sum()  # sources switch faster than the tongue moves
    for column in range(table.shape[1]):
        kernel = glide if column < 3 else quick
        padded = np.pad(table[:, column], len(kernel) // 2, mode="edge")
        if column not in (6, 7):
            table[:, column] = np.convolve(padded, kernel, mode="valid")
    wide = np.hanning(31)[1:-1] / np.hanning(31)[1:-1].sum()
    f0 = np.convolve(np.pad(f0, len(wide) // 2, mode="edge"), wide, mode="valid")
    return table, f0


def voice(length: int, generator: np.random.Generator) -> np.ndarray:
    """The talker: (length,)."""
    table, f0 = tracks()
    missing = max(0, -(-length // FRAME) - len(table))
    rest = np.tile([*PHONES["."][:8]], (missing, 1))
    table, f0 = np.concatenate([table, rest]), np.pad(f0, (0, missing), mode="edge")
    centre = np.arange(length) / FRAME - 0.5
    hz = np.interp(centre, np.arange(len(f0)), f0)
    drift = np.interp(centre, np.arange(0, len(f0), 4), generator.standard_normal(-(-len(f0) // 4)))
    pulses, flow = glottis(hz * (1 + 0.008 * drift), generator)
    ramp = np.stack([np.interp(centre, np.arange(len(table)), table[:, c]) for c in (3, 4, 5)])
    hiss = generator.standard_normal((2, length))
    source = 6 * ramp[0] * pulses + 0.04 * ramp[1] * hiss[0] * (0.3 + flow)
    for column, width in ((0, 70), (1, 95), (2, 140)):
        source = resonate(source, table[:, column], np.full(len(table), width))
    for fixed, width in ((3600, 220), (4600, 300), (5800, 500), (7000, 700)):
        source = resonate(source, np.full(len(table), fixed), np.full(len(table), width))
    # Frication starts at the teeth or the palate: one resonance of its own, no formants.
    place = np.maximum(table[:, 6], 500.0), np.maximum(table[:, 7], 300.0)
    friction = np.diff(resonate(hiss[1], *place), prepend=0.0)
    friction /= np.sqrt(np.mean(friction**2))
    dry = source / np.abs(source).max() + 0.06 * ramp[2] * friction
    # A quiet room: 80 ms of sparse reflections, 20 dB under the direct sound, and a noise floor.
    room = generator.standard_normal(1280) * np.exp(-np.arange(1280) / 300)
    room *= (generator.random(1280) < 0.05) * 0.1 / np.sqrt(np.sum(room**2) * 0.05)
    room[0] = 1.0
    return np.convolve(dry, room)[:length] + 5e-4 * generator.standard_normal(length)


def chirp(wobble: float) -> np.ndarray:
    """A small bird: 150 ms of a tone around 4.5 kHz that swings 12 times a second."""
    t = np.arange(round(0.15 * RATE)) / RATE
    hz = 4500 + 800 * np.sin(2 * np.pi * 12 * t + wobble)
    return np.sin(2 * np.pi * np.cumsum(hz) / RATE) * np.hanning(t.size)


def shake(generator: np.random.Generator) -> np.ndarray:
    """A shaker: 250 ms of noise above 4.5 kHz that dies away."""
    bins = np.fft.rfft(generator.standard_normal(round(0.25 * RATE)))
    bins[: round(4500 * 0.25)] = 0
    noise = np.fft.irfft(bins)
    return noise * np.exp(-np.arange(noise.size) / RATE / 0.06)


def events(length: int, generator: np.random.Generator) -> np.ndarray:
    """Chirps, and a shaker now and then: (length,)."""
    x = np.zeros(length)

    def place(at: float, level: float, sound: np.ndarray) -> None:
        start = round(at * RATE)
        end = min(length, start + sound.size)
        x[start:end] += level * sound[: end - start]

    for i, at in enumerate(np.arange(0.2, 5.8, 0.45)):
        place(at, 0.5, chirp(float(i)))
    for at in np.arange(0.6, 5.7, 1.35):
        place(at, 0.35, shake(generator))
    return x


def to_words(x: np.ndarray) -> np.ndarray:
    """16-bit words at LEVEL, faded over 10 ms at both ends."""
    fade = np.minimum(1, np.minimum(np.arange(x.size), np.arange(x.size)[::-1]) / (0.01 * RATE))
    x = x * fade
    x = x * 10 ** (LEVEL / 20) / np.sqrt(np.mean(x**2))
    return np.rint(x * 32768).astype(np.int32)


def save(path: Path, words: np.ndarray) -> None:
    """Write a mono 16-bit WAV; raise if a word does not fit."""
    if np.abs(words).max() > 32767:
        raise ValueError(f"{path}: peaks at {np.abs(words).max()}, over 16 bits")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(words.astype("<i2").tobytes())


def main(folder: Path) -> None:
    """Write speech.wav, sound.wav and mixture.wav into the folder."""
    length = round(SECONDS * RATE)
    speech = to_words(voice(length, np.random.default_rng(1980)))
    sound = to_words(events(length, np.random.default_rng(1952)))
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in (("speech", speech), ("sound", sound), ("mixture", speech + sound)):
        save(folder / f"{name}.wav", words)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
