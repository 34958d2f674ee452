"""Moment matching with the denoisers' whole Jacobians, for any linear observation y = sum_k A_k x_k + noise.

Given its noisy state z_k = x_k + s eps alone, source k has mean D_k and, by Tweedie's formula, covariance
V_k = s^2 J_k with J_k = dD_k / dz_k. Taking it for Gaussian and conditioning on y gives

    C = Sigma_y + sum_k A_k V_k A_k^T,      E[x_k | z, y] = D_k + V_k A_k^T C^-1 (y - sum_j A_j D_j).

Exact where the sources are Gaussian. J_k is never formed. With few observed numbers M, C is built from M backward
passes and solved directly; otherwise by conjugate gradients, one backward pass per iteration and one to end with. One
backward pass covers all sources. With alpha other than 1, V_k = s^2 alpha dD_k / dx_t.

With `corrections`, every level after the first is visited again, with a Langevin step of size tau s^2 each time:

    z <- z - tau (z - D) + s sqrt(2 tau) eps.

François Rozet et al., "Learning Diffusion Priors from Observations by Expectation Maximization", 2024,
https://arxiv.org/abs/2405.13712 (moment matching). Sebastian Wagner-Carena et al., "A Data-Driven Prism: Multi-View
Source Separation with Diffusion Model Priors", 2025, https://arxiv.org/abs/2510.05205 (several sources at once).

B items, K sources, N samples, M observed numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from audiosep.errors import UsageError
from audiosep.operators import Mixing, Operator
from audiosep.prior import JointPrior
from audiosep.samplers.base import Noise, Sampler


class ExactMomentMatching(Sampler):
    """Posterior sampling with the denoisers' Jacobians.

    Args:
        prior: the K sources' priors.
        operator: how observations follow from sources: an operator, or gains (C, K) or (B, C, K); None is the sum of
            the sources, y (B, N).
        noise: standard deviation of the observation's noise, a number or a tensor that broadcasts with y (B, ...).
        direct: up to so many observed numbers are solved for directly.
        iterations: of the conjugate gradients, at most.
        tolerance: a row is done when its residual has fallen to this fraction.
        corrections: Langevin steps at every level but the first.
        tau: their size.
        length: N, where y doesn't tell: None is y's last axis.
        start_from: (B, K, N) sources that the initial state has in its noise; None: see `init`.
    """

    needs_gradient = True

    def __init__(
        self,
        prior: JointPrior,
        *,
        operator: Operator | Tensor | None = None,
        noise: float | Tensor = 1e-3,
        direct: int = 16,
        iterations: int = 8,
        tolerance: float = 1e-3,
        corrections: int = 0,
        tau: float = 0.1,
        length: int | None = None,
        start_from: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(prior, **options)
        if corrections:
            first, *others = self.times
            levels = [t for t in others for _ in range(1 + corrections)]
            super().__init__(prior, **{**options, "times": [first, *levels], "order": 1})
        self.operator = Mixing(operator) if isinstance(operator, Tensor) else operator or Operator(len(prior))
        if len(prior) and self.operator.n_sources != len(prior):
            raise UsageError(f"the operator is for {self.operator.n_sources} sources, there are {len(prior)} priors")
        deviation = torch.as_tensor(noise, dtype=torch.float64)
        self.variance = deviation**2
        if not (deviation > 0).all():
            raise UsageError("the observation's noise has to be above 0 everywhere, at least -80 dB of the signal")
        self.direct, self.iterations, self.tolerance = direct, iterations, tolerance
        self.tau, self.length, self.start_from = tau, length, start_from

    @property
    def evaluations(self) -> int:
        """One for every backward pass of a step: M of few observed numbers, else one per iteration and one more."""
        return len(self.times) * (self.iterations + 1)

    def start(self, y: Tensor, noise: Noise) -> Tensor:
        """The initial state (B, K, N)."""
        if self.init == "mixture" and y.ndim == 2 and self.start_from is None:
            return super().start(y, noise)
        eps = noise(len(self.prior), y.new_empty(len(y), self.length or y.shape[-1]))
        mean = torch.zeros_like(eps) if self.start_from is None else self.start_from
        return self.initial_alpha * (mean + self.initial_ratio * eps)

    def denoise(self, x_t: Tensor, y: Tensor, i: int) -> Tensor:
        """E[x_0 | x_t, y] (B, K, N)."""
        estimate = super().denoise(x_t, y, i)
        scale = self.ratios[i] ** 2 * self.alphas[i]
        self.passes = 0

        def lift(w: Tensor) -> Tensor:
            """V A^T w (B, K, N) for w (B, ...)."""
            self.passes += 1
            back = self.operator.adjoint(w).to(estimate)
            return scale * torch.autograd.grad(estimate, x_t, back, retain_graph=True)[0]

        with torch.no_grad():
            answer = estimate.detach()
            left = y - self.operator(answer)
            variance = self.variance.to(left).expand_as(left)
            if left[0].numel() <= self.direct:
                return answer + self._directly(lift, left, variance)
            weights = conjugate_gradients(
                lambda w: variance * w + self.operator(lift(w)),
                left,
                self.iterations,
                self.tolerance,
                float(variance.min()),
            )
            moved = lift(weights)
            return answer + _no_further(moved, self.operator(moved), left)

    def _directly(self, lift: Callable[[Tensor], Tensor], left: Tensor, variance: Tensor) -> Tensor:
        """V A^T C^-1 left, from M backward passes."""
        units = torch.eye(left[0].numel()).to(left).view(-1, 1, *left.shape[1:])
        lifted = torch.stack([lift(unit.expand_as(left)) for unit in units], 1)  # (B, M, K, N)
        moved = self._observed(lifted)  # (B, M, M)
        weights = solve(moved, variance.flatten(1), left.flatten(1))
        return torch.einsum("bm,bmkn->bkn", weights, lifted)

    def _observed(self, lifted: Tensor) -> Tensor:
        """A V A^T (B, M, M) from V A^T (B, M, K, N)."""
        return torch.stack([self.operator(lifted[:, m]).flatten(1) for m in range(lifted.shape[1])], 1)

    def advance(self, x_t: Tensor, answer: Tensor, i: int, noise: Noise) -> Tensor:
        """A step to the next level, or a Langevin step where that is the same one."""
        s, alpha = self.ratios[i], self.alphas[i]
        if self.ratios[i + 1] != s:
            return super().advance(x_t, answer, i, noise)
        z = x_t / alpha
        return alpha * (z - self.tau * (z - answer) + s * (2 * self.tau) ** 0.5 * noise(len(self.prior), x_t))


def _no_further(moved: Tensor, seen: Tensor, left: Tensor) -> Tensor:
    """The step `moved` (B, K, N), shortened where the observation `seen` of it overshoots what was left of y.

    An exact step never does; that of a learned denoiser, whose Jacobian is not symmetric, may by far.
    """
    along = (seen * left).flatten(1).sum(1) / seen.square().flatten(1).sum(1).clamp(min=1e-30)
    return along.clamp(0, 1)[:, None, None] * moved


def solve(covariance: Tensor, variance: Tensor, right: Tensor) -> Tensor:
    """(covariance + diag(variance))^-1 right, where the covariance is one.

    A learned denoiser's Jacobian is neither symmetric nor positive. In a direction whose variance comes out negative
    nothing is known to move, and the answer is 0 there: 1 / variance would be huge, and what it multiplies not zero.

    Args:
        covariance: (B, M, M).
        variance: (B, M), above 0.
        right: (B, M).
    """
    scale = variance.rsqrt()
    whitened = scale[:, :, None] * (covariance + covariance.mT) / 2 * scale[:, None]
    # A row that has diverged stays what it is, instead of failing all.
    values, vectors = torch.linalg.eigh(whitened.nan_to_num(0.0, 0.0, 0.0))
    inner = (vectors.mT @ (scale * right)[..., None])[..., 0] * (values > 0) / (1 + values.clamp(min=0))
    return scale * (vectors @ inner[..., None])[..., 0]


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], right: Tensor, iterations: int, tolerance: float, least: float = 0.0
) -> Tensor:
    """Solve apply(w) = right (B, ...) for every row on its own.

    A row stays as it is once its residual is at most `tolerance` times its right side, or where `apply` turns out to
    have an eigenvalue that is not above `least`. Magnus Hestenes and Eduard Stiefel, "Methods of Conjugate Gradients
    for Solving Linear Systems", 1952, https://doi.org/10.6028/jres.049.044.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1)

    def along(factor: Tensor, a: Tensor) -> Tensor:
        return factor.view(-1, *[1] * (a.ndim - 1)) * a

    solution, residual, direction = torch.zeros_like(right), right, right
    power = dot(residual, residual)
    goal = tolerance**2 * power
    for _ in range(iterations):
        turned = apply(direction)
        curvature = dot(direction, turned)
        going = (power > goal) & (curvature > least * dot(direction, direction))
        if not going.any():
            break
        step = torch.where(going, power / curvature.where(going, torch.ones_like(curvature)), 0.0)
        solution = solution + along(step, direction)
        residual = residual - along(step, turned)
        after = dot(residual, residual)
        turn = torch.where(going, after / power.where(going, torch.ones_like(power)), 0.0)
        # A row that is done gets the direction 0, and so never moves again.
        direction = along(going.to(residual), residual) + along(turn, direction)
        power = torch.where(going, after, torch.zeros_like(power))
    return solution
