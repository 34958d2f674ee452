"""Separate the example with the shipped checkpoints and write each source's SI-SDR before and after to result.json.

Run: python recipes/example/score.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from audiosep import audio, metrics
from audiosep.separator import Separator

HERE = Path(__file__).parent


def main() -> None:
    """Write result.json beside this file."""
    mixture, rate = audio.read(HERE / "mixture.wav")
    y = torch.from_numpy(mixture[0])
    stems = Separator.from_pretrained("speech,sound", device="cpu")(y, rate).sources
    found = {
        name: {
            "before_db": round(metrics.si_sdr(y, reference).item(), 2),
            "after_db": round(metrics.si_sdr(stems[name], reference).item(), 2),
        }
        for name in stems
        for reference in [torch.from_numpy(audio.read(HERE / f"{name}.wav")[0][0])]
    }
    found["largest_error_of_the_sum"] = float((sum(stems.values()) - y).abs().max())
    (HERE / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
