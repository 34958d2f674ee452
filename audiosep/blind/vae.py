"""The loop that the variational separators share: they differ in the prior of a source's trajectory.

z (T, p) is the whitened recording. The encoder gives the mean of q(s | z) = N(mu_r, q_j), its variance q_j per source;
the decoder maps a draw back. Minimised by Adam (AR-Flow VAE, arXiv:2603.14441, Algorithm 1):

    J = mean (z - zhat)^2 + beta / (p T) (log q(S | z) - log p(S))

beta / 2 is thus the variance of the observation noise. It falls from `warm` * beta over the first half: while much of z
may be noise, the sources can still turn.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from audiosep.blind import bent, posterior
from audiosep.blind.base import (
    Array,
    InstantaneousSeparator,
    Whitening,
    choose,
    order_and_signs,
    positive,
    rank,
    whiten,
)
from audiosep.blind.bent import Map
from audiosep.blind.classical import SOBI, FastICA
from audiosep.blind.one_cycle import OneCycle
from audiosep.errors import UsageError

INITS = ("auto", "sobi", "fastica", "random")
PILOT_STEPS = 100  # of the prior alone, to compare the starts
UNBANDED = (
    "sources_std_ is far too small to be the error: no noise was found that can be told from the sources, or the "
    "mixing is bent, and the error of the unmixing is not in it (more channels than sources would tell noise)"
)
REFINED_TOL = 0.5  # as `tol`, where the last step refines the mixing itself and needs only a start


class SourcePrior(Protocol):
    """What a prior of n sources must offer besides being a torch module: log_prob is (..., n, T) -> (..., n)."""

    def start_from(self, s: Tensor) -> None: ...
    def log_prob(self, s: Tensor) -> Tensor: ...
    def learned(self) -> dict[str, Tensor]: ...
    def parameters(self) -> Any: ...


class LearnedSeparator(InstantaneousSeparator):
    """What StrADiff and the variational separators share: starts, the device, the final posterior."""

    mixing: str
    init: str
    posterior: str
    learning_rate: float
    mlp_units: int
    max_iter: int
    tol: float
    device: str

    # Told of each iteration: done, total, message. No parameter: clones do not report.
    progress: Callable[[int, int | None, str], None] | None = None

    sources_std_: Array
    loss_curve_: Array
    traces_: dict[str, Array]
    _whitening: Whitening
    _encoder: Map | None = None
    _decoder: Map
    _refined: bool  # Is the mixing no more the native one?
    processes_: tuple[Any, ...] | None
    bands_hold_: bool  # Does sources_std_ say how large the error is?
    elbo_: float
    noise_: float

    def _check_options(self) -> None:
        choose("mixing", self.mixing, ("linear", "mlp"))
        choose("init", self.init, INITS)
        choose("posterior", self.posterior, ("gp", "native"))
        positive("max_iter", self.max_iter, whole=True)
        positive("tol", self.tol, zero=True)
        positive("learning_rate", self.learning_rate)
        positive("mlp_units", self.mlp_units, whole=True)

    def _torch_device(self) -> torch.device:
        wanted = str(self.device)
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted.partition(":")[0] not in ("cpu", "cuda"):
            raise UsageError(f"device is auto, cpu, cuda or cuda:N, got {self.device!r}: double precision is needed")
        if wanted.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"device={self.device!r}, but torch finds no CUDA device")
        return torch.device(wanted)

    def _tell(self, done: int, loss: Tensor) -> None:
        if self.progress is not None:
            self.progress(done, self._iterations(), f"loss {float(loss.detach()):.4g}")

    def _iterations(self) -> int:
        """Of all starts together."""
        return self.max_iter

    def _starts(self) -> tuple[str, ...]:
        """What init="auto" compares. Priors that know spectra only have no use for FastICA's start."""
        return ("sobi",)

    def _rotations(self, Z: Array, rng: np.random.RandomState) -> dict[str, Array]:
        """Starting rotations (n, n) of the whitened recording, by name."""
        names = self._starts() if self.init == "auto" else (self.init,)
        return {name: _rotation(name, Z, rng) for name in names}

    def _refines(self, z: Tensor) -> bool:
        """Is a bent unmixing refined before the final posterior? Only of as many channels z (T, n) as sources."""
        return self.posterior == "gp" and self.mixing == "mlp" and z.shape[1] == self.n_sources_

    def _refine_bent(self, encoder: Map, z: Tensor) -> None:
        """Take the likeliest unmixing of z (T, n), from another as a start, and the decoder that belongs to it."""
        self._encoder = bent.refined(encoder, z)
        self._decoder = bent.fitted(self._decoder, self._encoder(z), z)
        self._refined = True

    def _native_mixing(self, X: Array, native: Array) -> Array:
        """The mixing (m, n) of the native sources (T, n); the best linear one for "mlp"."""
        if self.mixing == "linear":
            return self._whitening.inverse @ self._decoder.weight.detach().numpy()
        return np.linalg.lstsq(native - native.mean(0), X - self.mean_, rcond=None)[0].T

    def _set_sources(self, X: Array, sources: Array, std: Array, mixing: Array) -> None:
        """Normalise, order and sign the native sources (T, n) with mixing (m, n); then the final posterior."""
        check_finite(sources)
        scale = sources.std(0)
        order, signs = order_and_signs(mixing * scale)
        self._order, self._signs, self._scale = order, signs, scale[order]
        self.mixing_ = (mixing * scale)[:, order] * signs
        self.sources_ = self._normalised(sources)
        self.sources_std_ = std[:, order] / self._scale
        self.processes_, self.noise_, self.bands_hold_ = None, float("nan"), False
        self._rival: int | None = None
        if self.posterior == "gp":
            self._smooth_fitted(X - self.mean_)

    def _normalised(self, sources: Array) -> Array:
        """Native sources (T, n) in the order, scale and sign of sources_."""
        return sources[:, self._order] / self._scale * self._signs

    def _smooth_fitted(self, X: Array) -> None:
        """Replace sources_ and sources_std_ by the exact posterior of Gaussian processes fitted to the sources."""
        if self.mixing == "linear":
            found = posterior.gaussian_posterior(X, self.mixing_, rivals=self._rivals())
            self._refined, self._rival = found.refined, found.rival
            self.mixing_ = found.mixing
        else:
            # The bent mixing is undone already; its best linear stand-in says how noise comes through.
            square = np.linalg.qr(self.mixing_)[1]
            found = posterior.gaussian_posterior(self.sources_ @ square.T, square, refine=False)
        self.processes_, self.noise_ = found.processes, found.noise
        self.sources_, self.sources_std_ = found.mean, found.std
        self.bands_hold_ = found.noisy and self.mixing == "linear"
        if not self.bands_hold_:
            warnings.warn(UNBANDED, stacklevel=4)

    def _rivals(self) -> list[Array]:
        """Mixings (m, n) that the final posterior weighs against mixing_."""
        return []

    def _smoothed(self, X: Array, native: Array) -> tuple[Array, Array]:
        """Mean and deviation (T, n) of the sources of another centred recording."""
        assert self.processes_ is not None
        if self.mixing == "linear":
            return posterior.smooth(X, self.mixing_, self.processes_, self.noise_)
        square = np.linalg.qr(self.mixing_)[1]
        return posterior.smooth(native @ square.T, square, self.processes_, self.noise_)

    def _check_convergence(self, turn: Turn) -> None:
        """Warn if the sources still turned, in the second half, by more than `tol` of what the rates allowed."""
        tol = max(self.tol, REFINED_TOL) if self._refined else self.tol
        if turn.share > tol:
            warnings.warn(
                f"{type(self).__name__} did not converge in {self.n_iter_} iterations: a source changed by "
                f"{100 * turn.angle:.2g} % in the second half of them, {100 * turn.share:.0f} % of what the learning "
                f"rate allows (allowed are {100 * tol:.2g} %); raise max_iter",
                ConvergenceWarning,
                stacklevel=4,
            )


