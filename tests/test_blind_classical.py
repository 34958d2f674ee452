"""SOBI, AMUSE, JADE, FastICA: known mixings come back, and the estimators behave as scikit-learn's."""

import pickle
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")

from scipy.signal import lfilter
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from audiosep.blind import AMUSE, JADE, SOBI, FastICA
from audiosep.blind.base import RecordingError, estimate_n_sources
from audiosep.blind.classical import joint_diagonalizer, lagged_covariances
from audiosep.blind.matching import align, coverage, match, mean_correlation, si_sdr
from audiosep.errors import UsageError

MIXING = np.array([[1.0, 0.4, -0.3], [0.2, -0.9, 0.5], [-0.5, 0.3, 0.6]])
ALL = [SOBI(), AMUSE(), JADE(), FastICA(random_state=0)]
WITH_TIME, WITH_TAILS = [SOBI(3), AMUSE(3)], [JADE(3), FastICA(3, random_state=0)]


def coloured(samples=4000, seed=0):
    """Gaussian sources of different spectra: nothing but time tells them apart."""
    rng = np.random.default_rng(seed)
    return np.stack([lfilter([1], [1, -a], rng.standard_normal(samples)) for a in (0.95, 0.3, -0.7)], axis=1)


def heavy(samples=4000, seed=0):
    """White Laplace noise: nothing but its distribution tells the sources apart."""
    return np.random.default_rng(seed).laplace(size=(samples, 3))


@pytest.mark.parametrize(
    ("estimator", "sources"),
    [(e, coloured()) for e in WITH_TIME] + [(e, heavy()) for e in WITH_TAILS],
    ids=lambda v: type(v).__name__,
)
def test_a_known_mixing_comes_back(estimator, sources):
    X = sources @ MIXING.T + [1.0, 2.0, 3.0]
    found = clone(estimator).fit(X)
    pairing = match(found.sources_, sources)
    mixing = found.mixing_[:, pairing.order] * pairing.signs
    np.testing.assert_allclose(mixing, MIXING * sources.std(0), atol=0.08)
    np.testing.assert_allclose(found.inverse_transform(found.sources_), X, atol=1e-9)
    np.testing.assert_allclose(found.sources_.std(0), 1)
    np.testing.assert_allclose(found.transform(X), found.sources_)


def test_order_and_sign_do_not_depend_on_the_mixing():
    sources = coloured()
    first = SOBI(3).fit(sources @ MIXING.T)
    second = SOBI(3).fit(sources[:, [2, 0, 1]] @ MIXING[:, [2, 0, 1]].T * -2.0)
    power = np.square(first.mixing_).sum(0)
    assert (np.diff(power) < 0).all()
    assert (first.mixing_.max(0) == np.abs(first.mixing_).max(0)).all()
    np.testing.assert_allclose(np.abs(second.mixing_), 2 * np.abs(first.mixing_), rtol=1e-6)


def test_joint_diagonalizer_finds_the_common_axes():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    matrices = np.stack([axes @ np.diag(rng.standard_normal(5)) @ axes.T for _ in range(7)])
    rotation, sweeps, change = joint_diagonalizer(matrices)
    np.testing.assert_allclose(np.sort(np.abs(rotation.T @ axes).max(0)), 1, atol=1e-10)
    assert sweeps < 20
    assert change < 1e-8


def test_sobi_is_at_a_fixed_point():
    X = coloured() @ MIXING.T
    found = SOBI(3, lags=10).fit(X)
    again = joint_diagonalizer(lagged_covariances(found.sources_, found.lags_), max_iter=1)
    np.testing.assert_allclose(again[0], np.eye(3), atol=1e-7)


def test_lags_are_chosen_to_suit_the_sources():
    rng = np.random.default_rng(3)
    short = np.stack([lfilter([1], [1, -a], rng.standard_normal(1000)) for a in (0.9, 0.7, 0.4)], axis=1)
    by_lags = {n: mean_correlation(SOBI(3, lags=n).fit_transform(short @ MIXING.T), short) for n in (1, 3, 100)}
    chosen = mean_correlation(SOBI(3).fit_transform(short @ MIXING.T), short)
    assert chosen > by_lags[100]
    assert chosen > max(by_lags.values()) - 0.005


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_number_of_sources_is_estimated(noise):
    rng = np.random.default_rng(1)
    X = coloured() @ rng.standard_normal((3, 6))
    X += noise * rng.standard_normal(X.shape)
    assert estimate_n_sources(X) == 3
    assert SOBI().fit(X).mixing_.shape == (6, 3)


def test_scores_know_their_truth():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((1000, 5)) - 0)[0]
    basis = np.linalg.qr(np.c_[np.ones(1000), basis])[0][:, 1:]  # orthonormal, zero mean
    reference, estimate = basis[:, :2], np.c_[-3 * basis[:, 1], 2 * (basis[:, 0] + 0.1 * basis[:, 2])]
    found = match(estimate, reference)
    assert found.order.tolist() == [1, 0]
    assert found.signs.tolist() == [1, -1]
    np.testing.assert_allclose(found.correlations, [1 / np.sqrt(1.01), 1])
    np.testing.assert_allclose(si_sdr(estimate, reference)[0], 20, atol=1e-6)
    np.testing.assert_allclose(align(estimate, reference)[:, 1], reference[:, 1], atol=1e-12)


