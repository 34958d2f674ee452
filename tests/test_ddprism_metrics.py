"""The recipe's metrics on sets whose distance is known."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "ddprism"))
from metrics import divergence, pqmass, psnr, transport


def points(rows, seed):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_known_error():
    truth = points(50, 0)
    assert psnr(truth + 0.04, truth) == pytest.approx(40.0, abs=0.01)
    spoilt = truth + 0.04
    spoilt[0] = torch.nan
    assert psnr(spoilt, truth) == pytest.approx(40.0, abs=0.01)


def test_transport_finds_the_pairing_and_divergence_takes_off_its_bias():
    x = points(300, 0)
    assert transport(x, x.flip(0)) == pytest.approx(0.0, abs=1e-9)
    assert transport(x, x + 2) == pytest.approx(12.0, rel=1e-5)
    # A shift by d costs |d|^2 once; sets of one distribution are at no distance.
    assert divergence(points(2000, 1), points(2000, 2) + 1) == pytest.approx(3.0, rel=0.1)
    assert abs(divergence(points(2000, 1), points(2000, 2))) < 0.05


def test_estimates_of_the_same_rows_are_compared_with_other_rows():
    """Row by row they are nearer to the truth than any other set of the same distribution."""
    truth = points(2048, 1)
    assert abs(divergence(truth + 0.01 * points(2048, 2), truth)) < 0.05
    assert pqmass(truth, truth, repeats=20) < 0.8
    spoilt = truth.clone()
    spoilt[:300] = torch.nan
    assert abs(divergence(spoilt, truth)) < 0.08


def test_pqmass_tells_equal_sets_from_others():
    same = pqmass(points(2400, 1), points(2400, 2), repeats=20)
    assert 0.3 < same < 0.7
    assert pqmass(points(2400, 1), 1.3 * points(2400, 2), repeats=20) < 0.05
    assert np.isclose(pqmass(points(2400, 1), points(2400, 2), repeats=20), same)
