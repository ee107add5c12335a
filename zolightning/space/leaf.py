"""One stored tensor, and how the coordinates of z become a perturbation of it."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..noise import (
    Distribution,
    noise_sum,
    perturb,
    perturb_both,
    perturb_rows,
    pieces,
    sample,
    sgd_,
    stochastic_round_,
    working_dtype,
)
from ..types import Key, Term
from .cycle import Turn

HEAD_BLOCK = 1 << 21  # elements of a weight built at once: a vocabulary-sized head goes through in row blocks


def block_rows(shape: Sequence[int], elements: int = HEAD_BLOCK) -> int:
    """Rows of a matrix that are built at once: all, or as many as have so many elements."""
    count, columns = shape[0], math.prod(shape[1:])
    step = count if count * columns <= elements else max(1, elements // columns)
    return step - step % 128 if 128 < step < count else step  # a GPU's products of other widths take twice as long


class Scratch:
    """One reusable buffer for the perturbed weight of the operation that runs now.

    Args:
        trained: weights in all; on a GPU, where it is launches that cost, blocks of 1/64 of them are built at once.
    """

    def __init__(self, trained: int) -> None:
        self._trained = trained
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self._views: dict[tuple[int, int, int, torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    def take(self, copies: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """So many uninitialised matrices, valid until the next call."""
        form = (copies, rows, columns, dtype, device)
        views = self._views.get(form)
        if views is None:
            size = copies * rows * columns * dtype.itemsize
            if self.buffer.numel() < size or self.buffer.device != device:
                self._views.clear()
                self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
            views = self._views[form] = self.buffer[:size].view(dtype).view(copies, rows, columns).unbind()
        return views

    def row_blocks(self, weight: Tensor, copies: int = 1) -> list[tuple[int, int]]:
        """(first row, rows) of the blocks that a weight is built in, ``copies`` of them at once."""
        count = len(weight)
        step = block_rows(weight.shape, max(HEAD_BLOCK, self._trained // 64 if weight.is_cuda else 0) // copies)
        return [(0, count)] if step == count else [(row, min(step, count - row)) for row in range(0, count, step)]

    def release(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self._views.clear()


class Leaf(ABC):
    """A trained tensor. Subclasses define z; reading and updating follow from it.

    A new kind of perturbation is a subclass with :meth:`noise`: probes, updates by any optimizer, low precision and exact
    restore come with it. Override :meth:`linear`, :meth:`rows`, :meth:`perturb_into` and :meth:`sgd_` only where there is a
    faster way to the same numbers. ``noise`` may depend on the terms' keys, the leaf, its settings and the weights as they
    are, on nothing else. A :class:`~zolightning.space.Structure` says which parameters get it; a name in
    :data:`~zolightning.space.LEAVES` lets the ledger replay it.

    Args:
        name: the parameter's name in the module, for messages and selections.
        index: its place among *all* parameters of the module: the leaf word of the noise, so that freezing one
            parameter never changes the noise of another.
        parameter: the stored tensor; only ever read by a probe.
        distribution: of z's coordinates.
    """

    floor: float | None = None
    """The smallest value that an update leaves; None: any may be."""

    def __init__(self, name: str, index: int, parameter: nn.Parameter, distribution: Distribution) -> None:
        self.name, self.index, self.parameter, self.distribution = name, index, parameter, distribution
        self.turn: Turn | None = None
        """Which steps it takes part in; None: all."""
        self.first = 0
        """Place of the parameter's first element in the leaf: not 0 in a later part, see :meth:`on`."""

    @abstractmethod
    def noise(self, terms: Sequence[Term], start: int, length: int) -> Tensor:
        """Σ_k c_k z_k over elements ``start … start + length`` of the leaf, row-major, in its working dtype."""

    @property
    def per_example(self) -> bool:
        """Whether each example of a batch can read it along a direction of its own."""
        return False

    @property
    def settings(self) -> dict[str, float]:
        """The constructor's further arguments, which ledgers and checkpoints keep."""
        return {}

    def active(self, key: Key) -> bool:
        """Whether the key's step perturbs and updates it."""
        return self.turn is None or self.turn.now(key)

    def fixed(self, start: int, length: int) -> Tensor | None:
        """Which of these elements of the parameter an update must leave as they are, as booleans; None: no element."""
        return None

    def perturb_into(self, out: Tensor, terms: Sequence[Term], first_row: int = 0) -> None:
        """out = cast(W[rows] + Σ_k c_k z_k): ``out`` is contiguous and holds whole rows from ``first_row`` on."""
        rows = self.stored(out.shape, first_row)
        offset = first_row * math.prod(rows.shape[1:])
        flat = out.view(-1)
        for start, piece in pieces(rows):
            source = piece.to(working_dtype(piece.dtype)).reshape(-1)
            flat[start : start + piece.numel()] = source + self.noise(terms, offset + start, piece.numel())

    def stored(self, shape: torch.Size, first_row: int) -> Tensor:
        """The weight's rows from ``first_row`` on, of that shape: of an offloaded weight no others are read."""
        weight = self.parameter
        return (weight if shape == weight.shape else weight[first_row : first_row + shape[0]]).detach()

    def perturbed(self, terms: Sequence[Term]) -> Tensor:
        """W + Σ_k c_k z_k in the stored dtype, in new memory."""
        out = torch.empty(self.parameter.shape, dtype=self.parameter.dtype, device=self.parameter.device)
        self.perturb_into(out, terms)
        return out

    def gradient(self, terms: Sequence[Term]) -> Tensor:
        """Σ_k c_k z_k of the parameter's shape, dense, in the working dtype: for optimizers that keep state."""
        weight = self.parameter
        out = torch.empty(weight.shape, dtype=working_dtype(weight.dtype), device=weight.device)
        flat = out.view(-1)
        for start, piece in pieces(out):
            flat[start : start + piece.numel()] = self.noise(terms, self.first + start, piece.numel())
        return out

    def sgd_(self, terms: Sequence[Term], lr: float, weight_decay: float, key: Key) -> None:
        """W ← W − lr·(Σ_k c_k z_k + weight_decay·W), in torch.optim.SGD's arithmetic, without extra memory.

        Low-precision weights are updated in float32 and rounded stochastically by ``key``.
        """
        for start, piece in pieces(self.parameter.detach()):
            step = self.noise(terms, self.first + start, piece.numel()).view(piece.shape)
            fixed = self.fixed(start, piece.numel())
            before = None if fixed is None else piece.clone()
            exact = piece.to(working_dtype(piece.dtype))  # the piece itself where that is its dtype
            if weight_decay:
                step = step.add(exact, alpha=weight_decay)
            exact = exact.add_(step, alpha=-lr)
            if exact.dtype != piece.dtype:
                stochastic_round_(piece, exact, key, self.index, self.first + start)
            if fixed is not None and before is not None:
                keep_(piece, before, fixed)

    def linear(self, x: Tensor, bias: Tensor | None, terms: Sequence[Term], scratch: Scratch) -> Tensor:
        """F.linear(x, W + Σ_k c_k z_k, bias), the weight built in scratch, in the dtype that the product runs in."""
        weight, dtype = self.parameter, self._product_dtype()
        x = x.contiguous()  # torch copies a weight without gradient once per example for a strided input
        blocks = []
        for row, rows in scratch.row_blocks(weight):
            (block,) = scratch.take(1, rows, weight.shape[1], dtype, weight.device)
            self.perturb_into(block, terms, row)
            blocks.append(F.linear(x, block, None if bias is None else bias[row : row + rows]))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)

    def _product_dtype(self) -> torch.dtype:
        dtype, device = self.parameter.dtype, self.parameter.device.type
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            return torch.get_autocast_dtype(device)  # round once, as casting the perturbed weight would
        return dtype

    def rows(self, indices: Tensor, terms: Sequence[Term]) -> Tensor:
        """(W + Σ_k c_k z_k)[indices], negative ones counted from the end."""
        if indices.dim() or self.parameter.dim() < 2:
            return self.perturbed(terms)[indices]
        row = range(len(self.parameter))[int(indices)]
        out = torch.empty(1, *self.parameter.shape[1:], dtype=self.parameter.dtype, device=self.parameter.device)
        self.perturb_into(out, terms, row)
        return out[0]

    def on(self, parameter: nn.Parameter, first: int = 0) -> Leaf:
        """The same leaf, of another Parameter that holds the same weights, or whole rows of them, to be updated.

        Args:
            parameter: the other.
            first: place of its first element in the leaf.
        """
        twin = copy.copy(self)
        twin.parameter, twin.first = parameter, first
        return twin

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {tuple(self.parameter.shape)}, {self.parameter.dtype})"


