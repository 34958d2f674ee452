import numpy as np
import pytest
import torch

from audiosep.guidance import LARGEST, ClassGuidance
from audiosep.metrics import si_sdr
from audiosep.mixing import BANDS, grid, hats
from audiosep.prior import GaussianPrior, JointPrior
from audiosep.samplers import Noise, build
from audiosep.schedules import ve
from audiosep.stft import istft, stft
from audiosep.tagger import SURE, Tagger


class Ears(Tagger):
    """Hears a tone of 400 Hz as "Low" and one of 3500 Hz as "High", the surer the louder it is beside the other."""

    def log_odds(self, mixture):
        power = torch.fft.rfft(mixture).abs().square()
        low, high = (power[:, int(f * mixture.shape[1] / 16000)] for f in (400, 3500))
        odds = (low - high) / (low + high + 1e-9)
        return torch.tensor([0, 0, 0, 0, 0, 4.0, -4.0]) * odds[:, None]


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
        x = guide(x, 1.0)
    assert (guide.objective(x) > before + 5).all()
    assert (si_sdr(x.double(), truth.double()) > 20).all()


def test_what_is_sure_is_moved_on_as_what_is_not():
    truth = low_and_high()
    sure = Ears(["Low", "High"])
    sure.log_odds = lambda mixture: 100 * Ears.log_odds(sure, mixture)
    x = 0.7 * truth + 0.3 * truth.flip(1)
    assert (sure.fits(x, ["Low", "High"]).abs() == SURE).all()
    once = [ClassGuidance(ears, ["Low", "High"], 0.3)(x, 1.0) for ears in (Ears(["Low", "High"]), sure)]
    torch.testing.assert_close(once[1], once[0], atol=1e-6, rtol=0)
    assert (si_sdr(once[1].double(), truth.double()) > si_sdr(x.double(), truth.double()) + 1).all()


@pytest.fixture
def tagger():
    torch.manual_seed(0)
    return Tagger(["Bark", "Bell"], width=2, mels=8).eval().requires_grad_(False)


def test_the_sum_stays_and_items_are_alike_alone_and_in_a_batch(tagger):
    x = torch.randn(2, 3, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    guide = ClassGuidance(tagger, ["speech", "Bark", "Bell"], 0.3)
    moved = guide(x, 1.0)
    torch.testing.assert_close(moved.sum(1), x.sum(1), atol=1e-5, rtol=0)
    assert (moved - x).abs().amax() > 0.01
    torch.testing.assert_close(guide(x[1:], 1.0), moved[1:], atol=1e-5, rtol=0)
    # A caller's mixed precision is not for this.
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(guide(x, 1.0), moved, atol=1e-5, rtol=0)


def test_a_field_has_the_rms_asked_for_and_is_cut_off(tagger, monkeypatch):
    guide = ClassGuidance(tagger, ["Bark", "Bell"], 0.1)
    x = torch.randn(1, 2, 32000, generator=torch.Generator().manual_seed(0)) * 0.1

    def spectrum(x):
        return stft(x, guide.n_fft, guide.hop_length)

    power = torch.nn.functional.avg_pool2d(spectrum(x).abs().square(), 3, 1, 1)
    log = (power + 1e-6 * power.amax()).log()

    def expected(field):
        change = (log + field).softmax(1) - log.softmax(1)
        return x + istft(change * spectrum(x.sum(1, keepdim=True)), guide.n_fft, guide.hop_length, 32000)

    # One node of weight one everywhere: a field is a number for each source. What one gains the other loses.
    monkeypatch.setattr("audiosep.guidance.grid", lambda *_: (torch.ones(513, 1), torch.ones(126, 1)))
    guide.objective = lambda x: x[:, 0].square().sum(-1)
    field = torch.tensor([0.1, -0.1])[None, :, None, None]
    torch.testing.assert_close(guide(x, 1.0), expected(field), atol=1e-5, rtol=0)
    # At less noise the step is shorter.
    torch.testing.assert_close(guide(x, 0.09), expected(0.3 * field), atol=1e-5, rtol=0)
    # Of 26 nodes, each of one bin of one frame, one has the whole gradient: five times the rms.
    monkeypatch.setattr("audiosep.guidance.grid", lambda *_: (torch.eye(513)[:, ::20], torch.eye(126)[:, 60:61]))
    guide.objective = lambda x: spectrum(x)[:, 0, 80, 60].abs().square()
    one = (torch.arange(513) == 80)[:, None] & (torch.arange(126) == 60)
    moved = spectrum(guide(x, 1.0) - x)[0, 0, 80, 60]
    most = spectrum(expected(field * LARGEST * one) - x)[0, 0, 80, 60]
    torch.testing.assert_close(moved, most, atol=0.02 * float(most.abs()), rtol=0)


def test_nodes_are_even_in_mel_and_in_time():
    rows, columns = grid(16000, 513, 126, 32000)
    hertz = 700 * ((1 + 8000 / 700) ** (torch.arange(BANDS) / (BANDS - 1)) - 1)
    assert (rows.argmax(0) * 8000 / 512 - hertz).abs().max() < 8000 / 512
    assert columns.argmax(0).tolist() in ([0, 31, 62, 94, 125], [0, 31, 63, 94, 125])


def test_sources_of_one_class_are_not_driven_apart(tagger):
    two_voices = ClassGuidance(tagger, ["speech", "Speech", "Bark"], 0.3)
    torch.testing.assert_close(two_voices.weights, torch.tensor([[1.0, 0, -1], [0, 1, -1], [-0.5, -0.5, 1]]))


def test_silence_stays_silent(tagger):
    guide = ClassGuidance(tagger, ["Bark", "Bell"], 0.3)
    silent = torch.zeros(1, 2, 16000)
    assert torch.equal(guide(silent, 1.0), silent)
    half = torch.stack((tone(400), torch.zeros(16000)))[None]
    moved = guide(half, 1.0)
    assert moved.isfinite().all()
    torch.testing.assert_close(moved.sum(1), half.sum(1), atol=1e-5, rtol=0)


def test_nodes_interpolate_linearly():
    at = torch.linspace(0, 1, 11)
    torch.testing.assert_close(hats(at, 6) @ torch.linspace(2.0, 4.0, 6), 2 + 2 * at)


def test_a_sampler_is_steered_in_every_step():
    seen, levels = [], []

    def steer(x, noise):
        seen.append(x)
        levels.append(noise)
        return x.flip(1)

    prior = GaussianPrior(torch.full((8001,), 0.01), ve())
    joint = JointPrior([(prior, None)] * 2)
    y = low_and_high().sum(1)
    plain, steered = build(joint), build(joint, steer=steer)
    ends = [list(sampler(y, Noise([0])))[-1].x for sampler in (plain, steered)]
    assert levels == steered.ratios[:-1]
    torch.testing.assert_close(seen[0].sum(1), y, atol=1e-4, rtol=0)
    assert not torch.allclose(*ends, atol=1e-3)
