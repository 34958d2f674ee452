"""The audio recipe: what it makes of samples, and of its own table."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from audiosep.multiview import Plan
from audiosep.multiview_frames import Frames
from audiosep.schedules import ve

FILE = Path(__file__).resolve().parent.parent / "recipes" / "ddprism" / "audio.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("ddprism_audio", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_samples_under_known_spectra_give_their_wiener_filter(recipe):
    """Low and high halves of the band: the voice's samples have power where it is, and none elsewhere."""
    low = torch.full((recipe.FRAME,), 1e-4, dtype=torch.float64)
    low[:64] = 2.0
    start = {
        name: Frames(torch.ones(1).double(), spectrum[None]) for name, spectrum in zip(recipe.NAMES, (low.flip(0), low))
    }
    generator = torch.Generator().manual_seed(0)
    x = torch.stack([start[name].sample(2, 40, generator).float() for name in recipe.NAMES], 1)
    plan = Plan(steps=8, corrections=0, sigma_min=2e-2, sigma_max=3.0, again=3.0, iterations=6)
    priors = [start[name].prior(ve(8, 2e-2, 3.0)) for name in recipe.NAMES]
    voice = recipe.by_priors(start, priors, plan, x.sum(1))
    assert (voice - x[:, 1]).square().mean() < 0.05 * x[:, 1].square().mean()


def test_nmf_leaves_known_spectra_alone_and_explains_the_rest(recipe):
    generator = torch.Generator().manual_seed(0)
    spectra = torch.rand(20, 3, generator=generator)
    spectra = spectra / spectra.sum(0)
    gains = torch.rand(3, 200, generator=generator) ** 4
    fresh, found = recipe.divide(spectra @ gains, spectra[:, :2], torch.rand(20, 1, generator=generator), 400)
    assert (fresh[:, 0] - spectra[:, 2]).abs().max() < 0.01
    assert (found - gains).abs().mean() < 0.1 * gains.mean()


def test_table_has_the_paired_difference_with_its_interval(recipe):
    rows = [
        {"method": "NMF", "si_sdr": [1.0, 2.0, 3.0, 4.0], "training_s": 1, "separation_s": 2},
        {"method": "Joint", "si_sdr": [2.0, 4.0, 4.0, 6.0], "training_s": 1, "separation_s": 2},
    ]
    # Differences 1, 2, 1, 2: mean 1.5, deviation 0.577, half the interval 1.96 * 0.577 / 2. Recordings a and b differ
    # by 1 and 2, and are drawn twice, once or not at all.
    table = recipe.table(rows, {"recordings": ["a", "b", "a", "b"]})
    assert "over 4 mixtures | over 2 recordings |" in table
    assert "| NMF | 2.50 | +1.50 (+0.93 to +2.07) | +1.50 (+1.00 to +2.00) | 1 | 2 |" in table


def test_recordings_that_are_held_out_share_no_file_with_the_others(recipe):
    items = [recipe.Item(f"{i}", Path(f"{i}"), "train", "sound", "Drill", 1.0, f"file {i // 3}") for i in range(24)]
    kept, held = recipe.left_out(items, np.random.default_rng(0))
    assert len(held) == 6
    assert sorted([*kept, *held]) == sorted(items)
    assert not {item.group for item in kept} & {item.group for item in held}
