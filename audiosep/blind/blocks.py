"""Recordings longer than memory: learn from stretches of them, then separate block by block.

The mixing is the same everywhere, and so are the stationary priors of the sources: stretches spread evenly over the
recording say what all of it would. Where a source at one time depends on the samples around it (posterior="gp"), a
block is separated with a margin on both sides that is thrown away.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from audiosep.blind.base import Array, InstantaneousSeparator
from audiosep.errors import UsageError

STRETCHES = 10
FIT_SAMPLES, BLOCK, MARGIN = 100_000, 50_000, 2_000


class Rows(Protocol):
    """Rows of samples by slices: an array, np.memmap, an HDF5 or Zarr dataset."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Any: ...


class WritableRows(Rows, Protocol):
    def __setitem__(self, rows: slice, values: Any) -> None: ...


def separate_in_blocks(
    estimator: InstantaneousSeparator,
    X: Rows,
    out: WritableRows,
    *,
    fit_samples: int = FIT_SAMPLES,
    block: int = BLOCK,
    margin: int = MARGIN,
) -> InstantaneousSeparator:
    """Fit `estimator` to stretches of X (n_samples, n_channels) and write the sources to `out` (n_samples, n_sources).

    At most fit_samples samples are learned from, and at most block + 2 margin are in memory after that. Returns the
    fitted estimator; its sources_ are those of the stretches.
    Raises UsageError if `out` has another shape, or the estimator separates only what it was fitted to.
    """
    if tuple(out.shape[:1]) != (X.shape[0],) or block < 1 or margin < 0 or fit_samples < STRETCHES:
        raise UsageError(
            f"out has as many rows as X, block is at least 1, margin at least 0 and fit_samples at least {STRETCHES}; "
            f"got shapes {tuple(out.shape)} and {tuple(X.shape)}, {block}, {margin} and {fit_samples}"
        )
    _ = estimator.transform  # those that separate only what they were fitted to say so here, before the fit
    fit_to_stretches(estimator, X, fit_samples)
    transform_in_blocks(estimator, X, out, block, margin)
    return estimator


def fit_to_stretches(estimator: InstantaneousSeparator, X: Rows, fit_samples: int = FIT_SAMPLES) -> None:
    """Fit to at most fit_samples samples of X, spread over it."""
    estimator.fit(_stretches(X, fit_samples))


def transform_in_blocks(
    estimator: InstantaneousSeparator, X: Rows, out: WritableRows, block: int = BLOCK, margin: int = MARGIN
) -> None:
    """Write the sources of X to `out`, a block at a time."""
    samples = X.shape[0]
    if tuple(out.shape) != (samples, estimator.n_sources_):
        raise UsageError(f"out has shape {tuple(out.shape)}, the sources have {(samples, estimator.n_sources_)}")
    for begin in range(0, samples, block):
        end = min(begin + block, samples)
        first, last = max(0, begin - margin), min(samples, end + margin)
        out[begin:end] = estimator.transform(np.asarray(X[first:last]))[begin - first : end - first]


def _stretches(X: Rows, count: int) -> Array:
    """`count` samples of X in STRETCHES pieces from its begin to its end; all of X if it has no more."""
    samples = X.shape[0]
    if samples <= count:
        return np.asarray(X[0:samples], dtype=np.float64)
    length = count // STRETCHES
    begins = np.linspace(0, samples - length, STRETCHES).astype(int)
    return np.concatenate([np.asarray(X[b : b + length], dtype=np.float64) for b in begins])
