"""A hash of weights that is taken where they live: the same on every device, memory layout and chunking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b

import torch
from torch import Tensor

from ..noise import mixed_sum
from .leaf import block_rows


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """32 hexadecimal digits that change when any name, shape, dtype or bit does.

    Against accidents, not against forgers: each tensor's 8-byte words are mixed with their places and summed, which is no
    cryptographic hash. It needs no copy to the host, which for a large model on a GPU would take longer than a step.

    Args:
        tensors: (name, tensor) pairs, in any order.
    """
    return combined(mixed(tensors))


def mixed(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Name → dtype, shape and hash of each tensor."""
    kinds = {name: (str(t.dtype).removeprefix("torch."), ",".join(map(str, t.shape)), _sum(t)) for name, t in tensors}
    return {name: "\0".join(map(str, kind)) for name, kind in kinds.items()}


def combined(hashes: Mapping[str, str]) -> str:
    """The fingerprint of the tensors whose hashes these are."""
    digest = blake2b(digest_size=16)
    for name, value in sorted(hashes.items()):
        digest.update(f"{name}\0{value}\n".encode())
    return digest.hexdigest()


def _sum(tensor: Tensor) -> int:
    """Of the tensor's bytes in row-major order, the last word filled up with zeros."""
    total = first = 0
    data = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    for rows in _runs(tensor):
        data = _bytes(rows)
        words = data[: data.numel() // 8 * 8]
        total += mixed_sum(words.view(torch.int64), first)
        first += words.numel() // 8
    left = data[data.numel() // 8 * 8 :]
    tail = torch.zeros(8, dtype=torch.uint8, device=data.device)
    tail[: left.numel()] = left
    return (total + mixed_sum(tail.view(torch.int64), first)) % (1 << 64)


def _runs(tensor: Tensor) -> Iterator[Tensor]:
    """Its rows, some at a time, of which all but the last fill whole words: no more of an offloaded one is read at once."""
    step = block_rows(tensor.shape) if tensor.dim() > 1 and tensor.numel() and tensor.device.type == "cpu" else 0
    if not step or step == len(tensor):
        yield tensor.detach()
        return
    if tensor.nbytes // len(tensor) % 8:
        step += -step % 8
    for row in range(0, len(tensor), step):
        yield tensor[row : row + step].detach()


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    if flat.stride(0) != 1:  # also of one element or none
        flat = flat.clone(memory_format=torch.contiguous_format)
    data = flat.view(torch.uint8)
    return data.clone() if data.storage_offset() % 8 else data  # a view into another tensor's memory
