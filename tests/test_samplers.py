"""Samplers against the published loop's outputs and against exact Gaussian posteriors."""

import math

import numpy as np
import pytest
import torch

from audiosep.errors import UsageError
from audiosep.losses import ReconstructionLoss, group_loss, stft_loss, time_loss
from audiosep.samplers import PRESETS, SAMPLERS, SAMPLES, Noise, build


class NoNoise(Noise):
    def __init__(self):
        pass

    def __call__(self, rows, like):
        return torch.zeros(like.shape[0], rows, like.shape[-1])


@pytest.mark.parametrize(("sampler", "name", "last"), [("hybrid", "hybrid", 0), ("dsg", "DSG", 0), ("dps", "DPS", 10)])
def test_published_preset_reproduces_the_published_loop(gaussian, sampler, name, last):
    compared = 0
    for state in build(gaussian.joint, sampler, "published")(gaussian.mixture, NoNoise()):
        key = f"{name}_after_step_{state.t}"
        if key in gaussian.reference.files and state.t >= last:
            known = gaussian.reference[key]
            error = np.linalg.norm(state.x[0].numpy() - known) / np.linalg.norm(known)
            assert error <= 1e-3, key
            compared += 1
    assert compared == (6 if last == 0 else 5)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_analytical_sampling_shares_the_residual(gaussian, count):
    """Two rounds, the first of the states before the step: x_k + (y - sum x)/K, whatever those states were."""
    sampler = build(gaussian.joint, "analytical", "published")
    generator = torch.Generator().manual_seed(0)
    x, x_t = torch.randn(2, 2, count, 50, generator=generator)
    y = torch.randn(2, 50, generator=generator)
    moved = x + sampler.guide(x, x_t, x, y, 0)
    residual = y - x.sum(1)
    assert torch.allclose(moved.sum(1), y, atol=1e-5)
    assert torch.allclose(moved - x, residual[:, None].expand_as(x) / count, atol=1e-5)


def test_analytical_sampling_with_undiffs_half_overshoots_for_three(gaussian):
    sampler = build(gaussian.joint, "analytical", "published", share=0.5, corrections=1)
    x, y = torch.randn(2, 3, 50), torch.randn(2, 50)
    moved = x + sampler.guide(x, x, x, y, 0)
    assert torch.allclose(y - moved.sum(1), -0.5 * (y - x.sum(1)), atol=1e-5)


def draw(gaussian, runs, **options):
    """Samples (runs, 2, N) and the evaluations of a run."""
    sampler = build(gaussian.joint, **options)
    for state in sampler(gaussian.mixture.expand(runs, -1), Noise(range(runs))):
        samples = state.x
    return samples.double(), sampler.evaluations


def accuracy(gaussian, samples):
    """Relative error of the mean, and |log| of the ratio of summed variances, against the exact posterior."""
    mean, variance = gaussian.posterior()
    centre = samples.mean(0)
    found = torch.fft.rfft(samples - centre).abs().square().sum(0) / (len(samples) - 1) / gaussian.n
    ratio = found.sum(-1) / variance.sum()
    return ((centre - mean).norm() / mean.norm()).item(), ratio.log().abs().max().item(), (found / variance)


EXACT = {"eta": 0.0, "order": 2}  # the deterministic solver: no noise is renewed


@pytest.mark.slow
def test_moment_matching_is_nearer_the_exact_posterior_than_published(gaussian):
    published, many = draw(gaussian, 64, preset="published")
    default, few = draw(gaussian, 64, steps=12, **EXACT)
    assert few <= many / 16
    mean_published, variance_published, bins_published = accuracy(gaussian, published)
    mean_default, variance_default, bins_default = accuracy(gaussian, default)
    assert mean_default < 0.03 < mean_published
    assert variance_default < 0.05 < variance_published
    # Bin by bin, too, for both sources.
    for k in range(2):
        assert bins_default[k].log().abs().mean() < bins_published[k].log().abs().mean()


def test_moment_matching_samples_the_exact_posterior(gaussian):
    mean, variance, _ = accuracy(gaussian, draw(gaussian, 12, steps=12, **EXACT)[0])
    # Twelve samples' own scatter about the exact mean is 12 ** -0.5 of the posterior's spread.
    exact, spread = gaussian.posterior()
    scatter = (spread.sum() * 2 * 2 / 12).sqrt() / exact.norm()
    assert mean < 1.15 * scatter.item()
    assert variance < 0.1


def test_default_preset_finds_the_posterior_mean_and_is_no_wider(gaussian):
    samples, evaluations = draw(gaussian, 24)
    assert evaluations * SAMPLES["default"] == 48
    mean, _, ratio = accuracy(gaussian, samples)
    exact, spread = gaussian.posterior()
    assert mean < 1.15 * ((spread.sum() * 2 * 2 / 24).sqrt() / exact.norm()).item()
    # Noise that is renewed in steps as large as these loses some of the spread.
    assert ((ratio.mean(-1) > 0.4) & (ratio.mean(-1) < 1.1)).all()


def test_what_ends_at_more_noise_is_nearer_the_posterior_mean_than_samples(gaussian):
    (samples, many), (means, few) = (draw(gaussian, 12, least_noise=level) for level in (None, 0.063))
    assert (many, few) == (24, 12)
    exact, _ = gaussian.posterior()
    errors = [(found - exact).square().mean() for found in (samples, means)]
    assert errors[1] < 0.7 * errors[0]
    torch.testing.assert_close(means.sum(1), gaussian.mixture.double().expand(12, -1), atol=1e-5, rtol=0)


