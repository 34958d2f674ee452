"""Where learning from views starts: Gaussians and mixtures of Gaussians, by exact expectation maximisation.

With Gaussian sources x_k ~ N(m_k, C_k) and y = sum_k A_k x_k + noise of covariance R, the gains
G_k = C_k A_k^T (sum_j A_j C_j A_j^T + R)^-1 give the E-step

    E[x_k | y] = m_k + G_k (y - sum_j A_j m_j),        Cov[x_k | y] = C_k - G_k A_k C_k.

Where every source is a mixture of J Gaussians, each of the J^K ways to choose a component per source is such a case,
and has a weight p(choice | y) in the same closed form. One Gaussian can't say that a source lies on a curve; a few
dozen can, and nothing is approximated in finding them.

Arthur Dempster, Nan Laird and Donald Rubin, "Maximum Likelihood from Incomplete Data via the EM Algorithm", 1977;
Donald Rubin and Dorothy Thayer, "EM Algorithms for ML Factor Analysis", 1982, and Michael Tipping and Christopher
Bishop, "Probabilistic Principal Component Analysis", 1999 (the low-rank covariance).

R recordings of a view, B of them at a time, K sources, N samples of a source, M observed numbers, J components.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from audiosep.errors import UsageError
from audiosep.multiview_frames import Frames, fit_frames, posterior_of_frames
from audiosep.operators import Chain, Mask, Mixing, Operator, dense
from audiosep.prior import Denoiser, GaussianPrior, MixturePrior, NormalPrior, Prior
from audiosep.schedules import Schedule

CHOICES = 2**18  # choices of components that are looked at together

log = logging.getLogger("audiosep.multiview")


@dataclass(frozen=True)
class View:
    """Recordings that share a kind of mixing.

    Args:
        name: for messages.
        sources: names of the K sources in it.
        y: (R, M) or (R, C, N) observations; NaN is what was not observed.
        operator: the map from sources (R, K, N) to y.
        noise: standard deviation of the noise: a number, or a tensor that broadcasts with one recording.
    """

    name: str
    sources: tuple[str, ...]
    y: Tensor
    operator: Operator
    noise: float | Tensor = 0.01

    def masked(self) -> View:
        """The view with a mask in place of NaN."""
        missing = self.y.isnan()
        if not missing.any():
            return self
        seen = Chain(self.operator, Mask((~missing).to(self.y.dtype), per_item=True))
        return replace(self, y=self.y.nan_to_num(0.0), operator=seen)


@dataclass(frozen=True)
class Source:
    """A source to learn a prior of.

    Args:
        name: as the views call it.
        prior: untrained; it is trained in place. None for what needs no more than the start.
        covariance: of its Gaussian start: "full", "low_rank" (plus a diagonal), "stationary", or
            "frames" for long signals, which are stationary in every frame alone (`multiview_frames`).
        rank: of "low_rank".
        frame: of "frames", in samples.
        centred: its mean is 0, as that of sound is.
        components: above 1, of the mixture of Gaussians that it starts as; of "frames", spectra that a frame may have.
    """

    name: str
    prior: Prior | None = None
    covariance: str = "full"
    rank: int = 2
    frame: int = 128
    centred: bool = False
    components: int = 1

    def __post_init__(self) -> None:
        if self.covariance not in ("full", "low_rank", "stationary", "frames"):
            raise UsageError(f"covariance is 'full', 'low_rank', 'stationary' or 'frames', got {self.covariance!r}")
        if self.frame < 1:
            raise UsageError(f"frame is at least 1 sample, got {self.frame}")
        for name in ("rank", "components"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.components > 1 and self.covariance not in ("full", "frames"):
            raise UsageError(
                f"components = {self.components} takes covariance 'full' or 'frames', got {self.covariance!r}; "
                "a source starts either as several Gaussians or as one of a special kind"
            )


@dataclass(frozen=True)
class Stage:
    """Laps in which some sources are learned from some views; the other sources stay as they are.

    Args:
        learn: names of the sources.
        views: names of the views.
        laps: how many.
    """

    learn: tuple[str, ...]
    views: tuple[str, ...]
    laps: int


def length_of(view: View) -> int:
    """N of a view's sources."""
    return view.operator.rows(slice(0, 1)).adjoint(torch.zeros_like(view.y[:1])).shape[-1]


