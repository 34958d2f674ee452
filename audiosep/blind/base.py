"""What all blind estimators share: checks of the recording, whitening, order and sign of the sources.

The model is X = mean_ + sources_ @ mixing_.T: X (T, m) with T samples of m channels, sources_ (T, n) of
unit variance, ordered by the power that they bring to the channels, signed so that the largest
entry of each column of mixing_ (m, n) is positive.
"""

from __future__ import annotations

import numbers
import warnings
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from audiosep.errors import AudiosepError, UsageError

Array = NDArray[np.float64]

# Eigenvalues of the channels' correlation matrix below this share of the largest are rounding.
RANK_TOLERANCE = 1e-12


class RecordingError(AudiosepError, ValueError):
    """A recording can't be separated: NaN, too short, a constant channel, ..."""


@dataclass(frozen=True)
class Whitening:
    """z = (x - mean) @ matrix.T has unit covariance; x - mean = z @ inverse.T in the kept subspace.

    mean (m,), matrix (n, m), inverse (m, n); noise is the mean variance of the components cut off
    (that of white noise, where X is sources and white noise), None if none was cut.
    """

    mean: Array
    matrix: Array
    inverse: Array
    noise: float | None

    def __call__(self, X: Array) -> Array:
        return (X - self.mean) @ self.matrix.T


def whiten(X: Array, n: int) -> Whitening:
    """Principal components of X (T, m): the n strongest, at unit variance."""
    mean = X.mean(0)
    _, singular, axes = np.linalg.svd(X - mean, full_matrices=False)
    power = singular**2 / len(X)
    kept = np.sqrt(power[:n])[:, None]
    noise = float(power[n:].mean()) if len(power) > n else None
    return Whitening(mean, axes[:n] / kept, (axes[:n] * kept).T, noise)


def rank(X: Array) -> int:
    """How many independent signals the channels of X (T, m) are mixtures of, whatever the channels' units."""
    centred = X - X.mean(0)
    spread = centred.std(0)
    power = np.linalg.svd(centred / np.where(spread > 0, spread, 1.0), compute_uv=False) ** 2
    return int((power > RANK_TOLERANCE * power[0]).sum())


def estimate_n_sources(X: Array) -> int:
    """The number of sources in X (T, m), the rest being white Gaussian noise of equal power everywhere.

    Wax and Kailath, "Detection of signals by information theoretic criteria" (1985): the shortest description has all
    eigenvalues of the covariance equal but the sources'. As equal powers may be chance, components that are
    correlated in time or not Gaussian count as sources in any case. Without noise it is the rank.
    """
    samples, channels = X.shape
    axes, singular, _ = np.linalg.svd(X - X.mean(0), full_matrices=False)
    power = singular**2 / samples
    independent = rank(X)
    if independent < channels:  # fewer sources than channels and no noise
        return independent
    lengths = []
    for k in range(channels):
        tail = power[k:]
        misfit = samples * (channels - k) * (np.log(tail.mean()) - np.log(tail).mean())
        lengths.append(misfit + 0.5 * k * (2 * channels - k) * np.log(samples))
    shortest = max(1, int(np.argmin(lengths)))
    structured = [k for k in range(shortest, channels) if not _is_noise(axes[:, k] * np.sqrt(samples))]
    return max([shortest, *(k + 1 for k in structured)])