class Turn:
    """How far the sources turn in the second half of the iterations.

    angle: the largest of a source's (rad), 0 if only its scale, offset and sign changed. share: the angle over the sum
    of the learning rates, the way that Adam goes where all gradients agree. Where the optimum is reached, gradients
    contradict each other, and the share is small however few or small the steps were. The loss can't tell: it is that
    of one draw, and hardly changes once the learning rate has fallen.
    """

    def __init__(self, iterations: int) -> None:
        self._half = iterations // 2
        self._allowed = 0.0
        self.angle = 0.0

    def watch(self, step: int, rate: float, sources: Callable[[], Tensor]) -> None:
        """Before each iteration: its learning rate, and the sources (T, n) as they are."""
        if step == self._half:
            self._before = _unit(sources())
        if step >= self._half:
            self._allowed += rate

    def end(self, sources: Tensor) -> None:
        after = _unit(sources)
        chord = torch.minimum((after - self._before).norm(dim=0), (after + self._before).norm(dim=0))
        self.angle = float((2 * torch.asin(chord / 2)).max())

    @property
    def share(self) -> float:
        return self.angle / self._allowed


def _unit(sources: Tensor) -> Tensor:
    centred = (sources - sources.mean(0)).detach().double()
    return centred / centred.norm(dim=0)


