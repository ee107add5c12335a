"""A matrix perturbed in a subspace that stays the same for some steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..noise import Distribution, outer_sum, working_dtype
from ..types import Key, Term
from .leaf import Leaf, Scratch


class LowRankLeaf(Leaf):
    r"""A matrix with :math:`z = U V^\top / \sqrt r`: U new for every direction, V the same for ``hold`` steps and all queries.

    The root makes the elements' variance 1. LOZO, arXiv:2410.07698, probes at :math:`\theta \pm \epsilon' U V^\top` and
    steps along :math:`g\,U V^\top / r`, which is this leaf with :math:`\epsilon = \sqrt r\,\epsilon'`. A linear layer sees
    :math:`W x + \epsilon\,U (V^\top x)/\sqrt r`, and the weight is not touched.

    Args:
        name, index, parameter, distribution: see :class:`~zolightning.space.Leaf`; a parameter of more than two dimensions
            is a matrix of its first by the product of the others.
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
        self._rows, self._columns = parameter.shape[0], math.prod(parameter.shape[1:])

    @property
    def settings(self) -> dict[str, float]:
        return {"rank": self.rank, "hold": self.hold}

    def factors(self, terms: Sequence[Term], first: int, last: int) -> tuple[Tensor, Tensor]:
        """c Uᵀ/√r of rows first … last and Vᵀ of all columns, one below another for each term, in the working dtype."""
        weight = self.parameter
        each = torch.arange(self.rank, device=weight.device)
        left, right = [], []
        for key, coefficient in terms:
            u = self.distribution.sample(key, self.index, each * self._rows + first, last - first)
            held = Key(key.seed, key.step - key.step % self.hold)
            start = self.rank * self._rows  # behind all of U's
            v = self.distribution.sample(held, self.index, each * self._columns + start, self._columns)
            left.append(u * (coefficient / math.sqrt(self.rank)))
            right.append(v)
        dtype = working_dtype(weight.dtype)
        return torch.cat(left).to(dtype), torch.cat(right).to(dtype)

    def noise(self, terms: Sequence[Term], start: int, length: int) -> Tensor:
        first, last = start // self._columns, -(-(start + length) // self._columns)
        return outer_sum(*self.factors(terms, first, last)).view(-1)[start - first * self._columns :][:length]

    def linear(self, x: Tensor, bias: Tensor | None, terms: Sequence[Term], scratch: Scratch) -> Tensor:
        out = F.linear(x, self.parameter, bias)
        left, right = self.factors(terms, 0, self._rows)
        return out.add_(F.linear(F.linear(x, right.to(x.dtype)), left.T.to(x.dtype)))

    def rows(self, indices: Tensor, terms: Sequence[Term]) -> Tensor:
        weight = self.parameter.detach()
        if weight.dim() != 2:
            return super().rows(indices, terms)
        left, right = self.factors(terms, 0, self._rows)
        noise = torch.zeros((), dtype=left.dtype, device=left.device)
        for u, v in zip(left, right, strict=True):
            noise = noise + u[indices][..., None] * v
        return (weight[indices].to(left.dtype) + noise).to(weight.dtype)
