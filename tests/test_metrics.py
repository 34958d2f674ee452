"""Scores against signals whose score is known, and against another implementation."""

import math

import numpy as np
import pytest
import torch

from audiosep import metrics
from audiosep.errors import UsageError


def orthonormal(count=3, length=800):
    """Zero-mean signals, orthogonal to each other and of unit norm."""
    n = torch.arange(length, dtype=torch.float64)
    waves = torch.stack([torch.sin(2 * torch.pi * (k + 1) * n / length) for k in range(count)])
    return waves / waves.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("decibels", [-20.0, 0.0, 13.0, 60.0])
@pytest.mark.parametrize("gain", [-2.0, 0.01, 1.0])
def test_si_sdr_of_orthogonal_noise_is_the_power_ratio(decibels, gain):
    a, b, _ = orthonormal()
    estimate = gain * (a + 10 ** (-decibels / 20) * b) + 0.3
    assert metrics.si_sdr(estimate, 5 * a + 1).item() == pytest.approx(decibels, abs=1e-6)


def test_si_sdri_is_the_gain_over_the_mixture():
    a, b, _ = orthonormal()
    improvement = metrics.si_sdri(a + 0.1 * b, a, a + b)
    assert improvement.item() == pytest.approx(20.0, abs=1e-6)


def test_sdr_counts_a_wrong_level():
    a, b, _ = orthonormal()
    assert metrics.sdr(a + 0.1 * b, a).item() == pytest.approx(20.0, abs=1e-6)
    assert metrics.sdr(0.9 * a, a).item() == pytest.approx(20.0, abs=1e-6)


def test_all_pairs_by_broadcasting():
    waves = orthonormal()
    mixed = waves + 0.1 * waves.roll(1, 0)
    table = metrics.si_sdr(mixed[:, None], waves[None])
    assert table.shape == (3, 3)
    assert torch.allclose(table.diagonal(), torch.full((3,), 20.0, dtype=torch.float64), atol=1e-6)


def test_limits_are_infinite_not_zero():
    a, b, _ = orthonormal()
    assert metrics.si_sdr(torch.zeros_like(a), a).item() == -torch.inf
    assert metrics.si_sdr(b, a).item() < -200
    assert metrics.si_sdr(a, a).item() > 200
    assert metrics.sdr(a, a).item() == torch.inf


def test_float32_is_scored_in_double():
    a, b, _ = (wave.float() for wave in orthonormal())
    assert metrics.si_sdr(a + 1e-6 * b, a).item() == pytest.approx(120, abs=1.0)


@pytest.mark.parametrize("metric", ["si_sdr", "sdr"])
def test_what_cannot_be_scored_is_named(metric):
    score = metrics.METRICS[metric]
    a, b, _ = orthonormal()
    with pytest.raises(UsageError, match="length"):
        score(a[:-1], a, 16000)
    with pytest.raises(UsageError, match="reference is silent"):
        score(a, torch.zeros_like(a), 16000)
    with pytest.raises(UsageError, match="reference is silent"):
        score(a[:0], a[:0], 16000)
    with pytest.raises(UsageError, match="estimate holds NaN"):
        score(torch.full_like(a, torch.nan), a, 16000)
    with pytest.raises(UsageError, match="reference holds NaN"):
        score(a, torch.where(b > 0, torch.inf, b), 16000)


def test_agrees_with_fast_bss_eval():
    other = pytest.importorskip("fast_bss_eval")
    rng = torch.Generator().manual_seed(0)
    reference = torch.randn(4, 8000, generator=rng, dtype=torch.float64)
    estimate = reference + 0.3 * torch.randn(4, 8000, generator=rng, dtype=torch.float64)
    expected = -other.si_sdr_loss(estimate, reference, zero_mean=True)
    assert torch.allclose(metrics.si_sdr(estimate, reference), expected, atol=1e-6)


