"""A leaf whose directions are disjoint groups of its weights: between SPSA and coordinate-wise finite differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor, nn

from ..noise import Distribution, noise_sum, perturb_rows, scattering, working_dtype
from ..types import Key, Term
from .leaf import Leaf

_order = lru_cache(maxsize=1024)(scattering)


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
        self._count = parameter.numel()
        self.kept = self._count if kept is None else int(kept)

    @property
    def settings(self) -> dict[str, float]:
        return {"queries": self.queries, "begin": self.begin, "end": self.end, "kept": self.kept, "redraw": self.redraw}

    @property
    def still(self) -> bool:
        """No direction moves it."""
        return self.begin == self.end

    def moved(self, terms: Sequence[Term]) -> bool:
        """Whether one of these directions moves some of its weights."""
        return any(int(self.begin) <= term.key.query < math.ceil(self.end) for term in terms)

    def groups(self, key: Key, start: int, length: int) -> Tensor:
        """The direction that moves each of these elements in the key's step, int64; -1: none."""
        step, shift = self._order(key)
        elements = torch.arange(start, start + length, device=self.parameter.device)
        return self._direction((elements * step + shift) % max(self._count, 1))

    def members(self, key: Key) -> Tensor:
        """The elements that the key's direction moves, int64: as many steps as there are of them, not of weights."""
        width, query = (self.end - self.begin) / max(self.kept, 1), key.query - self.begin
        low, high = (0, self.kept) if self.still else (math.floor(query / width) - 2, math.ceil((query + 1) / width) + 2)
        places = torch.arange(max(0, low), max(0, low, min(self.kept, high)), device=self.parameter.device)
        step, shift = self._order(key)
        inverse = pow(step, -1, self._count) if step > 1 else 1
        return (places[self._direction(places) == key.query] - shift) * inverse % max(self._count, 1)

    def _order(self, key: Key) -> tuple[int, int]:
        return _order(Key(key.seed, key.step // self.redraw), self.index, max(self._count, 1))

    def _direction(self, place: Tensor) -> Tensor:
        width = (self.end - self.begin) / max(self.kept, 1)
        group = (self.begin + (place.double() + 0.5) * width).floor().long()
        group = group.clamp_(int(self.begin), math.ceil(self.end) - 1)
        return group.masked_fill_(place >= self.kept, -1)

    def perturb_into(self, out: Tensor, terms: Sequence[Term], first_row: int = 0) -> None:
        stored = self.parameter
        whole = stored.is_contiguous() and out.shape == stored.shape and stored.dtype != torch.float64  # noise is float32's
        if len(terms) != 1 or not whole:
            super().perturb_into(out, terms, first_row)
            return
        weight = stored.detach()
        (key, coefficient), members = terms[0], self.members(terms[0].key)
        out.copy_(weight)
        moved = torch.empty(members.numel(), 1, dtype=out.dtype, device=out.device)
        term = Term(key._replace(query=0), math.sqrt(self.queries) * coefficient)
        perturb_rows(moved, weight.view(-1, 1)[members], self.distribution, [term], self.index, members)
        out.view(-1)[members] = moved.view(-1)

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


def arrange(leaves: Sequence[GroupLeaf], queries: int | None, kept: Sequence[int], importance: Sequence[float]) -> None:
    """Give each leaf the weights that it trains, and its part of the directions.

    Args:
        leaves: all of a view.
        queries: q of a step; no more than there are kept weights are used. None: as many as these.
        kept: weights that a step trains, of each leaf.
        importance: of each leaf, >= 0. The directions are dealt out in proportion to it; no leaf gets more than it keeps.
    """
    queries = queries or sum(kept)
    parts = _dealt(min(queries, sum(kept)), kept, importance)
    ends = [_rounded(math.fsum(parts[: i + 1])) for i in range(len(parts))]
    for leaf, count, begin, end in zip(leaves, kept, [0.0, *ends], ends, strict=False):
        leaf.queries, leaf.kept, leaf.begin, leaf.end = queries, count if end > begin else 0, begin, end


def deal(total: int, most: Sequence[int], importance: Sequence[float]) -> list[int]:
    """Whole shares of the total in proportion to importance, none beyond its most; the rest goes by size."""
    return _whole(_dealt(total, most, importance))


def _dealt(total: float, most: Sequence[int], importance: Sequence[float]) -> list[float]:
    """Shares of the total in proportion to importance, none beyond its most; the rest goes by size."""
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