@dataclass
class _Fit:
    """What is learned from one start, and how it went."""

    encoder: Map
    decoder: Map
    prior: SourcePrior
    log_q: nn.Parameter  # (n,)
    init: str
    beta: float
    warm: float
    elbo: float = float("nan")
    curve: Array = field(default_factory=lambda: np.empty(0))
    traces: dict[str, Array] = field(default_factory=dict)
    turn: Turn = field(default_factory=lambda: Turn(1))
    begun: Array = field(default_factory=lambda: np.empty(0))  # the rotation (n, p) that the encoder began as

    def entropy(self, samples: int) -> Tensor:
        """Of q over that many samples."""
        return 0.5 * samples * (self.log_q + math.log(2 * math.pi * math.e)).sum()


class VariationalSeparator(LearnedSeparator):
    """A separator that learns an encoder, a decoder and priors of the sources together. A subclass gives `_prior`."""

    beta: float | None
    warm: float | None
    block: int | None
    n_init: int = 1  # a parameter of those whose elbo_ compares starts
    fits_random_starts = True  # Is the prior first fitted to the sources of a random rotation, which are much alike?

    def _check_options(self) -> None:
        super()._check_options()
        positive("n_init", self.n_init, whole=True)
        beta, warm = self._levels()
        positive("beta", beta)
        positive("warm", warm)
        check_block(self.block)

    def _prior(self, sources: int) -> SourcePrior:
        raise NotImplementedError

    def _separate(self, X: Array, rng: np.random.RandomState) -> None:
        self._check_options()
        device = self._torch_device()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(rng.randint(2**31)))
            self._train(X, rng, device)

    def _train(self, X: Array, rng: np.random.RandomState, device: torch.device) -> None:
        sources = self.n_sources_
        kept = X.shape[1] if self.mixing == "mlp" else sources
        whitening = whiten_safely(X, kept)
        Z = whitening(X)
        z = torch.from_numpy(Z).to(device)
        fits = [self._fit_from(start, z, Z, rng) for start in range(self.n_init)]
        best = max(fits, key=lambda f: f.elbo if math.isfinite(f.elbo) else -math.inf)
        self.elbo_, self.init_, self.loss_curve_, self.traces_ = best.elbo, best.init, best.curve, best.traces
        self._begun = best.begun
        self.n_iter_ = self.max_iter
        check_finite(self.loss_curve_)
        self._finish(X, z, whitening, best)
        self._check_convergence(best.turn)

    def _iterations(self) -> int:
        return self.max_iter * self.n_init

    def _fit_from(self, start: int, z: Tensor, Z: Array, rng: np.random.RandomState) -> _Fit:
        prior, rotation, name = self._best_start(start, z, Z, rng)
        beta, warm = self._levels()
        with double_precision():
            encoder = Map(rotation.to(z.device), self.mixing, self.mlp_units).to(z.device)
            decoder = Map(rotation.T.to(z.device), self.mixing, self.mlp_units).to(z.device)
        log_q = torch.full((self.n_sources_,), math.log(beta / 2), dtype=torch.float64, device=z.device)
        fit = _Fit(encoder, decoder, prior, nn.Parameter(log_q), name, beta, warm)
        fit.begun = rotation.numpy()
        self._optimise(z, fit, start)
        fit.elbo = self._elbo(z, fit)
        return fit

    def _levels(self) -> tuple[Any, Any]:
        """beta, and how many times it begins at."""
        return self.beta, self.warm

    def _best_start(
        self, number: int, z: Tensor, Z: Array, rng: np.random.RandomState
    ) -> tuple[SourcePrior, Tensor, str]:
        """The prior that, fitted to the sources of a starting rotation, is likeliest; the rotation; its name.

        All rotations of white data have the same volume, so that the likelihoods compare.
        """
        best: tuple[float, str, SourcePrior, Tensor] | None = None
        seed = int(torch.randint(2**31, ()))
        white = Z[:, : self.n_sources_]
        starts = {"random": _rotation("random", white, rng)} if number else self._rotations(white, rng)
        for name, rotation in starts.items():
            torch.manual_seed(seed)
            weight = torch.zeros(self.n_sources_, Z.shape[1], dtype=torch.float64)
            weight[:, : self.n_sources_] = torch.from_numpy(rotation)
            with double_precision():
                prior = self._prior(self.n_sources_)
            if isinstance(prior, nn.Module):
                prior.to(z.device)
            s = (self._block(z) @ weight.to(z).T).T
            likelihood = -math.inf
            if name != "random" or self.fits_random_starts:
                prior.start_from(s)
                # Sharp priors would hold the bent sources of a linear start as they are.
                if self.mixing == "linear" or len(starts) > 1:
                    likelihood = _fit_prior(prior, s)
            if best is None or likelihood > best[0]:
                best = likelihood, name, prior, weight
        assert best is not None
        return best[2], best[3], best[1]

    def _optimise(self, z: Tensor, fit: _Fit, start: int) -> None:
        rates = [self.learning_rate, self.learning_rate * (0.3 if self.mixing == "mlp" else 1.0)]
        nets = [*fit.encoder.parameters(), *fit.decoder.parameters()]
        groups = zip(([fit.log_q, *fit.prior.parameters()], nets), rates)
        optimiser = OneCycle(groups, self.max_iter, clip=10.0)
        curve, traces = [], []
        fit.turn = Turn(self.max_iter)
        for step in range(self.max_iter):
            fit.turn.watch(step, optimiser.rate, lambda: fit.encoder(z))
            loss = self._loss(z, fit, self._beta_at(step, fit))
            optimiser.step(loss)
            curve.append(loss.detach())
            self._tell(start * self.max_iter + step + 1, loss)
            learned = {**fit.prior.learned(), "q_": fit.log_q.exp()}
            traces.append({k: v.detach().clone() for k, v in learned.items()})
        fit.turn.end(fit.encoder(z))
        fit.curve = torch.stack(curve).cpu().numpy()
        fit.traces = {k: torch.stack([t[k] for t in traces]).cpu().numpy() for k in traces[0]}

    def _beta_at(self, step: int, fit: _Fit) -> float:
        progress = min(1.0, 2 * step / self.max_iter)
        return fit.beta * fit.warm ** (1 - progress)

    def _loss(self, z: Tensor, fit: _Fit, beta: float) -> Tensor:
        """J of a stretch of z, over a draw and its mirror image about the mean: the noise of odd order cancels."""
        block = self._block(z)
        mean = fit.encoder(block)
        noise = torch.randn_like(mean) * (0.5 * fit.log_q).exp()
        draws = torch.stack([mean + noise, mean - noise])  # (2, T, n)
        misfit = (block - fit.decoder(draws)).square().mean()
        likelihood = fit.prior.log_prob(draws.transpose(1, 2)).sum() / len(draws)
        return misfit - beta / block.numel() * (fit.entropy(len(block)) + likelihood)

    def _block(self, z: Tensor) -> Tensor:
        """A stretch of at most `block` samples, anywhere: priors that forget are learned from parts of a recording."""
        return z[random_stretch(len(z), self.block)]

    @torch.no_grad()
    def _finish(self, X: Array, z: Tensor, whitening: Whitening, fit: _Fit) -> None:
        self.mean_ = whitening.mean
        self._whitening = whitening
        self._encoder, self._decoder = fit.encoder.cpu(), fit.decoder.cpu()
        self._refined = False
        if self._refines(z):
            self._refine_bent(self._encoder, z.cpu())
        native = self._encoder(z.cpu()).numpy()
        mixing = self._native_mixing(X, native)
        std = np.broadcast_to((0.5 * fit.log_q).exp().cpu().numpy(), native.shape)
        self._set_sources(X, native, std, mixing)
        order = torch.from_numpy(self._order)
        for name, value in fit.prior.learned().items():
            setattr(self, name, value.detach().cpu()[order].numpy())
        self.traces_ = {name: trace[:, self._order] for name, trace in self.traces_.items()}
        if self.mixing == "linear":
            weight = self._encoder.weight.numpy()[self._order] / self._scale[:, None] * self._signs[:, None]
            self.components_ = weight @ whitening.matrix

    @torch.no_grad()
    def _elbo(self, z: Tensor, fit: _Fit, draws: int = 8) -> float:
        """The evidence lower bound of the whitened recording, with observation noise of variance beta / 2, in nats."""
        total = 0.0
        mean = fit.encoder(z)
        for _ in range(draws):
            s = mean + torch.randn_like(mean) * (0.5 * fit.log_q).exp()
            misfit = (z - fit.decoder(s)).square().sum() / fit.beta + 0.5 * z.numel() * math.log(math.pi * fit.beta)
            total += float(fit.prior.log_prob(s.T).sum() - misfit)
        return total / draws + float(fit.entropy(len(z)))

    def transform(self, X: ArrayLike) -> Array:
        """The sources (n_samples, n_sources) of a recording that was mixed alike.

        With posterior="gp" a source at one time depends on the samples around it: X is one stretch of time.
        """
        check_is_fitted(self)
        recording = self._checked(X, reset=False)
        with torch.no_grad():
            assert self._encoder is not None
            encoded = self._encoder(torch.from_numpy(self._whitening(recording))).numpy()
        native = self._normalised(encoded)
        return native if self.processes_ is None else self._smoothed(recording - self.mean_, native)[0]

    def inverse_transform(self, sources: ArrayLike) -> Array:
        """The recording (n_samples, n_channels) that these sources mix to."""
        check_is_fitted(self)
        if self.mixing == "linear":
            return super().inverse_transform(sources)
        back = np.argsort(self._order)
        native = (self._checked_sources(sources) * self._signs * self._scale)[:, back]
        with torch.no_grad():
            white = self._decoder(torch.from_numpy(native)).numpy()
        return white @ self._whitening.inverse.T + self.mean_


