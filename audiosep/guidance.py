"""Class guidance: classifiers tell the sampler, step by step, whose sound is whose.

A denoiser that was trained on single sounds keeps what belongs to another source as long as it looks like sound,
whatever class it was asked for. A classifier that was trained to tell which sounds are in a stem knows better, and its
gradient can steer the sampler (Prafulla Dhariwal and Alex Nichol, "Diffusion Models Beat GANs on Image Synthesis",
2021, https://arxiv.org/abs/2105.05233, section 4). With f_kj how well estimate k fits
the class of source j (`tagger.Ensemble`), it climbs

    J = sum_k (f_kk - mean of f_kj over the sources j of other classes).

A gradient in the samples would find what deceives the classifier, not what belongs elsewhere. So what may change is how
the estimates X_k share their sum Y, smoothly in time and pitch: with P_k the power of X_k around each time-frequency
bin, and fields D_k between few nodes,

    X_k + (softmax_k(log P_k + D_k) - softmax_k(log P_k)) Y,    D = step * sqrt(s) * dJ/dD / rms(dJ/dD) at D = 0,

cut off at `LARGEST` times the step. The sum stays what it was. Only the gradient's direction counts: its length says
how sure the classifier is, and one that is asked about estimates in the making is not to be trusted that far. The step
falls with the noise s, times full scale: whose sound is whose is decided early, while the priors' answers are vague.
Later these know more of the details, and a step as long would take stems apart that were right.

B items, K sources, N samples, F bins, M frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from audiosep.mixing import change_of_shares, grid, log_power
from audiosep.stft import istft, stft
from audiosep.tagger import Ensemble, Tagger

FALLS = 0.5  # power of the noise with which the step does
STEERED = 0.06  # times full scale: at less noise the sources have parted, and no class guides
LARGEST = 3.0  # multiples of its rms at which a field is cut off


class ClassGuidance:
    """Moves estimates (B, K, N) towards their own classes.

    Args:
        classifier: its `fits` are the f_kj. Its weights should ask for no gradients, to save time.
        names: the K classes, two different ones at least.
        step: rms of the fields before they are cut off, in nats, where the noise is full scale.
    """

    n_fft, hop_length = 1024, 256

    def __init__(self, classifier: Tagger | Ensemble, names: Sequence[str], step: float) -> None:
        self.classifier, self.names, self.step = classifier, list(names), step
        lowered = [name.casefold() for name in names]
        others = torch.tensor([[float(a != b) for b in lowered] for a in lowered])
        weights = torch.eye(len(names)) - others / others.sum(1, keepdim=True)
        self.weights = weights.to(next(classifier.parameters()).device)  # here, so that no step waits for the copy

    def __call__(self, x: Tensor, noise: float) -> Tensor:
        """Estimates (B, K, N), of the same sum, after one step at this noise, times full scale."""
        with torch.autocast(x.device.type, enabled=False):
            return self._stepped(x, self.step * noise**FALLS)

    def _stepped(self, x: Tensor, step: float) -> Tensor:
        total = stft(x.sum(1, keepdim=True), self.n_fft, self.hop_length)
        log = log_power(stft(x, self.n_fft, self.hop_length), 3)
        rows, columns = grid(self.classifier.sample_rate, log.shape[-2], log.shape[-1], x.shape[-1], x.device)

        def moved(field: Tensor) -> Tensor:
            change = change_of_shares(log, rows @ field @ columns.T) * total
            return x + istft(change, self.n_fft, self.hop_length, x.shape[-1])

        with torch.enable_grad():
            field = x.new_zeros(*x.shape[:2], rows.shape[1], columns.shape[1], requires_grad=True)
            (gradient,) = torch.autograd.grad(self.objective(moved(field)).sum(), field)
        rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
        return moved(step * (gradient / (rms + 1e-12)).clamp(-LARGEST, LARGEST))

    def objective(self, x: Tensor) -> Tensor:
        """J of estimates (B, K, N), in nats (B,)."""
        fits = self.classifier.fits(x, self.names, sure=math.inf)
        return (self.weights * fits).sum((1, 2))
