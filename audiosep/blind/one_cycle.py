"""Adam under the one-cycle schedule, which all learned separators follow."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

RISE = 0.3  # of the iterations, in which the rate rises
FIRST, LAST = 1 / 25, 1 / 250_000  # of the peak rate
MOMENTUM = (0.95, 0.85)  # Adam's first beta at the ends and at the peak


class OneCycle:
    """Adam whose rate rises along a cosine to its peak and falls to nearly 0, momentum the other way.

    Smith and Topin: "Super-convergence: very fast training of neural networks using large learning rates" (2018); the
    numbers are those of torch's OneCycleLR, whose bookkeeping would take a fifth of a fit of these small models.
    groups: parameters and the peak of their rate. clip: the largest norm of all gradients together.
    """

    def __init__(
        self, groups: Iterable[tuple[Iterable[nn.Parameter], float]], steps: int, clip: float | None = None
    ) -> None:
        given = [(list(parameters), peak) for parameters, peak in groups]
        self._peaks = [peak for _, peak in given]
        self._steps, self._done, self._clip = steps, 0, clip
        self._adam = torch.optim.Adam([{"params": parameters} for parameters, _ in given], fused=True)

    @property
    def rate(self) -> float:
        """Of the first group in the next step."""
        return self._peaks[0] * _cycle(self._done, self._steps)[0]

    def step(self, loss: Tensor) -> None:
        share, momentum = _cycle(self._done, self._steps)
        for group, peak in zip(self._adam.param_groups, self._peaks):
            group["lr"], group["betas"] = share * peak, (momentum, 0.999)
        self._adam.zero_grad()
        loss.backward()
        if self._clip is not None:
            everything = [p for group in self._adam.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(everything, self._clip)
        self._adam.step()
        self._done += 1


def _cycle(done: int, steps: int) -> tuple[float, float]:
    """The share of the peak rate, and the momentum, after that many of the steps."""
    top = RISE * (steps + 1) - 1
    if done <= top:
        return _cosine(FIRST, 1.0, done / top), _cosine(*MOMENTUM, done / top)
    fallen = (done - top) / (steps - top)
    return _cosine(1.0, LAST, fallen), _cosine(MOMENTUM[1], MOMENTUM[0], fallen)


def _cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) / 2 * (1 + math.cos(math.pi * progress))
