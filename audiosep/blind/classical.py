"""Classical blind separation: SOBI, AMUSE, JADE, and FastICA and Picard behind the same interface.

Each whitens the recording and finds the rotation that its statistics ask for. SOBI and AMUSE use
correlations over time (sources need different spectra), the others the distribution of the samples
(at most one source may be Gaussian). All take milliseconds, and are the ones to beat.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import welch
from sklearn import decomposition
from sklearn.exceptions import ConvergenceWarning

from audiosep.blind.base import Array, LinearSeparator, choose, positive, warn_unconverged
from audiosep.errors import UsageError

# Lags that the criterion of SOBI chooses from: 1..3 suit short memories, 1..100 slow sources.
LAG_CHOICES = (1, 3, 10, 30, 100)


def joint_diagonalizer(matrices: Array, max_iter: int = 100, tol: float = 1e-8) -> tuple[Array, int, float]:
    """The rotation V (n, n) that makes all V.T @ M @ V as diagonal as can be, for symmetric M (K, n, n).

    Cardoso and Souloumiac: "Jacobi angles for simultaneous diagonalization" (1996): each pair of axes is
    rotated by the angle that is best for the pair, in sweeps, until no angle exceeds tol.
    Returns V, the number of sweeps, and the largest angle (rad) of the last sweep.
    """
    work = np.array(matrices, dtype=np.float64)
    size = work.shape[-1]
    rotation = np.eye(size)
    sweeps, largest = 0, np.inf
    while sweeps < max_iter and largest > tol:
        sweeps, largest = sweeps + 1, 0.0
        for p in range(size - 1):
            for q in range(p + 1, size):
                angle = _pair_angle(work[:, p, p] - work[:, q, q], work[:, p, q] + work[:, q, p])
                largest = max(largest, abs(angle))
                if abs(angle) > tol:
                    c, s = np.cos(angle), np.sin(angle)
                    turn = np.array([[c, -s], [s, c]])
                    pair = [p, q]
                    work[:, :, pair] = work[:, :, pair] @ turn
                    work[:, pair, :] = turn.T @ work[:, pair, :]
                    rotation[:, pair] = rotation[:, pair] @ turn
    return rotation, sweeps, largest


def _pair_angle(difference: Array, crossed: Array) -> float:
    """The Jacobi angle of one pair of axes: (K,) differences of the diagonal, (K,) sums off it."""
    on = difference @ difference - crossed @ crossed
    off = 2 * difference @ crossed
    return 0.5 * float(np.arctan2(off, on + np.hypot(on, off)))


def lagged_covariances(Z: Array, lags: NDArray[np.intp]) -> Array:
    """Symmetrised covariances between Z (T, n) and Z delayed by each lag: (K, n, n)."""
    covariances = np.stack([Z[lag:].T @ Z[: len(Z) - lag] / (len(Z) - lag) for lag in lags])
    return (covariances + covariances.transpose(0, 2, 1)) / 2


def spectral_misfit(S: Array, floor: float = 0.5) -> float:
    """How little the spectra of the sources S (T, n), at unit variance, tell them apart: less is better.

    The mean of log(spectrum + floor) over frequencies and sources, Welch's spectrum with a mean of 1. Without the
    floor it is, for rotations of white data, minus the Gaussian likelihood per sample; but then white noise, which
    whitening has made unequal, decides. Of the floors from 0 to 3, 0.3 to 1 chose lags best.
    """
    length = min(len(S), max(8, min(len(S) // 4, 1024)))
    spectrum = welch(S, fs=1.0, nperseg=length, axis=0, detrend=False)[1] / 2  # one-sided
    return float(np.log(spectrum + floor).mean())


class SOBI(LinearSeparator):
    """Second-order blind identification: joint diagonalisation of covariances over several lags.

    Belouchrani, Abed-Meraim, Cardoso, Moulines: "A blind source separation technique using second-order
    statistics" (IEEE Trans. Signal Processing, 1997).

    Parameters
    ----------
    n_sources: int or None
        Number of sources; None estimates it.
    lags: int, sequence of int, or None
        Lags in samples; an int means 1..lags. None tries 1..1, 1..3, 1..10, 1..30 and 1..100 and keeps the sources
        whose spectra differ most (`spectral_misfit`).
    max_iter, tol: int, float
        Sweeps at most; the angle (rad) below which they end.
    random_state: ignored
        The method has nothing random; here for uniformity.

    Attributes
    ----------
    sources_ (n_samples, n_sources), mixing_ (n_channels, n_sources), components_ (n_sources, n_channels), mean_
        of X = mean_ + sources_ @ mixing_.T and sources_ = (X - mean_) @ components_.T.
    lags_: the lags used. n_iter_: sweeps done.
    """

    def __init__(
        self,
        n_sources: int | None = None,
        *,
        lags: Any = None,
        max_iter: int = 100,
        tol: float = 1e-8,
        random_state: Any = None,
    ) -> None:
        self.n_sources = n_sources
        self.lags = lags
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _rotation(self, Z: Array, rng: np.random.RandomState) -> Array:
        candidates = [self._diagonalized(Z, lags) for lags in self._lag_sets(len(Z))]
        misfits = [spectral_misfit(Z @ c[0]) for c in candidates] if len(candidates) > 1 else [0.0]
        rotation, self.n_iter_, change, self.lags_ = candidates[int(np.argmin(misfits))]
        if change > self.tol:
            warn_unconverged(self, self.n_iter_, change, self.tol)
        return rotation.T

    def _diagonalized(self, Z: Array, lags: NDArray[np.intp]) -> tuple[Array, int, float, NDArray[np.intp]]:
        return (*joint_diagonalizer(lagged_covariances(Z, lags), self.max_iter, self.tol), lags)

    def _lag_sets(self, samples: int) -> list[NDArray[np.intp]]:
        if self.lags is None:
            counts = [count for count in LAG_CHOICES if count < samples // 2] or [1]
            return [np.arange(1, count + 1) for count in counts]
        lags = np.asarray(self.lags)
        if lags.dtype.kind not in "iu":
            raise UsageError(f"lags are whole numbers or None, got {self.lags!r}")
        lags = np.arange(1, int(lags) + 1) if lags.ndim == 0 else lags.ravel()
        if not len(lags) or lags.min() < 1 or lags.max() >= samples:
            raise UsageError(f"lags lie between 1 and {samples - 1} (one less than the samples), got {self.lags!r}")
        return [lags]


class AMUSE(LinearSeparator):
    """The covariance at one lag, diagonalised: exact and immediate where that lag tells the sources apart.

    Tong, Soon, Huang, Liu: "AMUSE: a new blind identification algorithm" (ISCAS 1990).

    Parameters: n_sources (None estimates it), lag in samples, random_state (ignored, nothing is random).
    Attributes: as SOBI's, without lags_.
    """

    def __init__(self, n_sources: int | None = None, *, lag: int = 1, random_state: Any = None) -> None:
        self.n_sources = n_sources
        self.lag = lag
        self.random_state = random_state

    def _check_options(self) -> None:
        positive("lag", self.lag, whole=True)

    def _rotation(self, Z: Array, rng: np.random.RandomState) -> Array:
        if not 1 <= self.lag < len(Z):
            raise UsageError(f"lag lies between 1 and {len(Z) - 1} (one less than the samples), got {self.lag!r}")
        self.n_iter_ = 1
        return np.linalg.eigh(lagged_covariances(Z, np.array([self.lag]))[0])[1].T


class JADE(LinearSeparator):
    """Joint diagonalisation of fourth-order cumulants.

    Cardoso and Souloumiac: "Blind beamforming for non-Gaussian signals" (IEE Proceedings F, 1993). Memory and time grow
    with the fourth power of the number of sources: for up to about 30.

    Parameters: n_sources (None estimates it), max_iter (sweeps), tol (rad), random_state (ignored).
    Attributes: as SOBI's, without lags_.
    """

    def __init__(
        self, n_sources: int | None = None, *, max_iter: int = 100, tol: float = 1e-8, random_state: Any = None
    ) -> None:
        self.n_sources = n_sources
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _rotation(self, Z: Array, rng: np.random.RandomState) -> Array:
        rotation, self.n_iter_, change = joint_diagonalizer(cumulants(Z), self.max_iter, self.tol)
        if change > self.tol:
            warn_unconverged(self, self.n_iter_, change, self.tol)
        return rotation.T


def cumulants(Z: Array) -> Array:
    """Fourth-order cumulant matrices of white Z (T, n), one per pair of axes: (n(n+1)/2, n, n)."""
    samples, size = Z.shape
    matrices = []
    identity = np.eye(size)
    for i in range(size):
        for j in range(i + 1):
            moment = (Z * (Z[:, i] * Z[:, j])[:, None]).T @ Z / samples
            pair = np.outer(identity[i], identity[j])
            gaussian = (i == j) * identity + pair + pair.T
            matrices.append((moment - gaussian) * (1.0 if i == j else np.sqrt(2)))
    return np.stack(matrices)


class FastICA(LinearSeparator):
    """scikit-learn's FastICA, with the sources normalised, ordered and signed as here.

    Parameters: n_sources (None estimates it), fun ("logcosh", "exp" or "cube"), max_iter, tol, random_state.
    Attributes: as SOBI's, without lags_.
    """

    def __init__(
        self,
        n_sources: int | None = None,
        *,
        fun: str = "logcosh",
        max_iter: int = 500,
        tol: float = 1e-6,
        random_state: Any = None,
    ) -> None:
        self.n_sources = n_sources
        self.fun = fun
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _rotation(self, Z: Array, rng: np.random.RandomState) -> Array:
        choose("fun", self.fun, ("logcosh", "exp", "cube"))
        ica = decomposition.FastICA(
            whiten=False, fun=self.fun, max_iter=self.max_iter, tol=self.tol, random_state=rng, algorithm="parallel"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            ica.fit(Z)
        self.n_iter_ = int(ica.n_iter_)
        if self.n_iter_ >= self.max_iter:
            change = _fixed_point_change(ica.components_, Z, self.fun)
            if change > self.tol:
                warn_unconverged(self, self.n_iter_, change, self.tol)
        return np.asarray(ica.components_)


def _fixed_point_change(W: Array, Z: Array, fun: str) -> float:
    """How much one more step of FastICA would turn the rows of W: 0 at a fixed point."""
    again = decomposition.FastICA(whiten=False, fun=fun, max_iter=1, w_init=W)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        again.fit(Z)
    return float(np.max(np.abs(np.abs((again.components_ * W).sum(1)) - 1)))


class Picard(LinearSeparator):
    """Picard (needs `python-picard`), with the sources normalised, ordered and signed as here.

    Ablin, Cardoso, Gramfort: "Faster independent component analysis by preconditioning with Hessian
    approximations" (2018).

    Parameters: n_sources (None estimates it), ortho (keep the sources exactly white), max_iter, tol, random_state.
    Attributes: as SOBI's, without lags_.
    """

    def __init__(
        self,
        n_sources: int | None = None,
        *,
        ortho: bool = True,
        max_iter: int = 500,
        tol: float = 1e-7,
        random_state: Any = None,
    ) -> None:
        self.n_sources = n_sources
        self.ortho = ortho
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _rotation(self, Z: Array, rng: np.random.RandomState) -> Array:
        try:
            picard = import_module("picard").picard
        except ImportError as error:
            raise UsageError("python-picard is not installed: pip install python-picard") from error
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, W, _, steps = picard(
                Z.T,
                whiten=False,
                ortho=self.ortho,
                max_iter=self.max_iter,
                tol=self.tol,
                random_state=rng,
                return_n_iter=True,
            )
        self.n_iter_ = max(1, steps)
        for warning in caught:
            known = issubclass(warning.category, UserWarning)
            warnings.warn(str(warning.message), ConvergenceWarning if known else warning.category, stacklevel=4)
        return np.asarray(W)
