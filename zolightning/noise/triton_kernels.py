"""The sweeps as fused Triton kernels, for tensors on a GPU: the bits of :mod:`.reference`, one pass each.

Numbers are made as in native.cpp, every product and sum rounded by itself (``enable_fp_fusion=False``); bfloat16 is read and
written as integers, so that its rounding is ours. Imported where Triton is installed only.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Key, Term
from . import reference
from .library import Library
from .philox import philox_key, rounding_query

BLOCK = 1024
PIECE = 1 << 15  # elements that a program of a table takes
_NUMBERS = ["leaf", "start", "width", "length", "k0", "k1", "query", "count", "height", "columns"]


def _kernel(function: Any) -> Any:
    """Compiled once for all values of its numbers: 1 would become a constant, and each multiple of 16 a kernel of its own."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in _NUMBERS])


@triton.jit
def _philox(block, leaf, query, k0, k1):
    c0, c1 = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0) + leaf.to(tl.uint32), tl.zeros_like(c0) + query.to(tl.uint32)
    k0, k1 = k0.to(tl.uint32), k1.to(tl.uint32)
    m0, m1 = tl.full((1,), 0xD2511F53, tl.uint32), tl.full((1,), 0xCD9E8D57, tl.uint32)
    w0, w1 = tl.full((1,), 0x9E3779B9, tl.uint32), tl.full((1,), 0xBB67AE85, tl.uint32)
    k0, k1 = k0 + tl.zeros_like(w0), k1 + tl.zeros_like(w1)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * m0.to(tl.uint64), c2.to(tl.uint64) * m1.to(tl.uint64)
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + w0, k1 + w1
    return c0, c1, c2, c3


@triton.jit
def _word(block, which, leaf, query, k0, k1):
    """Word ``which`` of each block."""
    c0, c1, c2, c3 = _philox(block, leaf, query, k0, k1)
    return tl.where(which == 0, c0, tl.where(which == 1, c1, tl.where(which == 2, c2, c3)))


@triton.jit
def _sign(element, leaf, query, k0, k1):
    word = _word(element >> 7, (element >> 5) & 3, leaf, query, k0, k1)
    return 1.0 - 2.0 * ((word >> (element & 31).to(tl.uint32)) & 1).to(tl.float32)


@triton.jit
def _normal(element, leaf, query, k0, k1):
    word = _word(element >> 3, (element >> 1) & 3, leaf, query, k0, k1)
    u = ((word & 0xFFFF) * 2 + 1).to(tl.float32) * 7.62939453125e-06
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = x * x
    y = ((0.28674802 * x - 0.44629266) * square + (0.50928687 * x - 0.66456061)) * square + (0.99971165 * x - 2.000024)
    radius = tl.sqrt_rn(exponent.to(tl.float32) * -1.3862944 + y * x)
    angle = (((word >> 15) & 0x3FFE) | 1).to(tl.float32) * 4.7936899621426287e-05
    square = angle * angle
    sine = (0.00815299 * square - 0.16662834) * square * angle + angle
    cosine = ((-0.00135978 * square + 0.04165629) * square - 0.49999895) * square + 1.0
    first = (element & 1) == 0
    swap = ((word >> 29) & 1) == 1
    value = tl.where(first != swap, cosine, sine)
    negative = tl.where(first, (word >> 31) & 1, (word >> 30) & 1) == 1
    return radius * tl.where(negative, -value, value)


@triton.jit
def _noise(element, kind: tl.constexpr, leaf, query, k0, k1):
    if kind == 0:  # noqa: SIM108  a ternary would compile both
        value = _sign(element, leaf, query, k0, k1)
    else:
        value = _normal(element, leaf, query, k0, k1)
    return value


@triton.jit
def _sum(element, kind: tl.constexpr, terms, coefficients, count, leaf):
    """Σ_k c_k z_k in the terms' order; ``terms`` holds (k0, k1, query) of each."""
    total = tl.zeros(element.shape, tl.float32)
    for k in range(count):
        k0, k1, query = tl.load(terms + 3 * k), tl.load(terms + 3 * k + 1), tl.load(terms + 3 * k + 2)
        scaled = _noise(element, kind, leaf, query, k0, k1) * tl.load(coefficients + k)
        total = tl.where(k == 0, scaled, total + scaled)
    return total


