"""The threads of the native kernels are those of torch."""

from __future__ import annotations

import ctypes
from pathlib import Path


def parallel_region() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch uses, which libgomp, libomp and libiomp5 all have.

    Linking a runtime of our own could load a second one, whose threads would spin beside torch's.
    """
    candidates: list[str | None] = [None]
    maps = Path("/proc/self/maps")
    if maps.exists():
        files = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "omp" in line}
        candidates += sorted(f for f in files if Path(f).name.startswith(("libgomp", "libomp", "libiomp")))
    for name in candidates:  # the global scope first: torch's own calls are bound in that order
        try:
            return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