class DenseLeaf(Leaf):
    """z has the parameter's shape: the identity map. A vector can be read by each example along a direction of its own."""

    @property
    def per_example(self) -> bool:
        return self.parameter.dim() == 1

    def each(self, key: Key, queries: Tensor, offsets: Tensor) -> Tensor:
        """(n, length of the vector): W + offsets[n] · z of query queries[n], in the stored dtype."""
        weight = self.parameter.detach()
        queries = queries.to(weight.device)
        noise = sample(self.distribution, key, self.index, torch.zeros_like(queries), weight.numel(), queries)
        moved = offsets.to(weight.device, noise.dtype)[:, None] * noise
        return (weight.to(working_dtype(weight.dtype)) + moved).to(weight.dtype)

    def noise(self, terms: Sequence[Term], start: int, length: int) -> Tensor:
        weight = self.parameter
        total = noise_sum(self.distribution, terms, self.index, start, length, weight.device)
        return total.to(working_dtype(weight.dtype))

    def perturb_into(self, out: Tensor, terms: Sequence[Term], first_row: int = 0) -> None:
        weight = self.stored(out.shape, first_row)
        if not weight.is_contiguous():
            super().perturb_into(out, terms, first_row)
            return
        perturb(out, weight, self.distribution, terms, self.index, first_row * math.prod(weight.shape[1:]))

    def linear_both(self, x: Tensor, plus: Tensor | None, minus: Tensor | None, term: Term, scratch: Scratch) -> Tensor:
        """F.linear of the first half of ``x`` with W + c z and ``plus``, of the second with W − c z and ``minus``."""
        weight, dtype = self.parameter, self._product_dtype()
        up, down = x.contiguous().chunk(2)
        blocks = []
        for row, rows in scratch.row_blocks(weight, copies=2):
            upper, lower = scratch.take(2, rows, weight.shape[1], dtype, weight.device)
            stored = weight if rows == len(weight) else weight[row : row + rows]
            perturb_both(upper, lower, stored, self.distribution, term, self.index, row * weight.shape[1])
            first, second = (None if bias is None else bias[row : row + rows] for bias in (plus, minus))
            blocks.append(torch.cat((F.linear(up, upper, first), F.linear(down, lower, second))))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)

    def sgd_(self, terms: Sequence[Term], lr: float, weight_decay: float, key: Key) -> None:
        weight = self.parameter.detach()
        if not weight.is_contiguous():
            super().sgd_(terms, lr, weight_decay, key)
            return
        sgd_(weight.view(-1), self.distribution, terms, self.index, self.first, lr, weight_decay, key)

    def rows(self, indices: Tensor, terms: Sequence[Term]) -> Tensor:
        weight = self.parameter
        if weight.dim() < 2:
            return super().rows(indices, terms)
        rows = indices.reshape(-1).to(weight.device, torch.int64)
        rows = torch.where(rows < 0, rows + weight.shape[0], rows)
        stored = weight[rows].detach().reshape(rows.numel(), math.prod(weight.shape[1:])).contiguous()
        return self.moved_rows(stored, rows, terms).view(*indices.shape, *weight.shape[1:])

    def moved_rows(self, stored: Tensor, rows: Tensor, terms: Sequence[Term]) -> Tensor:
        """The leaf's rows of these numbers at the point, given as they are stored, (n, columns)."""
        out = torch.empty_like(stored)
        perturb_rows(out, stored, self.distribution, terms, self.index, rows)
        return out


def keep_(now: Tensor, before: Tensor, fixed: Tensor) -> None:
    """Put the values from before back where ``fixed`` says so."""
    now.copy_(torch.where(fixed.view(now.shape), before.to(now.dtype), now))