# Gaussians


@dataclass
class Gaussian:
    """Mean (N,) and covariance (N, N) of a source; a stationary one has a power spectrum (N // 2 + 1,) in its place."""

    mean: Tensor
    covariance: Tensor

    def sample(self, rows: int, generator: torch.Generator) -> Tensor:
        """Rows (rows, N) of it."""
        if self.covariance.ndim == 1:
            white = torch.fft.rfft(torch.randn(rows, len(self.mean), generator=generator, dtype=torch.float64))
            return torch.fft.irfft(white * self.covariance.sqrt(), n=len(self.mean))
        white = torch.randn(rows, len(self.mean), generator=generator, dtype=torch.float64)
        return self.mean + white @ _root(self.covariance).mT

    def prior(self, schedule: Schedule) -> Denoiser:
        """It as a prior."""
        if self.covariance.ndim == 1:
            return GaussianPrior(self.covariance, schedule)
        return NormalPrior(self.mean, self.covariance, schedule)


def fit_gaussians(
    views: Sequence[View], sources: Sequence[Source], laps: int = 300, tolerance: float = 1e-7
) -> tuple[dict[str, Gaussian], list[float]]:
    """Maximum-likelihood Gaussians of all sources, by exact expectation maximisation over all views.

    With gain G_k = C_k A_k^T (A C A^T + R)^-1 the E-step is E[x_k | y] = m_k + G_k (y - A m) and
    Cov[x_k | y] = C_k - G_k A_k C_k; the M-step takes the moments of x_k, projected on what its covariance may be.

    Returns:
        The Gaussians, and the mean log-likelihood of a recording by lap; it never falls.
    """
    views = [view.masked() for view in views]
    if all(source.covariance == "stationary" and source.centred for source in sources) and all(
        isinstance(view.operator, Mixing) and view.operator.matrix.ndim == 2 and _is_steady(view.noise)
        for view in views
    ):
        return _fit_spectra(views, sources, laps, tolerance)
    length = length_of(views[0])
    scale = sum(view.y.double().square().mean() for view in views) / len(views)
    found = {
        source.name: Gaussian(torch.zeros(length, dtype=torch.float64), scale * torch.eye(length, dtype=torch.float64))
        for source in sources
    }
    maps = {view.name: dense(view.operator, length) for view in views}
    curve: list[float] = []
    for _ in range(laps):
        sums = {source.name: _Moments(length) for source in sources}
        likelihood = 0.0
        for view in views:
            likelihood += _expect(view, maps[view.name], found, sums)
        curve.append(likelihood / sum(len(view.y) for view in views))
        for source in sources:
            found[source.name] = sums[source.name].gaussian(source)
        if len(curve) > 1 and curve[-1] - curve[-2] < tolerance * abs(curve[-1]):
            break
    return found, curve


class _Moments:
    """Sums of what is known of a source, over recordings."""

    def __init__(self, length: int) -> None:
        self.count = 0
        self.first = torch.zeros(length, dtype=torch.float64)
        self.second = torch.zeros(length, length, dtype=torch.float64)

    def gaussian(self, source: Source) -> Gaussian:
        """The likeliest Gaussian of a kind with these moments."""
        mean = torch.zeros_like(self.first) if source.centred else self.first / self.count
        covariance = self.second / self.count - torch.outer(mean, mean)
        if source.covariance == "low_rank":
            covariance = diagonal_and_low_rank(covariance, source.rank)
        elif source.covariance == "stationary":
            bins = torch.fft.fft(torch.fft.ifft(covariance.to(torch.complex128), dim=0), dim=1).diagonal().real
            circle = torch.fft.ifft(bins).real
            places = torch.arange(len(mean))
            covariance = circle[(places[:, None] - places) % len(mean)]
        return Gaussian(mean, (covariance + covariance.mT) / 2)


