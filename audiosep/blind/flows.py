"""The autoregressive flow prior of one source each: exact density, exact gradients.

Wei, Deng, Cui, Sun: "AR-Flow VAE: a structured autoregressive flow prior variational autoencoder for unsupervised blind
source separation" (2026), arXiv:2603.14441, eqs. 12-28. For source j, with s_1 ~ N(0, sigma_0^2) and r = 2..R:

    u_r = (s_r - a s_{r-1}) / sigma                                   (14)
    u_r = b_r + exp(alpha_r) eps_r                                    (15)
    b_r = w_b . h_{r-1} + c_b,  alpha_r = kappa tanh(w_alpha . h_{r-1} + c_alpha)   (16, 17)
    h_r = tanh(W_h h_{r-1} + w_eps eps_r + c_h),  h_1 = 0             (18, 19)
    log p(s) = log p(s_1) + sum_r [log p(eps_r) - alpha_r - log sigma]   (27)

Given the past, s_r is an affine map of eps_r: with the paper's normal eps the process is conditionally Gaussian, so
that white heavy-tailed sources look all alike to it. base="student_t" (ours) lets eps_r have heavy tails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from audiosep.blind import compiled

BASES = ("normal", "student_t")


class _InverseFlow(torch.autograd.Function):
    """u (k n, R), draws of n sources, and their parameters -> eps, alpha (k n, R); eq. 20 along r.

    Runs on the CPU, where it is fastest.
    """

    @staticmethod
    def forward(ctx: Any, kappa: float, u: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        run: Callable[..., Any] = compiled.compiled("flow_forward") or compiled.flow_forward
        values = [_array(t) for t in (u, *parameters)]
        eps, alpha, h = run(*values, kappa)
        ctx.state = eps, alpha, h, values, kappa
        return torch.from_numpy(eps).to(u), torch.from_numpy(alpha).to(u)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        run: Callable[..., Any] = compiled.compiled("flow_backward") or compiled.flow_backward
        eps, alpha, h, (_, w_b, _, w_alpha, _, w_h, w_eps, _), kappa = ctx.state
        found = run(eps, alpha, h, _array(grads[0]), _array(grads[1]), w_b, w_alpha, w_h, w_eps, kappa)
        return None, *(torch.from_numpy(g).to(grads[0]) for g in found)


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().double().numpy())


class ARFlowPrior(nn.Module):
    """The prior of n sources; `log_prob` maps trajectories (..., n, R) to (..., n)."""

    def __init__(self, sources: int, hidden: int = 8, base: str = "normal", kappa: float = 0.8) -> None:
        super().__init__()
        self.base = base
        self.kappa = kappa
        self.ar_coef = nn.Parameter(torch.linspace(0.3, 0.9, sources))  # unlike, that they may part
        self.log_innovation = nn.Parameter(torch.zeros(sources))  # log sigma
        self.log_first = nn.Parameter(torch.zeros(sources))  # log sigma_0
        self.log_df = nn.Parameter(torch.full((sources,), math.log(8.0)))  # of the Student-t, less 2
        # b and alpha start at 0: the flow begins as the identity.
        self.w_b, self.c_b = nn.Parameter(torch.zeros(sources, hidden)), nn.Parameter(torch.zeros(sources))
        self.w_alpha, self.c_alpha = nn.Parameter(torch.zeros(sources, hidden)), nn.Parameter(torch.zeros(sources))
        self.w_h = nn.Parameter(0.5 * torch.randn(sources, hidden, hidden) / hidden**0.5)
        self.w_eps = nn.Parameter(0.5 * torch.randn(sources, hidden))
        self.c_h = nn.Parameter(torch.zeros(sources, hidden))

    @torch.no_grad()
    def start_from(self, s: Tensor) -> None:
        """Take the AR coefficient and innovation scale that trajectories s (n, R) have."""
        power = s.square().mean(1)
        coefficient = (s[:, 1:] * s[:, :-1]).mean(1) / power
        residual = s[:, 1:] - coefficient[:, None] * s[:, :-1]
        self.ar_coef.copy_(coefficient)
        self.log_innovation.copy_(0.5 * residual.square().mean(1).clamp_min(1e-8).log())
        self.log_first.copy_(0.5 * power.log())

    def residuals(self, s: Tensor) -> Tensor:
        """u (..., n, R - 1), eq. 14."""
        return (s[..., 1:] - self.ar_coef[:, None] * s[..., :-1]) * (-self.log_innovation).exp()[:, None]

    def noise(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """eps and alpha (..., n, R - 1) of trajectories s (..., n, R)."""
        parameters = (self.w_b, self.c_b, self.w_alpha, self.c_alpha, self.w_h, self.w_eps, self.c_h)
        u = self.residuals(s)
        eps, alpha = _InverseFlow.apply(self.kappa, u.flatten(0, -2), *parameters)
        return eps.view_as(u), alpha.view_as(u)

    def log_prob(self, s: Tensor) -> Tensor:
        first = torch.distributions.Normal(0.0, self.log_first.exp()).log_prob(s[..., 0])
        eps, alpha = self.noise(s)
        steps = s.shape[-1] - 1
        return first + self._base().log_prob(eps).sum(-1) - alpha.sum(-1) - steps * self.log_innovation

    def _base(self) -> torch.distributions.Distribution:
        if self.base == "normal":
            return torch.distributions.Normal(0.0, 1.0)
        return torch.distributions.StudentT(2 + self.log_df.exp()[:, None])

    def learned(self) -> dict[str, Tensor]:
        """What can be read off the prior, per source: (n,) each."""
        found = {"ar_coef_": self.ar_coef, "innovation_std_": self.log_innovation.exp()}
        return found if self.base == "normal" else {**found, "df_": 2 + self.log_df.exp()}
