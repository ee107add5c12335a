"""A leaf whose directions are disjoint groups of its weights: between SPSA and coordinate-wise finite differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from ..noise import Distribution, noise_sum, scattering, working_dtype
from ..types import Key, Term
from .leaf import Leaf


class GroupLeaf(Leaf):
    r"""±1 noise cut into the step's q directions, each of which moves a group of weights of its own:

    .. math:: z_k = \sqrt q\; s \odot [\,\text{group} = k\,], \qquad s_i = \pm 1

    Since :math:`z_k` has unit variance, the mean of :math:`g_k z_k` over the q directions is the *sum* of the groups'
    estimates. q = 1 is SPSA, and q = the number of weights is coordinate-wise estimation, whose finite difference moves a
    weight by :math:`\epsilon \sqrt q`. One pass of noise serves all directions, and neither groups nor masks are stored: a
    weight's place is a pure function of (seed, step, leaf, element). After DeepZero, arXiv:2310.02025.

    Args:
        name, index, parameter, distribution: see :class:`~zolightning.space.Leaf`; the noise must be ±1.
        queries: q, directions of a step over all leaves.
        begin: where its weights begin among the groups, in [0, q).
        end: where they end; group floor(begin + (end − begin)·(place + ½)/kept) holds the weight at that place.
        kept: how many of its weights a step perturbs and the gradient holds, drawn at random; the others get z = 0.
        redraw: steps after which places are drawn anew.
    """

    def __init__(
        self,
        name: str,
        index: int,
        parameter: nn.Parameter,
        distribution: Distribution,
        queries: float = 1,
        begin: float = 0.0,
        end: float = 1.0,
        kept: float | None = None,
        redraw: float = 1,
    ) -> None:
        super().__init__(name, index, parameter, distribution)
        self.queries, self.begin, self.end, self.redraw = int(queries), float(begin), float(end), int(redraw)
        self.kept = parameter.numel() if kept is None else int(kept)

    @property
    def settings(self) -> dict[str, float]:
        return {"queries": self.queries, "begin": self.begin, "end": self.end, "kept": self.kept, "redraw": self.redraw}

    def groups(self, key: Key, start: int, length: int) -> Tensor:
        """The direction that moves each of these elements in the key's step, int64; -1: none."""
        device, count = self.parameter.device, max(self.parameter.numel(), 1)
        step, shift = scattering(Key(key.seed, key.step // self.redraw), self.index, count)
        place = (torch.arange(start, start + length, device=device) * step + shift) % count
        width = (self.end - self.begin) / max(self.kept, 1)
        group = (self.begin + (place.double() + 0.5) * width).floor().long()
        group = group.clamp_(int(self.begin), math.ceil(self.end) - 1)
        return group.masked_fill_(place >= self.kept, -1)

    def noise(self, terms: Sequence[Term], start: int, length: int) -> Tensor:
        device, dtype = self.parameter.device, working_dtype(self.parameter.dtype)
        total = torch.zeros(length, dtype=dtype, device=device)
        for (seed, step), some in groupby(terms, lambda term: term.key[:2]):
            far = [0.0] * (self.queries + 1)  # the last is that of weights without a group
            for term in some:
                far[term.key.query] += math.sqrt(self.queries) * term.coefficient
            key = Key(seed, step)
            signs = noise_sum(self.distribution, [Term(key, 1.0)], self.index, start, length, device)
            total += signs.to(dtype) * torch.tensor(far, dtype=dtype).to(device)[self.groups(key, start, length)]
        return total


def arrange(leaves: Sequence[GroupLeaf], queries: int, sparsity: float, importance: Sequence[float]) -> None:
    """Give each leaf the weights that it trains, and its part of the directions.

    Args:
        leaves: all of a view.
        queries: q of a step; no more than there are weights are used.
        sparsity: share of all weights that a step leaves out, in [0, 1).
        importance: of each leaf, >= 0. The kept weights, and the directions among them, are dealt out in proportion to it; no
            leaf gets more than it has weights.
    """
    sizes = [leaf.parameter.numel() for leaf in leaves]
    kept = _whole(_dealt(round((1 - sparsity) * sum(sizes)), sizes, importance))
    parts = _dealt(min(queries, sum(kept)), kept, importance)
    ends = [_rounded(math.fsum(parts[: i + 1])) for i in range(len(parts))]
    for leaf, count, begin, end in zip(leaves, kept, [0.0, *ends], ends, strict=False):
        leaf.queries, leaf.kept, leaf.begin, leaf.end = queries, count if end > begin else 0, begin, end


def _dealt(total: float, most: Sequence[int], importance: Sequence[float]) -> list[float]:
    """Shares of the total in proportion to importance, none beyond its most; what is left goes by size."""
    given, left = [0.0] * len(most), float(total)
    for measure in (importance, most):
        open_ = [i for i, weight in enumerate(measure) if weight > 0 and given[i] == 0]
        while open_ and left > 0:
            scale = left / math.fsum(measure[i] for i in open_)
            full = [i for i in open_ if measure[i] * scale >= most[i]]
            for i in full or open_:
                given[i] = float(most[i]) if full else measure[i] * scale
            left = total - math.fsum(given)
            open_ = [i for i in open_ if i not in full] if full else []
    return given


def _whole(shares: Sequence[float]) -> list[int]:
    """Whole numbers of the same sum: the largest remainders are rounded up."""
    floors = [math.floor(share) for share in shares]
    missing = round(math.fsum(shares)) - sum(floors)
    up = sorted(range(len(shares)), key=lambda i: floors[i] - shares[i])[:missing]
    return [floor + (i in up) for i, floor in enumerate(floors)]


def _rounded(value: float) -> float:
    return float(round(value)) if abs(value - round(value)) < 1e-9 * max(1.0, value) else value
