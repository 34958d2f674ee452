"""Linear maps from sources to what was observed, each with its adjoint: y = A x.

A map takes sources x (B, K, N) to observations (B, ...); its adjoint takes such a w back, with
<A x, w> = <x, A^T w> row by row. `rows` picks items of a map that differs from item to item.

    Mixing(A)                     instantaneous mixing or gains, (C, K) or (B, C, K)
    Matrix(A)                     a matrix per source, (K, M, N) or (B, K, M, N)
    Delay(tau)                    steering delays in samples, fractions allowed, (C, K)
    Convolution(h)                impulse responses (C, K, L)
    Chain(Mixing(A), Mask(keep))  missing samples; Chain(Mixing(A), Decimation(4)): a lower rate

B items, K sources, C channels, N samples, M observed numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from audiosep.errors import UsageError

Index = slice | Tensor


def _checked(matrix: Tensor, shape: str) -> Tensor:
    """A matrix of the shape or, with the items' axis in front, of one more axis."""
    axes = shape.count(",") + 1
    if matrix.ndim not in (axes, axes + 1):
        raise UsageError(f"the mixing has shape ({shape}) or (B, {shape}), got {tuple(matrix.shape)}")
    return matrix


class Operator:
    """A linear map with its adjoint; this one adds the sources up, (B, K, N) to (B, N).

    Args:
        n_sources: K.
    """

    def __init__(self, n_sources: int) -> None:
        self.n_sources = n_sources

    def __call__(self, x: Tensor) -> Tensor:
        """Observations (B, ...) of sources x (B, K, N)."""
        return x.sum(1)

    def adjoint(self, w: Tensor) -> Tensor:
        """A^T w (B, K, N) for w (B, ...)."""
        return w[:, None].expand(-1, self.n_sources, -1)

    def rows(self, index: Index) -> Operator:
        """The map of these items alone."""
        return self


class Mixing(Operator):
    """y_c = sum_k A_ck x_k: gains, or microphones without delays; A (C, K) or (B, C, K), y (B, C, N)."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(_checked(matrix, "C, K").shape[-1])
        self.matrix = matrix

    def __call__(self, x: Tensor) -> Tensor:
        return self.matrix.to(x) @ x

    def adjoint(self, w: Tensor) -> Tensor:
        return self.matrix.to(w).mT @ w

    def rows(self, index: Index) -> Mixing:
        return self if self.matrix.ndim == 2 else Mixing(self.matrix[index])


class Matrix(Operator):
    """y = sum_k A_k x_k with a matrix per source, A (K, M, N) or (B, K, M, N), y (B, M)."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(_checked(matrix, "K, M, N").shape[-3])
        self.matrix = matrix

    def __call__(self, x: Tensor) -> Tensor:
        return (self.matrix.to(x) @ x[..., None])[..., 0].sum(1)

    def adjoint(self, w: Tensor) -> Tensor:
        return (self.matrix.to(w).mT @ w[:, None, :, None])[..., 0]

    def rows(self, index: Index) -> Matrix:
        return self if self.matrix.ndim == 3 else Matrix(self.matrix[index])


class Delay(Operator):
    """y_c = sum_k x_k delayed by tau_ck samples, circularly, as a phase in every bin; tau (C, K), y (B, C, N)."""

    def __init__(self, samples: Tensor) -> None:
        super().__init__(samples.shape[-1])
        self.samples = samples

    def __call__(self, x: Tensor) -> Tensor:
        return self._turn(x[:, None], -1).sum(2)

    def adjoint(self, w: Tensor) -> Tensor:
        return self._turn(w[:, :, None], 1).sum(1)

    def _turn(self, x: Tensor, sign: int) -> Tensor:
        """x (B, C, K, N), either axis of length 1, with every (c, k) turned by its delay."""
        n = x.shape[-1]
        phase = torch.fft.rfftfreq(n, device=x.device, dtype=x.dtype) * self.samples.to(x)[..., None] * 2 * torch.pi
        return torch.fft.irfft(torch.fft.rfft(x) * torch.exp(sign * 1j * phase), n=n)


