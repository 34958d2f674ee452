"""The one loop that draws K sources from p(x_1..x_K | y).

In z = x_t / alpha_t every schedule is the clean signal in white noise of standard deviation s = sigma / alpha. A step
from s_t down to s_u, with rho = s_u / s_t and the denoiser's answer D, is

    z_u = D + rho^(1 + eta) (z_t - D) + s_u sqrt(1 - rho^(2 eta)) eps.

eta = 1 is the ancestral step of DDPM, eta = 0 the deterministic one of DDIM. `order=2` replaces D by the extrapolation
D_t + h / (2 h') (D_t - D_t') of this and the last answer, h = log(s_t / s_u): DPM-Solver++(2M) for eta = 0 and its SDE
form for eta = 1. The last step goes to s = 0 and returns D.

Finished sources can be given noise of a level on the way, and the loop goes on from there: a restart (Xu et al.).

Jonathan Ho, Ajay Jain, Pieter Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239.
Cheng Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022,
https://arxiv.org/abs/2211.01095.
Yilun Xu et al., "Restart Sampling for Improving Generative Processes", 2023, https://arxiv.org/abs/2306.14878.

B items, K sources, N samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from audiosep.prior import JointPrior
from audiosep.schedules import Schedule, vp_linear


@dataclass(frozen=True)
class State:
    """Where the loop stands after a step.

    Attributes:
        step: steps done, 1..steps.
        steps: steps in all.
        t: the step of the schedule that was just left.
        x_t: (B, K, N) the state that was left.
        x: (B, K, N) the state that was reached; the sources when step equals steps.
        denoised: (B, K, N) estimate of the clean sources at x_t.
        guidance: (B, K, N) what guidance added to the state, None where it acts through `denoised`.
        gradient: (B, K, N) of the reconstruction loss with respect to x_t, where the sampler takes one.
    """

    step: int
    steps: int
    t: float
    x_t: Tensor
    x: Tensor
    denoised: Tensor
    guidance: Tensor | None
    gradient: Tensor | None = None


class Noise:
    """White noise with a generator per item, so that an item is the same alone and in any batch.

    Drawn on the CPU whatever the device: the same seeds give the same separation everywhere.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, rows: int, like: Tensor) -> Tensor:
        """Draw (B, rows, N) for items shaped like `like` (B, ..., N), on its device and in its type."""
        shape = (rows, like.shape[-1])
        noise = torch.stack([torch.randn(shape, generator=g) for g in self.generators])
        return noise.to(like, non_blocking=True)


class OneNoise(Noise):
    """White noise of one generator, on its device, for many short items: which items share a batch then matters."""

    def __init__(self, seed: int, device: str | torch.device = "cpu") -> None:
        self.generators = [torch.Generator(device).manual_seed(seed)]

    def __call__(self, rows: int, like: Tensor) -> Tensor:
        shape = (len(like), rows, like.shape[-1])
        return torch.randn(shape, generator=self.generators[0], device=like.device, dtype=like.dtype)


