"""Where learning sound from views starts: every frame of a source has one of a few spectra.

In an orthogonal lapped transform (`mdct`) of F coefficients a frame, frame m of source k has chosen a spectrum j with
probability w_kj, and its coefficients are independent, N(0, v_kjf). Gains act on every coefficient alike, so that

    y_mf = A x_mf + noise,      x_mf = (x_1mf, ..., x_Kmf),

and given the choices of all K sources everything is Gaussian, bin by bin: with C_f = A diag(v_f) A^T + R the posterior
has the mean diag(v_f) A^T C_f^-1 y_mf. The weight of a choice given the recording is the product of its weights and of
N(y_mf; 0, C_f) over the bins. Expectation maximisation, samples and means are exact, for whole recordings: frames
overlap, but their coefficients don't.

Laurent Benaroya, Frédéric Bimbot and Rémi Gribonval, "Audio Source Separation with a Single Sensor", 2006,
https://doi.org/10.1109/TSA.2005.854110 (mixtures of spectra, of clean sources).

R recordings, C channels, K sources, J spectra of a source, H choices, M frames, F coefficients of a frame.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from audiosep.errors import UsageError
from audiosep.mdct import imdct, mdct
from audiosep.operators import Mixing
from audiosep.prior import placed
from audiosep.schedules import Schedule

if TYPE_CHECKING:
    from audiosep.multiview_start import Source, Stage, View

BATCH = 2048  # frames that are looked at together

log = logging.getLogger("audiosep.multiview")


@dataclass
class Frames:
    """Weights (J,) and spectra (J, F) of a source's frames."""

    weights: Tensor
    spectra: Tensor

    def sample(self, rows: int, frames: int, generator: torch.Generator) -> Tensor:
        """Signals (rows, frames F) of it."""
        picks = torch.multinomial(self.weights, rows * frames, True, generator=generator)
        white = torch.randn(rows, frames, self.spectra.shape[1], generator=generator, dtype=torch.float64)
        return imdct(white * self.spectra[picks].view_as(white).sqrt())

    def prior(self, schedule: Schedule) -> FramesPrior:
        """It as a prior."""
        return FramesPrior(self, schedule)

    def split(self, count: int, generator: torch.Generator) -> Frames:
        """At most twice as many spectra: those of most weight become a louder and a fainter one of other colour."""
        chosen = self.weights.topk(min(count - len(self.weights), len(self.weights))).indices
        shape = self.spectra[chosen].shape
        apart = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.7
        weights, spectra = self.weights.clone(), self.spectra.clone()
        weights[chosen] /= 2
        spectra[chosen] *= apart.exp()
        return Frames(
            torch.cat((weights, weights[chosen])), torch.cat((spectra, self.spectra[chosen] * (-apart).exp()))
        )


class FramesPrior:
    """`Frames` as a denoiser, exact where a signal is whole frames long."""

    def __init__(self, frames: Frames, schedule: Schedule) -> None:
        self.frames, self.schedule = frames, schedule

    @property
    def power(self) -> float:
        """Mean square of its signals."""
        return float(self.frames.weights @ self.frames.spectra.mean(1))

    def denoise(self, x_t: Tensor, t: Tensor, label: Tensor | None = None, schedule: Schedule | None = None) -> Tensor:
        """Exact E[x_0 | x_t], (B, N)."""
        asked = schedule or self.schedule
        ratio = placed(asked.ratio_at(t), x_t)[:, None]
        weights, spectra = placed(self.frames.weights, x_t), placed(self.frames.spectra, x_t)
        noisy = x_t / placed(asked.alpha_of(ratio), x_t)
        c = mdct(pad(noisy, (0, -noisy.shape[-1] % spectra.shape[1])), spectra.shape[1])  # (B, M, F)
        total = spectra + ratio[..., None].square()  # (B, J, F)
        score = weights.log() - 0.5 * (c.square() @ (1 / total).mT + total.log().sum(-1)[:, None])
        return imdct((score.softmax(-1) @ (spectra / total)) * c)[:, : x_t.shape[-1]]


