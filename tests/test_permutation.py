"""Which estimate belongs to which reference."""

import pytest
import torch

from audiosep.errors import UsageError
from audiosep.mixing import best_permutation, permute


@pytest.mark.parametrize("count", [1, 2, 3, 6, 8])
def test_a_shuffle_is_undone(count):
    rng = torch.Generator().manual_seed(count)
    references = torch.randn(5, count, 50, generator=rng)
    orders = torch.stack([torch.randperm(count, generator=rng) for _ in range(5)])
    estimates = permute(references, orders)
    score = -(estimates[:, :, None] - references[:, None]).square().sum(-1)
    index = best_permutation(score)
    assert index.shape == (5, count)
    assert torch.equal(permute(estimates, index), references)


def test_the_sum_decides_not_the_best_single_pair():
    score = torch.tensor([[[10.0, 9.0], [8.0, 0.0]]])
    assert best_permutation(score).tolist() == [[1, 0]]


def test_both_ways_of_solving_agree():
    score = torch.randn(4, 7, 7, generator=torch.Generator().manual_seed(0))
    padded = score.clone()
    padded[:, 6], padded[:, :, 6], padded[:, 6, 6] = -100, -100, 100
    assert torch.equal(best_permutation(padded)[:, :6], best_permutation(score[:, :6, :6]))


def test_a_tie_keeps_the_order():
    assert best_permutation(torch.zeros(2, 3, 3)).tolist() == [[0, 1, 2]] * 2


def test_wrong_shapes_and_nan_are_errors():
    with pytest.raises(UsageError, match=r"\(B, K, K\)"):
        best_permutation(torch.zeros(2, 3))
    with pytest.raises(UsageError, match="NaN"):
        best_permutation(torch.full((1, 2, 2), torch.nan))
    with pytest.raises(UsageError, match="do not match"):
        permute(torch.zeros(2, 3, 5), torch.zeros(2, 2, dtype=torch.long))
