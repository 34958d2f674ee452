"""The example that ships with the project: made by make.py, and its parts sum to the mixture."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from audiosep.metrics import si_sdri
from audiosep.separator import Separator

FOLDER = Path(__file__).parents[1] / "recipes" / "example"
NAMES = ("speech", "sound", "mixture")


def words(folder, name):
    return sf.read(folder / f"{name}.wav", dtype="int16")[0].astype(int)


def test_sources_sum_to_the_mixture_at_equal_levels():
    speech, sound, mixture = (words(FOLDER, name) for name in NAMES)
    np.testing.assert_array_equal(speech + sound, mixture)
    assert mixture.size == 6 * 16000
    for source in (speech, sound):
        level = 10 * np.log10(np.mean((source / 32768) ** 2))
        assert abs(level + 22.5) < 0.01
    assert sum((FOLDER / f"{name}.wav").stat().st_size for name in NAMES) < 1_000_000


@pytest.mark.slow
def test_the_shipped_checkpoints_gain_5_db_on_each_source():
    parts = [torch.from_numpy(words(FOLDER, name) / 32768) for name in NAMES]
    references, mixture = torch.stack(parts[:2]), parts[2]
    separation = Separator.from_pretrained("speech,sound", device="cpu")(mixture, 16000)
    estimates = torch.stack(list(separation.sources.values()))
    assert (si_sdri(estimates, references, mixture) >= 5).all()
    assert torch.allclose(estimates.sum(0), mixture, atol=1e-6)


def test_make_makes_the_files_that_ship(tmp_path):
    runpy.run_path(str(FOLDER / "make.py"))["main"](tmp_path)
    for name in NAMES:
        assert np.abs(words(tmp_path, name) - words(FOLDER, name)).max() <= 2  # libm's last bit