def test_coverage_of_a_calibrated_band():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((20000, 2))
    estimate = -2 * (reference + 0.1 * rng.standard_normal(reference.shape))[:, ::-1]
    std = np.full(reference.shape, 0.2)
    assert coverage(estimate, std, reference) == pytest.approx(0.95, abs=0.01)


def test_pipelines_and_pickles():
    X = coloured() @ MIXING.T
    pipeline = make_pipeline(StandardScaler(), SOBI(3))
    sources = pipeline.fit_transform(X)
    assert mean_correlation(sources, coloured()) > 0.99
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pipeline)).transform(X), sources)
    assert pipeline.get_feature_names_out().tolist() == ["sobi0", "sobi1", "sobi2"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda X: X[:2], "too few"),
        (lambda X: X.T[:, :500], "transpose"),
        (lambda X: np.c_[X, np.ones(len(X))], "channel 3 is constant"),
        (lambda X: np.c_[X, -2 * X[:, 1] + 1], "channels 1 and 3 carry the same signal"),
        (lambda X: np.where(np.arange(len(X))[:, None] == 7, np.nan, X), "sample 7 of channel 0"),
        (lambda X: X + 1j, "Complex data not supported: take real parts"),
        (lambda X: X[:, 0], "got 1D array instead: a recording has a row per sample and a column per channel"),
    ],
)
@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_a_bad_recording_is_named(estimator, spoil, message):
    with pytest.raises(RecordingError, match=message):
        clone(estimator).fit(spoil(coloured(1000) @ MIXING.T))


def test_the_units_of_the_channels_do_not_matter():
    X = coloured() @ MIXING.T
    for n in (3, None):
        found = SOBI(n).fit(X * [1, 1e-7, 1e3])
        assert mean_correlation(found.sources_, coloured()) > 0.99
    assert estimate_n_sources(np.c_[X[:, :2], 1e-7 * (X[:, :2] @ [1, 1])]) == 2


def test_integers_are_taken():
    X = np.rint(1000 * coloured() @ MIXING.T).astype(np.int16)
    assert mean_correlation(SOBI().fit_transform(X), coloured()) > 0.99


def test_more_sources_than_channels_are_refused():
    with pytest.raises(UsageError, match="n_sources=4, but the recording has 3 channels"):
        SOBI(4).fit(coloured() @ MIXING.T)
    with pytest.raises(RecordingError, match="only 2 independent signals"):
        SOBI(3).fit(coloured()[:, :2] @ MIXING[:, :2].T)
    with pytest.raises(UsageError, match="n_sources is a positive number"):
        SOBI(0).fit(coloured())


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (SOBI(lags="abc"), "lags are whole numbers or None, got 'abc'"),
        (SOBI(lags=[1.5]), r"lags are whole numbers or None, got \[1.5\]"),
        (SOBI(lags=0), "lags lie between 1 and"),
        (SOBI(max_iter="abc"), "max_iter is a whole number above 0, got 'abc'"),
        (JADE(tol="x"), "tol is a number of at least 0, got 'x'"),
        (AMUSE(lag=1.5), "lag is a whole number above 0, got 1.5"),
        (FastICA(fun="sin"), "fun is logcosh, exp or cube, got 'sin'"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_wrong_options_are_named(estimator, message):
    with pytest.raises(UsageError, match=message):
        estimator.fit(coloured() @ MIXING.T)


def test_sources_to_mix_have_a_column_each():
    with pytest.raises(UsageError, match=r"sources have shape \(n_samples, 3\), got \(5, 2\)"):
        SOBI(3).fit(coloured() @ MIXING.T).inverse_transform(np.zeros((5, 2)))


def test_what_did_not_converge_says_so():
    with pytest.warns(ConvergenceWarning, match="did not converge in 1 iterations: the last change was"):
        SOBI(3, lags=10, max_iter=1).fit(coloured() @ MIXING.T)
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        FastICA(3, max_iter=1, random_state=0).fit(heavy() @ MIXING.T)


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_scikit_learns_own_checks(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(estimator)


def test_picard_agrees_with_fastica():
    """Both maximise a likelihood of heavy tails, from different sides."""
    pytest.importorskip("picard")
    from audiosep.blind import Picard

    sources = heavy()
    X = sources @ MIXING.T
    picard, fastica = Picard(3, random_state=0).fit(X), FastICA(3, random_state=0).fit(X)
    assert mean_correlation(picard.sources_, sources) > 0.998
    assert mean_correlation(picard.sources_, fastica.sources_) > 0.998
    np.testing.assert_allclose(picard.inverse_transform(picard.sources_), X, atol=1e-9)
    with pytest.warns(ConvergenceWarning, match=r"did not converge\. Final gradient norm"):
        Picard(3, max_iter=1, random_state=0).fit(X)


def test_picard_passes_scikit_learns_own_checks():
    pytest.importorskip("picard")
    from audiosep.blind import Picard

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(Picard(random_state=0))


def test_picard_that_is_missing_is_named(monkeypatch):
    from audiosep.blind import Picard

    monkeypatch.setitem(sys.modules, "picard", None)
    with pytest.raises(UsageError, match="pip install python-picard"):
        Picard(3).fit(heavy(200))
