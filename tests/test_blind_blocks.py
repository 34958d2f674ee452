"""Recordings that do not fit in memory: the same sources, from slices only."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from scipy.signal import lfilter

from audiosep.blind import SOBI, AuxIVA, StrADiff, separate_in_blocks
from audiosep.blind.base import RecordingError
from audiosep.blind.matching import mean_correlation, si_sdr
from audiosep.errors import UsageError

MIXING = np.array([[1.0, 0.4], [0.2, -0.9], [0.5, 0.5]])


class OnDisk:
    """Rows that count how many were asked for at once, and can't be taken whole."""

    def __init__(self, path, values):
        np.save(path, values)
        self.rows = np.load(path, mmap_mode="r+")
        self.shape, self.longest = values.shape, 0

    def __getitem__(self, rows):
        self.longest = max(self.longest, len(range(*rows.indices(len(self.rows)))))
        return self.rows[rows]

    def __setitem__(self, rows, values):
        self.rows[rows] = values


def sources(samples):
    noise = np.random.default_rng(0).standard_normal((samples, 2))
    S = np.stack([lfilter([1], [1, -1.8, 0.9], noise[:, 0]), lfilter([1], [1, 0.5], noise[:, 1])], axis=1)
    return S / S.std(0)


def test_blocks_give_what_the_whole_gives(tmp_path):
    S = sources(30_000)
    X = OnDisk(tmp_path / "x.npy", S @ MIXING.T + [3.0, 0.0, -1.0])
    out = OnDisk(tmp_path / "s.npy", np.zeros(S.shape))
    fitted = separate_in_blocks(SOBI(2), X, out, fit_samples=10_000, block=4_000, margin=100)
    assert X.longest <= 4_200
    np.testing.assert_allclose(out.rows, fitted.transform(X.rows))
    assert mean_correlation(out.rows, S) > 0.999
    assert len(fitted.sources_) == 10_000


def test_smoothed_blocks_do_not_show_where_they_meet(tmp_path):
    S = sources(1_500)
    noisy = S @ MIXING.T + 0.2 * np.random.default_rng(1).standard_normal((1_500, 3))
    out = np.zeros(S.shape)
    options = {"max_iter": 10, "steps": 2, "tol": 1.0, "random_state": 0}
    fitted = separate_in_blocks(StrADiff(2, **options), noisy, out, fit_samples=600, block=700, margin=100)
    whole = fitted.transform(noisy)
    assert si_sdr(out, S).mean() > si_sdr(SOBI(2).fit(noisy).sources_, S).mean() + 1
    np.testing.assert_allclose(out, whole, atol=1e-3)


def test_what_cant_be_is_said(tmp_path):
    X = sources(2_000) @ MIXING.T
    with pytest.raises(UsageError, match=r"out has shape \(2000, 3\), the sources have \(2000, 2\)"):
        separate_in_blocks(SOBI(2), X, np.zeros((2_000, 3)))
    with pytest.raises(UsageError, match="block is at least 1"):
        separate_in_blocks(SOBI(2), X, np.zeros((1_999, 2)))
    with pytest.raises(UsageError, match="block is at least 1"):
        separate_in_blocks(SOBI(2), X, np.zeros((2_000, 2)), block=0)
    pytest.importorskip("pyroomacoustics")
    with pytest.raises(UsageError, match="use fit_transform"):
        separate_in_blocks(AuxIVA(2), X, np.zeros((2_000, 2)))


def test_dependent_channels_in_a_room_are_named(monkeypatch):
    def singular(*_):
        raise np.linalg.LinAlgError("Singular matrix")

    pytest.importorskip("pyroomacoustics")
    monkeypatch.setattr(AuxIVA, "_run", singular)
    with pytest.raises(RecordingError, match="AuxIVA found the channels dependent"):
        AuxIVA(2).fit(sources(2_000) @ MIXING.T)
