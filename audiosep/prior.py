"""Priors: what one class of sources sounds like, as the denoiser E[x_0 | x_t].

A prior answers at any noise level of any schedule: with s = sigma / alpha the observation x_t / alpha is the clean
signal in white noise of standard deviation s, whatever the schedule that it came from.

Three parameterisations of a backbone F:

- ``"eps"``: F(x_t, t) estimates the noise, so E[x_0 | x_t] = (x_t - sigma_t F) / alpha_t (Ho et al. 2020).
- ``"edm"``: E[x_0 | x] = c_skip x + c_out F(c_in x, t) with c_skip = d^2 / (s^2 + d^2), c_in = 1 / sqrt(s^2 + d^2),
  c_out = s d / sqrt(s^2 + d^2) for data of standard deviation d (Tero Karras et al., "Elucidating the Design Space of
  Diffusion-Based Generative Models", 2022, https://arxiv.org/abs/2206.00364, table 1). A backbone with a mask head
  returns mask * input, so c_out is 1 / c_in there and the mask acts on x itself.
- ``"direct"``: E[x_0 | x] = d F(x / d, s / d): F is told the noise itself instead of a step, and gives the signal.

B items, N samples, K sources.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from audiosep.schedules import Schedule


def placed(value: Tensor, like: Tensor) -> Tensor:
    """`value` on the device and in the type of `like`, without waiting for the device."""
    return value.to(like.device, like.dtype, non_blocking=True)


def precision(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Where a network runs: mixed precision, unless it is float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class Denoiser(Protocol):
    """What a sampler needs of a prior."""

    schedule: Schedule

    @property
    def power(self) -> float:
        """Mean square of the source's signals."""
        ...

    def denoise(self, x_t: Tensor, t: Tensor, label: Tensor | None = None, schedule: Schedule | None = None) -> Tensor:
        """Return E[x_0 | x_t] (B, N) for x_t (B, N) at steps t (B,) of `schedule`."""
        ...