def diagonal_and_low_rank(covariance: Tensor, rank: int, laps: int = 100) -> Tensor:
    """The likeliest D + W W^T (N, N), D diagonal and W of so many columns, for data of this covariance.

    Given D, W is known: D^-1/2 W has the leading axes of D^-1/2 C D^-1/2, its eigenvalues less 1. Then D takes what
    expectation maximisation finds that W leaves of the diagonal. Starts where D is the same everywhere.
    """
    values, _ = torch.linalg.eigh(covariance)
    least = 1e-6 * values.mean().clamp(min=1e-30)
    diagonal = values[: len(values) - rank].mean().clamp(min=least).expand(len(values)).clone()
    loadings = covariance.new_zeros(len(values), rank)
    for _ in range(laps):
        root = diagonal.sqrt()
        values, vectors = torch.linalg.eigh(covariance / root / root[:, None])
        loadings = root[:, None] * vectors[:, -rank:] * (values[-rank:] - 1).clamp(min=0).sqrt()
        gain = torch.linalg.solve(torch.diag(diagonal) + loadings @ loadings.mT, loadings).mT  # (rank, N)
        diagonal = (covariance - loadings @ (gain @ covariance)).diagonal().clamp(min=least)
    return torch.diag(diagonal) + loadings @ loadings.mT


def _expect(view: View, maps: Tensor, found: Mapping[str, Gaussian], sums: Mapping[str, _Moments]) -> float:
    """Add a view's recordings to the sums; returns their log-likelihood."""
    likelihood = 0.0
    for first in range(0, len(view.y), 8192):
        index = slice(first, first + 8192)
        y = view.y[index].double().flatten(1)
        a = maps[index] if len(maps) > 1 else maps
        gains, left, covariance = _gains(view, a, found, y)
        weighed = torch.linalg.solve(covariance[0], left.mT).mT if len(a) == 1 else _solved(covariance, left)
        dimension = left.shape[1] * math.log(2 * math.pi)
        likelihood -= 0.5 * float(((left * weighed).sum(1) + torch.logdet(covariance) + dimension).sum())
        for k, name in enumerate(view.sources):
            own, moments = found[name], sums[name]
            mean = own.mean + (gains[k] @ left[..., None])[..., 0]
            taken = (gains[k] @ a[:, k] @ own.covariance).expand(len(y), -1, -1)
            moments.count += len(y)
            moments.first += mean.sum(0)
            moments.second += mean.mT @ mean + len(y) * own.covariance - taken.sum(0)
    return likelihood


