"""The code that oneDNN, which multiplies matrices on CPUs, keeps for the shapes it met.

It compiles code for every shape and keeps the last 1,024 of it, in two caches: 0.64 MB for each shape of a bfloat16 product. A
language model has some seven products for every length of batch, so that training on texts of 30 lengths holds 130 MB, which is
half of SmolLM2-135M. 64 shapes are the lengths of the last few steps; compiling one takes 1 to 2 ms.
"""

from __future__ import annotations

import os

SHAPES = 64
_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and that of PyTorch's binding


def keep_few_shapes() -> str:
    """Bound both caches to :data:`SHAPES` by this process's environment, except where the user has set them.

    oneDNN reads the variables once, when it computes a process's first product; a later change has no effect.

    Returns:
        A sentence for the log, or "" where nothing was changed.
    """
    missing = [name for name in _CAPACITIES if name not in os.environ]
    os.environ.update(dict.fromkeys(missing, str(SHAPES)))
    if not missing:
        return ""
    return (
        f"set {' and '.join(missing)} to {SHAPES} in this process, so that oneDNN keeps compiled code for {SHAPES} shapes of "
        "input only; it has no effect if a model has already run in this process. Set the variables yourself to choose."
    )
