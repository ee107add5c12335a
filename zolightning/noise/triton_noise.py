"""Noise on a GPU: the functions in Triton kernels. The bits of :mod:`.distributions`, every operation rounded by itself.

Two forms of each: ``…_at`` for elements anywhere, which makes a whole Philox block for each of them, and ``…_run`` for a run
that begins with a block, which makes each block once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(block, leaf, query, k0, k1):
    """The four words of each block, in uint32."""
    c0, c1 = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0) + leaf.to(tl.uint32), tl.zeros_like(c0) + query.to(tl.uint32)
    k0, k1 = k0.to(tl.uint32), k1.to(tl.uint32)
    m0, m1 = tl.full((1,), 0xD2511F53, tl.uint32), tl.full((1,), 0xCD9E8D57, tl.uint32)
    w0, w1 = tl.full((1,), 0x9E3779B9, tl.uint32), tl.full((1,), 0xBB67AE85, tl.uint32)
    k0, k1 = k0 + tl.zeros_like(w0), k1 + tl.zeros_like(w1)
    for _ in tl.static_range(10):
        high, low = tl.umulhi(c0, m0), c0 * m0
        c0, c1 = tl.umulhi(c2, m1) ^ c1 ^ k0, c2 * m1
        c2, c3 = high ^ c3 ^ k1, low
        k0, k1 = k0 + w0, k1 + w1
    return c0, c1, c2, c3


@triton.jit
def words(block, which, leaf, query, k0, k1):
    """Word ``which`` of each block; one of the two may be a column, the other a row."""
    c0, c1, c2, c3 = philox(block, leaf, query, k0, k1)
    return tl.where(which == 0, c0, tl.where(which == 1, c1, tl.where(which == 2, c2, c3)))


@triton.jit
def sign(word, bit):
    """-1 or 1 by a bit of the word."""
    return 1.0 - 2.0 * ((word >> bit.to(tl.uint32)) & 1).to(tl.float32)


@triton.jit
def signed_one(word, bit: tl.constexpr):
    """The same for a bit that is known beforehand: the float's own sign."""
    return (((word << (31 - bit)) & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def normals(word):
    """Both numbers that a word makes."""
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
    swap = ((word >> 29) & 1) == 1
    first, second = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    first = tl.where(((word >> 31) & 1) == 1, -first, first)
    second = tl.where(((word >> 30) & 1) == 1, -second, second)
    return radius * first, radius * second


@triton.jit
def noise_at(element, kind: tl.constexpr, leaf, query, k0, k1):
    """z of each element."""
    if kind == 0:
        value = sign(words(element >> 7, (element >> 5) & 3, leaf, query, k0, k1), element & 31)
    else:
        first, second = normals(words(element >> 3, (element >> 1) & 3, leaf, query, k0, k1))
        value = tl.where((element & 1) == 0, first, second)
    return value


@triton.jit
def interleave(a, b, c, d):
    """a₀, b₀, c₀, d₀, a₁, …: a thread's own numbers side by side, so nothing is exchanged."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def words_run(first, leaf, query, k0, k1, blocks: tl.constexpr):
    """All words of so many blocks, one after another."""
    c0, c1, c2, c3 = philox(first + tl.arange(0, blocks), leaf, query, k0, k1)
    return interleave(c0, c1, c2, c3)


@triton.jit
def noise_run(start, kind: tl.constexpr, leaf, query, k0, k1, size: tl.constexpr):
    """z of ``start … start + size``, where 128 divides both."""
    if kind == 0:
        word = (start >> 5) + tl.arange(0, size // 32)
        drawn = words(word >> 2, word & 3, leaf, query, k0, k1)
        group = tl.arange(0, size // 8)  # 8 elements each, which a thread reads at once
        own = tl.reshape(tl.broadcast_to(drawn[:, None], (size // 32, 4)), (size // 8,)) >> ((group & 3) * 8).to(tl.uint32)
        even = interleave(signed_one(own, 0), signed_one(own, 2), signed_one(own, 4), signed_one(own, 6))
        odd = interleave(signed_one(own, 1), signed_one(own, 3), signed_one(own, 5), signed_one(own, 7))
        value = tl.interleave(even, odd)
    else:
        first, second = normals(words_run(start >> 3, leaf, query, k0, k1, size // 8))
        value = tl.interleave(first, second)
    return value


@triton.jit
def random_of(block, leaf, query, k0, k1):
    """16 random bits for each element of the blocks, 8 of them side by side in the place of each."""
    c0, c1, c2, c3 = philox(block, leaf, query, k0, k1)
    word = interleave(c0, c1, c2, c3)
    return tl.interleave(word & 0xFFFF, word >> 16)


@triton.jit
def random_at(element, leaf, query, k0, k1):
    """The same for elements anywhere."""
    word = words(element >> 3, (element >> 1) & 3, leaf, query, k0, k1)
    return tl.where((element & 1) == 0, word & 0xFFFF, word >> 16)


@triton.jit
def random_run(start, aligned: tl.constexpr, leaf, query, k0, k1, size: tl.constexpr):
    """16 random bits for each of ``start … start + size``; ``aligned``: 8 divides both."""
    if aligned:
        bits = random_of((start >> 3) + tl.arange(0, size // 8), leaf, query, k0, k1)
    else:
        bits = random_at(start + tl.arange(0, size), leaf, query, k0, k1)
    return bits


@triton.jit
def sum_at(element, kind: tl.constexpr, terms, coefficients, count, leaf):
    """Σ_k c_k z_k in the terms' order; ``terms`` holds (k0, k1, query) of each."""
    total = tl.zeros(element.shape, tl.float32)
    for k in range(count):
        k0, k1, query = tl.load(terms + 3 * k), tl.load(terms + 3 * k + 1), tl.load(terms + 3 * k + 2)
        scaled = noise_at(element, kind, leaf, query, k0, k1) * tl.load(coefficients + k)
        total = tl.where(k == 0, scaled, total + scaled)
    return total


@triton.jit
def scaled_run(start, k, kind: tl.constexpr, terms, coefficients, leaf, size: tl.constexpr):
    """c_k z_k over ``start … start + size``, where 128 divides both."""
    k0, k1, query = tl.load(terms + 3 * k), tl.load(terms + 3 * k + 1), tl.load(terms + 3 * k + 2)
    return noise_run(start, kind, leaf, query, k0, k1, size) * tl.load(coefficients + k)


@triton.jit
def sum_run(
    start, kind: tl.constexpr, aligned: tl.constexpr, single: tl.constexpr, terms, coefficients, count, leaf, size: tl.constexpr
):
    """The same over ``start … start + size``; ``aligned``: 128 divides both; ``single``: there is one term."""
    if not aligned:
        total = sum_at(start + tl.arange(0, size), kind, terms, coefficients, count, leaf)
    elif single:
        total = scaled_run(start, 0, kind, terms, coefficients, leaf, size)
    else:
        total = tl.zeros((size,), tl.float32)
        for k in range(count):
            scaled = scaled_run(start, k, kind, terms, coefficients, leaf, size)
            total = tl.where(k == 0, scaled, total + scaled)
    return total