class Prior(nn.Module):
    """A backbone with its schedule and the facts a separator needs.

    Args:
        backbone: module (x_t (B, N), t (B,), label (B,) or None) -> (B, N).
        schedule: the noise levels that it was trained on.
        sample_rate: in Hz.
        classes: names of the labels 0, 1, ...; the null class (label None) carries the name `kind`.
        level: RMS of its training signals in dBFS.
        kind: name of what it models: "speech", "sound".
        parameterization: "eps", "edm" or "direct", see the module's text.
        label_dropout: how often `loss` replaces a label by the null class.
        focus: how much `loss` prefers the middle levels, 0..1: their density is (1 + focus) / (1 - focus) times that of
            the ends. 0 draws all steps alike.
    """

    def __init__(
        self,
        backbone: nn.Module,
        schedule: Schedule,
        *,
        sample_rate: int = 16000,
        classes: Sequence[str] = (),
        level: float = -22.5,
        kind: str = "sound",
        parameterization: str = "eps",
        label_dropout: float = 0.1,
        focus: float = 0.0,
    ) -> None:
        super().__init__()
        if parameterization not in ("eps", "edm", "direct"):
            raise ValueError(f"parameterization is 'eps', 'edm' or 'direct', not {parameterization!r}")
        self.backbone, self.schedule = backbone, schedule
        self.sample_rate, self.classes, self.level = sample_rate, tuple(classes), level
        self.kind, self.parameterization = kind, parameterization
        if not 0 <= focus < 1:
            raise ValueError(f"focus lies in 0..1, below 1, not {focus}")
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout lies in 0..1, not {label_dropout}")
        self.label_dropout, self.focus = label_dropout, focus
        self.origin: dict[str, Any] = {}  # name, folder, hash: where it was loaded from, for reports
        self.null = int(getattr(backbone, "num_classes", 0))  # the null class's number

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments as plain data; `backbone` and `schedule` are the parts' own `config`."""
        return {
            "backbone": self.backbone.config,
            "schedule": self.schedule.config,
            "sample_rate": self.sample_rate,
            "classes": list(self.classes),
            "level": self.level,
            "kind": self.kind,
            "parameterization": self.parameterization,
        }

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the training signals."""
        return 10 ** (self.level / 20)

    @property
    def power(self) -> float:
        """Mean square of the training signals."""
        return self.sigma_data**2

    def checkpoint_activations(self, on: bool) -> bool:
        """Recompute activations in backward passes, or not; returns whether that changed anything."""
        if getattr(self.backbone, "checkpointing", on) == on:
            return False
        self.backbone.checkpointing = on  # type: ignore[assignment]
        return True

    def denoise(self, x_t: Tensor, t: Tensor, label: Tensor | None = None, schedule: Schedule | None = None) -> Tensor:
        """Expected clean signal given a noisy one.

        Args:
            x_t: (B, N) at the prior's rate and level.
            t: (B,) steps of `schedule`, fractions allowed.
            label: (B,) class numbers; None is the null class.
            schedule: where t counts; None is the prior's own.

        Returns:
            E[x_0 | x_t], (B, N).
        """
        asked = schedule or self.schedule
        ratio = asked.ratio_at(t)
        noisy = x_t / placed(asked.alpha_of(ratio), x_t)[:, None]
        own = t if schedule is None else self.schedule.step_at(ratio)
        return self._denoise(noisy, placed(ratio, x_t), placed(own, x_t), label)

    def _denoise(self, noisy: Tensor, ratio: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """E[x_0 | noisy] for noisy = x_0 + ratio * eps; t is the step of the prior's own schedule."""
        s = ratio[:, None]
        if self.parameterization == "eps":
            alpha = self.schedule.alpha_of(s)
            return noisy - s * self.backbone(noisy * alpha, t, label)
        if self.parameterization == "direct":
            return self.sigma_data * self.backbone(noisy / self.sigma_data, ratio / self.sigma_data, label)
        skip, c_in, c_out = self._coefficients(s)
        return skip * noisy + c_out * self.backbone(c_in * noisy, t, label)

    def _coefficients(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = s.square() + self.sigma_data**2
        c_in = total.rsqrt()
        masks = getattr(self.backbone, "head", "direct") == "mask"
        c_out = 1 / c_in if masks else s * self.sigma_data * c_in
        return self.sigma_data**2 / total, c_in, c_out

    def loss(self, batch: dict[str, Any], generator: torch.Generator | None = None) -> Tensor:
        """Denoising loss per item at random levels; 1 is what the best linear denoiser of flat noise reaches.

        Args:
            batch: "wave" (B, N) at the prior's level and, if the prior has classes, "label" (B,). With "index" and
                "seed", lists of B numbers, every item's level, noise and dropout follow from its own two: they are
                the same in any batch, on any process.
            generator: source of the noise, the levels and the label dropout of a batch without those lists.

        Returns:
            (B,), mean over samples of |eps_hat - eps|^2 for "eps", of |E[x_0 | x_t] - x_0|^2 (s^2 + d^2) / (s d)^2 for
            the others.
        """
        wave = batch["wave"]
        if "seed" in batch:
            drop = torch.tensor([seed % 2**20 / 2**20 < self.label_dropout for seed in batch["seed"]])
            drop = drop.to(wave.device, non_blocking=True)
            return self.loss_at(batch, self.steps_of(batch["index"]), drop, noise=_noise(batch["seed"], wave))
        draw = torch.rand(2, len(wave), generator=generator, device=wave.device)
        t = self._focused(draw[0])
        return self.loss_at(batch, t, draw[1] < self.label_dropout, generator)

    def steps_of(self, index: Sequence[int]) -> Tensor:
        """The steps (B,), on the CPU, at which `loss` takes the items of these numbers.

        Multiples of the golden ratio: more evenly spread over each batch than chance would, and uniform where `focus`
        is 0.
        """
        return self._focused(torch.tensor(index, dtype=torch.float64) * ((5**0.5 - 1) / 2) % 1)

    def _focused(self, uniform: Tensor) -> Tensor:
        """Steps from uniform numbers in 0..1."""
        share = uniform + self.focus / (2 * math.pi) * torch.sin(2 * math.pi * uniform)
        t = share * (len(self.schedule) - 1)
        return t.round() if self.parameterization == "eps" else t

    def loss_at(
        self,
        batch: dict[str, Any],
        t: Tensor,
        drop: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The loss at given steps t (B,); `drop` (B,) marks the items whose label becomes the null class."""
        wave, label = batch["wave"], batch.get("label")
        if label is not None and drop is not None:
            label = torch.where(drop, self.null, label)
        s = placed(self.schedule.ratio_at(t), wave)
        if noise is None:
            noise = torch.randn(wave.shape, generator=generator, device=wave.device, dtype=wave.dtype)
        estimate = self._denoise(wave + s[:, None] * noise, s, placed(t, wave), label)
        error = (estimate - wave).square().mean(-1)
        if self.parameterization == "eps":
            return error / s**2
        return error * (s**2 + self.sigma_data**2) / (s * self.sigma_data) ** 2


def _noise(seeds: Sequence[int], like: Tensor) -> Tensor:
    """White noise like (B, N), each row from its own seed."""
    noise, generator = torch.empty_like(like), torch.Generator(like.device)
    for row, seed in zip(noise, seeds):
        row.normal_(generator=generator.manual_seed(seed))
    return noise


class JointPrior:
    """Independent priors of K sources, asked together: sources of the same prior share one batch.

    Args:
        sources: one (prior, class number or None for the null class) per source.
        dtype: number type of the networks' inner products; what goes in and comes out keeps its own.
    """

    def __init__(self, sources: Sequence[tuple[Denoiser, int | None]], dtype: torch.dtype = torch.float32) -> None:
        self.sources, self.dtype = list(sources), dtype
        groups: dict[int, list[int]] = {}
        for k, (prior, _) in enumerate(self.sources):
            groups.setdefault(id(prior), []).append(k)
        self.groups = list(groups.values())

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def power(self) -> list[float]:
        """Mean square of each source's signals."""
        return [source.power for source, _ in self.sources]

    def denoise(self, x_t: Tensor, t: float, schedule: Schedule) -> Tensor:
        """E[x_0 | x_t] (B, K, N) of all sources (B, K, N) at step t of `schedule`."""
        estimates: list[Tensor] = [x_t] * len(self)
        for members in self.groups:
            batch = torch.stack([x_t[:, k] for k in members], 1).flatten(0, 1)
            steps = torch.full((len(batch),), t, dtype=torch.float64)
            label = self._label(members, len(x_t), x_t.device)
            with precision(batch.device, self.dtype):
                joint = self.sources[members[0]][0].denoise(batch, steps, label, schedule)
            for k, estimate in zip(members, joint.unflatten(0, (-1, len(members))).unbind(1)):
                estimates[k] = estimate
        return torch.stack(estimates, 1)

    def _label(self, members: list[int], batch: int, device: torch.device) -> Tensor | None:
        labels = [self.sources[k][1] for k in members]
        if all(label is None for label in labels):
            return None
        null = getattr(self.sources[members[0]][0], "null", 0)
        row = [null if label is None else label for label in labels]
        return torch.tensor(row * batch).to(device, non_blocking=True)


class GaussianPrior:
    """A stationary Gaussian source of known power spectrum: every answer is exact, so samplers are tested on it.

    E[x_0 | x_t] = alpha S / (alpha^2 S + sigma^2) x_t per FFT bin, where S is the variance of a unitary-FFT bin.

    Args:
        spectrum: (N // 2 + 1,) variance per bin of a signal of N samples; its mean over all N bins is the power.
        schedule: the steps that `denoise` counts in by default.
    """

    def __init__(self, spectrum: Tensor, schedule: Schedule, sample_rate: int = 16000) -> None:
        self.spectrum, self.schedule, self.sample_rate = spectrum, schedule, sample_rate

    @property
    def power(self) -> float:
        """Mean of the spectrum over all N bins."""
        # All bins but the first, and the last of an even N, stand for two. One bin in N makes no difference.
        return float((2 * self.spectrum.sum() - self.spectrum[0] - self.spectrum[-1]) / (2 * len(self.spectrum) - 2))

    def denoise(self, x_t: Tensor, t: Tensor, label: Tensor | None = None, schedule: Schedule | None = None) -> Tensor:
        """Exact E[x_0 | x_t], (B, N)."""
        asked = schedule or self.schedule
        ratio = asked.ratio_at(t)
        alpha = placed(asked.alpha_of(ratio), x_t)[:, None]
        spectrum = placed(self.spectrum, x_t)
        gain = spectrum / (spectrum + placed(ratio, x_t)[:, None] ** 2)
        return torch.fft.irfft(gain * torch.fft.rfft(x_t / alpha), n=x_t.shape[-1])


class NormalPrior:
    """A Gaussian source of any mean and covariance, exact like `GaussianPrior`.

    E[x_0 | x] = mu + C (C + s^2)^-1 (x - mu) for x = x_t / alpha.

    Args:
        mean: (N,).
        covariance: (N, N).
        schedule: the steps that `denoise` counts in by default.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, schedule: Schedule) -> None:
        self.mean, self.covariance, self.schedule = mean, covariance, schedule
        values, self.vectors = torch.linalg.eigh(covariance)
        self.values = values.clamp(min=0)

    @property
    def power(self) -> float:
        """Mean square of its signals."""
        return float((self.mean.square() + self.values).mean())

    def denoise(self, x_t: Tensor, t: Tensor, label: Tensor | None = None, schedule: Schedule | None = None) -> Tensor:
        """Exact E[x_0 | x_t], (B, N)."""
        asked = schedule or self.schedule
        ratio = placed(asked.ratio_at(t), x_t)[:, None]
        mean, values, vectors = (placed(part, x_t) for part in (self.mean, self.values, self.vectors))
        inner = (x_t / placed(asked.alpha_of(ratio), x_t) - mean) @ vectors
        return mean + (inner * (values / (values + ratio**2))) @ vectors.T


class MixturePrior:
    """A source that is one of J Gaussians, exact like `GaussianPrior`.

    E[x_0 | x] is the mean of the components' answers, weighed by how likely each has made x.

    Args:
        weights: (J,).
        means: (J, N).
        covariances: (J, N, N).
        schedule: the steps that `denoise` counts in by default.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor, schedule: Schedule) -> None:
        self.weights, self.means, self.covariances, self.schedule = weights, means, covariances, schedule
        values, self.vectors = torch.linalg.eigh(covariances)
        self.values = values.clamp(min=0)

    @property
    def power(self) -> float:
        """Mean square of its signals."""
        return float(self.weights @ (self.means.square() + self.values).mean(-1))

    def denoise(self, x_t: Tensor, t: Tensor, label: Tensor | None = None, schedule: Schedule | None = None) -> Tensor:
        """Exact E[x_0 | x_t], (B, N)."""
        asked = schedule or self.schedule
        ratio = placed(asked.ratio_at(t), x_t)[:, None, None]
        weights, means, values, vectors = (
            placed(part, x_t) for part in (self.weights, self.means, self.values, self.vectors)
        )
        noisy = x_t / placed(asked.alpha_of(ratio[:, 0]), x_t)
        inner = torch.einsum("bjn,jnm->bjm", noisy[:, None] - means, vectors)
        total = values + ratio**2  # (B, J, N)
        share = torch.softmax(weights.log() - 0.5 * (inner.square() / total + total.log()).sum(-1), 1)
        answers = means + torch.einsum("bjm,jnm->bjn", inner * values / total, vectors)
        return (share[..., None] * answers).sum(1)
