"""Analytical sampling: the likelihood of the sum of the states, without gradients through the network.

Anastasiia Iashchenko et al., "UnDiff: Unsupervised Voice Restoration with Unconditional Diffusion Model", 2023,
https://arxiv.org/abs/2306.00721, section "source separation". After the prior's step x', twice: what the current states
(first the ones before the step) leave of the mixture is added to an accumulator a, and x_k = x'_k + a / K: after the
second round x_k = x'_k + (y - sum_j x'_j) / K. UnDiff has two sources, and writes 1/2.

UnDiff's Langevin corrector is left out: with its step of 1e-10 it moves nothing that can be measured and doubles the
network evaluations.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from audiosep.mixing import residual
from audiosep.prior import JointPrior
from audiosep.samplers.base import Sampler


class Analytical(Sampler):
    """`corrections` rounds of adding a share of the residual to every source.

    Args:
        share: of the residual, what a source gets in a round; None is 1 / K, with which two rounds make the sources add
            up to the mixture.
    """

    def __init__(
        self,
        prior: JointPrior,
        *,
        corrections: int = 2,
        share: float | None = None,
        init: str = "noise",
        shared_noise: bool = False,
        t_init: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(prior, init=init, shared_noise=shared_noise, t_init=t_init, **options)
        self.corrections, self.share = corrections, share

    def guide(self, x: Tensor, x_t: Tensor, denoised: Tensor, y: Tensor, i: int) -> Tensor:
        share = 1 / x.shape[1] if self.share is None else self.share
        accumulated = 0.0 * y
        states = x_t
        for _ in range(self.corrections):
            accumulated = accumulated + residual(y, states)
            states = x + share * accumulated[:, None]
        return states - x
