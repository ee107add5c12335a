"""Perturbations that act on activations and are never built in a forward: sums of outer products, and others like them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..noise import Distribution, floats, integers, outer_run, outer_sgd_, outer_sum, sample, working_dtype
from ..types import Key, PerExampleError, Term
from .compute import Compute
from .leaf import Leaf, Scratch


class PerExampleLeaf(Leaf, ABC):
    """A leaf whose perturbation can act on activations, so that every example of a batch can have a direction of its own."""

    @property
    def per_example(self) -> bool:
        return True

    @abstractmethod
    def compute_each(
        self, x: Tensor, compute: Compute, bias: Tensor | None, key: Key, queries: Tensor, offsets: Tensor
    ) -> Tensor:
        """``compute(W, x)`` with example n of ``x`` seeing W + offsets[n] · z of query queries[n].

        Args:
            x: (N, …, in), or (N·T, …, in) where an example holds T rows one after another: its flattened tokens, its options.
            compute: a linear layer, given its weight and input.
            bias: added by it.
            key: names the directions but for their queries.
            queries: (N,), int64.
            offsets: (N,), float32.

        Raises:
            PerExampleError: ``x`` does not hold the examples along dimension 0.
        """

    def by_example(self, x: Tensor, count: int) -> Tensor:
        """(N, T, in)."""
        if x.dim() < 2 or x.shape[0] % count:
            raise PerExampleError(
                f"per-example directions need the inputs of {self.name!r} to hold the {count} examples along dimension 0, "
                f"got shape {tuple(x.shape)}; use ZOStrategy(estimator='spsa') for this model"
            )
        return x.reshape(count, -1, x.shape[-1])

    def coordinates(self, key: Key, queries: Tensor, length: int) -> Tensor:
        """The first coordinates of z, (n, length) in float32, for each of n queries of the key's step."""
        return sample(self.distribution, key, self.index, torch.zeros_like(queries), length, queries)

    def drawn(self, terms: Sequence[Term], length: int) -> tuple[Tensor, Tensor]:
        """The first coordinates of each term's z, (n, length), and the coefficients, (n, 1), in the working dtype."""
        device, dtype = self.parameter.device, working_dtype(self.parameter.dtype)
        parts = []
        for _, group in groupby((term.key for term in terms), lambda key: key[:2]):  # all queries of a step in one go
            keys = list(group)
            parts.append(self.coordinates(keys[0], integers([key.query for key in keys], device), length))
        drawn = parts[0] if len(parts) == 1 else torch.cat(parts)
        return drawn.to(dtype), floats([term.coefficient for term in terms], device, dtype)[:, None]


