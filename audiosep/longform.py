"""Recordings of any length: overlapping segments in, aligned and overlap-added stems out, in constant memory.

Stems are (K, C, n): K sources, C channels, n samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from audiosep.mixing import best_permutation
from audiosep.stft import stft

N_BANDS = 40  # bands of a source's embedding


def cut(blocks: Iterable[np.ndarray], segment: int, hop: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Cut a stream of blocks (C, n) into segments that start every `hop` samples.

    Yields:
        A segment (C, segment), or what is left at the end (C, more than segment - hop), and whether it is the last.
    """
    buffer: np.ndarray | None = None
    for block in blocks:
        buffer = block if buffer is None else np.concatenate((buffer, block), axis=1)
        while buffer.shape[1] > segment:
            yield buffer[:, :segment], False
            buffer = buffer[:, hop:]
    if buffer is not None and buffer.shape[1]:
        yield buffer, True


def count_segments(frames: int, segment: int, hop: int) -> int:
    """How many segments `cut` makes of a recording of `frames` samples."""
    return 1 + max(0, -((segment - frames) // hop))


class OverlapAdd:
    """Cross-fade consecutive segments; the fades add up to one, so what sums to the mixture still does."""

    def __init__(self, segment: int, hop: int) -> None:
        self.overlap, self.hop = segment - hop, hop
        ramp = (torch.arange(self.overlap, dtype=torch.float64) + 0.5) / max(self.overlap, 1)
        self.rise, self.fall = ramp, 1 - ramp
        self.tail: Tensor | None = None

    def add(self, stems: Tensor, last: bool) -> Tensor:
        """Take the next segment's stems (K, C, n), return the finished samples (K, C, m) in float64."""
        stems = stems.double().clone()
        if self.tail is not None and self.overlap:
            stems[..., : self.overlap] *= self.rise
            stems[..., : self.overlap] += self.tail
        if last:
            return stems
        self.tail = stems[..., self.hop :] * self.fall
        return stems[..., : self.hop]


class Aligner:
    """Keeps sources that could be swapped (two speakers) on the same stem from segment to segment.

    A segment's sources are matched with a running embedding of each stem (mean and spread of its log band powers while
    it is active, over all segments so far) and with the stem's waveform where the segments overlap.

    Args:
        groups: stems that share prior and class and so have no identity of their own.
        overlap: samples that consecutive segments share.

    Attributes:
        margins: per segment and group, by how much the match beat the best swap of two stems (0..2).
    """

    def __init__(self, groups: Sequence[Sequence[int]], overlap: int) -> None:
        self.groups = [list(group) for group in groups if len(group) > 1]
        self.overlap = overlap
        self.margins: list[float] = []
        self.embeddings: Tensor | None = None
        self.weights: Tensor | None = None
        self.tail: Tensor | None = None

    def align(self, stems: Tensor) -> list[int]:
        """Order that puts the sources of the next segment, stems (K, C, n), on their stems."""
        if not self.groups:
            return list(range(len(stems)))
        embedding, power = embed(stems), stems.square().mean((1, 2))
        order = list(range(len(stems)))
        for group in self.groups:
            if self.embeddings is not None and self.tail is not None:
                best, margin = match(self._similarity(stems, embedding, group))
                self.margins.append(margin)
                for stem, source in zip(group, best):
                    order[stem] = group[source]
        stems, embedding, power = stems[order], embedding[order], power[order]
        self._remember(embedding, power)
        self.tail = stems[..., stems.shape[-1] - self.overlap :]
        return order

    def _similarity(self, stems: Tensor, embedding: Tensor, group: list[int]) -> Tensor:
        """Similarity (k, k) of the group's stems so far to the segment's sources, each part in -1..1."""
        assert self.embeddings is not None
        assert self.tail is not None
        voice = cosine(self.embeddings[group], embedding[group])
        if not self.overlap:
            return voice
        head = stems[group][..., : self.overlap].flatten(1)
        return voice + cosine(self.tail[group].flatten(1), head)

    def _remember(self, embedding: Tensor, power: Tensor) -> None:
        if self.embeddings is None or self.weights is None:
            self.embeddings, self.weights = embedding, power
            return
        total = self.weights + power + 1e-20
        self.embeddings += (power / total)[:, None] * (embedding - self.embeddings)
        self.weights = total


def match(similarity: Tensor) -> tuple[list[int], float]:
    """Best assignment of sources to stems for a similarity (stem, source), and its lead over any swap of two."""
    k = len(similarity)
    order = best_permutation(similarity.T[None])[0]
    scores = similarity[:, order]
    own = scores.diagonal()
    lead = own[:, None] + own[None] - scores - scores.T + torch.diag(torch.full((k,), torch.inf).to(scores))
    return order.tolist(), lead.min().item() / k


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity (..., k, k) of the rows of a and b (..., k, n); zero where a row is silent."""
    a = a / (a.norm(dim=-1, keepdim=True) + 1e-12)
    b = b / (b.norm(dim=-1, keepdim=True) + 1e-12)
    return a @ b.mT


def embed(stems: Tensor) -> Tensor:
    """Embedding (K, 2 bands) of each stem (K, C, n): mean and spread of the log band powers of its louder frames."""
    mono = stems.mean(1)
    power = stft(mono, 512, 256).abs().square()  # (K, F, M)
    edges = torch.logspace(0, np.log10(power.shape[1] - 1), N_BANDS + 1).round().long()
    bands = torch.stack([power[:, a : max(a + 1, b)].mean(1) for a, b in pairwise(edges.tolist())], 1)
    log = torch.log10(bands + 1e-10)
    loudness = bands.sum(1, keepdim=True)
    active = (loudness > 0.05 * loudness.amax(-1, keepdim=True)).to(log)
    count = active.sum(-1).clamp(min=1)
    mean = (log * active).sum(-1) / count
    spread = ((log - mean[..., None]).square() * active).sum(-1).div(count).sqrt()
    shape = mean - mean.mean(1, keepdim=True)
    return torch.cat((shape, spread - spread.mean(1, keepdim=True)), 1)