def fit_frames(
    views: Sequence[View], sources: Sequence[Source], stages: Sequence[Stage], laps: int
) -> tuple[dict[str, Frames], list[float]]:
    """Spectra of all sources, by exact expectation maximisation.

    All start as one spectrum, learned from all views. Then the stages are gone through in turn: a stage's sources are
    split until they have `Source.components` spectra, with `laps` laps after each split.

    Returns:
        The spectra, and the mean log-likelihood of a coefficient before every lap.
    """
    size = _size(sources)
    seen = {view.name: _Seen(view, size) for view in views}
    wanted = {source.name: source.components for source in sources}
    power = torch.stack([s.bins.square().mean((0, 2)) for s in seen.values()]).mean(0)
    one = torch.ones(1, dtype=torch.float64)
    found = {name: Frames(one, power[None].clone()) for name in wanted}
    generator = torch.Generator().manual_seed(0)
    curve = [_improve(list(seen.values()), found, list(wanted)) for _ in range(laps)]
    for stage in stages:
        used = [seen[name] for name in stage.views]
        while growing := [name for name in stage.learn if len(found[name].weights) < wanted[name]]:
            for name in growing:
                found[name] = found[name].split(wanted[name], generator)
            curve += [_improve(used, found, stage.learn) for _ in range(laps)]
            log.info("%s: log-likelihood %.4f", ", ".join(stage.learn), curve[-1])
    return found, curve


def posterior_of_frames(view: View, found: Mapping[str, Frames], generator: torch.Generator | None = None) -> Tensor:
    """Sources (R, K, T) of a view's recordings: an exact sample each, or the mean without a generator."""
    length = view.y.shape[-1]
    size = next(iter(found.values())).spectra.shape[1]
    seen = _Seen(view, size, whole=True)
    parts = []
    for y, choices in seen.cases(found):
        if generator is None:
            parts.append(torch.einsum("bh,hfkc,bfc->bfk", choices.share, choices.gains, y))
            continue
        picks = torch.multinomial(choices.share, 1, generator=generator)[:, 0]
        x = torch.randn(*y.shape[:2], len(view.sources), generator=generator, dtype=torch.float64)
        x = x * choices.variances[picks].sqrt()
        noise = seen.deviations * torch.randn(y.shape, generator=generator, dtype=torch.float64)
        left = y - x @ seen.matrix.mT - noise
        parts.append(x + (choices.gains[picks] @ left[..., None])[..., 0])
    x = torch.cat(parts).unflatten(0, (len(view.y), -1))  # (R, M, F, K)
    return imdct(x.permute(0, 3, 1, 2))[..., :length]


