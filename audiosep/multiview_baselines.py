"""Rivals of learning from views: linear and variational models of a background and of a target on top of it.

All take a background view, y = A x_b + noise, and a target view, y = A (x_b + x_t) + noise with the same A for both
sources, and draw the target view's sources. What they assume of the sources:

    gaussian_em   any mean and covariance, by exact expectation maximisation: what a linear method can reach
    CLVMLinear    x_b = S z + m_b, x_t = W t + m_t with z, t ~ N(0, 1), by exact expectation maximisation
    PCPCA         x_t = W t + m, found where the target's likelihood is high and the background's is low
    CPCA          the axes of most variance in the target, less gamma times the background's
    CLVMVAE       x_b = f(z), x_t = g(t), decoders and encoders are perceptrons
    CVAE          x_b + x_t = f(z, t), and t = 0 in the background

Abubakar Abid et al., "Exploring patterns enriched in a dataset with contrastive principal component analysis", 2018,
https://arxiv.org/abs/1709.06716 (CPCA). Didong Li, Andrew Jones and Barbara Engelhardt, "Probabilistic Contrastive
Principal Component Analysis", 2020, https://arxiv.org/abs/2012.07977. Kristen Severson, Soumya Ghosh and Kenney Ng,
"Unsupervised learning with contrastive latent variable models", 2019, https://arxiv.org/abs/1811.06094 (CLVM). Abubakar
Abid and James Zou, "Contrastive Variational Autoencoder Enhances Salient Features", 2019,
https://arxiv.org/abs/1902.04601 (CVAE).

R recordings of a view, N samples of a source, M observed numbers, d latent dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from audiosep.errors import UsageError
from audiosep.multiview_start import Gaussian, Source, View, fit_gaussians, posterior
from audiosep.operators import Matrix

__all__ = ["CLVMVAE", "CPCA", "CVAE", "PCPCA", "CLVMLinear", "Rival", "Variational", "gaussian_em"]

JITTER = 1e-6


class Rival(Protocol):
    """A fitted rival."""

    def draw(self, view: View, generator: torch.Generator) -> Tensor:
        """Sources (R, 2, N) of recordings of the target view: background and target, NaN where it has no say."""
        ...

    def prior(self, rows: int, generator: torch.Generator) -> Tensor:
        """Targets (rows, N) made up."""
        ...


def _matrix(view: View) -> Tensor:
    """The one A (R, M, N) that all sources of a view are seen through."""
    if not isinstance(view.operator, Matrix):
        raise UsageError(f"view {view.name!r}: the rivals need a matrix per recording")
    a = view.operator.matrix.double()
    a = a if a.ndim == 4 else a[None].expand(len(view.y), -1, -1, -1)
    if not all(torch.equal(a[:, 0], a[:, k]) for k in range(1, a.shape[1])):
        raise UsageError(f"view {view.name!r}: the rivals need sources that are seen through the same matrix")
    return a[:, 0]


def _backwards(view: View) -> Tensor:
    """The least x (R, N) with A x = y, for methods that need complete data."""
    return (torch.linalg.pinv(_matrix(view)) @ view.y.double()[..., None])[..., 0]


# Linear


class gaussian_em:
    """Exact expectation maximisation of a Gaussian per source; for any views, not contrastive ones alone."""

    def __init__(self, views: Sequence[View], sources: Sequence[Source], laps: int = 300) -> None:
        self.found, self.curve = fit_gaussians(views, sources, laps)

    def draw(self, view: View, generator: torch.Generator | None) -> Tensor:
        """A sample of the posterior, or its mean without a generator (R, K, N)."""
        return posterior(view, self.found, generator)

    def prior(self, rows: int, generator: torch.Generator) -> Tensor:
        """Samples of the last source."""
        return list(self.found.values())[-1].sample(rows, generator)


class CLVMLinear:
    """Contrastive latent variables, linear: y = A (S z + W t + m_b + m_t) + noise, t = 0 and m_t = 0 in the background.

    The E-step is the latent's exact Gaussian posterior. The M-step solves the normal equations of all loadings at once:
    with u = (z, t, 1) and the block matrix L = (S, W, m),

        sum_i kron(A_i^T A_i, E[u u^T]_i) vec L = vec sum_i A_i^T y_i E[u]_i^T.

    Args:
        background: its view.
        target: its view.
        dims: latent dimensions of each source.
        laps: of expectation maximisation, after the start at the Gaussian model's axes.
    """

    def __init__(self, background: View, target: View, dims: int = 5, laps: int = 50) -> None:
        views = [(background, _matrix(background), False), (target, _matrix(target), True)]
        n, self.dims, self.noise = views[0][1].shape[-1], dims, float(target.noise)
        self.loadings = torch.zeros(n, 2 * dims + 2, dtype=torch.float64)
        # From a random start it takes thousands of laps; the Gaussian model's axes are near.
        for k, gaussian in enumerate(_both_gaussians(background, target)):
            values, vectors = torch.linalg.eigh(gaussian.covariance)
            self.loadings[:, k * dims : (k + 1) * dims] = (vectors * values.clamp(min=0).sqrt())[:, -dims:]
            self.loadings[:, 2 * dims + k] = gaussian.mean
        size = self.loadings.shape[1]
        for _ in range(laps):
            left = torch.zeros(n * size, n * size, dtype=torch.float64)
            right = torch.zeros(n, size, dtype=torch.float64)
            counts = torch.zeros(2, dtype=torch.float64)
            sums = torch.zeros(2, 2 * dims, dims + 1, dtype=torch.float64)
            for view, a, both in views:
                first, second = self._latent(a, view.y.double(), both)
                left += torch.einsum("bmn,bmo,bpq->npoq", a, a, second).reshape(n * size, -1)
                right += torch.einsum("bmn,bm,bq->nq", a, view.y.double(), first)
                counts += torch.tensor([1.0, float(both)], dtype=torch.float64) * len(first)
                for k in range(2):
                    own = slice(k * dims, (k + 1) * dims)
                    sums[k] += torch.block_diag(second[:, own, own].sum(0), first[:, own].sum(0)[:, None])
            ridge = JITTER * left.diagonal().mean() * torch.eye(len(left), dtype=torch.float64)
            self.loadings = torch.linalg.solve(left + ridge, right.flatten()).view(n, size)
            for k in range(2):
                self._whiten(k, sums[k] / counts[k])

    def _whiten(self, k: int, moments: Tensor) -> None:
        """Move what source k's latents have for a mean and a covariance into its loadings; else EM takes ages.

        Chuanhai Liu, Donald Rubin and Ying Nian Wu, "Parameter expansion to accelerate EM", 1998.
        """
        d = self.dims
        mean = moments[d:, d]
        covariance = moments[:d, :d] - torch.outer(mean, mean) + JITTER * torch.eye(d, dtype=torch.float64)
        own = self.loadings[:, k * d : (k + 1) * d]
        self.loadings[:, 2 * d + k] += own @ mean
        self.loadings[:, k * d : (k + 1) * d] = own @ torch.linalg.cholesky(covariance)

    def _parts(self, both: bool) -> tuple[list[int], list[int]]:
        """Columns of the loadings that are random, and those that are means."""
        d = self.dims
        return list(range(2 * d if both else d)), [2 * d, 2 * d + 1] if both else [2 * d]

    def _posterior(self, a: Tensor, y: Tensor, both: bool) -> tuple[Tensor, Tensor]:
        """Mean (R, d) and covariance (R, d, d) of the latents."""
        random, means = self._parts(both)
        q = a @ self.loadings[:, random]
        left = y - (a @ self.loadings[:, means].sum(1)[:, None])[..., 0]
        inner = q.mT @ q + self.noise**2 * torch.eye(len(random), dtype=torch.float64)
        covariance = self.noise**2 * torch.linalg.inv(inner)
        return torch.linalg.solve(inner, (q.mT @ left[..., None]))[..., 0], covariance

    def _latent(self, a: Tensor, y: Tensor, both: bool) -> tuple[Tensor, Tensor]:
        """E[u] (R, 2 d + 2) and E[u u^T] (R, 2 d + 2, 2 d + 2)."""
        random, means = self._parts(both)
        mean, covariance = self._posterior(a, y, both)
        first = torch.zeros(len(y), self.loadings.shape[1], dtype=torch.float64)
        first[:, random], first[:, means] = mean, 1.0
        second = first[:, :, None] * first[:, None]
        second[:, : len(random), : len(random)] += covariance
        return first, second

    def draw(self, view: View, generator: torch.Generator) -> Tensor:
        a, d = _matrix(view), self.dims
        mean, covariance = self._posterior(a, view.y.double(), True)
        latent = mean + _coloured(covariance, generator)
        shift = self.loadings[:, 2 * d :]
        background = latent[:, :d] @ self.loadings[:, :d].T + shift[:, 0]
        return torch.stack((background, latent[:, d:] @ self.loadings[:, d : 2 * d].T + shift[:, 1]), 1)

    def prior(self, rows: int, generator: torch.Generator) -> Tensor:
        d = self.dims
        white = torch.randn(rows, d, generator=generator, dtype=torch.float64)
        return white @ self.loadings[:, d : 2 * d].T + self.loadings[:, -1]


def _both_gaussians(background: View, target: View) -> list[Gaussian]:
    """Exact Gaussians of the background and of the target."""
    names = target.sources
    sources = [Source(name) for name in names]
    return list(fit_gaussians([replace(background, sources=names[:1]), target], sources)[0].values())


def _coloured(covariance: Tensor, generator: torch.Generator) -> Tensor:
    white = torch.randn(covariance.shape[:-1], generator=generator, dtype=covariance.dtype)
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors @ (values.clamp(min=0).sqrt() * white)[..., None])[..., 0]


class PCPCA:
    """Probabilistic contrastive principal components with incomplete data.

    Maximises mean log N(y; A m, A W W^T A^T + s^2) over the target less gamma times the same over the background.

    Args:
        background: its view.
        target: its view.
        dims: latent dimensions.
        gamma: weight of the background.
        steps: of Adam, on 512 recordings of each view at a time.
        learning_rate: its step size.
        seed: of the recordings' order.
    """

    def __init__(
        self,
        background: View,
        target: View,
        dims: int = 5,
        gamma: float = 0.3,
        steps: int = 500,
        learning_rate: float = 2e-2,
        seed: int = 0,
    ) -> None:
        self.noise = float(target.noise)
        x = _backwards(target)
        # The answer for complete data; from the target's own axes Adam would have to turn all the way.
        values, axes = torch.linalg.eigh(torch.cov(x.T) - gamma * torch.cov(_backwards(background).T))
        loadings = (axes[:, -dims:] * values[-dims:].clamp(min=self.noise**2).sqrt()).requires_grad_()
        mean = x.mean(0).requires_grad_()
        views = [(v.y.double(), _matrix(v)) for v in (background, target)]

        def loss(generator: torch.Generator) -> Tensor:
            scores = []
            for y, a in views:
                index = torch.randint(len(y), (512,), generator=generator)
                q = a[index] @ loadings
                covariance = q @ q.mT + self.noise**2 * torch.eye(q.shape[1], dtype=torch.float64)
                left = y[index] - a[index] @ mean
                weighed = torch.linalg.solve(covariance, left[..., None])[..., 0]
                scores.append(-0.5 * ((weighed * left).sum(1) + torch.logdet(covariance)).mean())
            return gamma * scores[0] - scores[1]

        _descend([loadings, mean], loss, steps, learning_rate, seed)
        self.loadings, self.mean = loadings.detach(), mean.detach()

    def draw(self, view: View, generator: torch.Generator) -> Tensor:
        covariance = self.loadings @ self.loadings.T + JITTER * torch.eye(len(self.mean), dtype=torch.float64)
        alone = View(view.name, ("target",), view.y, Matrix(_matrix(view)[:, None]), view.noise)
        target = posterior(alone, {"target": Gaussian(self.mean, covariance)}, generator)
        return torch.cat((torch.full_like(target, torch.nan), target), 1)

    def prior(self, rows: int, generator: torch.Generator) -> Tensor:
        white = torch.randn(rows, self.loadings.shape[1], generator=generator, dtype=torch.float64)
        return self.mean + white @ self.loadings.T


class CPCA:
    """Contrastive principal components: it has no noise model, so it projects, and draws nothing.

    Args:
        background: its view.
        target: its view.
        dims: axes that are kept.
        gamma: weight of the background's covariance.
    """

    def __init__(self, background: View, target: View, dims: int = 2, gamma: float = 1.0) -> None:
        x, b = _backwards(target), _backwards(background)
        self.mean = x.mean(0) - b.mean(0)
        self.shift = x.mean(0)
        self.spread = torch.cov(x.T) - gamma * torch.cov(b.T)
        self.axes = torch.linalg.eigh(self.spread)[1][:, -dims:]

    def draw(self, view: View, generator: torch.Generator) -> Tensor:
        target = self.mean + (_backwards(view) - self.shift) @ self.axes @ self.axes.T
        return torch.stack((torch.full_like(target, torch.nan), target), 1)

    def prior(self, rows: int, generator: torch.Generator) -> Tensor:
        deviations = (self.axes.T @ self.spread @ self.axes).diagonal().clamp(min=0).sqrt()
        white = torch.randn(rows, len(deviations), generator=generator, dtype=torch.float64)
        return self.mean + (white * deviations) @ self.axes.T


# Variational


class Variational(nn.Module):
    """What the two variational rivals share: fitting, and drawing.

    Args:
        background: its view.
        target: its view.
        dims: latent dimensions of each source.
        width: of the perceptrons.
        steps: of Adam, on 512 recordings of each view at a time.
        learning_rate: its step size; it falls to 0 along half a cosine.
        seed: of weights, order and noise.
    """

    def __init__(
        self,
        background: View,
        target: View,
        dims: int = 5,
        width: int = 256,
        steps: int = 4000,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.dims = dims
        self.noise = self.build(target, width)
        data = [self.seen(view) for view in (background, target)]

        def loss(generator: torch.Generator) -> Tensor:
            total = torch.zeros(())
            for both, (y, a) in enumerate(data):
                index = torch.randint(len(y), (512,), generator=generator)
                mean, log_variance = self.encode(y[index], a[index], bool(both))
                x = torch.stack(self.decode(_drawn(mean, log_variance, generator))).sum(0)
                left = y[index] - (a[index] @ x[..., None])[..., 0]
                total = total + _evidence(left, self.noise, mean, log_variance)
            return total

        _descend(self.parameters(), loss, steps, learning_rate, seed)

    def build(self, target: View, width: int) -> float:
        """Make the perceptrons; returns the deviation that recordings are taken to have from what is decoded."""
        raise NotImplementedError

    def seen(self, view: View) -> tuple[Tensor, Tensor]:
        """Recordings (R, M) and the matrices (R, M, N) that they are seen through."""
        return view.y.float(), _matrix(view).float()

    def encode(self, y: Tensor, a: Tensor, both: bool) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, d or 2 d) of the latents."""
        raise NotImplementedError

    def decode(self, latent: Tensor) -> list[Tensor]:
        """Sources (B, N) of latents: the background of (B, d), also the target of (B, 2 d)."""
        raise NotImplementedError

    @torch.no_grad()
    def draw(self, view: View, generator: torch.Generator) -> Tensor:
        return torch.stack(self.decode(_drawn(*self.encode(*self.seen(view), True), generator)), 1).double()

    @torch.no_grad()
    def prior(self, rows: int, generator: torch.Generator) -> Tensor:
        return self.decode(torch.randn(rows, 2 * self.dims, generator=generator))[1].double()


