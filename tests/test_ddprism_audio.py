"""The audio recipe: held-out mixtures are separated from noise alone, whatever the laps went on from."""

import importlib.util
from pathlib import Path

import torch

from audiosep.multiview import Plan
from audiosep.prior import NormalPrior
from audiosep.schedules import ve

FILE = Path(__file__).resolve().parent.parent / "recipes" / "ddprism" / "audio.py"


def test_held_out_mixtures_have_nothing_to_go_on_from():
    spec = importlib.util.spec_from_file_location("ddprism_audio", FILE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.OFFSETS = (0,)
    n, schedule = recipe.BLOCK, ve(24, 2e-2, 20.0)
    eye = torch.eye(n, dtype=torch.float64)
    priors = [NormalPrior(torch.zeros(n, dtype=torch.float64), level * eye, schedule) for level in (0.2, 1.8)]
    waves = torch.randn(1, 4 * n, generator=torch.Generator().manual_seed(0))
    plan = Plan(steps=24, sigma_min=2e-2, sigma_max=20.0, again=0.02)
    voice = recipe.by_priors(priors, plan, waves)
    # The voice given the mixture is Gaussian: 0.9 of it, less 0.02 for the noise, with variance 0.18.
    left = voice - 0.9 * waves
    assert left.mean().abs() < 0.08
    assert 0.12 < left.square().mean() < 0.24