class Sampler:
    """Prior sampling without guidance; methods override `denoise` or `guide`.

    Args:
        prior: the K sources' priors.
        schedule: noise levels that the steps t count in.
        times: steps to visit, falling; None is every step from T - 1 to 0.
        t_init: step whose noise level the initial state alpha y + sigma eps has (0-based; t* - 1 in the paper);
            None is the first of `times`.
        init: "mixture", or "noise" for sigma eps alone.
        shared_noise: one eps for all sources of an item at the start, as published.
        clamp: limit the denoiser's answer to [-1, 1], as published.
        eta: 1 ancestral, 0 deterministic.
        order: 1, or 2 to extrapolate the denoiser's answers.
    """

    needs_gradient = False
    passes = 1  # network evaluations per source that the last step took

    def __init__(
        self,
        prior: JointPrior,
        *,
        schedule: Schedule | None = None,
        times: Sequence[float] | None = None,
        t_init: float | None = 149,
        init: str = "mixture",
        shared_noise: bool = True,
        clamp: bool = False,
        eta: float = 1.0,
        order: int = 1,
    ) -> None:
        if init not in ("mixture", "noise"):
            raise ValueError(f"init is 'mixture' or 'noise', not {init!r}")
        self.prior = prior
        self.schedule = schedule or vp_linear()
        self.times = list(times) if times is not None else list(range(len(self.schedule)))[::-1]
        self.init, self.shared_noise, self.clamp = init, shared_noise, clamp
        self.eta, self.order = eta, order
        # Plain numbers: nothing in the loop waits for the device.
        ratios = self.schedule.ratio_at(torch.tensor(self.times, dtype=torch.float64))
        self.ratios = [*ratios.tolist(), 0.0]
        self.alphas = [*self.schedule.alpha_of(ratios).tolist(), 1.0]
        start = torch.tensor(self.times[0] if t_init is None else t_init, dtype=torch.float64)
        self.initial_ratio = self.schedule.ratio_at(start).item()
        self.initial_alpha = self.schedule.alpha_of(self.schedule.ratio_at(start)).item()

    @property
    def evaluations(self) -> int:
        """Network evaluations per source and run, at most; a forward and its backward pass count as one."""
        return len(self.times)

    def __call__(self, y: Tensor, noise: Noise, restart: tuple[Tensor, int] | None = None) -> Iterator[State]:
        """Run the loop on mixtures y (B, N), yielding every state.

        A restart begins with sources (B, K, N) in noise of the level of a step, numbered from 0.
        """
        if restart is None:
            x, first = self.start(y, noise), 0
        else:
            sources, first = restart
            x = self.alphas[first] * (sources + self.ratios[first] * noise(len(self.prior), y))
        before: Tensor | None = None
        for i, t in enumerate(self.times[first:], first):
            x_t = x.detach().requires_grad_(self.needs_gradient)
            with torch.set_grad_enabled(self.needs_gradient):
                denoised = self.denoise(x_t, y, i)
            answer = denoised.detach()
            x = self.advance(x_t.detach(), self.extrapolate(answer, before, i), i, noise)
            guidance = self.guide(x, x_t, denoised, y, i)
            if guidance is not None:
                x = x + guidance
            before = answer
            yield State(i + 1, len(self.times), t, x_t.detach(), x, answer, guidance, x_t.grad)

    def start(self, y: Tensor, noise: Noise) -> Tensor:
        """The initial state (B, K, N) at the level of `t_init`."""
        k = len(self.prior)
        eps = noise(1, y).expand(-1, k, -1) if self.shared_noise else noise(k, y)
        mean = y[:, None] if self.init == "mixture" else torch.zeros_like(y[:, None])
        return self.initial_alpha * (mean + self.initial_ratio * eps)

    def denoise(self, x_t: Tensor, y: Tensor, i: int) -> Tensor:
        """Estimate of the clean sources (B, K, N) at step `times[i]`."""
        estimate = self.prior.denoise(x_t, self.times[i], self.schedule)
        return estimate.clamp(-1, 1) if self.clamp else estimate

    def extrapolate(self, answer: Tensor, before: Tensor | None, i: int) -> Tensor:
        """What the step takes as D."""
        s_before, s_t, s_u = self.ratios[i - 1], self.ratios[i], self.ratios[i + 1]
        if self.order == 1 or before is None or s_u == 0:
            return answer
        step = torch.log(torch.tensor([s_t / s_u, s_before / s_t], dtype=torch.float64)).tolist()
        return answer + 0.5 * step[0] / step[1] * (answer - before)

    def advance(self, x_t: Tensor, answer: Tensor, i: int, noise: Noise) -> Tensor:
        """Step from level i to level i + 1 (B, K, N)."""
        x, spread = self.mean(x_t, answer, i), self.spread(i)
        return x + self.alphas[i + 1] * spread * noise(len(self.prior), x_t) if spread else x

    def mean(self, x_t: Tensor, answer: Tensor, i: int) -> Tensor:
        """The step without its noise (B, K, N)."""
        rho = self.ratios[i + 1] / self.ratios[i]
        return self.alphas[i + 1] * (answer + rho ** (1 + self.eta) * (x_t / self.alphas[i] - answer))

    def spread(self, i: int) -> float:
        """Standard deviation of the noise that step i adds, relative to the clean signal."""
        rho = self.ratios[i + 1] / self.ratios[i]
        return self.ratios[i + 1] * (1 - rho ** (2 * self.eta)) ** 0.5

    def guide(self, x: Tensor, x_t: Tensor, denoised: Tensor, y: Tensor, i: int) -> Tensor | None:
        """What to add to the state (B, K, N) reached by step i."""
        return None
