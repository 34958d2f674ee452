"""Separate the example with the shipped checkpoints: each source's SI-SDR before and after, and not refined, goes to
result.json, spectrograms of the mixture, the stems and the true sources to *.png, 80 dB from dark to light in all.

Run: python recipes/example/score.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from audiosep import audio, metrics
from audiosep.report import RANGE_DB, mel_picture, png
from audiosep.separator import Separator

HERE = Path(__file__).parent


def main() -> None:
    """Write result.json and the pictures beside this file."""
    mixture, rate = audio.read(HERE / "mixture.wav")
    y = torch.from_numpy(mixture[0])
    stems, unrefined = (
        Separator.from_pretrained("speech,sound", device="cpu", refine=share)(y, rate).sources for share in (None, 0)
    )
    truth = {name: torch.from_numpy(audio.read(HERE / f"{name}.wav")[0][0]) for name in stems}
    found = {
        name: {
            "before_db": round(metrics.si_sdr(y, truth[name]).item(), 2),
            "after_db": round(metrics.si_sdr(stems[name], truth[name]).item(), 2),
            "unrefined_db": round(metrics.si_sdr(unrefined[name], truth[name]).item(), 2),
        }
        for name in stems
    }
    found["largest_error_of_the_sum"] = float((sum(stems.values()) - y).abs().max())
    (HERE / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    draw({"mixture": y} | truth | {f"{name}-stem": wave for name, wave in stems.items()}, rate)


def draw(waves: dict[str, Tensor], rate: int) -> None:
    """Write a spectrogram of each wave (T,); all have one scale."""
    pictures = {name: mel_picture(wave[None].numpy(), rate) for name, wave in waves.items()}
    top = max(picture.max() for picture in pictures.values())
    for name, picture in pictures.items():
        (HERE / f"{name}.png").write_bytes(png((picture - top) / RANGE_DB + 1))


if __name__ == "__main__":
    main()