def _gains(view: View, a: Tensor, found: Mapping[str, Gaussian], y: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gains (B or 1, N, M) of the K sources, y less its mean (B, M), and its covariance (B or 1, M, M)."""
    noise = (torch.as_tensor(view.noise, dtype=torch.float64) ** 2).expand(view.y.shape[1:]).flatten()
    crossed = [found[name].covariance @ a[:, k].mT for k, name in enumerate(view.sources)]
    covariance = torch.diag(noise) + sum(a[:, k] @ c for k, c in enumerate(crossed))
    gains = [torch.linalg.solve(covariance, c.mT).mT for c in crossed]
    left = y - sum((a[:, k] @ found[name].mean[:, None])[..., 0] for k, name in enumerate(view.sources))
    return gains, left, covariance


def _solved(covariance: Tensor, left: Tensor) -> Tensor:
    return torch.linalg.solve(covariance, left[..., None])[..., 0]


def _is_steady(noise: float | Tensor) -> bool:
    return not isinstance(noise, Tensor) or noise.ndim == 0 or noise.shape[-1] == 1


def _variances(view: View) -> Tensor:
    """Of noise that does not change over time, in every channel, (C,)."""
    return (torch.as_tensor(view.noise, dtype=torch.float64) ** 2).expand(view.y.shape[1], 1)[:, 0]


def _fit_spectra(
    views: Sequence[View], sources: Sequence[Source], laps: int, tolerance: float
) -> tuple[dict[str, Gaussian], list[float]]:
    """The same for zero-mean stationary sources and instantaneous mixing, bin by bin of a unitary FFT."""
    length = views[0].y.shape[-1]
    matrices = [view.operator.matrix.double() for view in views]  # type: ignore[attr-defined]
    bins = [torch.fft.rfft(view.y.double(), norm="ortho") for view in views]  # (R, C, F)
    power = [torch.einsum("rcf,rdf->fcd", b, b.conj()).real / len(b) for b in bins]
    spectra = {
        source.name: torch.stack([p.diagonal(dim1=1, dim2=2).mean(1) for p in power]).mean(0) for source in sources
    }
    curve: list[float] = []
    total = sum(len(view.y) for view in views)
    twice = torch.full_like(power[0][:, 0, 0], 2.0)  # a bin stands for itself and its mirror image
    twice[0] = 1
    if length % 2 == 0:
        twice[-1] = 1
    for _ in range(laps):
        sums = {source.name: torch.zeros_like(twice) for source in sources}
        counts = dict.fromkeys(sums, 0)
        likelihood = 0.0
        for view, a, p in zip(views, matrices, power):
            own = torch.stack([spectra[name] for name in view.sources], 1)  # (F, K)
            noise = _variances(view)
            covariance = (a * own[:, None]) @ a.mT + torch.diag(noise)
            gain = torch.linalg.solve(covariance, a * own[:, None]).mT  # (F, K, C)
            inverse = torch.linalg.inv(covariance)
            score = (inverse * p.mT).sum((1, 2)) + torch.logdet(covariance) + len(a) * math.log(2 * math.pi)
            likelihood -= 0.5 * len(view.y) * float((twice * score).sum())
            second = (gain @ p @ gain.mT).diagonal(dim1=1, dim2=2) + own - (gain @ a).diagonal(dim1=1, dim2=2) * own
            for k, name in enumerate(view.sources):
                sums[name] += len(view.y) * second[:, k]
                counts[name] += len(view.y)
        curve.append(likelihood / total)
        spectra = {name: sums[name] / counts[name] for name in sums}
        if len(curve) > 1 and curve[-1] - curve[-2] < tolerance * abs(curve[-1]):
            break
    return {
        name: Gaussian(torch.zeros(length, dtype=torch.float64), spectrum) for name, spectrum in spectra.items()
    }, curve


def posterior(view: View, gaussians: Mapping[str, Gaussian], generator: torch.Generator | None = None) -> Tensor:
    """Sources (R, K, N) of a view's recordings under Gaussian priors: a sample each, or the mean without a generator.

    A sample is a draw x~ of the prior, moved by the gain onto the recording: x~ + G (y - A x~ - eps).
    """
    view = view.masked()
    means = torch.stack([gaussians[name].mean for name in view.sources])
    covariances = [gaussians[name].covariance for name in view.sources]
    shape = (len(view.y), *means.shape)
    noise = torch.as_tensor(view.noise, dtype=torch.float64)
    if covariances[0].ndim == 1:
        a = view.operator.matrix.double()  # type: ignore[attr-defined]
        own = torch.stack(covariances, 1)
        gain = torch.linalg.solve((a * own[:, None]) @ a.mT + torch.diag(_variances(view)), a * own[:, None]).mT
        x = torch.zeros(shape, dtype=torch.float64)
        if generator is not None:
            white = torch.fft.rfft(torch.randn(shape, generator=generator, dtype=torch.float64))
            x = torch.fft.irfft(white * own.mT.sqrt(), n=shape[-1])
        left = torch.fft.rfft(view.y.double() - _noisy(a @ x, noise, generator))
        return x + torch.fft.irfft(torch.einsum("fkc,rcf->rkf", gain.to(left.dtype), left), n=shape[-1])
    maps, parts = dense(view.operator, means.shape[-1]), []
    for first in range(0, len(view.y), 8192):
        index = slice(first, first + 8192)
        y = view.y[index].double().flatten(1)
        a = maps[index] if len(maps) > 1 else maps
        gains, _, _ = _gains(view, a, gaussians, y)
        x = means.expand(len(y), -1, -1)
        if generator is not None:
            roots = torch.stack([_root(covariance) for covariance in covariances])
            x = x + (roots @ torch.randn(x.shape, generator=generator, dtype=torch.float64)[..., None])[..., 0]
        seen = (a @ x[..., None])[..., 0].sum(1).unflatten(1, view.y.shape[1:])
        left = y - _noisy(seen, noise, generator).flatten(1)
        parts.append(torch.stack([x[:, k] + (g @ left[..., None])[..., 0] for k, g in enumerate(gains)], 1))
    return torch.cat(parts)


def _noisy(y: Tensor, noise: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return y
    return y + noise * torch.randn(y.shape, generator=generator, dtype=y.dtype)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]


# Mixtures


@dataclass
class Mixture:
    """Weights (J,), means (J, N) and covariances (J, N, N) of a source's components."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def sample(self, rows: int, generator: torch.Generator) -> Tensor:
        """Rows (rows, N) of it."""
        picks = torch.multinomial(self.weights, rows, True, generator=generator)
        white = torch.randn(rows, self.means.shape[1], 1, generator=generator, dtype=torch.float64)
        return self.means[picks] + (_root(self.covariances)[picks] @ white)[..., 0]

    def prior(self, schedule: Schedule) -> Denoiser:
        """It as a prior."""
        return MixturePrior(self.weights, self.means, self.covariances, schedule)

    def split(self, count: int) -> Mixture:
        """At most twice as many components: those of the largest spread are cut in two across their longest axis."""
        values, vectors = torch.linalg.eigh(self.covariances)
        chosen = (self.weights * values[:, -1]).topk(min(count - len(self.weights), len(self.weights))).indices
        axis, spread = vectors[chosen, :, -1], values[chosen, -1:]
        # The halves of a Gaussian lie 0.8 deviations to its sides, and have 0.36 of its variance along the axis.
        weights, means, covariances = self.weights.clone(), self.means.clone(), self.covariances.clone()
        weights[chosen] /= 2
        means[chosen] += 0.8 * spread.sqrt() * axis
        covariances[chosen] -= 0.64 * spread[:, :, None] * axis[:, :, None] * axis[:, None]
        return Mixture(
            torch.cat((weights, weights[chosen])),
            torch.cat((means, means[chosen] - 1.6 * spread.sqrt() * axis)),
            torch.cat((covariances, covariances[chosen])),
        )


def fit_mixtures(
    views: Sequence[View], sources: Sequence[Source], stages: Sequence[Stage], laps: int = 40
) -> dict[str, Mixture]:
    """Mixtures of `Source.components` Gaussians for all sources, by exact expectation maximisation.

    The stages that learn a source for the first time are gone through; others stay as they are. A stage's sources begin
    as one Gaussian and are cut in two until they have their number, with `laps` laps after each cut.
    """
    views = [view.masked() for view in views]
    length = length_of(views[0])
    maps = {view.name: dense(view.operator, length) for view in views}
    wanted = {source.name: source.components for source in sources}
    one = torch.ones(1, dtype=torch.float64)
    found = {
        name: Mixture(one, gaussian.mean[None], gaussian.covariance[None])
        for name, gaussian in fit_gaussians(views, sources)[0].items()
    }
    done = set[str]()
    for stage in stages:
        used = [view for view in views if view.name in stage.views]
        while not done.issuperset(stage.learn):
            likelihood = [_improve(used, maps, found, stage.learn) for _ in range(laps)][-1]
            sizes = ", ".join(f"{len(found[name].weights)} of {name}" for name in stage.learn)
            log.info("components: %s; mean log-likelihood %.4f", sizes, likelihood)
            growing = [name for name in stage.learn if len(found[name].weights) < wanted[name]]
            if not growing:
                done.update(stage.learn)
            for name in growing:
                found[name] = found[name].split(wanted[name])
    return found


def _improve(
    views: Sequence[View], maps: Mapping[str, Tensor], found: dict[str, Mixture], learned: Sequence[str]
) -> float:
    """One lap for the learned sources, in place; returns the mean log-likelihood of a recording before it."""
    likelihood = 0.0
    counts = {name: torch.zeros_like(found[name].weights) for name in learned}
    shifts = {name: torch.zeros_like(found[name].means) for name in learned}
    spreads = {name: torch.zeros_like(found[name].covariances) for name in learned}
    for view in views:
        for a, _, choices in _cases(view, maps[view.name], found):
            likelihood += float(choices.evidence.sum())
            for k, name in enumerate(view.sources):
                if name in learned:
                    share, pull, square = choices.moments(k)
                    counts[name] += share
                    shifts[name] += torch.einsum("bmn,bjm->jn", a[:, k], pull)
                    spreads[name] += torch.einsum("bmn,bjmp,bpo->jno", a[:, k], square, a[:, k])
    for name in learned:
        old, count = found[name], counts[name].clamp(min=1e-9)
        # With w = C^-1 (y - mean), x_k has mean m_k + C_k A_k^T w and covariance C_k - C_k A_k^T C^-1 A_k C_k.
        shift = (old.covariances @ (shifts[name] / count[:, None])[..., None])[..., 0]
        moved = old.covariances @ (spreads[name] / count[:, None, None]) @ old.covariances
        covariance = old.covariances + moved - shift[:, :, None] * shift[:, None]
        scale = (old.weights[:, None] * old.covariances.diagonal(dim1=1, dim2=2)).sum(0).mean()
        floor = 1e-6 * scale * torch.eye(old.means.shape[1], dtype=torch.float64)
        weights = counts[name] + 1e-3  # none dies out
        found[name] = Mixture(weights / weights.sum(), old.means + shift, (covariance + covariance.mT) / 2 + floor)
    return likelihood / sum(len(view.y) for view in views)


class _Choices:
    """What recordings say about every choice of components (J_1, ..., J_K).

    M is small, so matrices are lists of rows of tensors (B, J_1, ..., J_K): no library call per matrix.

    Attributes:
        evidence: (B,) log-likelihood of a recording.
        share: (B, J_1, ..., J_K) probability of a choice given the recording.
    """

    def __init__(self, left: list[Tensor], covariance: list[list[Tensor]], log_weights: Tensor) -> None:
        self.size = len(left)
        # Rows of P with P C P^T = 1, from Cholesky's factor L by P = L^-1.
        lower: list[list[Tensor]] = []
        self.whitener: list[list[Tensor]] = []
        score = log_weights - 0.5 * self.size * math.log(2 * math.pi)
        self.whitened: list[Tensor] = []
        for i in range(self.size):
            row: list[Tensor] = []
            for j in range(i):
                row.append((covariance[i][j] - _dot(row, lower[j][:j])) / lower[j][j])
            row.append((covariance[i][i] - _dot(row, row)).clamp(min=1e-30).sqrt())
            lower.append(row)
            inverse = [-_dot(row[m:i], [self.whitener[q][m] for q in range(m, i)]) / row[i] for m in range(i)]
            self.whitener.append([*inverse, 1 / row[i]])
            self.whitened.append(_dot(self.whitener[i], left[: i + 1]))
            score = score - row[i].log() - 0.5 * self.whitened[i].square()
        self.evidence = torch.logsumexp(score.flatten(1), 1)
        self.share = (score - self.evidence.view(-1, *[1] * (score.ndim - 1))).exp()

    def moments(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of source k's components: summed probability (J_k,), and w (B, J_k, M) and w w^T - C^-1 (B, J_k, M, M) with
        the probabilities as weights; w = C^-1 (y - mean)."""
        axes = [1 + j for j in range(self.share.ndim - 1) if j != k]

        def total(value: Tensor) -> Tensor:
            weighed = self.share * value
            return weighed.sum(axes) if axes else weighed

        down = [[self.whitener[i][m] for i in range(m, self.size)] for m in range(self.size)]  # columns of P
        w = [_dot(down[m], self.whitened[m:]) for m in range(self.size)]
        pull = torch.stack([total(value) for value in w], -1)
        square = pull.new_zeros(*pull.shape, self.size)
        for m in range(self.size):
            for p in range(m, self.size):
                inverse = _dot(down[m][p - m :], down[p])
                square[..., m, p] = square[..., p, m] = total(w[m] * w[p] - inverse)
        return self.share.sum([0, *axes]), pull, square


class _SharedChoices:
    """The same for recordings that share their maps: a choice's covariance is one matrix (M, M) for all of them.

    Its moments are summed over the recordings, with an axis of length 1 in their place.
    """

    def __init__(self, left: Tensor, covariance: Tensor, log_weights: Tensor) -> None:
        lower = torch.linalg.cholesky(covariance)  # (J_1, ..., J_K, M, M), and left is (B, J_1, ..., J_K, M)
        self.inverse = torch.cholesky_inverse(lower)
        self.w = torch.einsum("...mn,b...n->b...m", self.inverse, left)
        half = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * left.shape[-1] * math.log(2 * math.pi)
        score = log_weights - half - 0.5 * (left * self.w).sum(-1)
        self.evidence = torch.logsumexp(score.flatten(1), 1)
        self.share = (score - self.evidence.view(-1, *[1] * (score.ndim - 1))).exp()

    def moments(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        axes = [j for j in range(self.share.ndim - 1) if j != k]
        total = self.share.sum(0)  # (J_1, ..., J_K)
        weighed = (self.share[..., None] * self.w).movedim(1 + k, 0).flatten(1, -2)  # (J_k, B ..., M)
        square = weighed.mT @ self.w.movedim(1 + k, 0).flatten(1, -2)
        inverse = total[..., None, None] * self.inverse
        inverse = inverse.sum(axes) if axes else inverse
        return total.sum(axes) if axes else total, weighed.sum(1)[None], (square - inverse)[None]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return sum((x * y for x, y in zip(a, b, strict=True)), torch.zeros((), dtype=torch.float64))


def _cases(
    view: View, maps: Tensor, found: Mapping[str, Mixture]
) -> Iterator[tuple[Tensor, Tensor, _Choices | _SharedChoices]]:
    """Maps (B or 1, K, M, N), recordings (B, M) and their choices, some recordings at a time."""
    mixtures = [found[name] for name in view.sources]
    noise = (torch.as_tensor(view.noise, dtype=torch.float64) ** 2).expand(view.y.shape[1:]).flatten()
    choices, ones = math.prod(len(mixture.weights) for mixture in mixtures), [1] * len(mixtures)
    places = [[*ones[:k], len(mixture.weights), *ones[k + 1 :]] for k, mixture in enumerate(mixtures)]
    logs = [mixture.weights.log().view(1, *place) for mixture, place in zip(mixtures, places)]
    log_weights = sum(logs[1:], logs[0])
    size = len(noise)
    count = max(1, 8 * CHOICES // (choices * size) if len(maps) == 1 else CHOICES // choices)
    for first in range(0, len(view.y), count):
        y = view.y[first : first + count].double().flatten(1)
        a = maps[first : first + count] if len(maps) > 1 else maps
        means = [
            torch.einsum("bmn,jn->mbj", a[:, k], mixture.means).unflatten(-1, places[k])
            for k, mixture in enumerate(mixtures)
        ]
        seen = [
            torch.einsum("bmn,jno,bpo->mpbj", a[:, k], mixture.covariances, a[:, k]).unflatten(-1, places[k])
            for k, mixture in enumerate(mixtures)
        ]
        left = [y[:, m].view(-1, *ones) - sum(mean[m] for mean in means) for m in range(size)]
        if len(maps) == 1:
            whole = sum(seen[1:], seen[0])[:, :, 0].movedim((0, 1), (-2, -1)) + torch.diag(noise)
            yield a, y, _SharedChoices(torch.stack(left, -1), whole, log_weights)
            continue
        covariance = [
            [sum(c[i, j] for c in seen) + (noise[i] if i == j else 0.0) for j in range(i + 1)] for i in range(size)
        ]
        yield a, y, _Choices(left, covariance, log_weights)


def posterior_of_mixtures(view: View, mixtures: Mapping[str, Mixture], generator: torch.Generator) -> Tensor:
    """Sources (R, K, N) of a view's recordings, exact samples: first components, then sources."""
    view = view.masked()
    length = next(iter(mixtures.values())).means.shape[1]
    noise = torch.as_tensor(view.noise, dtype=torch.float64).expand(view.y.shape[1:]).flatten()
    parts = []
    for a, y, choices in _cases(view, dense(view.operator, length), mixtures):
        flat = torch.multinomial(choices.share.flatten(1), 1, generator=generator)[:, 0]
        picks = torch.unravel_index(flat, choices.share.shape[1:])
        own = [mixtures[name] for name in view.sources]
        covariance = torch.stack([m.covariances[j] for m, j in zip(own, picks)], 1)  # (B, K, N, N)
        roots = torch.stack([_root(m.covariances)[j] for m, j in zip(own, picks)], 1)
        x = torch.stack([m.means[j] for m, j in zip(own, picks)], 1)
        x = x + (roots @ torch.randn(x.shape, generator=generator, dtype=x.dtype)[..., None])[..., 0]
        left = y - _noisy((a @ x[..., None])[..., 0].sum(1), noise, generator)
        back = covariance @ a.mT  # (B, K, N, M)
        weights = torch.linalg.solve((a @ back).sum(1) + torch.diag(noise**2), left[..., None])
        parts.append(x + (back @ weights[:, None])[..., 0])
    return torch.cat(parts)


# Either


Start = Gaussian | Mixture | Frames


def fit_start(views: Sequence[View], sources: Sequence[Source], stages: Sequence[Stage], laps: int) -> dict[str, Start]:
    """What the sources start as: spectra of frames, Gaussians where every source has one component, else mixtures."""
    if any(source.covariance == "frames" for source in sources):
        return dict(fit_frames(views, sources, stages, laps)[0])
    if all(source.components == 1 for source in sources):
        return dict(fit_gaussians(views, sources, laps)[0])
    return dict(fit_mixtures(views, sources, stages, laps))


def draw_start(view: View, starts: Mapping[str, Start], seed: int) -> Tensor:
    """An exact sample of a view's sources (R, K, N)."""
    generator = torch.Generator().manual_seed(seed)
    frames = {name: start for name, start in starts.items() if isinstance(start, Frames)}
    if frames:
        return posterior_of_frames(view, frames, generator).float()
    mixtures = {name: start for name, start in starts.items() if isinstance(start, Mixture)}
    if mixtures:
        return posterior_of_mixtures(view, mixtures, generator).float()
    gaussians = {name: start for name, start in starts.items() if isinstance(start, Gaussian)}
    return posterior(view, gaussians, generator).float()
