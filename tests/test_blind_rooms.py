"""The wrappers of pyroomacoustics: a short convolutive mixture, and what is refused."""

import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.utils.estimator_checks import check_estimator

from audiosep.blind import ILRMA, AuxIVA, FastMNMF2
from audiosep.blind.matching import si_sdr
from audiosep.errors import UsageError


def room(seconds=3, rate=8000):
    """Two bursts of noise through short filters, as two microphones hear them; and each alone at the first."""
    rng = np.random.default_rng(0)
    samples = seconds * rate
    level = [np.repeat(rng.random(40) ** 4, samples // 40) for _ in range(2)]
    sources = [rng.laplace(size=samples) * g for g in level]
    filters = rng.standard_normal((2, 2, 60)) * np.exp(-np.arange(60) / 8)
    filters[0, 0, 0] = filters[1, 1, 0] = 4
    images = np.array([[np.convolve(s, f)[:samples] for s, f in zip(sources, row)] for row in filters])
    return images.sum(1).T, images[0].T


ROOMS = [
    AuxIVA(2, n_fft=512),
    ILRMA(2, n_fft=512, random_state=0),
    FastMNMF2(2, n_fft=512, n_components=2, max_iter=30, random_state=0),
]


@pytest.mark.parametrize("method", ROOMS, ids=lambda e: type(e).__name__)
def test_a_short_room_is_unmixed(method):
    pytest.importorskip("pyroomacoustics")
    X, images = room()
    before = si_sdr(np.repeat(X[:, :1], 2, axis=1) + 1e-9 * images, images).mean()
    found = method.fit_transform(X)
    assert si_sdr(found, images).mean() > before + 6
    assert found.shape == X.shape


@pytest.mark.parametrize("method", ROOMS, ids=lambda e: type(e).__name__)
def test_scikit_learns_own_checks(method):
    """Those of estimators without a transform, as manifold.TSNE is one."""
    pytest.importorskip("pyroomacoustics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(type(method)(n_fft=16, max_iter=2))


def test_what_is_missing_is_named(monkeypatch):
    X, _ = room(1)
    monkeypatch.setitem(sys.modules, "pyroomacoustics", None)
    with pytest.raises(UsageError, match="pip install pyroomacoustics"):
        AuxIVA(2).fit(X)
    with pytest.raises(UsageError, match="ILRMA finds as many sources as channels"):
        ILRMA(1).fit(X)
    with pytest.raises(UsageError, match="use fit_transform"):
        AuxIVA(2).transform(X)
    with pytest.raises(UsageError, match="no mixing matrix"):
        AuxIVA(2).inverse_transform(X)
    assert not hasattr(AuxIVA(2), "transform")
