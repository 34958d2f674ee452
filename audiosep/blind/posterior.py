"""What the recording says about its sources once the mixing is known: exact smoothing, and bands that mean something.

X = mean + S A^T + E, the columns of S Gaussian processes, E white noise of variance v in every channel. The
least-squares unmixing Y = X pinv(A)^T keeps all that X holds about S: Y = S + E', E' of covariance N = v (A^T A)^-1
at each sample, correlated between the sources. Hence mean = K (K + N)^-1 Y over all sources at once, by conjugate
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from audiosep.blind import gp, toeplitz

Array = NDArray[np.float64]

ROUNDS = 5  # of refining the mixing and fitting the processes anew
SMALL_CHANGE, LARGE_CHANGE = 0.01, 0.1  # of the mixing in a round: the last one; one that asks for other kernels
CURVATURE_NUMBERS = 2_000_000  # of covariances held at once
# Noise is taken to be none unless it makes the sources likelier by more than this for each (in nats): white noise has a
# line at the best of all frequencies that gains the logarithm of their number.
EVIDENCE = 12.0
NOISE_THAT_COUNTS = 1e-3  # of a source's power: with less the mixing is left as the method found it


@dataclass(frozen=True)
class Posterior:
    """mean, std (T, n); mixing (m, n), refined or not; processes of the sources; noise variance per channel.

    noisy: Was noise found that counts? Without it std is far below the error, all of which is that of the mixing.
    rival: the number of the rival mixing taken, None for the first.
    """

    mean: Array
    std: Array
    mixing: Array
    processes: tuple[gp.Process, ...]
    noise: float
    refined: bool
    noisy: bool
    rival: int | None = None


def gaussian_posterior(
    X: Array, mixing: Array, *, rivals: Sequence[Array] = (), refine: bool = True, kernels: tuple[str, ...] = ()
) -> Posterior:
    """Fit processes and noise to the centred recording X (T, m) mixed by A (m, n), and smooth.

    rivals: other mixings (m, n), taken instead where the recording is likelier under their processes.
    refine: under noise, also take the mixing that makes the recording likeliest (separation that ignores noise is
    biased by it). Without noise, mean is the unmixed X.
    """
    fits = [(A, *noise_and_processes(X, A, kernels)) for A in (mixing, *rivals)]
    best = int(np.argmin([_misfit(X, *fit) for fit in fits])) if rivals else 0
    mixing, noise, processes = fits[best]
    refined = False
    for done in range(ROUNDS if refine else 0):
        if not _counts(noise, mixing, processes):
            break
        before, mixing, refined = mixing, refined_mixing(X, mixing, processes, noise), True
        change = np.linalg.norm(mixing - before) / np.linalg.norm(mixing)
        noise, processes = noise_and_processes(X, mixing, kernels, processes if done and change < LARGE_CHANGE else ())
        if change < SMALL_CHANGE:
            break
    mean, std = smooth(X, mixing, processes, noise)
    noisy = _counts(noise, mixing, processes)
    if noisy:
        passed = _passed(mean, np.diag(_unmixed_noise(mixing, noise)), processes)
        leaked = np.einsum("jtk,jkl,jtl->tj", passed, leakage(X, mixing, processes, noise), passed)
        std = np.sqrt(std**2 + leaked)
    return Posterior(mean, std, mixing, processes, noise, refined, noisy, best - 1 if best else None)


def _misfit(X: Array, mixing: Array, noise: float, processes: tuple[gp.Process, ...]) -> float:
    """Of the recording under a mixing and its processes: negative log-likelihood but for a constant."""
    return float(_Spectra.of(X, processes, noise).negative_log_likelihood(torch.from_numpy(mixing)))


def smooth(X: Array, mixing: Array, processes: tuple[gp.Process, ...], noise: float) -> tuple[Array, Array]:
    """Mean and standard deviation (T, n) of the sources of a centred recording (T, m), all else being known."""
    return joint_smooth(X @ np.linalg.pinv(mixing).T, _unmixed_noise(mixing, noise), processes)


def _unmixed_noise(mixing: Array, noise: float) -> Array:
    """Covariance (n, n) of the noise in the unmixed sources."""
    return np.asarray(noise * np.linalg.inv(mixing.T @ mixing), dtype=np.float64)


def _passed(S: Array, noise: Array, processes: tuple[gp.Process, ...]) -> Array:
    """What the smoothing of each source j leaves of source k in it, [j, t, k]: (n, T, n) of sources S (T, n)."""
    passed = np.empty((len(processes), *S.shape))
    for j, process in enumerate(processes):
        known = replace(process, noise=max(noise[j], gp.NOISE_FLOOR * process.variance))
        inverse = gp.inverse_of(known, len(S))
        passed[j] = S - known.noise * inverse.solve(S.T).T
        passed[j, :, j] = 0.0
    return passed


def _counts(noise: float, mixing: Array, processes: tuple[gp.Process, ...]) -> bool:
    shares = np.diag(_unmixed_noise(mixing, noise)) / [p.variance for p in processes]
    return bool(shares.max() > NOISE_THAT_COUNTS)


def noise_and_processes(
    X: Array, mixing: Array, kernels: tuple[str, ...] = (), near: tuple[gp.Process, ...] = ()
) -> tuple[float, tuple[gp.Process, ...]]:
    """The noise variance per channel, and a process per source given it; near: processes to begin at, if any."""
    names = kernels or gp.DEFAULT_KERNELS
    Y = X @ np.linalg.pinv(mixing).T
    gains = np.diag(_unmixed_noise(mixing, 1.0))
    starts = near or [None] * len(gains)
    samples, channels = X.shape
    spare = channels - mixing.shape[1]
    if spare > 0:
        noise = float(np.sum((X - Y @ mixing.T) ** 2)) / (samples * spare)
        return noise, tuple(gp.fit(y, names, noise=noise * g, near=p) for y, g, p in zip(Y.T, gains, starts))
    # A source that is white itself can't be told from noise: all of them together tell how much there is, if any. Of
    # levels about as likely the least is taken: the smoothest source's, while waves that are no draws look noisier.
    clean, free = ([gp.fit(y, names, noise=v, near=p) for y, p in zip(Y.T, starts)] for v in (0.0, None))
    found = [(sum(p.nll for p in clean), 0.0, tuple(clean))]
    surely = sum(min(p.nll, c.nll) for p, c in zip(free, clean)) + EVIDENCE * len(clean)  # each at its own best level
    for level in sorted(p.noise / gain for p, gain in zip(free, gains)):
        if found[-1][0] <= surely:
            break
        if (level * gains > NOISE_THAT_COUNTS * np.mean(Y**2, axis=0)).any():
            noisy = tuple(_at(level * gain, y, names, p, c) for gain, y, p, c in zip(gains, Y.T, free, clean))
            found.append((sum(p.nll for p in noisy), float(level), noisy))
            if len(found) > 2 and found[-1][0] > found[-2][0]:
                break
    enough = surely if found[-1][0] <= surely else min(nll for nll, *_ in found) + EVIDENCE * len(clean)
    return next((level, processes) for nll, level, processes in found if nll <= enough)


def _at(noise: float, y: Array, names: tuple[str, ...], free: gp.Process, clean: gp.Process) -> gp.Process:
    """The likeliest process of y (T,) with that noise, from a fit with any noise and one without."""
    if abs(free.noise - noise) <= 0.05 * noise:
        return free
    # Of a white source the one takes nearly all for noise.
    starts = (free, clean) if free.noise > free.variance else (free,)
    return min((gp.fit(y, names, noise=noise, near=p) for p in starts), key=lambda p: p.nll)


@dataclass(frozen=True)
class _Spectra:
    """The recording and its processes over frequencies f: what the likelihood of a mixing needs.

    recording (F, m) of the slightly tapered recording; powers (F, n) that such a recording of the processes is expected
    to have (not those of periodic processes, which leak otherwise: the estimating equations are unbiased);
    weights (F,) 2 for frequencies that stand for their negatives too; noise per channel.
    """

    recording: Tensor
    powers: Tensor
    weights: Tensor
    noise: float

    @classmethod
    def of(cls, X: Array, processes: tuple[gp.Process, ...], noise: float, fade: float = gp.FADE) -> _Spectra:
        recording = gp.tapered_spectrum(X, fade)
        powers = np.stack([gp.expected_power(p.column(len(X)), fade) for p in processes], axis=1)
        weights = np.full(len(recording), 2.0)
        weights[0] = 1.0
        floor = max(noise, gp.NOISE_FLOOR * float(np.mean(X**2)))
        return cls(torch.from_numpy(recording), torch.from_numpy(powers), torch.from_numpy(weights), floor)

    def covariance(self, A: Tensor) -> Tensor:
        """(F, m, m) of the recording, for a mixing A (m, n)."""
        eye = torch.eye(len(A), dtype=A.dtype)
        return torch.einsum("mj,fj,kj->fmk", A, self.powers, A) + self.noise * eye

    def negative_log_likelihood(self, A: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(self.covariance(A))
        real = torch.view_as_real(self.recording)  # (F, m, 2): the covariance is real
        white = torch.linalg.solve_triangular(factor, real, upper=False)
        logdet = 2 * torch.diagonal(factor, dim1=-2, dim2=-1).log().sum(-1)
        return 0.5 * (self.weights * (logdet + white.square().sum((-2, -1)))).sum()

    def curvature(self, mixing: Array) -> Array:
        """Second derivatives (m, n, m, n) of the negative log-likelihood by the mixing A (m, n).

        At a frequency with C the covariance and Q = C^-1, W = Q Re(x x^H) Q, G = Q A, H = A^T G, U = W A, V = A^T U:

            d2/dA_ak dA_bl = [k = l] p_k (Q - W)_ab
                             + p_k p_l (U_al G_bk + G_al U_bk - G_al G_bk + Q_ab (V - H)_kl + W_ab H_kl)

        summed with the weights. In stretches of frequencies, as (F, m, m) of a long recording may not fit.
        """
        channels, sources = mixing.shape
        total = np.zeros((sources, sources, channels, channels))  # k, l, a, b
        stretch = max(1, CURVATURE_NUMBERS // channels**2)
        for begin in range(0, len(self.weights), stretch):
            part = slice(begin, begin + stretch)
            x, powers = self.recording[part].numpy(), self.powers[part].numpy()
            weights = self.weights[part].numpy()
            Q = np.linalg.inv(np.einsum("mj,fj,kj->fmk", mixing, powers, mixing) + self.noise * np.eye(channels))
            y = np.einsum("fmk,fk->fm", Q, x)
            W = (y[:, :, None] * y[:, None].conj()).real
            G, U = Q @ mixing, W @ mixing
            H, V = mixing.T @ G, mixing.T @ U
            pairs = weights[:, None, None] * powers[:, :, None] * powers[:, None]
            diagonal = np.tensordot(weights[:, None] * powers, Q - W, (0, 0))  # (n, m, m)
            total[np.arange(sources), np.arange(sources)] += diagonal
            total += np.tensordot(pairs * (V - H), Q, (0, 0)) + np.tensordot(pairs * H, W, (0, 0))
            # Products over one source at a channel and the other at the other: (F, m l), (F, m k).
            p_G, p_U = powers[:, None] * G, powers[:, None] * U
            crossed = np.tensordot(weights[:, None, None] * (p_U - p_G), p_G, (0, 0))  # a, l, b, k
            crossed += np.tensordot(weights[:, None, None] * p_G, p_U, (0, 0))
            total += crossed.transpose(3, 1, 0, 2)
        return total.transpose(2, 0, 3, 1)


def refined_mixing(X: Array, mixing: Array, processes: tuple[gp.Process, ...], noise: float) -> Array:
    """The mixing (m, n) of maximal likelihood for known processes and noise, from a first guess, at its column norms.

    Few periods say little about a process's variance, so that the columns' scale would drift.
    """
    spectra = _Spectra.of(X, processes, noise)

    def loss(values: Array) -> tuple[float, Array]:
        A = torch.from_numpy(values.reshape(mixing.shape)).requires_grad_()
        with torch.enable_grad():
            nll = spectra.negative_log_likelihood(A)
        (gradient,) = torch.autograd.grad(nll, A)
        return float(nll.detach()), gradient.numpy().ravel()

    found = minimize(loss, mixing.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 100})
    refined = found.x.reshape(mixing.shape)
    return refined * (np.linalg.norm(mixing, axis=0) / np.linalg.norm(refined, axis=0))


def leakage(X: Array, mixing: Array, processes: tuple[gp.Process, ...], noise: float) -> Array:
    """How uncertain the mixing leaves each source: covariances (n, n, n) of what others leak into it.

    A mixing off by D leaves R = -pinv(A) D of source k in source j at [j, k]; the first axis is j. D has the inverse of
    the likelihood's curvature as covariance. A source's own scale, [j, j], is no leak.
    """
    channels, sources = mixing.shape
    curvature = _Spectra.of(X, processes, noise, fade=1.0).curvature(mixing)
    covariance = _positive_inverse(curvature.reshape(mixing.size, -1)).reshape(channels, sources, channels, sources)
    unmixing = np.linalg.pinv(mixing)
    leaks = np.einsum("ja,akbl,jb->jkl", unmixing, covariance, unmixing)
    for j in range(sources):
        leaks[j, j, :] = leaks[j, :, j] = 0.0
    return leaks


def _positive_inverse(curvature: Array) -> Array:
    """Inverse over the directions in which the likelihood has a maximum."""
    values, axes = np.linalg.eigh(curvature)
    kept = values > 1e-9 * values[-1]
    return (axes[:, kept] / values[kept]) @ axes[:, kept].T


def joint_smooth(Y: Array, noise: Array, processes: tuple[gp.Process, ...]) -> tuple[Array, Array]:
    """Posterior mean and standard deviation (T, n) of processes S given Y = S + white noise of covariance (n, n).

    The mean is exact. The deviation is that of each source by itself, exact at the edges too, narrowed by what the
    noise shared with the other sources tells inside. A source's scale and offset can't be known, and errors of them are
    none: the deviation is that of what is left besides them (`_besides`).
    """
    samples = len(Y)
    floor = np.diag([gp.NOISE_FLOOR * p.variance for p in processes])
    columns = np.stack([p.column(samples) for p in processes])
    if noise.max() > 0:
        noise = noise + floor
        mean = Y - (noise @ _solve(columns, noise, Y.T)).T  # K C^-1 Y = Y - N C^-1 Y
    else:
        noise, mean = floor, Y
    alone = np.stack([_besides(replace(p, noise=v), m) for p, v, m in zip(processes, np.diag(noise), mean.T)], axis=1)
    spectra = np.stack([gp.expected_power(c, fade=1.0) for c in columns])  # (n, F)
    return mean, alone * _narrowing(spectra, noise, samples)


def _besides(process: gp.Process, mean: Array) -> Array:
    """Posterior standard deviation (T,) of a process seen in its noise, but for the scale and offset of its mean (T,).

    The covariance is P = v I - v^2 C^-1, C of the noisy process. With orthonormal u of the offset and the centred mean
    the errors left are (I - U U^T) e, of variances P_tt - 2 (P U U^T)_tt + (U U^T P U U^T)_tt.
    """
    inverse, noise = gp.inverse_of(process, len(mean)), process.noise
    variance = noise - noise**2 * inverse.diagonal
    centred = mean - mean.mean()
    U = np.stack([np.full_like(mean, len(mean) ** -0.5), centred / max(float(np.linalg.norm(centred)), 1e-300)])
    PU = noise * (U - noise * inverse.solve(U))  # (2, T)
    variance += (U * ((PU @ U.T) @ U)).sum(0) - 2 * (U * PU).sum(0)
    return np.sqrt(np.maximum(variance, 0.0))


def _narrowing(spectra: Array, noise: Array, samples: int) -> Array:
    """Standard deviation from all sources over that from one alone, for periodic processes: (n,)."""
    weights = np.full(spectra.shape[1], 2.0)
    weights[0] = 1.0
    if samples % 2 == 0:
        weights[-1] = 1.0
    blocks = np.einsum("jf,jk->fjk", spectra, np.eye(len(noise)))
    joint = blocks - blocks @ np.linalg.solve(blocks + noise, blocks)
    own = np.diag(noise)[:, None]
    alone = spectra * own / (spectra + own)
    variances = np.einsum("f,fjj->j", weights, joint), alone @ weights
    return np.sqrt(np.minimum(variances[0] / np.maximum(variances[1], 1e-300), 1.0))


def _chan(columns: Array) -> Array:
    """Eigenvalues of the circulants nearest to the Toeplitz matrices: (n, T) -> (n, F)."""
    samples = columns.shape[1]
    k = np.arange(samples)
    return np.fft.rfft(((samples - k) * columns + k * np.roll(columns[:, ::-1], 1, axis=1)) / samples).real


def _solve(columns: Array, noise: Array, Y: Array, tolerance: float = 1e-10, max_steps: int = 500) -> Array:
    """(blockdiag(Toeplitz(columns)) + noise x I)^-1 Y, for Y (n, T), by preconditioned conjugate gradients."""
    samples = Y.shape[1]
    blocks = np.linalg.inv(
        np.einsum("jf,jk->fjk", np.maximum(_chan(columns), 0.0), np.eye(len(columns))) + noise
    )  # (F, n, n)

    def condition(v: Array) -> Array:
        return np.fft.irfft(np.einsum("fjk,kf->jf", blocks, np.fft.rfft(v)), samples)

    def multiply(v: Array) -> Array:
        return np.stack([toeplitz.multiply(c, row) for c, row in zip(columns, v)]) + noise @ v

    x, left = np.zeros_like(Y), Y.copy()
    direction = condition(left)
    power = float(np.vdot(left, direction))
    for _ in range(max_steps):
        image = multiply(direction)
        step = power / float(np.vdot(direction, image))
        x += step * direction
        left -= step * image
        if np.linalg.norm(left) <= tolerance * np.linalg.norm(Y):
            break
        conditioned = condition(left)
        power, before = float(np.vdot(left, conditioned)), power
        direction = conditioned + power / before * direction
    return x
