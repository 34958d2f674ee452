import numpy as np
import torch

from audiosep.guidance import ClassGuidance, _hats
from audiosep.metrics import si_sdr
from audiosep.prior import GaussianPrior, JointPrior
from audiosep.samplers import Noise, build
from audiosep.samplers.mmps import STEERED
from audiosep.schedules import ve
from audiosep.tagger import Tagger


class Ears(Tagger):
    """Hears a tone of 400 Hz as "Low" and one of 3500 Hz as "High", the surer the louder it is beside the other."""

    def forward(self, mixture):
        power = torch.fft.rfft(mixture).abs().square()
        low, high = (power[:, int(f * mixture.shape[1] / 16000)] for f in (400, 3500))
        odds = (low - high) / (low + high + 1e-9)
        return (torch.tensor([0, 0, 0, 0, 0, 4.0, -4.0]) * odds[:, None]).sigmoid()


def tone(frequency):
    return 0.1 * torch.sin(2 * np.pi * frequency * torch.arange(16000) / 16000)


def low_and_high():
    """The two tones, (1, 2, N)."""
    return torch.stack((tone(400), tone(3500)))[None]


def test_it_finds_whose_sound_is_whose():
    truth = low_and_high()
    x = 0.5 * truth.sum(1, keepdim=True).expand(-1, 2, -1)  # both hold half of everything
    guide = ClassGuidance(Ears(["Low", "High"]), ["LOW", "High"], 0.3)
    before = guide.objective(x)
    for _ in range(24):
        x = guide(x)
    assert (guide.objective(x) > before + 5).all()
    assert (si_sdr(x.double(), truth.double()) > 20).all()


def test_the_sum_stays_and_steps_are_as_long_as_asked():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16000, generator=generator) * 0.1
    tagger = Tagger(["Bark", "Bell"], width=2, mels=8).eval()
    guide = ClassGuidance(tagger, ["speech", "Bark", "Bell"], 0.3)
    moved = guide(x)
    torch.testing.assert_close(moved.sum(1), x.sum(1), atol=1e-5, rtol=0)
    shorter = ClassGuidance(tagger, guide.names, 0.15)(x) - x
    ratio = (moved - x).square().mean().sqrt() / shorter.square().mean().sqrt()
    assert 1.8 < ratio < 2.1
    # A mixture is moved alike alone and in a batch.
    torch.testing.assert_close(guide(x[1:]), moved[1:], atol=1e-5, rtol=0)


def test_sources_of_one_class_are_not_driven_apart():
    x = low_and_high()
    same = ClassGuidance(Ears(["Low", "High"]), ["Low", "LOW"], 0.3)
    assert torch.equal(same.weights, torch.eye(2))
    two_voices = ClassGuidance(Ears(["Low", "High"]), ["speech", "speech", "Low"], 0.3)
    torch.testing.assert_close(two_voices.weights, torch.tensor([[1.0, 0, -1], [0, 1, -1], [-0.5, -0.5, 1]]))
    silent = torch.zeros_like(x)
    assert torch.equal(same(silent), silent)


def test_nodes_interpolate_linearly():
    at = torch.linspace(0, 1, 11)
    torch.testing.assert_close(_hats(at, 6) @ torch.linspace(2.0, 4.0, 6), 2 + 2 * at)


def test_a_sampler_steers_while_there_is_noise():
    seen = []

    def steer(x):
        seen.append(x)
        return x.flip(1)

    prior = GaussianPrior(torch.full((8001,), 0.01), ve())
    joint = JointPrior([(prior, None)] * 2)
    y = low_and_high().sum(1)
    plain, steered = build(joint), build(joint, steer=steer)
    ends = [list(sampler(y, Noise([0])))[-1].x for sampler in (plain, steered)]
    assert len(seen) == sum(ratio >= STEERED for ratio in steered.ratios)
    assert len(seen) > 5
    torch.testing.assert_close(seen[0].sum(1), y, atol=1e-4, rtol=0)
    assert not torch.allclose(*ends, atol=1e-3)
