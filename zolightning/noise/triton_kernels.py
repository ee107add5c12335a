"""The sweeps as Triton kernels, one pass over the weights each.

bfloat16 is read and written as integers; the GPU's own rounding to nearest is the reference's, which the self-test confirms.
``aligned`` says that runs begin with a block of noise; of the tensors in a table also that 16 divides their addresses and
lengths. ``single``: such a run of one term, without the loop over terms, which would lay its sum out anew.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .triton_noise import noise_at, random_at, random_of, random_run, sum_at, sum_run

_NUMBERS = ["leaf", "start", "width", "k0", "k1", "query", "count", "height", "columns"]


def _kernel(function: Any) -> Any:
    """Compiled once for all values of its numbers: 1 would become a constant, and each multiple of 16 a kernel of its own.

    Not of ``length``: where 16 divides it, the mask holds for all or none of the 16 bytes that are read and written at once.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in _NUMBERS])


@triton.jit
def _read(pointer, at, inside, narrow: tl.constexpr):
    value = tl.load(pointer + at, mask=inside, other=0)
    if narrow:  # a return in here would end no trace: the lines behind it are compiled as well
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _write(pointer, at, inside, value, narrow: tl.constexpr):
    if narrow:
        tl.store(pointer + at, _nearest(value), mask=inside)
    else:
        tl.store(pointer + at, value, mask=inside)


@triton.jit
def _nearest(value):
    """A float32 as bfloat16, ties to even."""
    return value.to(tl.bfloat16).to(tl.int16, bitcast=True)


@triton.jit
def _stochastic(value, random):
    """bfloat16, rounded up or down by 16 random bits an element; to nearest beyond the largest finite number."""
    bits = value.to(tl.uint32, bitcast=True)
    ordinary = (bits & 0x7FFFFFFF) <= 0x7F7F0000
    return tl.where(ordinary, ((bits + random) >> 16).to(tl.int16), _nearest(value))


@triton.jit
def _begin(size: tl.constexpr):
    """First element of the program's run."""
    return tl.program_id(0).to(tl.int64) * size


