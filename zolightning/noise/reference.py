"""The kernels in plain torch: they run on any device, and every other backend has to give the same bits.

All arithmetic is float32 (float64 for float64 leaves), every product and sum rounded by itself. Elements are numbered in
row-major order whatever the memory layout. Chunks only bound the temporaries: they change no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from ..types import Key, Term
from .distributions import Distribution, elements, rounding_bits, run

CHUNK = 1 << 18  # elements
_DEVICE_CHUNK = 1 << 22  # where it is the kernel launches that take time
NoiseSum = Callable[[Distribution, Sequence[Term], int, int, int, torch.device], Tensor]
OuterSum = Callable[[Tensor, Tensor], Tensor]
_LARGEST = {torch.bfloat16: 0x7F7F0000, torch.float16: 0x477FE000}  # the largest finite numbers, as bits of a float32


@cache  # each read of a leaf asks
def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where arithmetic on a leaf happens: float64 for float64 leaves, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pieces(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(index of the first element, view) of about CHUNK elements each; works on any memory layout."""
    for offset, (view,) in _slices(tensor):
        yield offset, view


def _slices(*tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """:func:`pieces` of tensors of one shape, cut alike."""
    flat = tuple(t.view(-1) for t in tensors) if all(t.is_contiguous() for t in tensors) else tensors
    width = flat[0][0].numel() if flat[0].numel() else 1
    chunk = CHUNK if flat[0].device.type == "cpu" else _DEVICE_CHUNK
    rows = max(1, chunk // max(1, width))
    for row in range(0, flat[0].shape[0], rows):
        yield row * width, tuple(t[row : row + rows] for t in flat)


def noise_sum(dist: Distribution, terms: Sequence[Term], leaf: int, start: int, length: int, device: torch.device) -> Tensor:
    """Σ_k c_k z_k over elements ``start … start + length``: float32 of shape (length,), summed in the terms' order."""
    total = torch.zeros(length, dtype=torch.float32, device=device)
    for at in range(0, length, CHUNK):  # several int64 temporaries an element of it
        piece = total[at : at + CHUNK]
        for k, (key, coefficient) in enumerate(terms):
            z = run(dist, key, leaf, start + at, piece.numel(), device, key.query)
            torch.add(piece, z * coefficient, out=piece) if k else torch.mul(z, coefficient, out=piece)
    return total


@torch.no_grad()
def perturb(out: Tensor, source: Tensor, dist: Distribution, terms: Sequence[Term], leaf: int, start: int) -> None:
    """``out = source + Σ_k c_k z_k``."""
    for offset, (to, piece) in _slices(out, source):
        noise = noise_sum(dist, terms, leaf, start + offset, piece.numel(), piece.device).view(piece.shape)
        to.copy_(piece.to(working_dtype(source.dtype)) + noise)


@torch.no_grad()
def perturb_rows(out: Tensor, source: Tensor, dist: Distribution, terms: Sequence[Term], leaf: int, rows: Tensor) -> None:
    """``out[j] = source[j] + Σ_k c_k z_k``, the noise being that of row ``rows[j]`` of the leaf."""
    width = source.shape[1]
    count = max(1, CHUNK // max(1, width))
    for at in range(0, rows.numel(), count):
        piece = rows[at : at + count]
        noise = torch.zeros(piece.numel(), width, dtype=torch.float32, device=source.device)
        for k, (key, coefficient) in enumerate(terms):
            z = elements(dist, key, leaf, piece * width, width, key.query) * coefficient
            noise = noise + z if k else z
        out[at : at + count].copy_(source[at : at + count].to(working_dtype(source.dtype)) + noise)


@torch.no_grad()
def stochastic_round_(target: Tensor, value: Tensor, key: Key, leaf: int, start: int) -> None:
    """Store ``value``, rounded up or down with odds given by the distance to each neighbour."""
    if target.dtype not in _LARGEST:
        target.copy_(value)
        return
    for offset, (to, piece) in _slices(target, value):
        random = rounding_bits(key, leaf, start + offset, piece.numel(), piece.device).view(piece.shape)
        to.copy_(_round(piece.contiguous(), random, target.dtype))


def _round(value: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    bits = value.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((bits + random) & ~0xFFFF).view(torch.float32)
    else:  # 13 bits fall away; below 2**-14 float16 is a fixed grid of 2**-24
        rounded = ((bits + (random & 0x1FFF)) & ~0x1FFF).view(torch.float32)
        scaled = value.abs() * 2.0**24
        whole = scaled.floor()
        up = random.to(torch.float32) + 0.5 < (scaled - whole) * 2.0**16
        tiny = torch.copysign((whole + up.to(torch.float32)) * 2.0**-24, value)
        rounded = torch.where(scaled < 1024.0, tiny, rounded)
    return torch.where((bits & 0x7FFFFFFF) <= _LARGEST[dtype], rounded, value)  # beyond: to nearest, as any cast


def sgd_(
    target: Tensor,
    dist: Distribution,
    terms: Sequence[Term],
    leaf: int,
    start: int,
    lr: float,
    weight_decay: float,
    key: Key,
    noise: NoiseSum = noise_sum,
) -> None:
    """``w -= lr * (Σ_k c_k z_k + weight_decay * w)``."""

    def gradient(offset: int, length: int) -> Tensor:
        return noise(dist, terms, leaf, start + offset, length, target.device)

    _descend_(target, gradient, leaf, start, lr, weight_decay, key)


@torch.no_grad()
def _descend_(
    target: Tensor, gradient: Callable[[int, int], Tensor], leaf: int, start: int, lr: float, weight_decay: float, key: Key
) -> None:
    """By the very operations of ``torch.optim.SGD`` in float32, float64."""
    wide = target.dtype not in _LARGEST
    for offset, (w,) in _slices(target):
        d = gradient(offset, w.numel()).view(w.shape)
        if wide:
            d = d.to(w.dtype)
            w.add_(d.add(w, alpha=weight_decay) if weight_decay else d, alpha=-lr)
        else:  # torch.add with alpha rounds once on some machines, twice on others
            value = w.to(torch.float32)
            d = d + value * weight_decay if weight_decay else d
            stochastic_round_(w, value - d * lr, key, leaf, start + offset)


def outer_sum(a: Tensor, b: Tensor) -> Tensor:
    """``Σ_k a[k, :, None] * b[k, None, :]``, summed in order."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=a.dtype, device=a.device)
    for left, right in zip(a, b, strict=True):
        total += left[:, None] * right
    return total


def outer_run(a: Tensor, b: Tensor, start: int, length: int, outer: OuterSum = outer_sum) -> Tensor:
    """``length`` elements of the sum from element ``start`` on, row-major."""
    columns = b.shape[1]
    first, last = start // columns, -(-(start + length) // columns)
    return outer(a[:, first:last].contiguous(), b).view(-1)[start - first * columns :][:length]


def outer_sgd_(
    target: Tensor,
    a: Tensor,
    b: Tensor,
    leaf: int,
    lr: float,
    weight_decay: float,
    key: Key,
    outer: OuterSum = outer_sum,
) -> None:
    """``w -= lr * (Σ_k a_k b_kᵀ + weight_decay * w)``."""

    def gradient(start: int, length: int) -> Tensor:
        return outer_run(a, b, start, length, outer)

    _descend_(target, gradient, leaf, 0, lr, weight_decay, key)


@torch.no_grad()
def keep_large_(out: Tensor, stored: Tensor, limit: float) -> None:
    """``out[i] = stored[i]`` where ``|stored[i]| > limit``."""
    for _, (to, piece) in _slices(out, stored):
        to.copy_(torch.where(piece.abs() > limit, piece.to(to.dtype), to))


_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64's, as signed words


def mixed_sum(words: Tensor, first: int) -> int:
    """Σ_i mix(word_i ^ (first + i)·STEP) modulo 2^64, in integer arithmetic that wraps, which every device does alike."""
    chunk = CHUNK if words.device.type == "cpu" else 1 << 24
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    places = torch.arange(min(chunk, words.numel()), device=words.device) * _STEP
    for start in range(0, words.numel(), chunk):
        piece = words[start : start + chunk]
        mixed = (places[: piece.numel()] + _signed((first + start) * _STEP)).bitwise_xor_(piece).mul_(_FIRST)
        mixed ^= (mixed >> 29).bitwise_and_((1 << 35) - 1)
        mixed *= _SECOND
        total += mixed.bitwise_xor_((mixed >> 32).bitwise_and_((1 << 32) - 1)).sum()
    return int(total) % (1 << 64)


def _signed(number: int) -> int:
    """As a signed 64-bit word."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