class Convolution(Operator):
    """y_c = sum_k h_ck * x_k, cut to the sources' length; h (C, K, L), y (B, C, N)."""

    def __init__(self, responses: Tensor) -> None:
        super().__init__(responses.shape[-2])
        self.responses = responses

    def __call__(self, x: Tensor) -> Tensor:
        n, size = x.shape[-1], x.shape[-1] + self.responses.shape[-1]
        response = torch.fft.rfft(self.responses.to(x), n=size)
        return torch.fft.irfft((response * torch.fft.rfft(x, n=size)[:, None]).sum(2), n=size)[..., :n]

    def adjoint(self, w: Tensor) -> Tensor:
        n, size = w.shape[-1], w.shape[-1] + self.responses.shape[-1]
        response = torch.fft.rfft(self.responses.to(w), n=size).conj()
        return torch.fft.irfft((response * torch.fft.rfft(w, n=size)[:, :, None]).sum(1), n=size)[..., :n]


class Linear(Operator):
    """Any linear map given as two functions, (B, K, N) to (B, ...) and back."""

    def __init__(
        self, n_sources: int, forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(n_sources)
        self.forward, self.backward = forward, adjoint

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def adjoint(self, w: Tensor) -> Tensor:
        return self.backward(w)


class Mask:
    """What is observed of each number, 1 or 0: `keep` is like one item's observation, or with `per_item` (B, ...)."""

    def __init__(self, keep: Tensor, per_item: bool = False) -> None:
        self.keep, self.per_item = keep, per_item

    def __call__(self, y: Tensor) -> Tensor:
        return self.keep.to(y) * y

    adjoint = __call__

    def rows(self, index: Index) -> Mask:
        return Mask(self.keep[index], True) if self.per_item else self


class Decimation:
    """Every `factor`-th sample; put a low-pass `Convolution` before it for a lower sample rate."""

    def __init__(self, factor: int, length: int) -> None:
        self.factor, self.length = factor, length

    def __call__(self, y: Tensor) -> Tensor:
        return y[..., :: self.factor]

    def adjoint(self, w: Tensor) -> Tensor:
        back = w.new_zeros(*w.shape[:-1], self.length)
        back[..., :: self.factor] = w
        return back

    def rows(self, index: Index) -> Decimation:
        return self


class Chain(Operator):
    """What `first` gives, seen through `then`, a `Mask` or a `Decimation`."""

    def __init__(self, first: Operator, then: Mask | Decimation) -> None:
        super().__init__(first.n_sources)
        self.first, self.then = first, then

    def __call__(self, x: Tensor) -> Tensor:
        return self.then(self.first(x))

    def adjoint(self, w: Tensor) -> Tensor:
        return self.first.adjoint(self.then.adjoint(w))

    def rows(self, index: Index) -> Chain:
        return Chain(self.first.rows(index), self.then.rows(index))


class Only(Operator):
    """What an operator sees of source k alone, (B, 1, N) to (B, ...)."""

    def __init__(self, operator: Operator, k: int) -> None:
        super().__init__(1)
        self.operator, self.k = operator, k

    def __call__(self, x: Tensor) -> Tensor:
        everything = x.new_zeros(len(x), self.operator.n_sources, x.shape[-1])
        everything[:, self.k] = x[:, 0]
        return self.operator(everything)

    def adjoint(self, w: Tensor) -> Tensor:
        return self.operator.adjoint(w)[:, self.k : self.k + 1]

    def rows(self, index: Index) -> Only:
        return Only(self.operator.rows(index), self.k)


def dense(operator: Operator, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The matrices (B or 1, K, M, N) of a map of sources of `length` samples; for small ones only."""
    if isinstance(operator, Matrix):
        matrix = operator.matrix.to(dtype)
        return matrix if matrix.ndim == 4 else matrix[None]
    items = max(sizes(operator), default=1)
    columns = []
    for k in range(operator.n_sources):
        for n in range(length):
            unit = torch.zeros(items, operator.n_sources, length, dtype=dtype)
            unit[:, k, n] = 1
            columns.append(operator(unit).flatten(1))
    return torch.stack(columns, -1).unflatten(-1, (operator.n_sources, length)).movedim(2, 1)


def sizes(operator: Operator) -> set[int]:
    """B of everything in a map that differs from item to item; empty where all items share it."""
    if isinstance(operator, Only):
        return sizes(operator.operator)
    if isinstance(operator, Chain):
        own = {len(operator.then.keep)} if isinstance(operator.then, Mask) and operator.then.per_item else set()
        return own | sizes(operator.first)
    if (isinstance(operator, Mixing) and operator.matrix.ndim == 3) or (
        isinstance(operator, Matrix) and operator.matrix.ndim == 4
    ):
        return {len(operator.matrix)}
    return set()