class _Seen:
    """Coefficients (B, F, C) of a view's frames, and its gains (C, K) and noise (C,)."""

    def __init__(self, view: View, size: int, whole: bool = False) -> None:
        operator, noise = view.operator, torch.as_tensor(view.noise, dtype=torch.float64)
        if not isinstance(operator, Mixing) or operator.matrix.ndim != 2 or view.y.isnan().any():
            raise UsageError(f"view {view.name!r}: a start of frames takes complete recordings that share their gains")
        if noise.ndim and noise.shape[-1] != 1:
            raise UsageError(f"view {view.name!r}: a start of frames takes noise that does not change over time")
        length = view.y.shape[-1]
        if length < size:
            raise UsageError(f"view {view.name!r}: recordings of {length} samples have no frame of {size}")
        y = view.y.double()
        y = pad(y, (0, -length % size)) if whole else y[..., : length // size * size]
        self.sources, self.matrix = view.sources, operator.matrix.double()
        self.deviations = noise.expand(view.y.shape[1], 1)[:, 0]
        self.bins = mdct(y, size).permute(0, 2, 3, 1).flatten(0, 1)

    def cases(self, found: Mapping[str, Frames]) -> Iterator[tuple[Tensor, _Choices]]:
        """Frames (B, F, C) and their choices, some at a time."""
        choices = _Choices(self, [found[name] for name in self.sources])
        for y in self.bins.split(BATCH):
            choices.weigh(y)
            yield y, choices


class _Choices:
    """The H = J_1 ... J_K choices of a spectrum per source.

    Attributes:
        variances: (H, F, K) of the sources.
        gains: (H, F, K, C) of the posterior mean.
        share: (B, H) probability of a choice given the frame, after `weigh`.
        evidence: (B,) log-likelihood of the frame.
    """

    def __init__(self, seen: _Seen, own: Sequence[Frames]) -> None:
        self.counts = [len(frames.weights) for frames in own]
        picks = torch.cartesian_prod(*[torch.arange(count) for count in self.counts]).view(-1, len(own))
        self.picks = picks.unbind(1)
        self.variances = torch.stack([frames.spectra[j] for frames, j in zip(own, self.picks)], -1)
        weights = sum(frames.weights[j].log() for frames, j in zip(own, self.picks))
        scaled = seen.matrix * self.variances[:, :, None]  # (H, F, C, K)
        covariance = scaled @ seen.matrix.mT + torch.diag(seen.deviations.square())
        self.precision = torch.linalg.inv(covariance)
        self.gains = scaled.mT @ self.precision
        # What is left of a source's variance.
        self.rest = self.variances * (1 - (self.gains * seen.matrix.mT).sum(-1))
        channels = len(seen.matrix)
        constant = 0.5 * covariance.shape[1] * channels * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
        self.offset = weights - 0.5 * torch.logdet(covariance).sum(1) - constant

    def weigh(self, y: Tensor) -> None:
        square = (y[..., None] * y[..., None, :]).flatten(1)
        score = self.offset - 0.5 * square @ self.precision.flatten(1).mT
        self.evidence = score.logsumexp(1)
        self.share = (score - self.evidence[:, None]).exp()

    def moments(self, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Of source k's spectra: summed probability (J_k,) and second moments weighed with it (J_k, F)."""
        square = (y[..., None] * y[..., None, :]).flatten(1)
        total = self.share.sum(0)
        power = (self.share.mT @ square).view(len(total), *y.shape[1:], y.shape[-1])  # (H, F, C, C)
        gain = self.gains[:, :, k]
        second = torch.einsum("hfc,hfcd,hfd->hf", gain, power, gain) + total[:, None] * self.rest[..., k]
        count = torch.zeros(self.counts[k], dtype=torch.float64).index_add(0, self.picks[k], total)
        return count, second.new_zeros(len(count), second.shape[1]).index_add(0, self.picks[k], second)


def _improve(seen: Sequence[_Seen], found: dict[str, Frames], learned: Sequence[str]) -> float:
    """One lap for the learned sources, in place; returns the mean log-likelihood of a coefficient before it."""
    likelihood, numbers = 0.0, 0
    counts = {name: torch.zeros_like(found[name].weights) for name in learned}
    powers = {name: torch.zeros_like(found[name].spectra) for name in learned}
    for view in seen:
        for y, choices in view.cases(found):
            likelihood += float(choices.evidence.sum())
            numbers += y.numel()
            for k, name in enumerate(view.sources):
                if name in learned:
                    count, power = choices.moments(y, k)
                    counts[name] += count
                    powers[name] += power
    for name in learned:
        old = found[name]
        spectra = (powers[name] + 1e-3 * old.spectra) / (counts[name][:, None] + 1e-3)
        weights = counts[name] + 1e-3  # none dies out
        floor = 1e-9 * (old.weights[:, None] * old.spectra).sum(0).mean()
        found[name] = Frames(weights / weights.sum(), spectra.clamp(min=float(floor)))
    return likelihood / numbers


def _size(sources: Sequence[Source]) -> int:
    sizes = {source.frame for source in sources}
    if len(sizes) > 1 or any(source.covariance != "frames" or not source.centred for source in sources):
        raise UsageError("covariance 'frames' is for all sources or none: with the same frame, and with centred = true")
    return sizes.pop()
