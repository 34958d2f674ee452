"""What several test files share: tiny priors, Gaussian sources, the known outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from audiosep.backbones.triple_path_unet import TriplePathUNet
from audiosep.prior import GaussianPrior, JointPrior, Prior
from audiosep.schedules import ve, vp_linear

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items):
    """GPU tests are skipped where there is no CUDA device."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture(scope="session")
def gaussian():
    """The two stationary Gaussian sources of the guided sampler's reference: priors, mixture, exact posterior."""
    return GaussianSources(np.load(GOLDEN / "guided_sampler_reference.npz"))


class GaussianSources:
    def __init__(self, reference):
        self.reference, self.n = reference, 16000
        f = np.abs(np.fft.fftfreq(self.n, 1 / 16000))
        shapes = [1 / (1 + (f / 400) ** 4), 1 / (1 + ((f - 2500) / 500) ** 4)]
        half = self.n // 2 + 1
        self.spectra = [torch.from_numpy((0.07**2 * s / s.mean())[:half]) for s in shapes]
        self.joint = JointPrior([(GaussianPrior(s, vp_linear()), None) for s in self.spectra])
        self.mixture = torch.from_numpy(reference["mixture"]).float()[None]

    def posterior(self):
        """Exact posterior mean (2, N) and variance per unitary-FFT bin (N // 2 + 1,), the same for both."""
        first, second = self.spectra
        bins = torch.fft.rfft(self.mixture[0].double())
        mean = torch.fft.irfft(torch.stack((first, second)) / (first + second) * bins, n=self.n)
        return mean, first * second / (first + second)


@pytest.fixture
def tiny_prior():
    """A small random prior of the real class: make(num_classes=..., kind=...)."""

    def make(num_classes=0, kind="sound", head="mask", classes=None, seed=0):
        torch.manual_seed(seed)
        net = TriplePathUNet(
            num_classes, width=8, depth=(1, 1, 1, 1, 1), heads=2, condition_dim=16, squeeze=4, n_fft=126, head=head
        )
        names = classes if classes is not None else [f"Class_{i}" for i in range(num_classes)]
        return Prior(net, ve(), kind=kind, classes=names, parameterization="edm").eval().requires_grad_(False)

    return make
