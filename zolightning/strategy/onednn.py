"""What oneDNN, which multiplies matrices on CPUs, keeps for the shapes it met.

It compiles code for every shape and keeps the last 1,024 of it, in two caches: 0.64 MB for each shape of a bfloat16 product. A
language model has some seven products for every length of batch, so that training on texts of 30 lengths holds 130 MB, which is
half of SmolLM2-135M. 64 shapes are the lengths of the last few steps; compiling one takes 1 to 2 ms.
"""

from __future__ import annotations

import os

SHAPES = 64
_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and that of PyTorch's binding


def keep_few_shapes() -> None:
    """Bound both caches to :data:`SHAPES`, where the user has not: read once, by the first product of a process."""
    for name in _CAPACITIES:
        os.environ.setdefault(name, str(SHAPES))
