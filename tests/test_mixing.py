import pytest
import torch

from audiosep.mixing import combine, mix, project, residual, shares
from audiosep.stft import istft, stft


@pytest.mark.parametrize("n", [1, 100, 255, 256, 511, 512, 513, 1000, 4097])
@pytest.mark.parametrize(("n_fft", "hop", "sqrt"), [(512, 128, False), (510, 255, True), (512, 256, False)])
def test_stft_comes_back_exactly_at_any_length(n, n_fft, hop, sqrt):
    x = torch.randn(2, 3, n, dtype=torch.float64)
    assert torch.allclose(istft(stft(x, n_fft, hop, sqrt), n_fft, hop, n, sqrt), x, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_the_inverse_transform_compiles_with_its_gradient():
    def energy(x):
        return istft(stft(x, 64, 32, True).exp(), 64, 32, x.shape[-1], True).square().sum()

    x = torch.randn(1, 500, requires_grad=True)
    (expected,) = torch.autograd.grad(energy(x), x)
    torch._dynamo.reset()
    try:
        torch.compile(torch.sin, dynamic=False)(x.detach())
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"torch can't compile here: {error}")
    (found,) = torch.autograd.grad(torch.compile(energy, dynamic=False)(x), x)
    torch._dynamo.reset()
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3 * expected.abs().max().item())


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
    power = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 5.0]])[:, None]  # (K, F, M)
    expected = torch.tensor([[0.25, 0.5, 0.0], [0.75, 0.5, 1.0]])[:, None]
    assert torch.allclose(shares(power), expected, atol=1e-6)
    # A quiet item is shared out as it is alone, whatever is in its batch.
    assert torch.allclose(shares(torch.stack((power, 1e-15 * power))), expected.expand(2, 2, 1, 3), atol=1e-6)


def test_samples_that_agree_are_left_as_they_are():
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(2, 3, 8000, generator=generator, dtype=torch.float64)
    assert torch.equal(combine(mix(sources), sources[None]), sources)
    same = sources.expand(4, -1, -1, -1)
    assert torch.allclose(combine(mix(sources), same), sources, atol=1e-6)


def test_samples_combined_add_up_to_the_mixture():
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(2, 5001, generator=generator, dtype=torch.float64)
    samples = torch.randn(4, 2, 3, 5001, generator=generator, dtype=torch.float64)
    samples += ((mixture - samples.sum(-2)) / 3).unsqueeze(-2)
    assert torch.allclose(mix(combine(mixture, samples)), mixture, atol=1e-6)
    silent = torch.zeros(4, 2, 3, 5001)
    assert torch.equal(combine(silent[0, :, 0], silent), silent[0])


def test_samples_combined_come_near_the_posterior_mean():
    """Gaussian sources of two bands each: what four exact posterior samples make against the exact mean."""
    generator = torch.Generator().manual_seed(0)
    length, draws = 32000, 4
    frequency = torch.fft.rfftfreq(length, dtype=torch.float64)
    gains = torch.stack([1 + 3 * (frequency < 0.2), 1 + 3 * (frequency > 0.3)])  # overlapping, never far apart
    white = torch.randn(2, length, generator=generator, dtype=torch.float64)
    sources = torch.fft.irfft(gains * torch.fft.rfft(white), n=length)
    mixture = mix(sources)

    def posterior_mean(y):
        return torch.fft.irfft(gains**2 / (gains**2).sum(0) * torch.fft.rfft(y).unsqueeze(-2), n=length)

    fresh = torch.randn(draws, 2, length, generator=generator, dtype=torch.float64)
    fresh = torch.fft.irfft(gains * torch.fft.rfft(fresh), n=length)
    samples = fresh + posterior_mean(mixture - mix(fresh))  # Matheron's rule
    exact = posterior_mean(mixture)

    def error(estimate):
        return (estimate - exact).square().mean().item()

    assert error(combine(mixture, samples)) < 0.3 * error(samples.mean(0))