def check_block(block: Any) -> None:
    if block is not None and (not isinstance(block, int | np.integer) or block < 2):
        raise UsageError(f"block is a number of samples or None, got {block!r}")


def random_stretch(samples: int, block: int | None) -> slice:
    """`block` of so many samples, anywhere; all of them if they are no more."""
    if block is None or samples <= block:
        return slice(0, samples)
    begin = int(torch.randint(samples - block + 1, ()))
    return slice(begin, begin + block)


def check_finite(values: Array) -> None:
    if not np.isfinite(values).all():
        raise UsageError("the fit diverged: lower learning_rate")


def _rotation(name: str, Z: Array, rng: np.random.RandomState) -> Array:
    size = Z.shape[1]
    if name == "random":
        return np.linalg.qr(rng.standard_normal((size, size)))[0]
    if size == 1:
        return np.eye(1)
    start = SOBI(size) if name == "sobi" else FastICA(size, tol=1e-5, random_state=rng)
    return start.unmix(Z, rng)


def whiten_safely(X: Array, kept: int) -> Whitening:
    """Without the directions in which the recording is flat: they hold nothing to reconstruct."""
    return whiten(X, min(kept, rank(X)))


def _fit_prior(prior: SourcePrior, s: Tensor) -> float:
    """Fit the prior alone to fixed sources (n, T); its log-likelihood per sample."""
    optimiser = torch.optim.Adam(prior.parameters(), lr=0.02, fused=True)
    value = torch.zeros(())
    for _ in range(PILOT_STEPS):
        value = -prior.log_prob(s).sum() / s.shape[1]
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    return -float(value.detach())


class double_precision:
    """New tensors in double precision inside the block."""

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)
