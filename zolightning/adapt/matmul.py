"""How fast this device multiplies matrices in each dtype: measured, since processors differ by an order of magnitude.

A CPU without bfloat16 instructions (AVX2) multiplies bfloat16 at a sixth to a tenth of float32's speed; one with them
(AVX512-BF16, AMX), and any GPU of these years, at twice and more.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..strategy.onednn import keep_few_shapes

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHAPES = {"cpu": (256, 576, 1536)}  # tokens, inputs, outputs of a layer in a small language model
_LARGE_SHAPE = (4096, 4096, 4096)  # large enough to keep an accelerator busy
_ROUNDS = 5
_GAIN = 1.3  # real processors are well on either side of it, so that a busy moment does not change the choice


class MatmulSpeed(NamedTuple):
    """The measurement of :func:`matmul_speed`."""

    device: torch.device
    threads: int
    flops: dict[torch.dtype, float]
    """Floating-point operations a second, by the dtype of the factors."""

    def pays(self, dtype: torch.dtype) -> bool:
        """Whether products in ``dtype`` are so much faster than in float32 that it is worth having fewer digits."""
        return self.flops.get(dtype, 0.0) >= _GAIN * self.flops[torch.float32]

    @property
    def fastest(self) -> torch.dtype:
        """bfloat16 where it pays, else float32."""
        return torch.bfloat16 if self.pays(torch.bfloat16) else torch.float32

    def __str__(self) -> str:
        speeds = ", ".join(f"{_name(dtype)} {self.flops[dtype] / 1e9:.0f}" for dtype in _DTYPES)
        where = f"{self.threads} CPU threads" if self.device.type == "cpu" else f"{self.device}"
        return f"matrix products on {where} in GFLOP/s: {speeds}"


def matmul_speed(device: torch.device | None = None) -> MatmulSpeed:
    """The speed of a language model's matrix product, measured once a process: the median of a few, the dtypes in turn.

    Args:
        device: None: the accelerator, where there is one, else the CPU.
    """
    return _measured(device or _default_device(), torch.get_num_threads())


def fastest_dtype(device: torch.device | None = None) -> torch.dtype:
    """bfloat16 where its products are much faster on ``device`` than float32's, else float32; see :func:`matmul_speed`."""
    return matmul_speed(device).fastest


def dtype_of_products(stored: torch.dtype, device: torch.device | None = None) -> torch.dtype:
    """The dtype to multiply weights ``stored`` in that dtype: the same, or float32 where a narrower one does not pay."""
    narrower = stored in _DTYPES and stored != torch.float32
    return torch.float32 if narrower and not matmul_speed(device).pays(stored) else stored


def _default_device() -> torch.device:
    for kind, found in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if found:
            return torch.device(kind)
    return torch.device("cpu")


@cache
@torch.no_grad()
def _measured(device: torch.device, threads: int) -> MatmulSpeed:
    if device.type == "cpu" and (change := keep_few_shapes()):  # these may be the first products of the process
        logger.info("%s", change)
    tokens, inputs, outputs = _SHAPES.get(device.type, _LARGE_SHAPE)
    generator = torch.Generator().manual_seed(0)  # never the user's
    x, weight = (torch.randn(rows, inputs, generator=generator) for rows in (tokens, outputs))
    factors = {dtype: (x.to(device, dtype), weight.to(device, dtype)) for dtype in _DTYPES}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in _DTYPES}
    for _ in range(1 + _ROUNDS):  # the first round makes kernels
        for dtype, pair in factors.items():
            started = time.perf_counter()
            float(F.linear(*pair)[-1, -1])  # waits for the device
            seconds[dtype].append(time.perf_counter() - started)
    operations = 2 * tokens * inputs * outputs
    speed = MatmulSpeed(device, threads, {dtype: operations / median(times[1:]) for dtype, times in seconds.items()})
    logger.info("%s", speed)
    return speed


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
