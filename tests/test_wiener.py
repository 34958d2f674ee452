"""The network of Wiener gains and the parameterisation that tells a backbone the noise itself."""

import pytest
import torch

from audiosep import hub
from audiosep.backbones.wiener import Wiener
from audiosep.prior import Prior
from audiosep.schedules import ve, vp_linear


def prior(level=-22.5, schedule=None, **options):
    torch.manual_seed(0)
    return Prior(Wiener(64, 16, 2, **options), schedule or ve(50, 1e-3, 3.0), level=level, parameterization="direct")


def waves(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule", [ve(50, 1e-3, 3.0), vp_linear()])
def test_one_variance_for_all_bins_is_the_denoiser_of_white_noise(schedule):
    """An untrained network estimates the variance e^-1, times that of the level, whatever it hears."""
    net = prior(schedule=schedule)
    torch.nn.init.zeros_(net.backbone.out.bias)
    x, t = waves(3, 500), torch.tensor([2.0, 20.0, 49.0])
    ratio, alpha = schedule.ratio_at(t).float()[:, None], schedule.alpha_of(schedule.ratio_at(t)).float()[:, None]
    variance = torch.e**-1 * net.sigma_data**2
    exact = variance / (variance + ratio**2) * x / alpha
    assert torch.allclose(net.denoise(x, t), exact, atol=1e-5)


def test_answer_scales_with_level_and_loss_does_not_care():
    quiet, loud = prior(-40.0), prior(0.0)
    quiet.backbone.load_state_dict(loud.backbone.state_dict())
    torch.nn.init.normal_(loud.backbone.out.weight, std=0.3)
    quiet.backbone.load_state_dict(loud.backbone.state_dict())
    x, ratio = waves(2, 300), torch.tensor([0.1, 1.0])
    t = torch.tensor([0.0, 0.0])
    assert torch.allclose(quiet._denoise(0.01 * x, 0.01 * ratio, t, None), 0.01 * loud._denoise(x, ratio, t, None))
    steps = [net.schedule.step_at(level * ratio) for net, level in ((quiet, 0.01), (loud, 1.0))]
    noise = waves(2, 300, seed=1)
    losses = [
        net.loss_at({"wave": level * x}, step, noise=noise)
        for net, level, step in ((quiet, 0.01, steps[0]), (loud, 1.0, steps[1]))
    ]
    assert torch.allclose(*losses, rtol=1e-3)


def test_phase_does_not_matter_and_faint_noise_leaves_the_signal():
    net = prior(0.0)
    torch.nn.init.normal_(net.backbone.out.weight, std=0.3)
    x, t = waves(1, 400), torch.tensor([25.0])
    assert torch.allclose(net.denoise(-x, t), -net.denoise(x, t), atol=1e-6)
    assert torch.allclose(net.denoise(x, torch.tensor([0.0])), x, atol=0.01)


def test_training_finds_where_the_signal_is():
    """A source of low frequencies alone: after a hundred steps the upper half is taken for noise."""
    net = prior(0.0)
    white = torch.fft.rfft(waves(32, 512))
    white[:, 64:] = 0
    x = 2 * torch.fft.irfft(white, n=512)
    adam = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(100):
        adam.zero_grad()
        net.loss({"wave": x}, torch.Generator().manual_seed(step)).mean().backward()
        adam.step()
    noisy = waves(8, 512, seed=2)
    with torch.no_grad():
        answer = torch.fft.rfft(net.denoise(noisy, net.schedule.step_at(torch.ones(8)))).abs().square().mean(0)
    assert answer[80:].mean() < 0.05 * answer[:50].mean()


def test_checkpoint_keeps_it(tmp_path):
    net = prior()
    torch.nn.init.normal_(net.backbone.out.weight, std=0.3)
    hub.save_prior(net, tmp_path / "w", {"title": "w", "description": "", "licence": "", "data": ""}, torch.float32)
    again = hub.load_prior(tmp_path / "w")
    x, t = waves(2, 333), torch.tensor([10.0, 40.0])
    assert again.parameterization == "direct"
    assert torch.equal(again.denoise(x, t), net.denoise(x, t))


def test_unknown_parameterisations_are_refused():
    with pytest.raises(ValueError, match="'eps', 'edm' or 'direct', not 'score'"):
        Prior(Wiener(64, 8, 1), ve(3, 0.1, 1.0), parameterization="score")


@pytest.mark.parametrize("wrong", [{"n_fft": 0}, {"n_fft": 65}, {"width": 0}, {"depth": -1}])
def test_sizes_that_are_no_network_are_refused(wrong):
    with pytest.raises(ValueError, match="n_fft is even"):
        Wiener(**wrong)
