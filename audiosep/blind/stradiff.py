"""StrADiff: each source is drawn by its own reverse diffusion, under its own Gaussian process prior.

Wei: "StrADiff: a structured source-wise adaptive diffusion framework for linear and nonlinear blind source separation"
(2026), arXiv:2604.04973. For source k, with z ~ N(mu, diag(sigma^2)) learned (eq. 7), x_L = z, eps = eps_k(x_t, t / L):

    x0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)                  (13)
    x_{t-1} = sqrt(abar_{t-1}) x0 + sqrt(1 - abar_{t-1}) eps          (14)    s = x_0

    loss = |Y - g(S)|^2 / (2 nu)  +  lambda_prior sum_k NLL_k(s_k)  +  lambda_diff mean |eps_k(x_t, t / L) - eta|^2
           +  lambda_kl KL(q(Z) | N(0, I))                            (24, 21, 27, 30; weights as in 31)

Y is the whitened recording (the paper centres and scales only, which favours mixings with orthogonal columns).
Not in the paper, and ours: the noise schedule, the networks, nu, the weights, the start, annealing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from audiosep.blind import gp, posterior
from audiosep.blind.base import Array, choose, positive
from audiosep.blind.bent import Map, fitted
from audiosep.blind.gp_vae import GPPrior
from audiosep.blind.one_cycle import OneCycle
from audiosep.blind.vae import (
    LearnedSeparator,
    Turn,
    check_block,
    check_finite,
    double_precision,
    random_stretch,
    whiten_safely,
)

START_STD = 0.01  # of the diffusion's learned start
LEAST_NOISE = 0.002  # nu of a recording without noise: with less the rotation of the start hardly moves
RANDOM_NOISE, RANDOM_ANNEAL = 0.05, 20.0  # nu from a random start, and how many times it begins at
ALL = slice(None)
BETA_FIRST, BETA_LAST = 1e-4, 0.2  # of the schedule: abar_L stays above 0.1, so that x0 does not explode at first


class NoiseNetworks(nn.Module):
    """eps_k(x, t / L) of all sources at once, each a small network over the samples, beside a multiple of x.

    At first all are 0: the reverse diffusion then only divides by sqrt(abar_L).
    """

    def __init__(self, sources: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(sources, 1, hidden))
        self.time = nn.Parameter(torch.randn(sources, 1, hidden))
        self.bias = nn.Parameter(0.1 * torch.randn(sources, 1, hidden))
        self.out = nn.Parameter(torch.zeros(sources, hidden, 1))
        self.skip = nn.Parameter(torch.zeros(sources, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (n, T), time (n, 1) in 0..1 -> (n, T)."""
        hidden = torch.tanh(torch.baddbmm(self.bias + time[..., None] * self.time, x[..., None], self.weight))
        return torch.bmm(hidden, self.out)[..., 0] + self.skip * x


class Diffusion(nn.Module):
    """The learned start of all sources (n, T), and the way from there to the sources."""

    def __init__(self, start: Tensor, steps: int, networks: NoiseNetworks) -> None:
        super().__init__()
        betas = torch.linspace(BETA_FIRST, BETA_LAST, steps, dtype=start.dtype)
        self.register_buffer("abar", torch.cat([torch.ones(1, dtype=start.dtype), torch.cumprod(1 - betas, 0)]))
        self.abar: Tensor
        self.steps = steps
        self.networks = networks
        self.mean = nn.Parameter(self.abar[-1].sqrt() * start)
        self.log_std = nn.Parameter(torch.full_like(start, math.log(START_STD)))

    def draw(self, part: slice = ALL) -> Tensor:
        """z of eq. 9, or a stretch of it: (n, T)."""
        mean = self.mean[:, part]
        return mean + self.log_std[:, part].exp() * torch.randn_like(mean)

    def path(self, z: Tensor) -> list[Tensor]:
        """x_L, ..., x_0 by eqs. 13 and 14: L + 1 times (n, T)."""
        states = [z]
        for step in range(self.steps, 0, -1):
            x = states[-1]
            eps = self.networks(x, x.new_full((len(x), 1), step / self.steps))
            clean = (x - (1 - self.abar[step]).sqrt() * eps) / self.abar[step].sqrt()
            states.append(self.abar[step - 1].sqrt() * clean + (1 - self.abar[step - 1]).sqrt() * eps)
        return states

    def denoising_loss(self, s: Tensor) -> Tensor:
        """Eq. 27 with one step drawn per source."""
        step = torch.randint(1, self.steps + 1, (len(s), 1), device=s.device)
        noise = torch.randn_like(s)
        noised = self.abar[step].sqrt() * s + (1 - self.abar[step]).sqrt() * noise
        return (self.networks(noised, step.to(s) / self.steps) - noise).square().mean()

    def divergence(self, part: slice = ALL) -> Tensor:
        """Eq. 30."""
        mean, log_std = self.mean[:, part], self.log_std[:, part]
        return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum()

    @torch.no_grad()
    def mean_sources(self) -> Tensor:
        """The sources (T, n) of the start's mean."""
        return self.path(self.mean)[-1].T