def test_variances_are_calibrated_to_the_priors_power(gaussian):
    sampler = build(gaussian.joint)
    assert sampler.prior.power == pytest.approx([0.07**2] * 2, rel=1e-3)
    faint = torch.stack((gaussian.mixture, 0 * gaussian.mixture), 1)  # one source holds all
    variance = torch.full((1, 2, 257, 126), 1e-4)
    first, second = sampler._calibrated(variance, faint)[0]
    assert torch.equal(first, variance[0, 0])  # nothing is lacking
    assert second.mean().item() == pytest.approx(0.07**2, rel=1e-3)  # all is


def test_default_preset_adds_up_to_the_mixture_at_every_step(gaussian):
    for state in build(gaussian.joint, steps=5)(gaussian.mixture, Noise([3])):
        assert torch.allclose(state.denoised.sum(1), gaussian.mixture, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_item_is_the_same_alone_and_in_a_batch(gaussian, sampler, preset):
    y = torch.cat((gaussian.mixture, 0.5 * gaussian.mixture.flip(-1)))[:, :4000]
    prior = type(gaussian.joint.sources[0][0])
    spectra = [s[::4] for s in gaussian.spectra]
    joint = type(gaussian.joint)([(prior(s[:2001], gaussian.joint.sources[0][0].schedule), None) for s in spectra])
    joint_sampler = build(joint, sampler, preset, steps=6)
    *_, together = joint_sampler(y, Noise([7, 8]))
    *_, alone = joint_sampler(y[1:], Noise([8]))
    scale = together.x.abs().max()
    assert torch.allclose(together.x[1], alone.x[0], atol=2e-4 * scale.item())


@pytest.mark.parametrize("first", [0, 9])
def test_a_restart_goes_on_from_sources_in_noise(gaussian, first):
    sampler = build(gaussian.joint, sampler="mmps")
    y = gaussian.mixture.expand(3, -1)
    sources = y[:, None].expand(-1, len(gaussian.joint), -1)
    states = list(sampler(y, Noise(range(3)), (sources, first)))
    assert [state.step for state in states] == list(range(first + 1, len(sampler.times) + 1))
    begun = states[0].x_t / sampler.alphas[first]
    torch.testing.assert_close((begun - sources).std().item(), sampler.ratios[first], rtol=0.05, atol=0)
    if not first:  # the sampler begins with the mixture for every source
        for state, other in zip(states, sampler(y, Noise(range(3)))):
            assert torch.equal(state.x, other.x)


def test_a_restart_from_the_exact_posterior_stays_there(gaussian):
    samples, _ = draw(gaussian, 24, steps=12, **EXACT)
    sampler = build(gaussian.joint, steps=12, **EXACT)
    for state in sampler(gaussian.mixture.expand(24, -1), Noise(range(100, 124)), (samples.float(), 6)):
        again = state.x.double()
    before, after = accuracy(gaussian, samples), accuracy(gaussian, again)
    assert (again - samples).norm() > 0.1 * (samples - samples.mean(0)).norm()  # others of its samples
    assert after[0] < 1.1 * before[0]
    assert max(before[1], after[1]) < 0.1


def test_wrong_names_and_numbers_are_refused(gaussian):
    with pytest.raises(UsageError, match=r"dsp.*hybrid"):
        build(gaussian.joint, "dsp")
    with pytest.raises(UsageError, match=r"fast.*default"):
        build(gaussian.joint, preset="fast")
    with pytest.raises(UsageError, match="at least 1"):
        build(gaussian.joint, steps=0)
    for level in (0.0, 1.5, -1.0, math.nan):
        with pytest.raises(UsageError, match=r"above 0 and below 1\.5"):
            build(gaussian.joint, least_noise=level)
    with pytest.raises(UsageError, match="least_noise is for the default preset"):
        build(gaussian.joint, preset="paper", least_noise=0.1)
    with pytest.raises(TypeError, match="stpes"):
        build(gaussian.joint, stpes=3)


def test_losses_have_their_printed_values():
    y, estimate = torch.zeros(2, 1024), torch.ones(2, 1024)
    assert torch.allclose(time_loss(estimate, y), torch.full((2,), 32.0))
    assert torch.allclose(time_loss(estimate, y, squared=True), torch.full((2,), 1024.0))
    assert torch.allclose(group_loss(estimate, y), torch.full((2,), 512 * 2**0.5))
    assert torch.allclose(group_loss(estimate, y, squared=True), torch.full((2,), 2.0))
    noise = torch.randn(2, 4000)
    assert stft_loss(noise, -noise).max() < 1e-4  # magnitudes have no sign
    loss = ReconstructionLoss(time=1, group=0, stft=0)
    assert torch.equal(loss(estimate, y), time_loss(estimate, y))


def test_gradient_of_a_perfect_fit_is_finite():
    y = torch.zeros(1, 2048)
    estimate = torch.zeros(1, 2048, requires_grad=True)
    ReconstructionLoss()(estimate, y).sum().backward()
    assert estimate.grad.isfinite().all()
