"""Maps that bend, and the bent unmixing of maximal likelihood under Gaussian processes.

A map f: R^n -> R^n turns the whitened recording z (T, n) into sources s_t = f(z_t). With as many sources as channels
and an invertible f, the density of the recording is exact:

    -log p(z) = sum_k NLL(s_k; K_k + v I) - sum_t log |det J_f(z_t)|,

s_k at unit variance, K_k the covariance of a process fitted to it (`gp`). v, the share of a source that may be noise,
falls level by level, and at each the processes are fitted anew: first the sources need only be likely by their shapes,
at the end by every wiggle. A decay of the weights keeps the map smooth. The variational methods' own objectives hardly
prefer the true sources to slightly mixed ones; this one does, by far.

Only for an f that is nowhere folded is that a density, and a folded recording can be very likely: |sin| is as smooth as
sin. So det J_f, of sources at unit variance, must not turn negative: below FOLD its logarithm goes on as a line. And
where a wrong process was fitted to a source, the map may leave it for another: if a source has become less like what it
was than TRUST, the map stays as it was.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from audiosep.blind import gp
from audiosep.blind.one_cycle import OneCycle

LEVELS = (0.1, 0.05, 0.02, 0.01)  # v
RATE, STEPS = 3e-3, 100  # of Adam at each level
DECAY = 0.02
FOLD = 0.03
TRUST = 0.85  # correlation; 0.88 and more where sources became better, 0.77 and less where they became worse
FIT_STEPS, FIT_RATE = 500, 1e-2  # of the least-squares fit of a map


class Map(nn.Module):
    """x W^T, and for "mlp" a small network beside it that starts at 0: (T, a) -> (T, b)."""

    def __init__(self, weight: Tensor, mixing: str, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bend: nn.Sequential | None = None
        if mixing == "mlp":
            b, a = weight.shape
            last = nn.Linear(hidden, b)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.bend = nn.Sequential(nn.Linear(a, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), last)

    def forward(self, x: Tensor) -> Tensor:
        straight = x @ self.weight.T
        return straight if self.bend is None else straight + self.bend(x)

    def slope(self, x: Tensor) -> Tensor:
        """The Jacobian matrices (T, b, a) at x (T, a)."""
        slope = self.weight.expand(len(x), *self.weight.shape)
        if self.bend is None:
            return slope
        bent, chain = x, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        for layer in self.bend:
            bent = layer(bent)
            chain = layer.weight @ chain if isinstance(layer, nn.Linear) else (1 - bent**2)[..., None] * chain
        return slope + chain


@torch.enable_grad()
def fitted(start: Map, x: Tensor, y: Tensor) -> Map:
    """The map from x (T, a) to y (T, b) of least squares, from another as a start."""
    found = _copy(start)
    optimiser = OneCycle([(found.parameters(), FIT_RATE)], FIT_STEPS)
    for _ in range(FIT_STEPS):
        optimiser.step((found(x) - y).square().mean())
    return found.requires_grad_(False)


@torch.enable_grad()
def refined(encoder: Map, z: Tensor) -> Map:
    """The map from z (T, n) to n sources of maximal likelihood, from another as a start.

    Its sources have unit variance; it is the start if the sources would become others (TRUST). Of more than
    gp.FIT_SAMPLES samples each level takes another stretch.
    """
    found = _copy(encoder)
    length = min(len(z), gp.FIT_SAMPLES)
    begins = np.linspace(0, len(z) - length, len(LEVELS)).astype(int)
    side = float(torch.linalg.det(encoder.slope(z)).detach().median().sign())
    for level, begin in zip(LEVELS, begins):
        _climb(found, z[begin : begin + length], side, level)
    kept = found if _likeness(encoder, found, z) > TRUST else _copy(encoder)
    return _standardised(kept.requires_grad_(False), z)


@torch.no_grad()
def _likeness(first: Map, second: Map, z: Tensor) -> float:
    """The least |correlation| of a source of both maps."""
    return float((_unit(first(z)) * _unit(second(z))).mean(0).abs().min())


def _climb(encoder: Map, z: Tensor, side: float, level: float) -> None:
    assert encoder.bend is not None
    with torch.no_grad():
        sources = _unit(encoder(z)).numpy()
    processes = [gp.fit(s, noise=level) for s in sources.T]
    columns = torch.from_numpy(np.stack([p.column(len(z)) for p in processes]))
    columns[:, 0] += level
    optimiser = OneCycle([(encoder.parameters(), RATE)], STEPS)
    for _ in range(STEPS):
        misfit = negative_log_density(encoder, z, columns, side) / len(z)
        decay = torch.stack([p.square().sum() for p in encoder.bend.parameters()]).sum()
        optimiser.step(misfit + DECAY * decay)


def negative_log_density(encoder: Map, z: Tensor, columns: Tensor, side: float) -> Tensor:
    """-log p(z) of z (T, n) whose sources, at unit variance, have covariances of first columns (n, T).

    side: the sign that det J_f is to have everywhere.
    """
    s = encoder(z)
    volume = side * torch.linalg.det(encoder.slope(z)) / s.std(0).prod()
    logarithm = torch.where(volume > FOLD, volume.clamp_min(FOLD).log(), math.log(FOLD) + volume / FOLD - 1)
    return gp.negative_log_likelihood(_unit(s).T, columns).sum() - logarithm.sum()


def _copy(of: Map) -> Map:
    return copy.deepcopy(of).cpu().requires_grad_(True)


def _unit(s: Tensor) -> Tensor:
    return (s - s.mean(0)) / s.std(0)


@torch.no_grad()
def _standardised(encoder: Map, z: Tensor) -> Map:
    """The same map but for the offset and scale of its sources."""
    assert encoder.bend is not None
    s = encoder(z)
    last = encoder.bend[-1]
    assert isinstance(last, nn.Linear)
    last.bias.sub_(s.mean(0))
    for values in (encoder.weight, last.weight, last.bias):
        values.div_(s.std(0).reshape(-1, *[1] * (values.ndim - 1)))
    return encoder
