"""How fast this machine multiplies, perturbs, and moves bytes: measured in a few seconds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from ...adapt.matmul import matmul_speed
from ...noise import DISTRIBUTIONS
from ...offload.files import File, pages
from ...space import DenseLeaf
from ...types import Key, Term
from .rows import Need

_WEIGHTS = 1 << 22
_BYTES = 64 << 20
_ROUNDS = 3


class Rates(NamedTuple):
    """Of this machine.

    Args:
        flops: of products in the weights' dtype, a second.
        swept: weights perturbed a second.
        copied: bytes a second between the host's memory and the device.
        disk_read: bytes a second past the page cache.
        disk_written: the same.
    """

    flops: float
    swept: float
    copied: float
    disk_read: float
    disk_written: float

    def seconds(self, need: Need) -> float:
        """Of a step: its arithmetic, or its bytes where these take longer, since both go on at a time.

        seconds = max(products/flops + perturbed/swept, read/rate + written/rate)
        """
        read, written = (self.disk_read, self.disk_written) if need.disk else (self.copied, self.copied)
        return max(need.flops / self.flops + need.swept / self.swept, need.read / read + need.written / written)

    def __str__(self) -> str:
        return (
            f"Measured here: products {self.flops / 1e9:.0f} GFLOP/s, perturbing {self.swept / 1e9:.2f} G weights/s, memory "
            f"{self.copied / 1e9:.1f} GB/s, disk {self.disk_read / 1e6:.0f} MB/s read and {self.disk_written / 1e6:.0f} MB/s "
            "written."
        )


@torch.no_grad()
def measured(dtype: torch.dtype, device: torch.device, folder: Path) -> Rates:
    """Measure them.

    Args:
        dtype: of the weights.
        device: that computes.
        folder: on the disk that weights would be on.
    """
    weight = nn.Parameter(torch.ones(_WEIGHTS // 1024, 1024, dtype=dtype, device=device))
    leaf = DenseLeaf("weight", 0, weight, DISTRIBUTIONS["rademacher"]())
    out, source = torch.empty_like(weight), pages(_BYTES)
    host, there = torch.empty(_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda"), source.to(device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    swept = _seconds(lambda: leaf.perturb_into(out, [Term(Key(0, 0), 1e-3)]), wait)
    copied = _seconds(lambda: there.copy_(host), wait)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        file = File(Path(place) / "rate", write=True)

        def write() -> None:
            file.write(0, source)
            file.sync()

        written, read = _seconds(write), _seconds(lambda: file.read(0, _BYTES, source))
        file.close()
    return Rates(matmul_speed(device).flops[dtype], _WEIGHTS / swept, _BYTES / copied, _BYTES / read, _BYTES / written)


def _seconds(call: Callable[[], object], wait: Callable[[], None] = lambda: None) -> float:
    call()
    times = []
    for _ in range(_ROUNDS):
        wait()
        began = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - began)
    return median(times)
