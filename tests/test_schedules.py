import numpy as np
import pytest
import torch

from audiosep.samplers.gradient import Hybrid
from audiosep.schedules import ve, vp_linear


def test_vp_linear_is_the_published_table(golden):
    known = np.load(golden / "schedule_reference.npz")
    schedule = vp_linear()
    assert np.allclose(schedule.alpha**2, known["alphas_cumprod"], rtol=1e-6)
    assert np.allclose(schedule.alpha**2 + schedule.sigma**2, 1)


def test_hybrid_strength_is_the_published_smooth_max(golden, gaussian):
    known = np.load(golden / "schedule_reference.npz")
    sampler = Hybrid(gaussian.joint)
    assert sampler.times == list(range(199, -1, -1))
    variance = [(sampler.alphas[i + 1] * sampler.spread(i)) ** 2 for i in range(200)][::-1]
    assert np.allclose(variance, known["posterior_variance"], rtol=3e-4, atol=1e-12)  # float32 there
    strength = [sampler.strength(i) for i in range(200)][::-1]
    assert np.allclose(strength, known["smooth_max"], rtol=3e-4)


@pytest.mark.parametrize("schedule", [vp_linear(), ve(50, 1e-3, 2.0)])
def test_steps_and_ratios_invert_each_other(schedule):
    t = torch.linspace(0, len(schedule) - 1, 77, dtype=torch.float64)
    assert torch.allclose(schedule.step_at(schedule.ratio_at(t)), t, atol=1e-9)
    assert (schedule.ratio.diff() > 0).all()


def test_a_single_step_is_the_noisiest():
    assert ve(1, 1e-3, 1.5).ratio.tolist() == [1.5]


def test_levels_outside_the_table_are_limited_to_it():
    schedule = ve(10, 1e-2, 1.0)
    assert schedule.step_at(torch.tensor([1e-5, 50.0], dtype=torch.float64)).tolist() == [0, 9]
