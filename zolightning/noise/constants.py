"""A few numbers on a device, kept from call to call: all leaves of a step ask for the same, and a copy makes a GPU wait."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .captured_key import keep


def integers(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64, of shape (n,); read it only."""
    return keep(_integers(tuple(numbers), device))


def floats(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of shape (n,); read it only."""
    return keep(_floats(struct.pack(f"{len(numbers)}d", *numbers), device, dtype))


@lru_cache(maxsize=8)
def _integers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).to(device)


@lru_cache(maxsize=8)  # by their bytes: 0.0 and -0.0 are equal
def _floats(numbers: bytes, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(struct.unpack(f"{len(numbers) // 8}d", numbers), dtype=dtype).to(device)
