"""Sources to a mixture and back: which estimate belongs to which reference."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from audiosep.errors import UsageError


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
