"""The noise of perturbations: independent, zero-mean, unit-variance noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..types import Key
from .philox import philox4x32, philox_key, rounding_query

MAX_QUERIES = 1 << 31
_ORDER_LEAF = (1 << 32) - 1  # no module has so many parameters


class Distribution(ABC):
    """Noise as a pure function: element ``e`` of a leaf comes from Philox block ``e // per_block``, place ``e % per_block``.

    Counter (block low, block high, leaf, query), key from (seed, step): no device, thread count or chunking can
    change a value. A new distribution says how four 32-bit words become numbers, and nothing else.
    """

    name: ClassVar[str]
    per_block: ClassVar[int]
    native: ClassVar[int | None] = None  # its code in native.cpp

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "from_words" in cls.__dict__ and "native" not in cls.__dict__:
            cls.native = None  # the native kernels do not know a subclass with numbers of its own

    @abstractmethod
    def from_words(self, words: Tensor) -> Tensor:
        """(…, 4) words in [0, 2**32) as int64 → (…, per_block) float32 numbers."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def elements(dist: Distribution, key: Key, leaf: int, starts: Tensor, length: int, query: int | Tensor) -> Tensor:
    """``sample`` of :mod:`zolightning.noise` in plain torch: the definition that every other kernel has to match."""
    # asking a GPU whether the runs are aligned would wait for it
    aligned = starts.device.type == "cpu" and bool((starts % dist.per_block == 0).all())
    blocks = -(-length // dist.per_block) + (0 if aligned else 1)  # a run may start inside its first block
    index = (starts // dist.per_block)[:, None] + torch.arange(blocks, device=starts.device)
    values = dist.from_words(philox4x32(index, leaf, query, philox_key(key))).flatten(1)
    if aligned:
        return values[:, :length]
    columns = (starts % dist.per_block)[:, None] + torch.arange(length, device=starts.device)
    return values.gather(1, columns)


def run(dist: Distribution, key: Key, leaf: int, start: int, length: int, device: torch.device, query: int) -> Tensor:
    """:func:`elements` for one run of which the host knows the start: float32 of shape (length,)."""
    block, skip = divmod(start, dist.per_block)
    count = -(-(skip + length) // dist.per_block)
    index = torch.arange(block, block + count, device=device)
    return dist.from_words(philox4x32(index, leaf, query, philox_key(key))).flatten()[skip : skip + length]


class Rademacher(Distribution):
    """±1 with equal odds, one bit an element: bit-identical on every device."""

    name = "rademacher"
    per_block = 128
    native = 0

    def from_words(self, words: Tensor) -> Tensor:
        bits = (words.to(torch.int32)[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
        return (1 - 2 * bits).flatten(-2).to(torch.float32)


class Gaussian(Distribution):
    r"""Standard normal by Box–Muller, :math:`\sqrt{-2\ln u}\,(\cos\varphi, \sin\varphi)`, a pair from each word.

    16 bits choose the radius, 16 the angle, both midpoints of equal parts: 2**32 different pairs, |z| <= 4.86, variance 1
    within 1e-5. The logarithm, sine and cosine are polynomials in separately rounded IEEE float32 operations, right within
    4e-6, so that the same bits come out wherever multiply and add are not contracted into one rounding.
    """

    name = "gaussian"
    per_block = 8
    native = 1

    def from_words(self, words: Tensor) -> Tensor:
        radius = _radius(words)
        cosine, sine = _cos_sin(words)
        return torch.stack((radius * cosine, radius * sine), dim=-1).flatten(-2)


DISTRIBUTIONS: dict[str, type[Distribution]] = {"rademacher": Rademacher, "gaussian": Gaussian}


class _Uniform16(Distribution):
    """Integers 0 … 65535 as float32: the rounding bits, eight a block."""

    name = "uniform16"
    per_block = 8

    def from_words(self, words: Tensor) -> Tensor:
        return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-2).to(torch.float32)


def rounding_bits(key: Key, leaf: int, start: int, length: int, device: torch.device) -> Tensor:
    """16 random bits an element for stochastic rounding, as int32 of shape (length,); independent of all noise."""
    return run(_Uniform16(), key, leaf, start, length, device, rounding_query(key)).to(torch.int32)


@lru_cache(maxsize=64)
def permutation(key: Key, count: int) -> tuple[int, ...]:
    """An order of 0 … count - 1 as a pure function of (seed, step), independent of all noise."""
    words = philox4x32(torch.arange(count), _ORDER_LEAF, 0, philox_key(key))[:, 0]
    return tuple(torch.argsort(words, stable=True).tolist())


@lru_cache(maxsize=256)
def scattering(key: Key, leaf: int, count: int) -> tuple[int, int]:
    """(a, b) such that e ↦ (a·e + b) mod count is an order of 0 … count - 1: a pure function of (seed, step, leaf).

    As :func:`permutation`, for so many elements that none of them can be stored; count < 2**31.
    """
    if count >= 1 << 31:
        raise ValueError(f"a parameter of {count:,} weights cannot be scattered; the largest has 2**31 - 1")
    shift, *steps = philox4x32(torch.arange(32), _ORDER_LEAF, leaf + 1, philox_key(key)).flatten().tolist()
    step = next((word % count for word in steps if count > 1 and math.gcd(word % count, count) == 1), 1)
    return step, shift % max(count, 1)


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root, which ``torch.sqrt`` is not: on some CPUs 0.7 % of its float32 results are off.

    No root of a float32 number lies so near the middle of two others that the double root could be rounded to the wrong
    one. (MPS has no float64; there Gaussian noise may differ in the last place.)
    """
    return torch.sqrt(x) if x.device.type == "mps" else torch.sqrt(x.to(torch.float64)).to(torch.float32)


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 ln u) for u = (2 low half + 1) / 2**17, float32."""
    u = (((word & 0xFFFF) * 2 + 1).to(torch.float32) * 2.0**-17).view(torch.int32)  # exact
    exponent = (u - 0x3F3504F3) >> 23  # of u = mantissa * 2**exponent, the mantissa in [sqrt(1/2), sqrt(2))
    x = (u - (exponent << 23)).view(torch.float32) - 1.0
    square = x * x
    # -2 ln(1 + x) / x by three lines at once, which is faster than one after another
    y = ((0.28674802 * x - 0.44629266) * square + (0.50928687 * x - 0.66456061)) * square + (0.99971165 * x - 2.000024)
    return _sqrt(exponent.to(torch.float32) * -1.3862944 + y * x)


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of an angle: 13 bits place it in (0, pi/4), the three highest choose among its eight images."""
    angle = (((word >> 15) & 0x3FFE) | 1).to(torch.float32) * (torch.pi / 4 / 2**14)
    square = angle * angle
    sine = (0.00815299 * square - 0.16662834) * square * angle + angle
    cosine = ((-0.00135978 * square + 0.04165629) * square - 0.49999895) * square + 1.0
    swap, flip_cos, flip_sin = ((word >> bit & 1).bool() for bit in (29, 31, 30))
    cos, sin = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    return torch.where(flip_cos, -cos, cos), torch.where(flip_sin, -sin, sin)
