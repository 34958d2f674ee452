"""Scores of estimated sources whose order, sign and scale are unknown: estimate (T, n), then reference (T, k)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from audiosep.errors import UsageError
from audiosep.metrics import si_sdr as _si_sdr

Array = NDArray[np.floating]


class Match(NamedTuple):
    """Which estimate belongs to each reference, its sign, and their |correlation|: (k,) each."""

    order: NDArray[np.intp]
    signs: Array
    correlations: Array


def match(estimate: Array, reference: Array) -> Match:
    """The assignment with the highest sum of |correlations|; a constant estimate correlates with nothing."""
    if len(estimate) != len(reference) or estimate.shape[1] < reference.shape[1]:
        raise UsageError(f"{reference.shape} references can't be matched by {estimate.shape} estimates")
    table = _unit(reference).T @ _unit(estimate)
    rows, order = linear_sum_assignment(np.abs(table), maximize=True)
    return Match(order, np.sign(table[rows, order]), np.abs(table[rows, order]))


def align(estimate: Array, reference: Array) -> Array:
    """The estimates (T, k) in the references' order, sign, mean and least-squares scale."""
    found = match(estimate, reference)
    chosen = estimate[:, found.order] - estimate[:, found.order].mean(0)
    return chosen * scales(estimate, reference) + reference.mean(0)


def scales(estimate: Array, reference: Array) -> Array:
    """The factors (k,), signs included, that bring the matched estimates to the references' scale."""
    chosen = estimate[:, match(estimate, reference).order]
    chosen = chosen - chosen.mean(0)
    power = np.square(chosen).sum(0)
    return (chosen * (reference - reference.mean(0))).sum(0) / np.where(power > 0, power, 1)


def mean_correlation(estimate: Array, reference: Array) -> float:
    """Mean matched |correlation|, 1 at best."""
    return float(match(estimate, reference).correlations.mean())


def si_sdr(estimate: Array, reference: Array) -> Array:
    """SI-SDR in dB of each reference's match: (k,)."""
    matched = align(estimate, reference)
    return _si_sdr(torch.from_numpy(matched.T.copy()), torch.from_numpy(reference.T.copy())).numpy()


def coverage(estimate: Array, std: Array, reference: Array) -> float:
    """Share of samples with |reference - estimate| <= 1.96 standard deviations, after matching; 0.95 is calibrated."""
    found = match(estimate, reference)
    error = np.abs(align(estimate, reference) - reference)
    return float((error <= 1.96 * std[:, found.order] * np.abs(scales(estimate, reference))).mean())


def _unit(signals: Array) -> Array:
    centred = signals - signals.mean(0)
    norm = np.linalg.norm(centred, axis=0)
    return centred / np.where(norm > 0, norm, 1)
