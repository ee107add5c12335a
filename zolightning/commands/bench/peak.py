"""Peak memory of each method, alone: on a CPU in a process of its own, on a GPU by its allocator's count."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from ...records.memory import MemoryMeter, tensor_bytes
from .measure import fits, hushed, out_of_memory
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

    That process gives freed memory back to the system at once, so that resident memory is what is in use and not what
    the C library kept for later.

    Raises:
        RuntimeError: the process failed for another reason than memory; its own message is on standard error.
    """
    if spec.device == "cuda":
        found = _attempt(spec, method, steps)
        gc.collect()  # the model is gone before the next one comes
        return found
    forks = sys.platform.startswith("linux")  # a fork server imports the libraries once for all methods
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__])
    receive, send = context.Pipe(duplex=False)
    with _environment(_MALLOC):
        process = context.Process(target=_child, args=(spec, method.name, steps, send))  # type: ignore[attr-defined]
        process.start()
    send.close()
    try:
        answer: Memory | None = receive.recv()
    except EOFError:
        answer = None
    process.join()
    if answer is not None:
        return answer
    if process.exitcode == -9:
        return Memory(None, 0, "its process was killed by the system, which does so when memory runs out")
    raise RuntimeError(f"measuring the memory of {method.name} ended with exit code {process.exitcode}")


@hushed()
def _child(spec: Spec, name: str, steps: int, send: Connection) -> None:
    torch.set_num_threads(spec.threads)
    send.send(_attempt(spec, METHODS[name], steps))


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
    method.setup(method.workload(tiny)).step(LR)  # libraries load what they need before memory is measured
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


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