class CLVMVAE(Variational):
    """Contrastive latent variables with perceptrons: encoders see (y, A), decoders give x_b and x_t."""

    def build(self, target: View, width: int) -> float:
        m, n = _matrix(target).shape[1:]
        self.of_background = perceptron(m + m * n, 2 * self.dims, width)
        self.of_target = perceptron(m + m * n, 4 * self.dims, width)
        self.background, self.target = (perceptron(self.dims, n, width) for _ in range(2))
        return float(target.noise)

    def encode(self, y: Tensor, a: Tensor, both: bool) -> tuple[Tensor, Tensor]:
        net = self.of_target if both else self.of_background
        mean, log_variance = net(torch.cat((y, a.flatten(1)), 1)).chunk(2, 1)
        return mean, log_variance.clamp(-20, 10)

    def decode(self, latent: Tensor) -> list[Tensor]:
        background = self.background(latent[:, : self.dims])
        return [background, self.target(latent[:, self.dims :])] if latent.shape[1] > self.dims else [background]


class CVAE(Variational):
    """Contrastive autoencoder of complete data: one decoder of (z, t), with t = 0 in the background.

    The target is what t adds: f(z, t) - f(z, 0). Nothing asks t to say what z can say alone: with as many z as there
    are numbers t goes unused, and the target is 0. So the default is two of each.
    """

    def __init__(self, background: View, target: View, dims: int = 2, **options: Any) -> None:
        super().__init__(background, target, dims, **options)

    def build(self, target: View, width: int) -> float:
        n = _matrix(target).shape[2]
        self.encoder, self.decoder = perceptron(n, 4 * self.dims, width), perceptron(2 * self.dims, n, width)
        return 10 * float(target.noise)

    def seen(self, view: View) -> tuple[Tensor, Tensor]:
        x = _backwards(view).float()
        return x, torch.eye(x.shape[1]).expand(len(x), -1, -1)

    def encode(self, y: Tensor, a: Tensor, both: bool) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(y).chunk(2, 1)
        count = 2 * self.dims if both else self.dims
        return mean[:, :count], log_variance[:, :count].clamp(-20, 10)

    def decode(self, latent: Tensor) -> list[Tensor]:
        alone = torch.cat((latent[:, : self.dims], torch.zeros_like(latent[:, : self.dims])), 1)
        background = self.decoder(alone)
        return [background, self.decoder(latent) - background] if latent.shape[1] > self.dims else [background]


def _drawn(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    return mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)


def perceptron(size: int, out: int, width: int) -> nn.Sequential:
    """Three hidden layers of Linear, SiLU, LayerNorm."""
    layers: list[nn.Module] = []
    for into in (size, width, width):
        layers += [nn.Linear(into, width), nn.SiLU(), nn.LayerNorm(width)]
    return nn.Sequential(*layers, nn.Linear(width, out))


def _evidence(left: Tensor, noise: float, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Minus the evidence lower bound, without its constant."""
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
    return (0.5 * left.square().sum(1) / noise**2 + divergence).mean()


def _descend(
    parameters: Iterable[Tensor],
    loss: Callable[[torch.Generator], Tensor],
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Adam with a cosine's fall, on batches that `loss` draws from the generator it is given."""
    parameters = list(parameters)
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(parameters, learning_rate)
    for step in range(steps):
        adam.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        adam.zero_grad()
        loss(generator).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        adam.step()
