"""Posterior samplers by name, and their presets.

`build(prior, sampler, preset, steps)` is the door. Presets:

- ``published``: every choice of the published code: factor 0.09 on sigma(t), plain norms, initial level of step 149
  with a loop from 199, clamp to [-1, 1], one noise for all sources.
- ``paper``: the text as printed: squared losses, mean over the groups, no factor. (DPS keeps plain norms there: its
  constant is not printed, and the code's 1.5 diverges on squares.)
- ``default``: ours. The trajectory starts at the level where it is initialised, its levels are evenly spaced in
  signal-to-noise ratio, every source has its own noise, and nothing is clamped; the mixture enters by moment matching,
  which needs no gradient. `mmps` renews most of its noise in every step (eta = 3): what was given to the wrong source
  early can still be taken back. (A deterministic solver of second order keeps such errors; `mmps-exact` has it, as its
  answers are meant to be exact.)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from audiosep.errors import UsageError
from audiosep.losses import ReconstructionLoss
from audiosep.prior import JointPrior
from audiosep.samplers.analytical import Analytical
from audiosep.samplers.base import Noise, OneNoise, Sampler, State
from audiosep.samplers.gradient import DPS, DSG, Hybrid
from audiosep.samplers.mmps import MomentMatching
from audiosep.samplers.mmps_exact import ExactMomentMatching
from audiosep.schedules import ve, vp_linear

__all__ = ["DEFAULT_LEVELS", "PRESETS", "SAMPLERS", "SAMPLES", "Noise", "OneNoise", "Sampler", "State", "build"]

SAMPLERS: dict[str, type[Sampler]] = {
    "hybrid": Hybrid,
    "dsg": DSG,
    "dps": DPS,
    "analytical": Analytical,
    "mmps": MomentMatching,
    "mmps-exact": ExactMomentMatching,
}

# Which sampler a preset means when none is named.
PRESETS = {"default": "mmps", "published": "hybrid", "paper": "hybrid"}

DEFAULT_STEPS = 24
# Least and most noise relative to full scale, for signals near -22.5 dBFS.
DEFAULT_LEVELS = (2e-3, 1.5)

# Runs that a separator makes a stem of when none are asked for. The mean of two samples of the posterior has 3/4 of one
# sample's squared error, and costs 48 network evaluations per source against the 200 of one published run.
SAMPLES = {"default": 2, "published": 1, "paper": 1}


def build(
    prior: JointPrior,
    sampler: str | None = None,
    preset: str = "default",
    steps: int | None = None,
    least_noise: float | None = None,
    **options: Any,
) -> Sampler:
    """Make a sampler.

    Args:
        prior: the K sources' priors.
        sampler: one of `SAMPLERS`; None is the preset's own.
        preset: one of `PRESETS`.
        steps: network evaluations per source; None is the preset's own number (200 for `published` and `paper`).
        least_noise: level of the last step of the default preset, relative to full scale; None is that of
            `DEFAULT_LEVELS`. At a higher one the answer is the mean of what could still become of the state, no sample,
            and takes fewer steps.
        **options: arguments of the sampler's class, which win over the preset's.

    Raises:
        UsageError: the name, the number of steps or the level is not possible.
    """
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    name = sampler or PRESETS[preset]
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    if steps is not None and steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    if least_noise is not None and preset != "default":
        raise UsageError("least_noise is for the default preset")
    if least_noise is not None and not 0 < least_noise < DEFAULT_LEVELS[1]:
        raise UsageError(f"least_noise lies above 0 and below {DEFAULT_LEVELS[1]}, got {least_noise}")
    return SAMPLERS[name](prior, **{**_settings(name, preset, steps, least_noise), **options})


def _settings(name: str, preset: str, steps: int | None, least_noise: float | None) -> dict[str, Any]:
    if preset == "default":
        low, high = least_noise or DEFAULT_LEVELS[0], DEFAULT_LEVELS[1]
        part = math.log(high / low) / math.log(high / DEFAULT_LEVELS[0])
        schedule = ve(steps or 1 + round(part * (DEFAULT_STEPS - 1)), low, high)
        settings: dict[str, Any] = {"schedule": schedule, "t_init": None, "shared_noise": False}
        if name == "mmps":
            settings["eta"] = 3.0
        if name == "mmps-exact":
            settings |= {"eta": 0.0, "order": 2}
        return settings
    settings = {"schedule": vp_linear(), "clamp": preset == "published"}
    if steps is not None:
        settings["times"] = np.linspace(len(vp_linear()) - 1, 0, steps).round().tolist()
    if preset == "paper" and name in ("hybrid", "dsg"):
        settings |= {"loss": ReconstructionLoss(squared=True), "factor": 1.0}
    return settings
