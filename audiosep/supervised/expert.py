"""A supervised network and the one task that it was trained on.

Trained on mixtures whose sources are known, with the negative SI-SDR of

    max over pi of 1/K sum_k SI-SDR(estimate_pi(k), reference_k),   pi exchanging sources of one kind only

(permutation-invariant training: Dong Yu et al., "Permutation Invariant Training of Deep Models for Speaker-Independent
Multi-Talker Speech Separation", 2017, https://arxiv.org/abs/1607.00325). Speech is always output 0 where there is one:
what has a name needs no permutation. A network sees mixtures at unit RMS. SI-SDR leaves the scale and the sign of an
output open, so that a user gets gain_k * output_k with the gains that bring the outputs' sum closest to the mixture.

B items, K sources, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from audiosep.data import parse_task
from audiosep.errors import UsageError
from audiosep.mixing import best_permutation, permute

EPS = 1e-8  # of a mean square at unit RMS: bounds a single SI-SDR to +-80 dB
APART = 1e6  # dB by which sources of two kinds are kept from being exchanged


class Expert(nn.Module):
    """A network (B, N) -> (B, K, N) that separates one task's mixtures.

    Args:
        network: has `n_sources` and `config`.
        task: what its mixtures hold, as in "1speech+1sound"; speech comes first.
        sample_rate: in Hz.
    """

    def __init__(self, network: nn.Module, task: str, sample_rate: int = 16000) -> None:
        super().__init__()
        speech, sound = parse_task(task)
        self.kinds = ["speech"] * speech + ["sound"] * sound
        if network.n_sources != len(self.kinds):
            raise UsageError(f"{task} has {len(self.kinds)} sources, the network {network.n_sources}")
        self.network, self.task, self.sample_rate = network, task, sample_rate
        self.evaluations = 1
        self.origin: dict[str, Any] = {}  # folder and hash, where it was loaded
        ones = torch.tensor([[a == b for b in self.kinds] for a in self.kinds])
        self.register_buffer("alike", ones, persistent=False)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments as plain data."""
        return {"task": self.task, "sample_rate": self.sample_rate, "network": self.network.config}

    def forward(self, mixture: Tensor) -> Tensor:
        """The network's outputs (B, K, N) for mixtures (B, N) of any level."""
        rms = mixture.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-7)
        return self.network(mixture / rms)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Negative SI-SDR in dB (B,), mean over sources; `batch` has "mixture" (B, N) and "sources" (B, K, N)."""
        return -self.scores(self(batch["mixture"]).float(), batch["sources"]).mean(-1)

    def scores(self, estimates: Tensor, references: Tensor) -> Tensor:
        """SI-SDR in dB (B, K) of each reference's estimate, sources of one kind in their best order."""
        table = si_sdr_table(estimates, references)
        with torch.no_grad():
            index = best_permutation(table - APART * ~self.alike)  # type: ignore[operator]
        return permute(table, index).diagonal(dim1=1, dim2=2)

    def resolve(self, sources: Sequence[str] | None) -> list[str]:
        """Kinds of the stems; UsageError when other sources are asked for than those of the task."""
        asked = self.kinds if sources is None else [name.strip().casefold() for name in sources]
        if sorted(asked) != sorted(self.kinds):
            raise UsageError(
                f"this network was trained on {self.task} and tells no classes apart: "
                f"it finds {', '.join(self.kinds)}, asked for {', '.join(asked)}"
            )
        return asked

    @torch.no_grad()
    def separate(self, mixture: Tensor, kinds: Sequence[str]) -> Tensor:
        """Sources (B, K, N), in the order of `kinds`, at the level at which they best add up to mixtures (B, N)."""
        outputs = fit_gains(self(mixture).float(), mixture)
        free = list(range(len(self.kinds)))
        order = [free.pop(next(i for i, k in enumerate(free) if self.kinds[k] == kind)) for kind in kinds]
        return outputs[:, order]


def si_sdr_table(estimates: Tensor, references: Tensor) -> Tensor:
    """SI-SDR in dB of every estimate against every reference: (B, K, N) and (B, L, N) -> (B, K, L).

    As `metrics.si_sdr`, means removed, but with a gradient everywhere and without a look at the values.
    """
    length = estimates.shape[-1]
    estimates = estimates - estimates.mean(-1, keepdim=True)
    references = references - references.mean(-1, keepdim=True)
    with torch.autocast(estimates.device.type, enabled=False):  # which would take the products in half precision
        products = estimates @ references.transpose(1, 2)
    own = estimates.square().sum(-1)[:, :, None]
    power = references.square().sum(-1)[:, None]
    target = products.square() / (power + length * torch.finfo(power.dtype).tiny)
    floor = EPS * (own + length * torch.finfo(own.dtype).tiny)
    return 10 * torch.log10((target + floor) / ((own - target).clamp(min=0) + floor))


def fit_gains(outputs: Tensor, mixture: Tensor) -> Tensor:
    """Outputs (B, K, N) times the K gains that bring their sum closest to the mixture (B, N)."""
    x = outputs.double()
    x = x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    gram = x @ x.transpose(1, 2)
    # A little damping: outputs that are nearly the same share a gain instead of cancelling each other.
    gram = gram + 1e-4 * x.shape[-1] * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    gains = torch.linalg.solve(gram, x @ mixture.double()[..., None])
    return (gains * x).to(outputs.dtype)
