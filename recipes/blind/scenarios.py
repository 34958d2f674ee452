"""Known sources and mixings to score blind separation on: `make(name, seed, samples)`.

Each draw is X (T, m) as recorded, S (T, n) the sources at zero mean and unit variance, A (m, n) the
mixing matrix or None where the mixing is nonlinear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter, sawtooth

Array = NDArray[np.float64]
Rng = np.random.Generator


class Draw(NamedTuple):
    X: Array
    S: Array
    A: Array | None


def standard(S: Array) -> Array:
    return (S - S.mean(0)) / S.std(0)


def random_mixing(rng: Rng, m: int, n: int, max_condition: float = 8.0) -> Array:
    """Unit columns, drawn again until the condition number is tolerable."""
    while True:
        A = rng.standard_normal((m, n))
        A /= np.linalg.norm(A, axis=0)
        if np.linalg.cond(A) < max_condition:
            return A


# Sources (T, 3)


def hetero(rng: Rng, T: int) -> Array:
    """A slow sine, a sawtooth, an amplitude-modulated tone."""
    t = np.linspace(0, 1, T)
    p = rng.uniform(0, 2 * np.pi, 4)
    tone = np.sin(2 * np.pi * 31 * t + p[2]) * (1 + 0.8 * np.sin(2 * np.pi * 2 * t + p[3]))
    return standard(np.c_[np.sin(2 * np.pi * 3 * t + p[0]), sawtooth(2 * np.pi * 7 * t + p[1]), tone])


def hetero_noise(rng: Rng, T: int) -> Array:
    """A sine, a triangle, autoregressive noise of changing level."""
    t = np.linspace(0, 1, T)
    p = rng.uniform(0, 2 * np.pi, 3)
    noise = lfilter([1.0], [1.0, -0.5], rng.standard_normal(T)) * (0.2 + np.sin(2 * np.pi * 2 * t + p[2]) ** 2)
    return standard(np.c_[np.sin(2 * np.pi * 5 * t + p[0]), sawtooth(2 * np.pi * 9 * t + p[1], 0.5), noise])


def gp(rng: Rng, T: int, length_scales: tuple[float, ...] = (4.0, 12.0, 40.0)) -> Array:
    """Gaussian processes with RBF kernels: white noise through exp(-d^2 / l^2) has that covariance."""
    sources = []
    for scale in length_scales:
        reach = np.arange(-int(6 * scale), int(6 * scale) + 1)
        kernel = np.exp(-(reach**2) / scale**2)
        sources.append(np.convolve(rng.standard_normal(T + len(kernel) - 1), kernel, "valid"))
    return standard(np.array(sources).T)


def gauss_ar(rng: Rng, T: int) -> Array:
    """Gaussian, second-order autoregressive, resonances far apart."""
    sources = []
    for radius, frequency in ((0.95, 0.02), (0.9, 0.10), (0.85, 0.25)):
        a = [1, -2 * radius * np.cos(2 * np.pi * frequency), radius * radius]
        sources.append(lfilter([1], a, rng.standard_normal(T + 500))[500:])
    return standard(np.array(sources).T)


def gauss_close(rng: Rng, T: int) -> Array:
    """Gaussian, first-order autoregressive, poles close together."""
    return standard(np.array([lfilter([1], [1, -a], rng.standard_normal(T + 500))[500:] for a in (0.9, 0.7, 0.4)]).T)


def heavy_iid(rng: Rng, T: int) -> Array:
    """Laplace, Student-t and impulsive noise: white, told apart by their distribution only."""
    laplace, student = rng.laplace(size=T), rng.standard_t(3, size=T)
    impulses = rng.standard_normal(T) * (rng.random(T) < 0.1) + 0.05 * rng.standard_normal(T)
    return standard(np.c_[laplace, student, impulses])


def heavy_ar(rng: Rng, T: int) -> Array:
    """The same noises through one filter: equal spectra, heavy-tailed innovations."""
    return standard(np.array([lfilter([1], [1, -0.8], e) for e in heavy_iid(rng, T).T]).T)


def nonstat(rng: Rng, T: int) -> Array:
    """White Gaussian noise of slowly changing level."""
    sources = []
    for _ in range(3):
        level = np.repeat(rng.standard_normal(12), int(np.ceil(T / 12)))[:T]
        level = np.convolve(level, np.hanning(T // 20), "same") / (T // 20 / 2)
        sources.append(np.exp(1.2 * level) * rng.standard_normal(T))
    return standard(np.array(sources).T)


# Mixings


def mlp(rng: Rng, S: Array, strength: float) -> Array:
    """A2 [(1 - strength) A1 s + strength tanh(2 A1 s)]."""
    n = S.shape[1]
    inner, outer = random_mixing(rng, n, n, 4), random_mixing(rng, n, n, 4)
    H = S @ inner.T
    return ((1 - strength) * H + strength * np.tanh(2 * H)) @ outer.T


def pnl(rng: Rng, S: Array) -> Array:
    """A linear mixture through another nonlinearity per channel."""
    n = S.shape[1]
    H = S @ random_mixing(rng, n, n, 5).T
    return np.c_[np.tanh(H[:, 0]), H[:, 1] + 0.3 * H[:, 1] ** 3, np.tanh(1.5 * H[:, 2]) + 0.1 * H[:, 2]]


Source = Callable[[Rng, int], Array]
Scenario = Callable[[Rng, int], Draw]


def linear(source: Source, channels: int | None = None, snr: float | None = None) -> Scenario:
    """Random mixing matrix; snr in dB adds white noise of equal power to all channels."""

    def draw(rng: Rng, T: int) -> Draw:
        S = source(rng, T)
        A = random_mixing(rng, channels or S.shape[1], S.shape[1])
        X = S @ A.T
        if snr is not None:
            X = X + rng.standard_normal(X.shape) * X.std() * 10 ** (-snr / 20)
        return Draw(X, S, A)

    return draw


def nonlinear(source: Source, mixing: Callable[[Rng, Array], Array]) -> Scenario:
    def draw(rng: Rng, T: int) -> Draw:
        S = source(rng, T)
        return Draw(mixing(rng, S), S, None)

    return draw


SCENARIOS: dict[str, Scenario] = {
    "hetero": linear(hetero),
    "hetero_noise": linear(hetero_noise),
    "hetero_20dB": linear(hetero, snr=20),
    "gp_rbf": linear(gp),
    "gauss_ar": linear(gauss_ar),
    "gauss_close": linear(gauss_close),
    "heavy_iid": linear(heavy_iid),
    "heavy_ar": linear(heavy_ar),
    "nonstat": linear(nonstat),
    "gp_5x3_10dB": linear(gp, channels=5, snr=10),
    "pnl": nonlinear(hetero, pnl),
    "mlp_mild": nonlinear(hetero, lambda rng, S: mlp(rng, S, 0.3)),
    "mlp_strong": nonlinear(hetero, lambda rng, S: mlp(rng, S, 0.7)),
    "mlp_gp": nonlinear(gp, lambda rng, S: mlp(rng, S, 0.5)),
}


def make(name: str, seed: int = 0, samples: int = 1000) -> Draw:
    """One draw of a scenario: the same seed gives the same recording."""
    return SCENARIOS[name](np.random.default_rng(1000 + seed), samples)