def test_agrees_with_torchmetrics():
    other = pytest.importorskip("torchmetrics.functional.audio")
    rng = torch.Generator().manual_seed(1)
    reference = torch.randn(2, 4000, generator=rng, dtype=torch.float64)
    estimate = reference + torch.randn(2, 4000, generator=rng, dtype=torch.float64)
    expected = other.scale_invariant_signal_distortion_ratio(estimate, reference, zero_mean=True)
    assert torch.allclose(metrics.si_sdr(estimate, reference), expected, atol=1e-6)
    expected = other.signal_noise_ratio(estimate, reference)
    assert torch.allclose(metrics.sdr(estimate, reference), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("package", "score", "name", "options"),
    [
        ("pystoi", metrics.estoi, "short_time_objective_intelligibility", {"extended": True}),
        ("pesq", metrics.pesq, "perceptual_evaluation_speech_quality", {"mode": "wb"}),
    ],
)
def test_scores_of_speech_agree_with_torchmetrics(package, score, name, options):
    """On a pair where it makes a difference which one is the reference: it pauses, the estimate doesn't."""
    other = pytest.importorskip("torchmetrics.functional.audio")
    pytest.importorskip(package)
    clean = buzz()
    clean[12000:22000] = 0
    estimate = clean + 0.03 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).double()
    expected = getattr(other, name)(estimate, clean, 16000, **options)
    assert score(estimate, clean).item() == pytest.approx(expected.item(), abs=1e-6)
    assert abs(score(estimate, clean) - score(clean, estimate)) > 0.01


def buzz(seconds=2.0, rate=16000):
    """Something like a voice: pulses at 120 Hz through a slow envelope."""
    n = np.arange(int(seconds * rate))
    wave = np.sign(np.sin(2 * np.pi * 120 * n / rate)) * (0.6 + 0.4 * np.sin(6 * n / rate))
    return torch.from_numpy(0.1 * wave)


def test_estoi():
    pytest.importorskip("pystoi")
    clean = buzz()
    noise = 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    scores = metrics.estoi(torch.stack([clean, clean + noise]), clean)
    assert scores[0] > 0.99
    assert scores[1] < scores[0]
    with pytest.raises(UsageError, match="ESTOI"):
        metrics.estoi(clean[:1000], clean[:1000])


def test_pesq():
    pytest.importorskip("pesq")
    clean = buzz()
    noise = 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    assert metrics.pesq(clean, clean) > metrics.pesq(clean + noise, clean)
    wide, narrow = (metrics.pesq(clean + noise, clean, mode=mode) for mode in ("wb", "nb"))
    assert metrics.pesq(clean + noise, clean) == wide != narrow


def test_pesq_says_what_it_needs(monkeypatch):
    with pytest.raises(UsageError, match="16000 Hz, got 44100"):
        metrics.pesq(buzz(), buzz(), 44100)
    with pytest.raises(UsageError, match="mode"):
        metrics.pesq(buzz(), buzz(), mode="swb")
    monkeypatch.setitem(__import__("sys").modules, "pesq", None)
    with pytest.raises(UsageError, match=r"pip install 'audiosep\[eval\]'"):
        metrics.pesq(buzz(), buzz())


def test_failure_rate():
    assert metrics.failure_rate([-1.0, 0.0, 3.0, -torch.inf]) == 0.5
    with pytest.raises(UsageError, match="no values"):
        metrics.failure_rate([])


def test_rate_interval_covers_the_rate_as_often_as_it_says():
    """Exactly, over all outcomes of 40 mixtures; the plain bootstrap has nothing to resample where none failed."""
    low, high = metrics.rate_interval(0, 40)
    assert low == 0
    assert high == pytest.approx(0.0876, abs=1e-4)
    assert metrics.rate_interval(40, 40) == pytest.approx((1 - high, 1))
    intervals = [metrics.rate_interval(k, 40) for k in range(41)]
    for rate in (0.05, 0.1, 0.3, 0.5):
        chance = [math.comb(40, k) * rate**k * (1 - rate) ** (40 - k) for k in range(41)]
        assert 0.93 < sum(p for p, (low, high) in zip(chance, intervals) if low <= rate <= high) < 0.99
    with pytest.raises(UsageError, match="5 of 4"):
        metrics.rate_interval(5, 4)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = metrics.bootstrap_interval(rng.normal(3.0, 2.0, 60), seed=trial, draws=200)
        hits += low <= 3.0 <= high
    assert 180 <= hits <= 198


def test_bootstrap_interval_is_near_the_normal_one_and_repeats():
    values = np.random.default_rng(1).normal(0.0, 1.0, 400)
    low, high = metrics.bootstrap_interval(values)
    assert (low, high) == metrics.bootstrap_interval(torch.from_numpy(values))
    half = 1.96 * values.std() / 20
    assert high - low == pytest.approx(2 * half, rel=0.1)


def test_paired_interval_is_narrow_where_the_items_vary_more_than_the_methods():
    rng = np.random.default_rng(2)
    hardness = rng.normal(0, 10, 100)
    better = hardness + 1 + rng.normal(0, 0.5, 100)
    low, high = metrics.paired_interval(better, hardness)
    assert 0.7 < low < 1 < high < 1.3
    with pytest.raises(UsageError, match="same items"):
        metrics.paired_interval(better, hardness[:50])
