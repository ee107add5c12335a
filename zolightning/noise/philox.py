"""Philox4x32-10: random bits as a pure function of (key, counter), by integer arithmetic only.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". This is the reference form, in plain torch integer
operations on any device; ``native.cpp`` gives the same bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..types import Key

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32(block: Tensor, leaf: int, query: int | Tensor, key: tuple[int, int]) -> Tensor:
    """Four 32-bit words for each block index: the counter is (block low, block high, leaf, query).

    Args:
        block: int64 block indices >= 0, any shape.
        leaf: third counter word.
        query: fourth counter word; a tensor broadcasts against ``block``.
        key: the two key words.

    Returns:
        int64 of shape (*block.shape, 4), each value in [0, 2**32).
    """
    c0, c1 = block & _MASK32, (block >> 32) & _MASK32
    c2 = torch.full_like(block, leaf)
    c3 = torch.zeros_like(block) + query
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap, which leaves all 64 bits right; the shift is arithmetic, hence the mask
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _finalise(x: int) -> int:
    """SplitMix64's output function, a bijection on 64 bits that spreads neighbouring inputs."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def philox_key(key: Key) -> tuple[int, int]:
    """The Philox key of a step: a bijection of the step for each seed, so no two steps of a run share noise."""
    return step_words(key.seed, key.step)


@lru_cache(maxsize=256)  # every leaf and query of a step asks for the same
def step_words(seed: int, step: int) -> tuple[int, int]:
    """The two words of :func:`philox_key`."""
    word = _finalise((_finalise((seed + 0x9E3779B97F4A7C15) & _MASK64) + step) & _MASK64)
    return word & _MASK32, word >> 32


def rounding_query(key: Key) -> int:
    """The query word of a key's rounding bits: in the upper half, where no direction is (see ``MAX_QUERIES``)."""
    return 1 << 31 | key.query
