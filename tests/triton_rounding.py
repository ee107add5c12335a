"""Rounding to bfloat16 by integers: Triton's interpreter cuts off what a GPU's instruction rounds to nearest."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(value):
    """A float32 as bfloat16, ties to even."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded).to(tl.int16)
