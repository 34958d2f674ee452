"""Microphones in a room: AuxIVA, ILRMA and FastMNMF2, from pyroomacoustics (pip install pyroomacoustics).

In a room each channel holds the sources with echoes; the methods unmix every frequency by itself. The instantaneous
methods of this package can't. X is (n_samples, n_channels), as everywhere; a source comes back as it sounds in the
first channel, so that here sources_ keep their scale.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from audiosep.blind.base import Array, BlindSeparator, RecordingError
from audiosep.errors import UsageError
from audiosep.stft import istft, stft


class _Missing(UsageError, AttributeError):
    """Told in the user's words, and yet `hasattr` says no, as scikit-learn asks."""


class ConvolutiveSeparator(BlindSeparator):
    """Base of the wrappers. What was fitted is one recording: there is `fit_transform`, and no transform of others."""

    n_fft: int
    max_iter: int

    def fit_transform(self, X: ArrayLike, y: None = None) -> Array:
        """The sources (n_samples, n_sources) of the recording X (n_samples, n_channels)."""
        return self.fit(X).sources_

    def __getattr__(self, name: str) -> Any:
        if name == "transform":
            raise _Missing(f"{type(self).__name__} separates the recording that it is fitted to: use fit_transform")
        if name == "inverse_transform":
            raise _Missing(f"{type(self).__name__} learns filters, no mixing matrix: it has no inverse_transform")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _separate(self, X: Array, rng: np.random.RandomState) -> None:
        try:
            bss = import_module("pyroomacoustics").bss
        except ImportError as error:
            raise UsageError("pyroomacoustics is not installed: pip install pyroomacoustics") from error
        hop = self.n_fft // 4
        spectra = stft(torch.from_numpy(X.T.copy()), self.n_fft, hop)  # (m, F, M)
        before = np.random.get_state()  # noqa: NPY002 - pyroomacoustics draws from the global generator
        np.random.seed(rng.randint(2**31))  # noqa: NPY002
        try:
            found = self._run(bss, spectra.permute(2, 1, 0).numpy())  # (M, F, n)
        except np.linalg.LinAlgError as error:
            raise RecordingError(
                f"{type(self).__name__} found the channels dependent at some frequency: it needs microphones in a "
                "room, not exact mixtures of fewer signals"
            ) from error
        finally:
            np.random.set_state(before)  # noqa: NPY002
        waves = istft(torch.from_numpy(np.ascontiguousarray(found)).permute(2, 1, 0), self.n_fft, hop, len(X))
        sources = waves.numpy().T
        self.sources_ = sources[:, np.argsort(-np.square(sources).sum(0), kind="stable")]
        self.n_iter_ = self.max_iter

    def _run(self, bss: Any, spectra: Array) -> Array:
        """Sources (M, F, n) of the channels' spectra (M, F, m), at their scale in the first channel."""
        raise NotImplementedError


class AuxIVA(ConvolutiveSeparator):
    """Independent vector analysis by auxiliary functions (Ono, WASPAA 2011): as many sources as microphones, or fewer.

    Parameters: n_sources (None estimates it), n_fft in samples, max_iter, random_state (ignored).
    Attributes: sources_ (n_samples, n_sources), the loudest first; n_iter_.
    """

    def __init__(
        self, n_sources: int | None = None, *, n_fft: int = 2048, max_iter: int = 30, random_state: Any = None
    ) -> None:
        self.n_sources = n_sources
        self.n_fft = n_fft
        self.max_iter = max_iter
        self.random_state = random_state

    def _run(self, bss: Any, spectra: Array) -> Array:
        return bss.auxiva(spectra, n_src=self.n_sources_, n_iter=self.max_iter, proj_back=True)


class ILRMA(ConvolutiveSeparator):
    """Independent low-rank matrix analysis (Kitamura et al., IEEE/ACM TASLP 2016): as many sources as microphones.

    Parameters: n_sources (the number of channels, or None), n_components of each source's spectrogram, n_fft in
    samples, max_iter, random_state. Attributes: as AuxIVA's.
    """

    def __init__(
        self,
        n_sources: int | None = None,
        *,
        n_components: int = 2,
        n_fft: int = 2048,
        max_iter: int = 50,
        random_state: Any = None,
    ) -> None:
        self.n_sources = n_sources
        self.n_components = n_components
        self.n_fft = n_fft
        self.max_iter = max_iter
        self.random_state = random_state

    def _count(self, X: Array) -> int:
        channels = X.shape[1]
        if self.n_sources not in (None, channels):
            raise UsageError(f"ILRMA finds as many sources as channels, {channels}, got n_sources={self.n_sources}")
        return channels

    def _run(self, bss: Any, spectra: Array) -> Array:
        return bss.ilrma(spectra, n_iter=self.max_iter, n_components=self.n_components, proj_back=True)


class FastMNMF2(ConvolutiveSeparator):
    """Fast multichannel non-negative matrix factorisation (Sekiguchi et al., IEEE/ACM TASLP 2020): slow.

    Parameters: n_sources (None estimates it), n_components of each source's spectrogram, n_fft in samples, max_iter,
    random_state. Attributes: as AuxIVA's.
    """

    def __init__(
        self,
        n_sources: int | None = None,
        *,
        n_components: int = 8,
        n_fft: int = 2048,
        max_iter: int = 50,
        random_state: Any = None,
    ) -> None:
        self.n_sources = n_sources
        self.n_components = n_components
        self.n_fft = n_fft
        self.max_iter = max_iter
        self.random_state = random_state

    def _run(self, bss: Any, spectra: Array) -> Array:
        return bss.fastmnmf2(
            spectra, n_src=self.n_sources_, n_iter=self.max_iter, n_components=self.n_components, mic_index=0
        )