class StrADiff(LearnedSeparator):
    """Separation by a learned reverse diffusion and a Gaussian process prior per source (see the module's head).

    Parameters
    ----------
    n_sources: int or None
        Number of sources; None estimates it.
    mixing: "linear" or "mlp"
        The decoder: a matrix of unit columns, or that and a tanh network beside it.
    init: "auto", "sobi", "fastica" or "random"
        Where the sources start; "auto" is SOBI's. "random" is the paper's, anneals nu, and wants 3000 iterations.
    posterior: "gp" or "native"
        What sources_ and sources_std_ are: the posterior under Gaussian processes fitted to the sources, or the mean
        and deviation over draws of the diffusion's start (which is no measure of the error). "gp" also refines the
        mixing, as ARFlowVAE's does.
    kernel: "rbf", "matern12", "matern32", "matern52", "periodic" or "periodic12"; as GPVAE's
    jitter: the white part xi of its unit variance (eq. 18).
    noise: float or None
        nu; None takes the noise found in the start's sources, and at least 0.002.
    lambda_prior, lambda_diff, lambda_kl: float
        Weights of eq. 31.
    steps: int
        L, the length of the diffusion.
    hidden, mlp_units: int
        Width of the noise networks; of the decoder's network.
    draws: int
        Draws of the native mean and deviation.
    snapshots: sequence of int
        Iterations at which the diffusion's path is kept, besides the last.
    block: int or None
        Samples seen in one iteration, a stretch anywhere in a longer recording; None sees all. Each sample's start is
        learned, so that a long recording wants more iterations; or fit a part of it, see `separate_in_blocks`.
    learning_rate: float
        Of the start, mixing and length-scales; a tenth of it for the networks.
    max_iter, tol, random_state, device
        As ARFlowVAE's. The paper has 10,000 iterations.

    Attributes
    ----------
    sources_, sources_std_ (n_samples, n_sources); mixing_ (n_channels, n_sources; the best linear one for "mlp"); mean_
    length_scales_ (n_sources,) in samples; with a periodic kernel shares of periods_ (n_sources,)
    traces_: theirs, and the loss terms "reconstruction_", "prior_", "diffusion_", "kl_"
    paths_: iteration -> (L + 1, n_samples, n_sources), from x_L to x_0
    loss_curve_, elbo_ (the loss's first two terms, negated: no bound, as draws have no density), n_iter_
    noise_: noise variance per channel and processes_: the fitted processes, with posterior="gp".
    bands_hold_: whether sources_std_ is the size of the error; as ARFlowVAE's, FAR TOO SMALL without noise.
    """

    paths_: dict[int, Array]
    length_scales_: Array

    def __init__(
        self,
        n_sources: int | None = None,
        *,
        mixing: str = "linear",
        init: str = "auto",
        posterior: str = "gp",
        kernel: str = "rbf",
        jitter: float = 0.03,
        noise: float | None = None,
        lambda_prior: float = 1.0,
        lambda_diff: float = 1000.0,
        lambda_kl: float = 1e-3,
        steps: int = 20,
        hidden: int = 32,
        mlp_units: int = 32,
        draws: int = 64,
        block: int | None = 20000,
        snapshots: Sequence[int] = (),
        learning_rate: float = 1e-2,
        max_iter: int = 300,
        tol: float = 0.1,
        random_state: Any = None,
        device: str = "auto",
    ) -> None:
        self.n_sources = n_sources
        self.mixing = mixing
        self.init = init
        self.posterior = posterior
        self.kernel = kernel
        self.jitter = jitter
        self.noise = noise
        self.lambda_prior = lambda_prior
        self.lambda_diff = lambda_diff
        self.lambda_kl = lambda_kl
        self.steps = steps
        self.hidden = hidden
        self.mlp_units = mlp_units
        self.draws = draws
        self.block = block
        self.snapshots = snapshots
        self.learning_rate = learning_rate
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.device = device

    def _check_options(self) -> None:
        super()._check_options()
        choose("kernel", self.kernel, gp.KERNELS)
        for name in ("steps", "hidden", "draws"):
            positive(name, getattr(self, name), whole=True)
        for name in ("jitter", "lambda_prior", "lambda_diff", "lambda_kl"):
            positive(name, getattr(self, name), zero=True)
        check_block(self.block)
        if self.noise is not None:
            positive("noise", self.noise)

    def fit_transform(self, X: ArrayLike, y: None = None) -> Array:
        """Fit, and return sources_; transform(X) would fit the native latents once more."""
        return self.fit(X).sources_

    def transform(self, X: ArrayLike) -> Array:
        """The sources (n_samples, n_sources) of a recording that was mixed alike, refitted under the learned mixing.

        With posterior="gp" the final step has an unmixing, which is applied and its sources smoothed; otherwise the
        diffusion's start is fitted anew, on the device of `device`.
        """
        check_is_fitted(self)
        recording = self._checked(X, reset=False) - self.mean_
        if self.processes_ is not None and self.mixing == "linear":
            return self._smoothed(recording, recording)[0]
        if self._encoder is not None:
            with torch.no_grad():
                native = self._encoder(torch.from_numpy(recording @ self._whitening.matrix.T)).numpy()
        else:
            native = self._refit(recording)
        native = self._normalised(native)
        return native if self.processes_ is None else self._smoothed(recording, native)[0]

    def inverse_transform(self, sources: ArrayLike) -> Array:
        """The recording (n_samples, n_channels) that these sources mix to."""
        check_is_fitted(self)
        if self.mixing == "linear":
            return super().inverse_transform(sources)
        native = (self._checked_sources(sources) * self._signs * self._scale)[:, np.argsort(self._order)]
        with torch.no_grad():
            white = self._decoder(torch.from_numpy(native)).numpy()
        return white @ self._whitening.inverse.T + self.mean_

    def _separate(self, X: Array, rng: np.random.RandomState) -> None:
        self._check_options()
        device = self._torch_device()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(rng.randint(2**31)))
            self._train(X, rng, device)

    def _train(self, X: Array, rng: np.random.RandomState, device: torch.device) -> None:
        sources = self.n_sources_
        whitening = whiten_safely(X, X.shape[1] if self.mixing == "mlp" else sources)
        Z = whitening(X)
        ((self.init_, rotation),) = self._rotations(Z[:, :sources], rng).items()
        start = Z[:, :sources] @ rotation.T
        weight = torch.zeros(Z.shape[1], sources, dtype=torch.float64)
        weight[:sources] = torch.from_numpy(rotation.T)
        z = torch.from_numpy(Z).to(device)
        with double_precision():
            decoder = Map(weight, self.mixing, self.mlp_units).to(device)
            prior = GPPrior(sources, self.kernel, self.jitter).to(device)
        # Single precision halves the time of the diffusion, which is most of it.
        networks = NoiseNetworks(sources, self.hidden)
        diffusion = Diffusion(torch.from_numpy(start.T.copy()).float(), self.steps, networks).to(device)
        prior.start_from(torch.from_numpy(start.T.copy()).to(device))
        self._nu = self._noise_of(start)
        anneal = RANDOM_ANNEAL if self.init_ == "random" else 1.0
        turn = self._optimise(z, decoder, prior, diffusion, self._nu, anneal)
        self._finish(X, z, whitening, decoder, prior, diffusion)
        self._check_convergence(turn)

    def _noise_of(self, start: Array) -> float:
        if self.noise is not None:
            return float(self.noise)
        if self.init_ == "random":
            return RANDOM_NOISE
        eye = np.eye(start.shape[1])
        return max(LEAST_NOISE, posterior.noise_and_processes(start - start.mean(0), eye)[0])

    def _optimise(
        self, z: Tensor, decoder: Map, prior: GPPrior, diffusion: Diffusion, nu: float, anneal: float
    ) -> Turn:
        rate = self.learning_rate
        slow = [*diffusion.networks.parameters(), *([] if decoder.bend is None else decoder.bend.parameters())]
        fast = [diffusion.mean, diffusion.log_std, decoder.weight, *prior.parameters()]
        optimiser = OneCycle([(fast, rate), (slow, rate / 10)], self.max_iter)
        names = ("reconstruction_", "prior_", "diffusion_", "kl_")
        curve, terms, learned = [], [], []
        self.paths_ = {}
        turn = Turn(self.max_iter)
        for step in range(self.max_iter):
            if step in self.snapshots:
                self._keep_path(step, diffusion)
            turn.watch(step, optimiser.rate, diffusion.mean_sources)
            level = nu * anneal ** max(0.0, 1 - 2 * step / self.max_iter)
            part = random_stretch(len(z), self.block)
            s = diffusion.path(diffusion.draw(part))[-1].double()
            parts = (
                (z[part] - decoder(s.T)).square().sum() / (2 * level),
                -self.lambda_prior * prior.log_prob(s).sum(),
                self.lambda_diff * diffusion.denoising_loss(s.float()).double(),
                self.lambda_kl * diffusion.divergence(part).double(),
            )
            loss = torch.stack(parts).sum()
            optimiser.step(loss)
            if self.mixing == "linear":
                with torch.no_grad():
                    decoder.weight.div_(decoder.weight.norm(dim=0))
            curve.append(loss.detach())
            self._tell(step + 1, loss)
            terms.append(torch.stack(parts).detach())
            learned.append({name: value.detach().clone() for name, value in prior.learned().items()})
        self.loss_curve_ = torch.stack(curve).cpu().numpy()
        columns = torch.stack(terms).cpu().numpy().T
        self.traces_ = {name: torch.stack([t[name] for t in learned]).cpu().numpy() for name in learned[0]}
        self.traces_ |= dict(zip(names, columns))
        self.elbo_ = -float(columns[0][-1] + columns[1][-1]) * len(z) / len(z[part])
        self.n_iter_ = self.max_iter
        check_finite(self.loss_curve_)
        turn.end(diffusion.mean_sources())
        return turn

    @torch.no_grad()
    def _keep_path(self, step: int, diffusion: Diffusion) -> None:
        states = diffusion.path(diffusion.draw())
        self.paths_[step] = torch.stack(states).transpose(1, 2).double().cpu().numpy()

    @torch.no_grad()
    def _finish(self, X: Array, z: Tensor, whitening: Any, decoder: Map, prior: GPPrior, diffusion: Diffusion) -> None:
        self._keep_path(self.max_iter, diffusion)
        native, std = _moments(diffusion, self.draws)
        self.mean_, self._whitening = whitening.mean, whitening
        self._decoder, self._networks, self._prior = decoder.cpu(), diffusion.networks.cpu(), prior.cpu()
        self._encoder, self._refined = None, False
        if self._refines(z):
            self._refine_bent(self._regression(z.cpu(), native), z.cpu())
            assert self._encoder is not None
            native = self._encoder(z.cpu()).numpy()
        self._set_sources(X, native, std, self._native_mixing(X, native))
        for name, value in prior.learned().items():
            setattr(self, name, value.cpu().numpy()[self._order])
            self.traces_[name] = self.traces_[name][:, self._order]
        self.paths_ = {step: self._normalised(path) for step, path in self.paths_.items()}

    def _regression(self, z: Tensor, sources: Array) -> Map:
        """The bent map from z (T, n) to sources (T, n) of least squares."""
        weight = torch.linalg.lstsq(z, torch.from_numpy(sources)).solution.T
        with double_precision():
            return fitted(Map(weight, self.mixing, self.mlp_units), z, torch.from_numpy(sources))

    def _normalised(self, sources: Array) -> Array:
        return sources[..., self._order] / self._scale * self._signs

    def _refit(self, X: Array) -> Array:
        """Native sources (T, n) of another centred recording: the diffusion's start fitted, all else as learned."""
        device = self._torch_device()
        z = torch.from_numpy(X @ self._whitening.matrix.T).to(device)
        decoder, networks = copy.deepcopy(self._decoder).to(device), copy.deepcopy(self._networks).to(device)
        prior = copy.deepcopy(self._prior).to(device)
        start = z @ torch.linalg.pinv(decoder.weight.detach()).T
        diffusion = Diffusion(start.T.float(), self.steps, networks).to(device)
        optimiser = torch.optim.Adam([diffusion.mean], lr=self.learning_rate)
        for _ in range(self.max_iter):
            s = diffusion.path(diffusion.mean)[-1].double()
            misfit = (z - decoder(s.T)).square().sum() / (2 * self._nu)
            loss = misfit - self.lambda_prior * prior.log_prob(s).sum()
            optimiser.zero_grad()
            loss.backward(inputs=[diffusion.mean])
            optimiser.step()
        with torch.no_grad():
            return diffusion.path(diffusion.mean)[-1].T.double().cpu().numpy()


@torch.no_grad()
def _moments(diffusion: Diffusion, draws: int) -> tuple[Array, Array]:
    """Mean and standard deviation (T, n) of the sources over draws of the start, eqs. 34 and 35."""
    total = torch.zeros_like(diffusion.mean, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for _ in range(draws):
        s = diffusion.path(diffusion.draw())[-1].double()
        total += s
        squares += s**2
    mean = total / draws
    variance = (squares - draws * mean**2).clamp_min(0) / max(1, draws - 1)
    return mean.T.cpu().numpy(), variance.sqrt().T.cpu().numpy()
