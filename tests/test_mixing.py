import pytest
import torch

from audiosep.mixing import mix, project, residual, shares
from audiosep.stft import istft, stft


@pytest.mark.parametrize("n", [1, 100, 255, 256, 511, 512, 513, 1000, 4097])
@pytest.mark.parametrize(("n_fft", "hop", "sqrt"), [(512, 128, False), (510, 255, True), (512, 256, False)])
def test_stft_comes_back_exactly_at_any_length(n, n_fft, hop, sqrt):
    x = torch.randn(2, 3, n, dtype=torch.float64)
    assert torch.allclose(istft(stft(x, n_fft, hop, sqrt), n_fft, hop, n, sqrt), x, atol=1e-7)


def test_projection_adds_up_and_leaves_a_fitting_estimate_alone():
    sources = torch.randn(2, 3, 5000, dtype=torch.float64)
    mixture = mix(sources)
    off = sources + 0.1 * torch.randn_like(sources)
    assert residual(mixture, project(mixture, off)).abs().max() < 1e-12
    assert torch.allclose(project(mixture, sources), sources, atol=1e-12)


def test_residual_goes_where_the_power_is():
    t = torch.arange(8000, dtype=torch.float64) / 16000
    low, high = torch.sin(2 * torch.pi * 500 * t), torch.sin(2 * torch.pi * 5000 * t)
    projected = project(low + high, torch.stack((0.5 * low, 0.8 * high)))
    inner = slice(1000, -1000)
    assert (projected[0] - low)[inner].abs().max() < 1e-3
    assert (projected[1] - high)[inner].abs().max() < 1e-3


def test_band_above_the_known_one_is_shared_as_just_below_it():
    t = torch.arange(24000, dtype=torch.float64) / 48000
    tone = [torch.sin(2 * torch.pi * f * t) for f in (6000, 20000)]
    silent = torch.zeros_like(t)
    estimates = torch.stack((tone[0], silent))
    projected = project(tone[0] + tone[1], estimates, 1536, 384, known_band=1 / 3)
    inner = slice(2000, -2000)
    assert (projected[0] - tone[0] - tone[1])[inner].abs().max() < 1e-3


def test_shares_are_fractions_also_without_power():
    power = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 5.0]])
    assert torch.allclose(shares(power, 0), torch.tensor([[0.25, 0.5, 0.0], [0.75, 0.5, 1.0]]), atol=1e-6)
