"""How near drawn sources are to the true ones, row by row and as sets."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import chi2_contingency
from torch import Tensor


def psnr(estimate: Tensor, truth: Tensor, span: float = 4.0) -> float:
    """Mean over rows of the peak signal-to-noise ratio in dB; rows that are NaN are left out."""
    error = (estimate - truth).square().mean(-1).sqrt() + 1e-6
    return float((20 * (span / error).log10()).nanmean())


def transport(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of two sets of one size, (rows, N) each, under their best pairing."""
    cost = torch.cdist(x.double(), y.double()).square().numpy()
    return float(cost[linear_sum_assignment(cost)].mean())


def apart(x: Tensor, y: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Four sets of at most `rows` rows, two of x and two of y, without rows that are NaN.

    Row i of x may be an estimate of row i of y. So the first set of x is from its beginning and the first of y from its
    end: they hold no such pair.
    """
    x, y = (s[s.isfinite().all(1)] for s in (x, y))
    rows = min(rows, len(x) // 2, len(y) // 2)
    return x[:rows], x[rows : 2 * rows], y[len(y) - rows :], y[len(y) - 2 * rows : len(y) - rows]


def divergence(x: Tensor, y: Tensor, rows: int = 1024) -> float:
    """Optimal transport between two sets less that within each of them; about 0, and maybe below, for equal sets.

    The limit of the Sinkhorn divergence (Jean Feydy et al., 2019, https://arxiv.org/abs/1810.08278) for no
    regularisation; all three transports are between sets of `rows` rows without a pair among them, so that their
    bias cancels.
    """
    a, b, c, d = apart(x, y, rows)
    return transport(a, c) - 0.5 * transport(a, b) - 0.5 * transport(c, d)


def pqmass(x: Tensor, y: Tensor, regions: int = 100, repeats: int = 200, rows: int = 1024, seed: int = 0) -> float:
    """Mean p-value of a chi-squared test on how two sets fill random cells; 0.5 for equal sets, 0 for others.

    The cells are those nearest to each of `regions` points of both sets. Pablo Lemos et al., "PQMass: Probabilistic
    Assessment of the Quality of Generative Models using Probability Mass Estimation", 2024,
    https://arxiv.org/abs/2402.04355.
    """
    generator = torch.Generator().manual_seed(seed)
    x, _, y, _ = (s.double() for s in apart(x, y, rows + regions))
    values = []
    for _ in range(repeats):
        orders = [torch.randperm(len(s), generator=generator) for s in (x, y)]
        half = regions // 2
        centres = torch.cat([s[order[:half]] for s, order in zip((x, y), orders)])
        cells = [torch.cdist(s[order[half:]], centres).argmin(1) for s, order in zip((x, y), orders)]
        counts = np.stack([np.bincount(cell.numpy(), minlength=len(centres)) for cell in cells])
        values.append(chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue)
    return float(np.mean(values))
