"""Clocks and counters: interleaved times, exactness, floating-point operations, the ceiling of a matrix product."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..clock import Clock, now
from .methods import LR, Running, synchronize

Timed = Callable[[], float]


def timed(running: Running, device: torch.device, clock: Clock) -> float:
    """Seconds of one step, with the device idle before and after."""
    synchronize(device)
    started = now(clock)
    own = running.step(LR)
    synchronize(device)
    return now(clock) - started if own is None else own


def interleave(steps: Mapping[str, Timed], rounds: int, each_round: Callable[[int], None]) -> dict[str, list[float]]:
    """Seconds of ``rounds`` steps of each, one step of every one in turn, so that a disturbance of the machine disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            seconds[name].append(step())
        each_round(number + 1)
    return seconds


@torch.no_grad()
def is_exact(running: Running) -> bool | None:
    """Whether a step with lr 0 leaves every bit of the weights; None where a copy to compare with does not fit."""
    weights = [p.detach() for p in running.module.parameters()]
    if not fits(sum(w.nbytes for w in weights), weights[0].device):
        return None
    before = [w.clone() for w in weights]
    with torch.enable_grad():
        running.step(0.0)
    return all(torch.equal(_bits(w), _bits(b)) for w, b in zip(weights, before, strict=True))


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def count_flops(running: Running) -> int:
    """Multiplications and additions of the matrix products and the attention in one step."""
    aten: Any = torch.ops.aten  # PyTorch's counter knows the attention's GPU forms alone
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    with counter:
        running.step(LR)
    return int(counter.get_total_flops())


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    """Two products, counted like PyTorch's counter does, including the part that a causal mask leaves out."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _attention_backward_flops(
    _: object, query: torch.Size, key: torch.Size, value: torch.Size, *__: object, **___: object
) -> int:
    """The scores again, and the gradients of both products: five products for the forward's two."""
    return _attention_flops(query, key, value) * 5 // 2


class Gemm:
    """A square matrix product in the forward's dtype: the most that a step's GFLOP/s can be compared with.

    Args:
        dtype: The dtype of the factors.
        device: The device on which it runs.
        size: rows and columns; None: 2048 on a CPU, 8192 on a GPU.
        clock: Of the seconds.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, size: int | None = None, clock: Clock = "wall") -> None:
        self.device, self.clock, self.size = device, clock, size or (8192 if device.type == "cuda" else 2048)
        self._x = torch.randn(self.size, self.size, device=device).to(dtype)
        self._weight = torch.randn(self.size, self.size, device=device).to(dtype)

    @torch.no_grad()
    def __call__(self) -> float:
        """Seconds of one product."""
        synchronize(self.device)
        started = now(self.clock)
        F.linear(self._x, self._weight)
        synchronize(self.device)
        return now(self.clock) - started

    def gflops(self, seconds: float) -> float:
        return 2 * self.size**3 / seconds / 1e9


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    return int(psutil.virtual_memory().available)


def fits(needed: float, device: torch.device) -> bool:
    """Whether ``needed`` bytes are free, with a tenth of the free memory to spare."""
    return math.ceil(needed) <= 0.9 * free_bytes(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory has run out; PyTorch's CPU allocator says so in words only."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(error)
