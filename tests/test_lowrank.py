import pytest
import torch

from audiosep.lowrank import LowRank
from audiosep.metrics import si_sdr
from audiosep.stft import stft


def rhythms():
    """Two noises of other bands and rhythms, (1, 2, N): of rank 1 each."""
    noise = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    bands = torch.fft.rfft(noise)
    bands[0, 3000:], bands[1, :2000] = 0, 0  # they share 2 to 3 kHz
    seconds = torch.arange(16000) / 16000
    swell = torch.stack([(torch.pi * beats * seconds).sin().square() for beats in (3, 5)])
    return 0.1 * (torch.fft.irfft(bands) * swell)[None]


def test_what_is_of_low_rank_comes_apart():
    truth = rhythms()
    x = 0.7 * truth + 0.3 * truth.flip(1)
    step = LowRank([1, 1], 0.5)
    before = si_sdr(x.double(), truth.double()).mean()
    for _ in range(8):
        x = step(x)
    assert si_sdr(x.double(), truth.double()).mean() > before + 3


def test_magnitudes_of_low_rank_are_found():
    generator = torch.Generator().manual_seed(1)
    w, h = torch.rand(2, 3, 513, 1, generator=generator), torch.rand(2, 3, 1, 40, generator=generator)
    sources = w @ h
    found = LowRank([1, 1, 1], 1.0).magnitudes(sources, sources.sum(1))
    torch.testing.assert_close(found, sources, atol=1e-3, rtol=1e-3)
    # Of what only looks like the other two there is less in the sum's than in the sources' own.
    mixed = sources + 0.2 * (sources.sum(1, keepdim=True) - sources)
    found = LowRank([1, 1, 1], 1.0).magnitudes(mixed / 1.4, sources.sum(1))
    assert (found - sources).abs().mean() < 0.7 * (mixed / 1.4 - sources).abs().mean()


def test_the_sum_stays_and_items_are_alike_alone_and_in_a_batch():
    x = torch.randn(2, 3, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    step = LowRank([8, 1, 2], 0.2)
    moved = step(x)
    torch.testing.assert_close(moved.sum(1), x.sum(1), atol=1e-5, rtol=0)
    assert (moved - x).abs().amax() > 0.01
    torch.testing.assert_close(step(x[1:]), moved[1:], atol=1e-5, rtol=0)
    assert torch.equal(LowRank([8, 1, 2], 0.0)(x), x)
    torch.testing.assert_close(step(x, 3.0), x + 3 * (moved - x), atol=1e-6, rtol=0)
    assert torch.equal(step(x, 100.0), step(x, 5.0))  # the whole way at most
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(step(x), moved, atol=1e-5, rtol=0)


@pytest.mark.parametrize("gain", [0.0, 1e-4, 1e3])
def test_level_does_not_matter_and_silence_stays_silent(gain):
    x = rhythms() + 0.01 * rhythms().flip(1)
    step = LowRank([1, 4], 0.3)
    torch.testing.assert_close(step(gain * x), gain * step(x), atol=gain * 1e-5, rtol=1e-3)


def test_one_source_of_silence_beside_another():
    x = torch.cat((rhythms()[:, :1], torch.zeros(1, 1, 16000)), 1)
    moved = LowRank([1, 1], 0.5)(x)
    assert moved.isfinite().all()
    assert stft(moved, 1024, 256).isfinite().all()
    torch.testing.assert_close(moved.sum(1), x.sum(1), atol=1e-6, rtol=0)