@_kernel
def perturb(
    out, source, terms, coefficients, count, leaf, start, length,
    kind: tl.constexpr, aligned: tl.constexpr, single: tl.constexpr,
    narrow_in: tl.constexpr, narrow_out: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """out = source + Σ_k c_k z_k."""
    first = _begin(size)
    at = first + tl.arange(0, size)
    inside = at < length
    value = _read(source, at, inside, narrow_in)
    value += sum_run(first + start, kind, aligned, single, terms, coefficients, count, leaf, size)
    _write(out, at, inside, value, narrow_out)


@_kernel
def perturb_both(
    plus, minus, source, terms, coefficients, leaf, start, length,
    kind: tl.constexpr, aligned: tl.constexpr, narrow_in: tl.constexpr, narrow_out: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """plus, minus = source ± c z."""
    first = _begin(size)
    at = first + tl.arange(0, size)
    inside = at < length
    value = _read(source, at, inside, narrow_in)
    noise = sum_run(first + start, kind, aligned, True, terms, coefficients, 1, leaf, size)
    _write(plus, at, inside, value + noise, narrow_out)
    _write(minus, at, inside, value - noise, narrow_out)


@_kernel
def perturb_rows(
    out, source, rows, terms, coefficients, count, leaf, width, length,
    kind: tl.constexpr, narrow_in: tl.constexpr, narrow_out: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """:func:`perturb` of rows of a matrix, given one after another."""
    at = _begin(size) + tl.arange(0, size)
    inside = at < length
    place = tl.load(rows + at // width, mask=inside, other=0) * width + at % width
    value = _read(source, at, inside, narrow_in) + sum_at(place, kind, terms, coefficients, count, leaf)
    _write(out, at, inside, value, narrow_out)


@_kernel
def sample(
    out, starts, queries, terms, coefficients, count, leaf, width, length,
    kind: tl.constexpr, own_queries: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """Σ_k c_k z_k from each start, or c z with a query for each."""
    at = _begin(size) + tl.arange(0, size)
    inside = at < length
    element = tl.load(starts + at // width, mask=inside, other=0) + at % width
    if own_queries:
        query = tl.load(queries + at // width, mask=inside, other=0)
        value = noise_at(element, kind, leaf, query, tl.load(terms), tl.load(terms + 1)) * tl.load(coefficients)
    else:
        value = sum_at(element, kind, terms, coefficients, count, leaf)
    tl.store(out + at, value, mask=inside)


@_kernel
def keep_large(out, stored, limits, length, narrow_in: tl.constexpr, narrow_out: tl.constexpr, size: tl.constexpr):
    """out = stored where it is large."""
    at = _begin(size) + tl.arange(0, size)
    inside = at < length
    value = _read(stored, at, inside, narrow_in)
    _write(out, at, inside & (tl.abs(value) > tl.load(limits)), value, narrow_out)


@_kernel
def perturb_all(
    table, terms, coefficients, count, kind: tl.constexpr, narrow: tl.constexpr, aligned: tl.constexpr, size: tl.constexpr
):
    """A row of the table for each program: source, out, leaf, start, length."""
    row = table + 5 * tl.program_id(0)
    leaf, start, length = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    if narrow:
        source, out = tl.load(row).to(tl.pointer_type(tl.int16)), tl.load(row + 1).to(tl.pointer_type(tl.int16))
    else:
        source, out = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 1).to(tl.pointer_type(tl.float32))
    if aligned:
        source, out, length = tl.multiple_of(source, 16), tl.multiple_of(out, 16), tl.multiple_of(length, 16)
    for first in range(0, length, size):
        at = first + tl.arange(0, size)
        inside = at < length
        value = _read(source, at, inside, narrow)
        value += sum_run(start + first, kind, True, False, terms, coefficients, count, leaf, size)
        _write(out, at, inside, value, narrow)


@_kernel
def sgd_all(
    table, terms, coefficients, count, k0, k1, query, rates,
    kind: tl.constexpr, aligned: tl.constexpr, single: tl.constexpr, decays: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    """A row of the table for each program: target (twice), leaf, start, length."""
    row = table + 5 * tl.program_id(0)
    target = tl.load(row).to(tl.pointer_type(tl.int16))
    leaf, start, length = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    if aligned:
        target, length = tl.multiple_of(target, 16), tl.multiple_of(length, 16)
    for first in range(0, length, size):
        at = first + tl.arange(0, size)
        inside = at < length
        old = _read(target, at, inside, True)
        gradient = sum_run(start + first, kind, aligned, single, terms, coefficients, count, leaf, size)
        if decays:
            gradient = gradient + old * tl.load(rates + 1)
        updated = old - gradient * tl.load(rates)
        random = random_run(start + first, aligned, leaf, query, k0, k1, size)
        tl.store(target + at, _stochastic(updated, random), mask=inside)


@_kernel
def stochastic_round(target, value, leaf, start, length, k0, k1, query, aligned: tl.constexpr, size: tl.constexpr):
    """target = value, rounded by random bits."""
    first = _begin(size)
    at = first + tl.arange(0, size)
    inside = at < length
    number = tl.load(value + at, mask=inside, other=0)
    random = random_run(first + start, aligned, leaf, query, k0, k1, size)
    tl.store(target + at, _stochastic(number, random), mask=inside)


@_kernel
def outer_sum(a, b, out, count, height, columns, size: tl.constexpr):
    """Σ_k a_k b_kᵀ."""
    at = _begin(size) + tl.arange(0, size)
    inside = at < height * columns
    row, column = at // columns, at % columns
    total = tl.zeros((size,), tl.float32)
    for k in range(count):
        total += tl.load(a + k * height + row, mask=inside, other=0) * tl.load(b + k * columns + column, mask=inside, other=0)
    tl.store(out + at, total, mask=inside)


@_kernel
def outer_sgd(
    target, a, b, count, height, columns, leaf, k0, k1, query, rates,
    aligned: tl.constexpr, decays: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """A tile of rows and columns for each program; ``aligned``: 8 divides the columns, 16 the address."""
    if aligned:
        columns = columns // 8 * 8  # so that the compiler knows: a hint is lost on an argument
    row, first = tl.program_id(0) * tall + tl.arange(0, tall), tl.program_id(1) * wide
    column = first + tl.arange(0, wide)
    down, across = row < height, column < columns
    at, inside = row.to(tl.int64)[:, None] * columns + column[None, :], down[:, None] & across[None, :]
    old = _read(target, at, inside, True)
    gradient = tl.zeros((tall, wide), tl.float32)
    for k in range(count):
        left = tl.load(a + k * height + row, mask=down, other=0)
        gradient += left[:, None] * tl.load(b + k * columns + column, mask=across, other=0)[None, :]
    if decays:
        gradient = gradient + old * tl.load(rates + 1)
    updated = old - gradient * tl.load(rates)
    if aligned:
        block = (row.to(tl.int64) * (columns // 8) + first // 8)[:, None] + tl.arange(0, wide // 8)[None, :]
        random = random_of(block, leaf, query, k0, k1)
    else:
        random = random_at(at, leaf, query, k0, k1)
    tl.store(target + at, _stochastic(updated, random), mask=inside)