def _is_noise(z: Array) -> bool:
    """Whether z (T,), at unit variance, may be white and Gaussian: correlations and kurtosis within 5 deviations."""
    samples = len(z)
    lags = range(1, min(11, samples // 2))
    correlation = max((abs(z[lag:] @ z[:-lag]) / samples for lag in lags), default=0.0)
    kurtosis = float(np.mean(z**4)) - 3
    return correlation < 5 / np.sqrt(samples) and abs(kurtosis) < 5 * np.sqrt(24 / samples)


class BlindSeparator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Base of the estimators. A subclass sets its parameters and writes `_separate`."""

    n_sources: int | None
    random_state: Any

    sources_: Array
    n_sources_: int
    n_iter_: int

    def fit(self, X: ArrayLike, y: None = None) -> Self:
        """Find the sources of the recording X (n_samples, n_channels). `y` is ignored."""
        recording = self._checked(X, reset=True)
        self.n_sources_ = self._count(recording)
        self._separate(recording, check_random_state(self.random_state))
        return self

    def _separate(self, X: Array, rng: np.random.RandomState) -> None:
        """Set what is learned from the checked recording X (T, m); n_sources_ is set."""
        raise NotImplementedError

    def _checked(self, X: ArrayLike, *, reset: bool) -> Array:
        """X as float64 (T, m), or a RecordingError that says what is wrong with it."""
        try:
            recording = validate_data(
                self,
                X,
                reset=reset,
                dtype=np.float64,
                order="C",
                ensure_all_finite=False,
                ensure_min_samples=2 if reset else 1,
            )
        except ValueError as error:
            text = " ".join(str(error).split())
            if text.startswith("Complex data not supported"):  # followed by all the numbers
                text = "Complex data not supported: take real parts or magnitudes first"
            if text.startswith("Expected 2D array, got 1D"):
                text = (
                    "Expected 2D array, got 1D array instead: a recording has a row per sample and a column per "
                    "channel. Reshape your data"
                )
            raise RecordingError(text) from error
        _check_finite(recording)
        if reset:
            _check_channels(recording)
        return recording

    def _count(self, X: Array) -> int:
        """The number of sources: as asked for, or estimated."""
        channels = X.shape[1]
        if self.n_sources is None:
            return estimate_n_sources(X)
        if not isinstance(self.n_sources, int | np.integer) or self.n_sources < 1:
            raise UsageError(f"n_sources is a positive number or None, got {self.n_sources!r}")
        if self.n_sources > channels:
            raise UsageError(
                f"n_sources={self.n_sources}, but the recording has {channels} channels: "
                "at most as many sources as channels can be separated"
            )
        independent = rank(X)
        if self.n_sources > independent:
            raise RecordingError(
                f"the {channels} channels are mixtures of only {independent} independent signals: "
                f"n_sources is at most {independent}"
            )
        return int(self.n_sources)

    @property
    def _n_features_out(self) -> int:
        return self.n_sources_


class InstantaneousSeparator(BlindSeparator):
    """One that learns how each sample is mixed, so that other recordings mixed alike can be separated too."""

    mean_: Array
    mixing_: Array
    components_: Array

    def transform(self, X: ArrayLike) -> Array:
        """The sources (n_samples, n_sources) of a recording that was mixed alike."""
        check_is_fitted(self)
        return (self._checked(X, reset=False) - self.mean_) @ self.components_.T

    def inverse_transform(self, sources: ArrayLike) -> Array:
        """The recording (n_samples, n_channels) that these sources mix to."""
        check_is_fitted(self)
        return self._checked_sources(sources) @ self.mixing_.T + self.mean_

    def _set_linear(self, whitening: Whitening, unmixing: Array, X: Array) -> None:
        """Take the sources whitening(X) @ unmixing.T, unmixing (n, n): normalise, order, sign."""
        std = (whitening(X) @ unmixing.T).std(0)
        mixing = whitening.inverse @ np.linalg.inv(unmixing) * std
        order, signs = order_and_signs(mixing)
        self.mean_ = whitening.mean
        self.mixing_ = mixing[:, order] * signs
        self.components_ = ((unmixing / std[:, None])[order] * signs[:, None]) @ whitening.matrix
        self.sources_ = (X - self.mean_) @ self.components_.T

    def _checked_sources(self, sources: ArrayLike) -> Array:
        """sources as float64 (T, n), or a UsageError."""
        given = np.asarray(sources, dtype=np.float64)
        if given.ndim != 2 or given.shape[1] != self.n_sources_:
            raise UsageError(f"sources have shape (n_samples, {self.n_sources_}), got {given.shape}")
        return given


class LinearSeparator(InstantaneousSeparator):
    """An estimator that whitens and then rotates: a subclass writes `_rotation`."""

    tol: float
    max_iter: int

    def _check_options(self) -> None:
        positive("max_iter", self.max_iter, whole=True)
        positive("tol", self.tol, zero=True)

    def _separate(self, X: Array, rng: np.random.RandomState) -> None:
        self._check_options()
        whitening = whiten(X, self.n_sources_)
        self._set_linear(whitening, self._rotation(whitening(X), rng), X)

    def unmix(self, Z: Array, rng: np.random.RandomState) -> Array:
        """The (n, n) rotation alone, for white Z (T, n): a start for others."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return self._rotation(Z, rng)

    def _rotation(self, Z: Array, rng: np.random.RandomState) -> Array:
        """The (n, n) rotation that turns white Z (T, n) into sources."""
        raise NotImplementedError


def order_and_signs(mixing: Array) -> tuple[NDArray[np.intp], Array]:
    """Strongest source first, the largest entry of each column positive: (n,) order, (n,) signs of the ordered."""
    order = np.argsort(-np.square(mixing).sum(0), kind="stable")
    ordered = mixing[:, order]
    largest = ordered[np.abs(ordered).argmax(0), np.arange(ordered.shape[1])]
    return order, np.where(largest < 0, -1.0, 1.0)


def choose(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """The value of an option of few words, or a UsageError that lists them."""
    if value not in allowed:
        raise UsageError(f"{name} is {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")
    return str(value)


def positive(name: str, value: Any, *, whole: bool = False, zero: bool = False) -> None:
    """A UsageError unless the value of an option is a number above 0, or a whole number, or (with zero) 0."""
    least = "of at least 0" if zero else "above 0"
    number = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
    if not number or not np.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise UsageError(f"{name} is a {'whole ' if whole else ''}number {least}, got {value!r}")


def warn_unconverged(estimator: object, iterations: int, change: float, tol: float) -> None:
    """Tell that max_iter was reached, and how far from `tol` the last change was."""
    warnings.warn(
        f"{type(estimator).__name__} did not converge in {iterations} iterations: "
        f"the last change was {change:.2g}, tol is {tol:.2g}; raise max_iter",
        ConvergenceWarning,
        stacklevel=4,
    )


def _check_finite(X: Array) -> None:
    bad = ~np.isfinite(X)
    if bad.any():
        sample, channel = np.argwhere(bad)[0]
        kind = "NaN" if np.isnan(X[sample, channel]) else "infinite"
        raise RecordingError(
            f"the recording holds {bad.sum()} NaN or inf values, the first ({kind}) at sample {sample} "
            f"of channel {channel}: fill or cut them first"
        )


def _check_channels(X: Array) -> None:
    samples, channels = X.shape
    if samples <= channels:
        raise RecordingError(
            f"{samples} samples of {channels} channels are too few to separate"
            f"{'; rows are samples: transpose it?' if samples > 1 else ' (1 sample)'}"
        )
    spread = X.std(0)
    silent = np.flatnonzero(spread <= 1e-12 * np.abs(X).max(0))
    if len(silent):
        raise RecordingError(f"channel {silent[0]} is constant: leave it out")
    unit = (X - X.mean(0)) / (spread * np.sqrt(samples))
    alike = np.argwhere(np.triu(np.abs(unit.T @ unit), 1) > 1 - 1e-12)
    if len(alike):
        first, second = alike[0]
        raise RecordingError(f"channels {first} and {second} carry the same signal: leave one out")