class OuterLeaf(Leaf, ABC):
    r"""A matrix with :math:`\sum_k c_k z_k = \sum_j a_j b_j^\top`. A parameter of more than two dimensions is a matrix of its
    first by the product of the others."""

    def __init__(self, name: str, index: int, parameter: nn.Parameter, distribution: Distribution) -> None:
        super().__init__(name, index, parameter, distribution)
        self._height, self._columns = parameter.shape[0], math.prod(parameter.shape[1:])

    @abstractmethod
    def products(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        """a of shape (n, rows) and b of shape (n, columns), both contiguous, in the working dtype."""

    def noise(self, terms: Sequence[Term], start: int, length: int) -> Tensor:
        return outer_run(*self.products(terms), start, length)

    def linear(self, x: Tensor, bias: Tensor | None, terms: Sequence[Term], scratch: Scratch) -> Tensor:
        out = F.linear(x, self.parameter, bias)
        left, right = self.products(terms)
        return out.add_(F.linear(F.linear(x, right.to(x.dtype)), left.T.to(x.dtype)))

    def gradient(self, terms: Sequence[Term]) -> Tensor:
        if not self._is_whole:
            return super().gradient(terms)
        return outer_sum(*self.products(terms)).view(self.parameter.shape)

    @property
    def _is_whole(self) -> bool:
        return self.parameter.numel() == self._height * self._columns

    def sgd_(self, terms: Sequence[Term], lr: float, weight_decay: float, key: Key) -> None:
        weight = self.parameter.detach()
        if weight.is_contiguous() and self._is_whole:
            matrix = weight.view(self._height, self._columns)
            outer_sgd_(matrix, *self.products(terms), self.index, lr, weight_decay, key)
        else:
            super().sgd_(terms, lr, weight_decay, key)


class Rank1Leaf(OuterLeaf, PerExampleLeaf):
    r"""A matrix with :math:`z = u v^\top`: out + in coordinates, applied to activations, the weight never copied.

    A linear layer sees :math:`W x + \epsilon\,u\,(v^\top x)`, which costs two thin products instead of a sweep over W,
    and lets every example of a batch have a direction of its own.
    """

    def __init__(self, name: str, index: int, parameter: nn.Parameter, distribution: Distribution) -> None:
        if parameter.dim() != 2:
            raise ValueError(f"a rank-1 leaf needs a matrix, got {name!r} of shape {tuple(parameter.shape)}")
        super().__init__(name, index, parameter, distribution)

    def factors(self, key: Key, queries: Tensor) -> tuple[Tensor, Tensor]:
        """u of shape (n, out) and v of shape (n, in), float32, for each of n queries of the key's step."""
        both = self.coordinates(key, queries, self._height + self._columns)
        return both[:, : self._height], both[:, self._height :]

    def products(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        z, coefficients = self.drawn(terms, self._height + self._columns)
        return z[:, : self._height] * coefficients, z[:, self._height :].contiguous()

    def linear(self, x: Tensor, bias: Tensor | None, terms: Sequence[Term], scratch: Scratch) -> Tensor:
        if len(terms) > 1:
            return super().linear(x, bias, terms, scratch)
        ((key, coefficient),) = terms
        out = F.linear(x, self.parameter, bias)
        flat_x, flat_out = x.reshape(1, -1, x.shape[-1]), out.view(1, -1, out.shape[-1])
        self._add_rank1(flat_out, flat_x, key, integers([key.query], out.device), floats([coefficient], out.device))
        return out

    def compute_each(
        self, x: Tensor, compute: Compute, bias: Tensor | None, key: Key, queries: Tensor, offsets: Tensor
    ) -> Tensor:
        by_example = self.by_example(x, queries.numel())
        out = compute(self.parameter.detach(), x)
        self._add_rank1(out.view(len(by_example), -1, out.shape[-1]), by_example, key, queries, offsets)
        return out

    def _add_rank1(self, out: Tensor, x: Tensor, key: Key, queries: Tensor, offsets: Tensor) -> None:
        """out[n] += offset[n] · (x[n] · v[n]) u[n], in place: the product's output is nobody else's yet."""
        u, v = self.factors(key, queries.to(out.device))
        u = u * offsets.to(u.device, u.dtype)[:, None]
        inner = torch.matmul(x, v.to(x.dtype)[:, :, None])
        out.baddbmm_(inner.to(out.dtype), u.to(out.dtype)[:, None, :])


class LowRankLeaf(OuterLeaf):
    r"""A matrix with :math:`z = U V^\top / \sqrt r`: U new for every direction, V the same for ``hold`` steps and all queries.

    The root makes the elements' variance 1. LOZO, arXiv:2410.07698, probes at :math:`\theta \pm \epsilon' U V^\top` and
    steps along :math:`g\,U V^\top / r`, which is this leaf with :math:`\epsilon = \sqrt r\,\epsilon'`. A linear layer sees
    :math:`W x + \epsilon\,U (V^\top x)/\sqrt r`, and the weight is not touched.

    Args:
        name, index, parameter, distribution: see :class:`~zolightning.space.Leaf`.
        rank: r, >= 1.
        hold: steps that share V, >= 1.
    """

    def __init__(
        self, name: str, index: int, parameter: nn.Parameter, distribution: Distribution, rank: int, hold: int
    ) -> None:
        if parameter.dim() < 2:
            raise ValueError(f"a low-rank leaf needs a matrix, got {name!r} of shape {tuple(parameter.shape)}")
        super().__init__(name, index, parameter, distribution)
        self.rank, self.hold = int(rank), int(hold)

    @property
    def settings(self) -> dict[str, float]:
        return {"rank": self.rank, "hold": self.hold}

    def products(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        each = torch.arange(self.rank, device=self.parameter.device)
        left, right = [], []
        for key, coefficient in terms:
            u = sample(self.distribution, key, self.index, each * self._height, self._height)
            held = Key(key.seed, key.step - key.step % self.hold)
            start = self.rank * self._height  # behind all of U's
            v = sample(self.distribution, held, self.index, each * self._columns + start, self._columns)
            left.append(u * (coefficient / math.sqrt(self.rank)))
            right.append(v)
        dtype = working_dtype(self.parameter.dtype)
        return torch.cat(left).to(dtype), torch.cat(right).to(dtype)

    def rows(self, indices: Tensor, terms: Sequence[Term]) -> Tensor:
        stored = self.parameter[indices].detach()
        left, right = self.products(terms)
        noise = torch.zeros((), dtype=left.dtype, device=left.device)
        for u, v in zip(left, right, strict=True):
            noise = noise + u[indices][..., None] * v
        return (stored.to(left.dtype) + noise.view(stored.shape)).to(stored.dtype)
