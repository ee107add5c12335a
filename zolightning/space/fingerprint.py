"""A hash of weights that is taken where they live: the same on every device, memory layout and chunking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b

import torch
from torch import Tensor

from ..noise import mixed_sum


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
    flat = tensor.detach().reshape(-1)
    if flat.stride(0) != 1:  # also of one element or none
        flat = flat.clone(memory_format=torch.contiguous_format)
    data = flat.view(torch.uint8)
    whole = data.numel() // 8 * 8
    words = data[:whole]
    if words.storage_offset() % 8:  # a view into another tensor's memory
        words = words.clone()
    tail = torch.zeros(8, dtype=torch.uint8, device=data.device)
    tail[: data.numel() - whole] = data[whole:]
    return (mixed_sum(words.view(torch.int64)) + mixed_sum(tail.view(torch.int64), whole // 8)) % (1 << 64)
