"""Mixtures of sources, and the way back: residuals shared out so that estimates add up to the mixture.

Sources are (..., K, N) on their own axis, mixtures (..., N).
"""

from __future__ import annotations

import os
from itertools import permutations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from audiosep.errors import UsageError
from audiosep.stft import istft, stft

BANDS = 12  # nodes of smooth fields along frequency, evenly spaced in mel
RATE = 2.5  # and along time, per second


def read_mixing(path: str | os.PathLike[str]) -> np.ndarray:
    """A mixing matrix (C, K) from a CSV file without a header; UsageError when it is none."""
    try:
        matrix = np.loadtxt(path, delimiter=",", ndmin=2)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such mixing matrix") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: a mixing matrix is rows of numbers with commas between: {error}") from error
    if not matrix.size or not np.isfinite(matrix).all():
        raise UsageError(f"{path}: a mixing matrix holds finite numbers, at least one")
    if not matrix.any(0).all():
        silent = ", ".join(str(k + 1) for k in np.flatnonzero(~matrix.any(0)))
        raise UsageError(f"{path}: column {silent} is all 0: that source is in no channel, so it can't be found")
    return matrix


def mix(sources: Tensor) -> Tensor:
    """Sum the sources (..., K, N) to the mixture (..., N)."""
    return sources.sum(-2)


def residual(mixture: Tensor, sources: Tensor) -> Tensor:
    """What the sources (..., K, N) leave of the mixture (..., N)."""
    return mixture - mix(sources)


