"""The memory that training takes, in bytes, and its parts."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def rss() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def device_memory(device: torch.device) -> int:
    """The device's whole memory: the GPU's, else the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _peak_rss() -> int:
    """Largest resident memory since the process began, or on Linux since it was last reset."""
    if _STATUS.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        if found:
            return int(found[1]) * 1024
    if os.name == "nt":
        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}.values())


def _give_back() -> None:
    """Let the C allocator return freed memory to the system, where it can (glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class MemoryMeter:
    """Peak memory of training: the allocator's on CUDA, elsewhere this process's resident memory.

    Resident memory counts the interpreter and its libraries too. They are the memory that was resident at the start beyond
    the module's own weights, and are subtracted, so that the figure compares with an allocator's. Memory freed before, as the
    weights of a model that has been quantised, is given back first: training would live in it unseen.

    Args:
        module: the module on its device, before the first step.
        device: The device on which it runs.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self.weights = tensor_bytes([*module.parameters(), *module.buffers()])
        self._libraries = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _give_back()
            self._libraries = max(0, rss() - self.weights)
            with contextlib.suppress(OSError):
                _CLEAR_REFS.write_text("5")  # Linux: the high-water mark starts again from here

    def peak(self) -> int:
        """Most memory in use since the meter was made."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, _peak_rss() - self._libraries)

    def parts(self, optimizers: Iterable[Optimizer]) -> dict[str, int]:
        """The parts of the memory: ``weights``, ``gradients``, ``optimizer_state``, and the rest of the peak."""
        states = [v for o in optimizers for s in o.state.values() for v in s.values() if isinstance(v, Tensor)]
        parts = {
            "weights": self.weights,
            "gradients": tensor_bytes(p.grad for p in self.module.parameters()),
            "optimizer_state": tensor_bytes(states),
        }
        return parts | {"activations": max(0, self.peak() - sum(parts.values()))}