@triton.jit
def _read(pointer, at, inside, narrow: tl.constexpr):
    value = tl.load(pointer + at, mask=inside, other=0)
    if narrow:  # a return in here would end no trace: what follows it is compiled as well
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _nearest(value):
    """The upper half of a float32 rounded to bfloat16, ties to even."""
    bits = value.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, nearest)


@triton.jit
def _stochastic(value, element, leaf, query, k0, k1):
    """bfloat16 as int16, rounded up or down by 16 random bits an element."""
    word = _word(element >> 3, (element >> 1) & 3, leaf, query, k0, k1)
    random = tl.where((element & 1) == 0, word & 0xFFFF, word >> 16)
    bits = value.to(tl.uint32, bitcast=True)
    ordinary = (bits & 0x7FFFFFFF) <= 0x7F7F0000
    return tl.where(ordinary, (bits + random) >> 16, _nearest(value)).to(tl.int16)


@_kernel
def _perturb(
    out, source, rows, terms, coefficients, count, leaf, start, width, length,
    kind: tl.constexpr, by_row: tl.constexpr, narrow_in: tl.constexpr, narrow_out: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = at < length
    place = at
    if by_row:
        place = tl.load(rows + at // width, mask=inside, other=0) * width + at % width
    value = _read(source, place, inside, narrow_in) + _sum(place + start, kind, terms, coefficients, count, leaf)
    if narrow_out:
        tl.store(out + at, _nearest(value).to(tl.int16), mask=inside)
    else:
        tl.store(out + at, value, mask=inside)


@_kernel
def _perturb_both(
    plus, minus, source, terms, coefficients, leaf, start, length,
    kind: tl.constexpr, narrow_in: tl.constexpr, narrow_out: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = at < length
    value = _read(source, at, inside, narrow_in)
    noise = _noise(at + start, kind, leaf, tl.load(terms + 2), tl.load(terms), tl.load(terms + 1)) * tl.load(coefficients)
    if narrow_out:
        tl.store(plus + at, _nearest(value + noise).to(tl.int16), mask=inside)
        tl.store(minus + at, _nearest(value - noise).to(tl.int16), mask=inside)
    else:
        tl.store(plus + at, value + noise, mask=inside)
        tl.store(minus + at, value - noise, mask=inside)


@_kernel
def _sample(
    out, starts, queries, terms, coefficients, count, leaf, width, length,
    kind: tl.constexpr, own_queries: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = at < length
    element = tl.load(starts + at // width, mask=inside, other=0) + at % width
    if own_queries:
        query = tl.load(queries + at // width, mask=inside, other=0)
        value = _noise(element, kind, leaf, query, tl.load(terms), tl.load(terms + 1)) * tl.load(coefficients)
    else:
        value = _sum(element, kind, terms, coefficients, count, leaf)
    tl.store(out + at, value, mask=inside)


@_kernel
def _keep_large(out, stored, limits, length, narrow_in: tl.constexpr, narrow_out: tl.constexpr, size: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = at < length
    value = _read(stored, at, inside, narrow_in)
    large = inside & (tl.abs(value) > tl.load(limits))
    if narrow_out:
        tl.store(out + at, _nearest(value).to(tl.int16), mask=large)
    else:
        tl.store(out + at, value, mask=large)


@_kernel
def _perturb_all(table, terms, coefficients, count, kind: tl.constexpr, narrow: tl.constexpr, size: tl.constexpr):
    """A row of the table for each program: source, out, leaf, start, length."""
    row = table + 5 * tl.program_id(0)
    leaf, start, length = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    for first in range(0, length, size):
        at = first + tl.arange(0, size)
        inside = at < length
        noise = _sum(start + at, kind, terms, coefficients, count, leaf)
        if narrow:
            source, out = tl.load(row).to(tl.pointer_type(tl.int16)), tl.load(row + 1).to(tl.pointer_type(tl.int16))
            tl.store(out + at, _nearest(_read(source, at, inside, True) + noise).to(tl.int16), mask=inside)
        else:
            source, out = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 1).to(tl.pointer_type(tl.float32))
            tl.store(out + at, tl.load(source + at, mask=inside, other=0) + noise, mask=inside)


@_kernel
def _sgd_all(
    table, terms, coefficients, count, k0, k1, query, rates,
    kind: tl.constexpr, decays: tl.constexpr, aligned: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """A row of the table for each program: target (twice), leaf, start, length."""
    row = table + 5 * tl.program_id(0)
    target = tl.load(row).to(tl.pointer_type(tl.int16))
    if aligned:
        target = tl.multiple_of(target, 16)
    leaf, start, length = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    for first in range(0, length, size):
        at = first + tl.arange(0, size)
        inside, element = at < length, start + at
        old = _read(target, at, inside, True)
        gradient = _sum(element, kind, terms, coefficients, count, leaf)
        if decays:
            gradient = gradient + old * tl.load(rates + 1)
        updated = old - gradient * tl.load(rates)
        tl.store(target + at, _stochastic(updated, element, leaf, query, k0, k1), mask=inside)


@_kernel
def _round(target, value, leaf, start, length, k0, k1, query, size: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = at < length
    number = tl.load(value + at, mask=inside, other=0)
    tl.store(target + at, _stochastic(number, at + start, leaf, query, k0, k1), mask=inside)


@_kernel
def _outer(a, b, out, count, height, columns, size: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = at < height * columns
    row, column = at // columns, at % columns
    total = tl.zeros((size,), tl.float32)
    for k in range(count):
        total += tl.load(a + k * height + row, mask=inside, other=0) * tl.load(b + k * columns + column, mask=inside, other=0)
    tl.store(out + at, total, mask=inside)


_FORM = {torch.float32: False, torch.bfloat16: True}  # dtypes, and whether they are read as integers


class TritonLibrary(Library):
    """The kernels on contiguous tensors of one GPU."""

    description = f"Triton {triton.__version__}"

    def takes(self, tensor: Tensor) -> bool:
        return tensor.dtype in _FORM and tensor.is_contiguous()

    def rounds(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16

    def updates(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16  # how ``torch.add`` rounds wider ones is the device's business

    def noise(
        self, kind: int, terms: Sequence[Term], leaf: int, starts: Tensor, length: int, queries: Tensor | None = None
    ) -> Tensor:
        starts = starts.to(torch.int64).contiguous()
        own = starts if queries is None else queries.to(starts.device, torch.int64).expand(starts.shape).contiguous()
        out = torch.empty(starts.numel(), length, dtype=torch.float32, device=starts.device)
        data = (out, starts, own, *_terms(terms, out.device), len(terms), leaf, length, out.numel())
        _launch(_sample, out.numel(), *data, kind=kind, own_queries=queries is not None)
        return out

    def perturb(self, out: Tensor, source: Tensor, kind: int, terms: Sequence[Term], leaf: int, start: int) -> None:
        self._perturb(out, source, kind, terms, leaf, start, None, 1)

    def perturb_both(self, plus: Tensor, minus: Tensor, source: Tensor, kind: int, term: Term, leaf: int, start: int) -> None:
        data = (_raw(plus), _raw(minus), _raw(source), *_terms([term], source.device), leaf, start, source.numel())
        forms = {"narrow_in": _FORM[source.dtype], "narrow_out": _FORM[plus.dtype]}
        _launch(_perturb_both, source.numel(), *data, kind=kind, **forms)

    def perturb_rows(self, out: Tensor, source: Tensor, kind: int, terms: Sequence[Term], leaf: int, rows: Tensor) -> None:
        self._perturb(out, source, kind, terms, leaf, 0, rows.to(torch.int64).contiguous(), source.shape[1])

    def _perturb(
        self,
        out: Tensor,
        source: Tensor,
        kind: int,
        terms: Sequence[Term],
        leaf: int,
        start: int,
        rows: Tensor | None,
        width: int,
    ) -> None:
        data = (_raw(out), _raw(source), out if rows is None else rows, *_terms(terms, out.device), len(terms))
        forms = {"by_row": rows is not None, "narrow_in": _FORM[source.dtype], "narrow_out": _FORM[out.dtype]}
        _launch(_perturb, out.numel(), *data, leaf, start, width, out.numel(), kind=kind, **forms)

    def perturb_all(
        self, outs: Sequence[Tensor], sources: Sequence[Tensor], kind: int, terms: Sequence[Term], leaves: Sequence[int]
    ) -> None:
        device = sources[0].device
        table = _table(_rows(sources, outs, leaves, [0] * len(outs)), device)
        numbers = (*_terms(terms, device), len(terms))
        _each(_perturb_all, table, *numbers, kind=kind, narrow=_FORM[sources[0].dtype])

    def sgd_(
        self, target: Tensor, kind: int, terms: Sequence[Term], leaf: int, start: int, lr: float, weight_decay: float, key: Key
    ) -> None:
        self._sgd([target], kind, terms, [leaf], [start], lr, weight_decay, key)

    def sgd_all_(
        self, targets: Sequence[Tensor], kind: int, terms: Sequence[Term], leaves: Sequence[int],
        lr: float, weight_decay: float, key: Key,
    ) -> None:  # fmt: skip
        self._sgd(targets, kind, terms, leaves, [0] * len(targets), lr, weight_decay, key)

    def _sgd(
        self, targets: Sequence[Tensor], kind: int, terms: Sequence[Term], leaves: Sequence[int], starts: Sequence[int],
        lr: float, weight_decay: float, key: Key,
    ) -> None:  # fmt: skip
        device = targets[0].device
        table = _table(_rows(targets, targets, leaves, starts), device)
        numbers = (*_terms(terms, device), len(terms), *philox_key(key), rounding_query(key))
        aligned = all(t.data_ptr() % 16 == 0 for t in targets)
        rates = _floats(struct.pack("2d", lr, weight_decay), device)
        _each(_sgd_all, table, *numbers, rates, kind=kind, decays=weight_decay != 0.0, aligned=aligned)

    def stochastic_round_(self, target: Tensor, value: Tensor, key: Key, leaf: int, start: int) -> None:
        stream = (*philox_key(key), rounding_query(key))
        _launch(_round, target.numel(), _raw(target), value, leaf, start, target.numel(), *stream)

    def outer_sum(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        out = torch.empty(a.shape[1], b.shape[1], dtype=torch.float32, device=a.device)
        _launch(_outer, out.numel(), a, b, out, a.shape[0], *out.shape)
        return out

    def keep_large_(self, out: Tensor, stored: Tensor, limit: float) -> None:
        limits = _floats(struct.pack("d", limit), out.device)
        forms = {"narrow_in": _FORM[stored.dtype], "narrow_out": _FORM[out.dtype]}
        _launch(_keep_large, out.numel(), _raw(out), _raw(stored), limits, out.numel(), **forms)

    def mixed_sum(self, words: Tensor, first: int) -> int:
        return reference.mixed_sum(words, first)


def _launch(kernel: Any, length: int, *arguments: Any, **constants: Any) -> None:
    if length:
        kernel[(triton.cdiv(length, BLOCK),)](*arguments, **constants, size=BLOCK, enable_fp_fusion=False)


def _each(kernel: Any, table: Tensor, *arguments: Any, **constants: Any) -> None:
    """A program for each row of the table."""
    if len(table):
        kernel[(len(table),)](table, *arguments, **constants, size=BLOCK, enable_fp_fusion=False)


def _rows(
    sources: Sequence[Tensor], outs: Sequence[Tensor], leaves: Sequence[int], starts: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Source, out, leaf, start, length and bytes an element of each tensor."""
    data = zip(sources, outs, leaves, starts, strict=True)
    return tuple((s.data_ptr(), o.data_ptr(), leaf, start, s.numel(), s.element_size()) for s, o, leaf, start in data)


@lru_cache(maxsize=8)  # a step's tables are those of the step before
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int64 (n, 5): source, out, leaf, start, length of pieces small enough for a program each."""
    whole = torch.tensor(rows, dtype=torch.int64)
    length, wide = whole[:, 4], whole[:, 5]
    pieces = -(-length // PIECE)
    index = torch.repeat_interleave(torch.arange(len(rows)), pieces)
    first = torch.cumsum(pieces, 0) - pieces
    skipped = (torch.arange(len(index)) - first[index]) * PIECE
    table = whole[index, :5]
    table[:, :2] += (skipped * wide[index])[:, None]
    table[:, 3] += skipped
    table[:, 4] = torch.minimum(length[index] - skipped, torch.tensor(PIECE))
    return table.to(device)


def _raw(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _terms(terms: Sequence[Term], device: torch.device) -> tuple[Tensor, Tensor]:
    words = tuple(word for key, _ in terms for word in (*philox_key(key), key.query))
    return _integers(words or (0,), device), _floats(
        struct.pack(f"{len(terms) or 1}d", *([c for _, c in terms] or [0.0])), device
    )


@lru_cache(maxsize=8)  # all leaves of a step ask for the same, and a copy to the device waits for it
def _integers(words: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(words, dtype=torch.int64).to(device)


@lru_cache(maxsize=8)  # by their bytes: 0.0 and -0.0 are equal
def _floats(numbers: bytes, device: torch.device) -> Tensor:
    return torch.tensor(struct.unpack(f"{len(numbers) // 8}d", numbers), dtype=torch.float32).to(device)