def project(
    mixture: Tensor,
    sources: Tensor,
    n_fft: int = 512,
    hop_length: int = 128,
    known_band: float = 1.0,
) -> Tensor:
    """Make estimates add up to the mixture: each time-frequency bin's residual is shared out by their power there.

    With powers P_k the estimate becomes X_k + P_k / sum_j P_j * (Y - sum_j X_j), which for variances P_k is the step of
    a Kalman filter onto the mixture. Where no source has power the residual is shared equally.

    Args:
        mixture: (..., N).
        sources: (..., K, N) estimates.
        n_fft: STFT size.
        hop_length: its hop.
        known_band: fraction of the band that the estimates cover; above it each frame is shared out as in the
            upper half of the band that they know.

    Returns:
        (..., K, N) whose sum is the mixture to rounding.
    """
    power = stft(sources, n_fft, hop_length).abs().square()
    known = round(known_band * power.shape[-2])
    if known < power.shape[-2]:
        power[..., known:, :] = power[..., known // 2 : known, :].mean(-2, keepdim=True)
    left = residual(mixture, sources)
    shared = istft(
        shares(power) * stft(left, n_fft, hop_length).unsqueeze(-3),
        n_fft,
        hop_length,
        sources.shape[-1],
    )
    projected = sources + shared
    # What the transforms' rounding left over is spread evenly.
    return projected + (residual(mixture, projected) / sources.shape[-2]).unsqueeze(-2)


def combine(mixture: Tensor, samples: Tensor, n_fft: int = 1024, hop_length: int = 256) -> Tensor:
    """One estimate from R runs of a sampler: their mean where they agree, a Wiener filter where they do not.

    Around each time-frequency bin let M_k be the power of the samples' mean, V_k that of their deviations from it, both
    averaged over 5 bins by 5 frames. In the local Gaussian model sources have variances P_k = M_k + V_k, the samples'
    second moment, and the posterior mean given the mixture Y is the Wiener filter P_k / sum_j P_j Y (Duong, Vincent and
    Gribonval, IEEE TASLP 18(7), 2010). Unlike the mean of a few samples it does not hold what they made up. With
    w = max_k V_k / (V_k + M_k / 10) the estimate is w times the filter's and 1 - w times the mean: samples of a sharp
    posterior, and one sample alone, are left as they are.

    Args:
        mixture: (..., N).
        samples: (R, ..., K, N), each of which adds up to the mixture.
        n_fft: STFT size.
        hop_length: its hop.

    Returns:
        (..., K, N) that adds up to the mixture, to rounding.
    """
    mean = samples.mean(0)
    if len(samples) == 1:
        return mean
    spread = around((stft(samples - mean, n_fft, hop_length).abs().square()).mean(0), 5, 5)
    bins = stft(mean, n_fft, hop_length)
    power = around(bins.abs().square(), 5, 5)
    floor = torch.finfo(power.dtype).tiny
    doubt = (spread / (spread + 0.1 * power + floor)).amax(-3, keepdim=True)
    filtered = shares(power + spread) * stft(mixture, n_fft, hop_length).unsqueeze(-3)
    return istft(doubt * filtered + (1 - doubt) * bins, n_fft, hop_length, samples.shape[-1])


def grid(
    sample_rate: int, bins: int, frames: int, samples: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Weights that make a smooth field (F, M) of few nodes, evenly spaced in mel and in time: rows @ nodes @ columns.T.

    Args:
        sample_rate: in Hz.
        bins: F, from 0 Hz to half the rate.
        frames: M.
        samples: of the signal; there are `RATE` nodes a second, two at least.
        device: of the weights.

    Returns:
        rows (F, `BANDS`) and columns (M, nodes), of linear interpolation between nodes.
    """
    mel = torch.log1p(torch.linspace(0, sample_rate / 2, bins, device=device) / 700)
    nodes = max(2, round(RATE * samples / sample_rate))
    return hats(mel / mel[-1], BANDS), hats(torch.linspace(0, 1, frames, device=device), nodes)


def hats(position: Tensor, nodes: int) -> Tensor:
    """Weights (P, nodes) of linear interpolation at positions (P,) in 0..1 between evenly spaced nodes."""
    return (1 - (position[:, None] * (nodes - 1) - torch.arange(nodes, device=position.device)).abs()).clamp(min=0)


def change_of_shares(log: Tensor, field: Tensor) -> Tensor:
    """What fields (..., K, F, M), in nats, change in the shares that sources of log power `log` have of their sum."""
    return (log + field).softmax(-3) - log.softmax(-3)


def log_power(bins: Tensor, size: int) -> Tensor:
    """log of the sources' power (..., K, F, M) over size x size bins around each, above 60 dB under their loudest."""
    power = around(bins.abs().square(), size, size)
    return (power + 1e-6 * power.amax((-3, -2, -1), keepdim=True) + torch.finfo(power.dtype).tiny).log()


def around(power: Tensor, rows: int, columns: int) -> Tensor:
    """Means (..., F, M) over rows bins by columns frames, odd numbers, fewer at the edges."""
    flat, half = power.flatten(0, -3).unsqueeze(1), (rows // 2, columns // 2)
    return avg_pool2d(flat, (rows, columns), stride=1, padding=half, count_include_pad=False).view(power.shape)


def shares(power: Tensor) -> Tensor:
    """Fractions power_k / sum_j power_j of powers (..., K, F, M); equal where there is no power at all."""
    # The floor lies 120 dB under an item's loudest bin, so that rounding noise decides nothing.
    floor = 1e-12 * power.amax((-3, -2, -1), keepdim=True) + torch.finfo(power.dtype).tiny
    return (power + floor) / (power + floor).sum(-3, keepdim=True)


def best_permutation(score: Tensor) -> Tensor:
    """The assignment with the highest sum of scores: (B, K, K) -> (B, K).

    `score[b, i, j]` is the score of estimate i against reference j, higher being better;
    `index[b, j]` is the estimate given to reference j. All K! orders are tried up to K = 6, beyond
    that the assignment problem is solved. Ties go to the order as given.
    """
    if score.ndim != 3 or score.shape[1] != score.shape[2]:
        raise UsageError(f"scores have shape (B, K, K), got {tuple(score.shape)}")
    if score.isnan().any():
        raise UsageError("the scores to permute by hold NaN")
    count = score.shape[1]
    if count > 6:
        return _assign(score)
    orders = torch.tensor(list(permutations(range(count))), device=score.device)  # (P, K)
    references = torch.arange(count, device=score.device)
    totals = score[:, orders, references].sum(-1)  # (B, P)
    return orders[totals.argmax(-1)]


def _assign(score: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    tables = score.detach().double().cpu().numpy()
    rows = [linear_sum_assignment(table.T, maximize=True)[1].tolist() for table in tables]
    return torch.tensor(rows, device=score.device)


def permute(sources: Tensor, index: Tensor) -> Tensor:
    """Sources (B, K, ...) in the order index (B, K): source j of the result is `index[:, j]`."""
    if sources.shape[:2] != index.shape:
        shapes = f"{tuple(sources.shape)} and {tuple(index.shape)}"
        raise UsageError(f"sources (B, K, ...) and their order (B, K) do not match: {shapes}")
    return torch.stack([items[order] for items, order in zip(sources, index)])
