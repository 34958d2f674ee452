import numpy as np
import pytest
import torch

from audiosep.longform import Aligner, OverlapAdd, count_segments, cut, match


@pytest.mark.parametrize("frames", [1, 5, 99, 100, 101, 175, 176, 400, 1000])
@pytest.mark.parametrize("block", [1, 37, 1000])
@pytest.mark.parametrize("hop", [50, 75, 100])
def test_cutting_and_adding_gives_the_recording_back(frames, block, hop):
    wave = np.random.default_rng(0).standard_normal((2, frames))
    blocks = [wave[:, i : i + block] for i in range(0, frames, block)]
    adder, out, count = OverlapAdd(100, hop), [], 0
    for segment, last in cut(blocks, 100, hop):
        out.append(adder.add(torch.from_numpy(segment)[None], last))
        count += 1
    assert np.allclose(torch.cat(out, -1)[0], wave)
    assert count == count_segments(frames, 100, hop)


def voice(seed, low, n):
    """Noise in a band that starts at `low` of the spectrum, in bursts of its own rhythm."""
    rng = np.random.default_rng(seed)
    bins = np.fft.rfft(rng.standard_normal(n))
    keep = np.zeros(len(bins))
    keep[int(low * len(bins)) : int((low + 0.1) * len(bins))] = 1
    bursts = np.repeat(rng.random(n // 800 + 1) > 0.4, 800)[:n]
    return torch.from_numpy(np.fft.irfft(keep * bins, n) * bursts)


def test_swapped_speakers_are_put_back_even_after_a_silence():
    n, segment, hop = 64000, 8000, 6000
    speakers = torch.stack((voice(1, 0.05, n), voice(2, 0.4, n)))
    speakers[0, 20000:34000] = 0  # longer than a segment: only the embedding remembers
    speakers += 1e-6 * torch.randn_like(speakers)
    aligner, adder, out = Aligner([[0, 1]], segment - hop), OverlapAdd(segment, hop), []
    for i, (piece, last) in enumerate(cut([speakers.numpy()], segment, hop)):
        stems = torch.from_numpy(piece)[:, None]
        stems = stems.flip(0) if i % 3 == 1 else stems
        out.append(adder.add(stems[aligner.align(stems)], last))
    assert torch.allclose(torch.cat(out, -1)[:, 0], speakers, atol=1e-9)
    assert min(aligner.margins) > 0.1


def test_sources_with_an_identity_are_never_moved():
    aligner = Aligner([], 10)
    assert aligner.align(torch.randn(3, 1, 100)) == [0, 1, 2]
    assert aligner.margins == []


def test_match_finds_the_best_assignment_and_its_lead():
    best, margin = match(torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.2, 0.1], [0.0, 0.1, 0.7]]))
    assert best == [1, 0, 2]
    assert margin == pytest.approx((0.8 + 0.7 - 0.1 - 0.0) / 3, abs=1e-6)
