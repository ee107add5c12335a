"""Peak memory of each method: on a CPU in a process of its own, on a GPU by its allocator's count."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import NamedTuple

from ...records.memory import MemoryMeter, tensor_bytes
from ..processes import OwnProcess, ProcessFailed, quiet_libraries
from .measure import fits, out_of_memory
from .methods import LR, METHODS, Method
from .workload import Spec, Unavailable

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Memory(NamedTuple):
    """A method's peak, or why there is none.

    Args:
        peak: bytes, the weights included; None where it was not measured.
        weights: bytes of the model.
        reason: why the method cannot run; "" when it can.
    """

    peak: int | None
    weights: int
    reason: str = ""


def measure_memory(spec: Spec, method: Method, steps: int = 2) -> Memory:
    """The most memory that ``steps`` steps hold, measured in a fresh process; on a GPU in this one.

    That process gives freed memory back to the system at once, so that resident memory is the memory in use, without
    memory that the C library keeps for later.

    Raises:
        RuntimeError: the process failed for another reason than memory; its own message is on standard error.
    """
    if spec.device == "cuda":
        found = _attempt(spec, method, steps)
        gc.collect()  # the model is gone before the next one comes
        return found
    process = OwnProcess(spec.threads, _MALLOC, preload=__name__)
    try:
        return process.call(_attempt_by_name, spec, method.name, steps)
    except ProcessFailed as error:
        if error.exitcode == -9:
            return Memory(None, 0, "its process was killed by the system, which does so when memory runs out")
        raise RuntimeError(f"measuring the memory of {method.name} ended with exit code {error.exitcode}") from None


@quiet_libraries()
def _attempt_by_name(spec: Spec, name: str, steps: int) -> Memory:
    return _attempt(spec, METHODS[name], steps)  # a method itself cannot be pickled


def _attempt(spec: Spec, method: Method, steps: int) -> Memory:
    try:
        return peak_here(spec, method, steps)
    except Unavailable as error:
        return Memory(None, 0, str(error))
    except Exception as error:
        if not out_of_memory(error):
            raise
        return Memory(None, 0, "out of memory")


def peak_here(spec: Spec, method: Method, steps: int) -> Memory:
    """The peak in this process, in which nothing else should have run."""
    tiny = replace(spec, model="tiny-llama", batch=2, length=4)
    method.setup(method.workload(tiny)).step(LR)  # libraries load their parts before memory is measured
    work = method.workload(spec)
    weights = tensor_bytes(work.model.parameters())
    if not fits(method.state * weights, work.device):
        return Memory(
            None, weights, f"needs over {method.state * weights / 1e9:.1f} GB in addition to the weights, which is not free"
        )
    meter = MemoryMeter(work.model, work.device)
    running = method.setup(work)
    for _ in range(steps):
        running.step(LR)
    return Memory(meter.peak(), weights)
