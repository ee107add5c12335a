"""What a perturbation is made of: independent, zero-mean, unit-variance noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..types import Key, Term
from . import rungs
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
            cls.native = None  # a subclass with numbers of its own is not what the native kernels know

    @abstractmethod
    def from_words(self, words: Tensor) -> Tensor:
        """(…, 4) words in [0, 2**32) as int64 → (…, per_block) float32 numbers."""

    def sample(self, key: Key, leaf: int, starts: Tensor, length: int, queries: Tensor | None = None) -> Tensor:
        """Elements ``start … start + length`` of a leaf's noise for each start.

        Args:
            key: which direction.
            leaf: the leaf's index.
            starts: int64 of shape (n,), on the device where the noise is wanted.
            length: elements in each run.
            queries: int64 of shape (n,): one query a run, in place of the key's.

        Returns:
            float32 of shape (n, length).
        """
        library = rungs.library() if self.native is not None and starts.device.type == "cpu" else None
        if library is not None and self.native is not None:
            return library.noise(self.native, [Term(key, 1.0)], leaf, starts, length, queries)
        return elements(self, key, leaf, starts, length, key.query if queries is None else queries[:, None])

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def elements(dist: Distribution, key: Key, leaf: int, starts: Tensor, length: int, query: int | Tensor) -> Tensor:
    """:meth:`Distribution.sample` in plain torch: the definition that every other kernel has to match."""
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
    r"""Standard normal by Box–Muller, :math:`\sqrt{-2\ln u_1}\,(\cos 2\pi u_2, \sin 2\pi u_2)`, two pairs a block.

    The logarithm, sine and cosine are polynomials (Cephes) in separately rounded IEEE float32 operations, so that the
    same bits come out wherever multiply and add are not contracted into one rounding. |z| <= 5.9.
    """

    name = "gaussian"
    per_block = 4
    native = 1

    def from_words(self, words: Tensor) -> Tensor:
        radius = _sqrt(-2.0 * _log_unit(words[..., 0::2]))
        cosine, sine = _cos_sin_turn(words[..., 1::2])
        return torch.stack((radius * cosine, radius * sine), dim=-1).flatten(-2)


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


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root, which ``torch.sqrt`` is not: on some CPUs 0.7 % of its float32 results are off.

    No root of a float32 number lies so near the middle of two others that the double root could be rounded to the wrong
    one. (MPS has no float64; there Gaussian noise may differ in the last place.)
    """
    return torch.sqrt(x) if x.device.type == "mps" else torch.sqrt(x.to(torch.float64)).to(torch.float32)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    result = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        result = result * x + c
    return result


def _log_unit(word: Tensor) -> Tensor:
    """ln(u) for u = (word >> 8 + 1) / 2**24 in (0, 1], float32."""
    u = ((word >> 8) + 1).to(torch.float32) * 2.0**-24  # exact: at most 24 bits
    bits = u.view(torch.int32)
    exponent = (bits >> 23) - 126
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).view(torch.float32)  # [0.5, 1)
    low = mantissa < 0.70710678
    exponent = (exponent - low.to(torch.int32)).to(torch.float32)
    x = torch.where(low, mantissa + mantissa, mantissa) - 1.0
    square = x * x
    y = _polynomial(x, (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
                        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1))  # fmt: skip
    y = y * x * square
    y = y + exponent * -2.12194440e-4
    y = y - square * 0.5
    return (x + y) + exponent * 0.693359375


def _cos_sin_turn(word: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi u for u = (word >> 8) / 2**24: the quadrant is taken in integers, the rest is within pi/4."""
    turn = word >> 8
    quadrant = ((turn + (1 << 21)) >> 22) & 3
    angle = (((turn + (1 << 21)) & ((1 << 22) - 1)) - (1 << 21)).to(torch.float32) * (2 * torch.pi / 2**24)
    square = angle * angle
    sine = _polynomial(square, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)) * square * angle + angle
    cosine = _polynomial(square, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2))
    cosine = cosine * square * square - square * 0.5 + 1.0
    swap = (quadrant & 1).bool()
    cos, sin = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    flip_cos = ((quadrant + 1) & 2).bool()  # quadrants 1 and 2
    flip_sin = (quadrant & 2).bool()  # quadrants 2 and 3
    return torch.where(flip_cos, -cos, cos), torch.where(flip_sin, -sin, sin)
