"""Low-rank guidance: what a source repeats tells it from the others.

A single sound mostly keeps its spectrum while it swells and fades, so its spectrogram has a low rank; so has a voice's,
with more of it. A denoiser that looks at a patch of the plane doesn't use that. Here each estimate's magnitudes are
approximated as |X_k| = W_k H_k with few columns in W_k, first alone, then all together as |Y| = sum_k W_k H_k, where Y
is the estimates' sum, by the multiplicative updates that lower the Kullback-Leibler divergence (Daniel D. Lee and H.
Sebastian Seung, "Algorithms for Non-negative Matrix Factorization", NIPS 2000). In the local Gaussian model with these
variances (Cédric Févotte, Nancy Bertin and Jean-Louis Durrieu, "Nonnegative Matrix Factorization with the
Itakura-Saito Divergence", Neural Computation 21(3), 2009) the sources are the Wiener filter's, and the estimates move
towards them by a share,

    X_k + share * (P_k / sum_j P_j * Y - X_k),    P_k = (W_k H_k)^2.

The sum stays what it was. The sampler's last step moves the sounds alone, among themselves, a share `LAST` times as
large: rank 1 tells them apart better than their priors do. Of a voice it would take what its prior knows. One sound
that has no class may be all the rest: it has more ranks, and no last step.

Unlike factorisation from a random start, which has to guess what belongs together, this one starts at the priors'
estimates.

B items, K sources, N samples, F bins, M frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from audiosep.mixing import shares
from audiosep.stft import istft, stft

UPDATES = 10  # of each source alone, and as many of all together
VAGUE = 0.5  # times full scale: at as much noise or more estimates don't say yet what repeats
LAST = 4.0  # times as far goes the last step, of the sounds among themselves
FLOOR = 1e-6  # of the mean magnitude, under which nothing is told apart


class LowRank:
    """Moves estimates (B, K, N) towards low-rank spectrograms.

    Args:
        ranks: of the K sources.
        share: how far, 0..1.
        device: where the estimates will be.
    """

    n_fft, hop_length = 1024, 256

    def __init__(self, ranks: Sequence[int], share: float, device: torch.device | str = "cpu") -> None:
        self.ranks, self.share = list(ranks), share
        start = torch.rand(self.n_fft // 2 + 1, sum(ranks), generator=torch.Generator().manual_seed(0))
        self.start = (0.1 + start).to(device).split(self.ranks, -1)  # here, so that no step waits for the copy

    def __call__(self, x: Tensor, times: float = 1.0) -> Tensor:
        """Estimates (B, K, N), of the same sum, after one step, so many times as far, the whole way at most."""
        with torch.autocast(x.device.type, enabled=False):
            total = stft(x.sum(1), self.n_fft, self.hop_length)
            power = self.magnitudes(stft(x, self.n_fft, self.hop_length).abs(), total.abs()).square()
            filtered = istft(shares(power) * total[:, None], self.n_fft, self.hop_length, x.shape[-1])
            return x + min(1.0, times * self.share) * (filtered - x)

    def magnitudes(self, sources: Tensor, total: Tensor) -> Tensor:
        """W_k H_k (B, K, F, M) for magnitudes of the sources (B, K, F, M) and of their sum (B, F, M)."""
        floor = FLOOR * total.mean((-1, -2), keepdim=True) + torch.finfo(total.dtype).tiny ** 0.5
        total = total + floor
        factors = []
        for source, w in zip(sources.unbind(1), self.start):
            h = source.new_ones(w.shape[1], source.shape[-1]) * source.mean((-1, -2), keepdim=True) + floor
            factors.append(_updated(source + floor, w.expand(len(source), -1, -1), h))
        w, h = (torch.cat(parts, dim) for parts, dim in zip(zip(*factors), (-1, -2)))
        w, h = _updated(total, w, h)
        return torch.stack([a @ b for a, b in zip(w.split(self.ranks, -1), h.split(self.ranks, -2))], 1)


def _updated(v: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Factors w (B, F, R) and h (B, R, M) of v (B, F, M) after `UPDATES` steps."""
    tiny = torch.finfo(v.dtype).tiny ** 0.5
    for _ in range(UPDATES):
        h = h * (w.mT @ (v / (w @ h + tiny))) / (w.sum(-2)[..., None] + tiny)
        w = w * ((v / (w @ h + tiny)) @ h.mT) / (h.sum(-1)[..., None, :] + tiny)
    return w, h
