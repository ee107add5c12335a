"""Tensors in files that are read and written past the page cache, into pages of our own."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import struct
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

PAGE = 4096
CHUNK = 8 << 20  # bytes handed to the system at once
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in safetensors files."""


class OffloadError(RuntimeError):
    """Weights cannot be streamed as asked; the message says why, and gives a way out."""


def raise_failure(failure: BaseException) -> NoReturn:
    """Report the error of a thread that writes weights."""
    if isinstance(failure, OffloadError):
        raise failure
    raise OffloadError(
        f"updated weights could not be written ({failure}); the ledger has all steps up to this one: make room or repair the "
        "folder, and resume from the last checkpoint"
    ) from failure


class Extent(NamedTuple):
    """A tensor's bytes in a file.

    Args:
        file: its path.
        offset: of the first byte.
        shape: of the tensor.
        dtype: as stored.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source(NamedTuple):
    """A weight's bytes, which lie one run after another.

    Args:
        runs: of its elements, in their order.
        shape: of the weight.
    """

    runs: tuple[Extent, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, extent: Extent) -> Source:
        """A whole tensor's."""
        return cls((extent,), extent.shape)

    def part(self, first: int, shape: tuple[int, ...]) -> Source:
        """That of the elements from ``first`` on, in this shape."""
        found, at, end = [], 0, first + math.prod(shape)
        for run in self.runs:
            count = math.prod(run.shape)
            low, high = max(first - at, 0), min(end - at, count)
            if low < high:
                found.append(run._replace(offset=run.offset + low * run.dtype.itemsize, shape=(high - low,)))
            at += count
        return Source(tuple(found), shape)


def pages(nbytes: int) -> Tensor:
    """So many bytes that start on a page, given back to the system with the tensor.

    Not the allocator's, which keeps freed blocks, and where direct I/O would find no page boundary. Private ones, which a limit
    of the process's data (RLIMIT_DATA) counts.
    """
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    return torch.frombuffer(mmap.mmap(-1, max(nbytes, 1), **private), dtype=torch.uint8)


def whole_pages(nbytes: int) -> int:
    """Rounded up."""
    return -(-nbytes // PAGE) * PAGE


class File:
    """A file that is read and written past the page cache, where its file system can.

    Args:
        path: of the file.
        write: also for writing; it is made if it is not there.
    """

    def __init__(self, path: Path, *, write: bool = False) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
        self.direct = bool(getattr(os, "O_DIRECT", 0))
        try:
            self._handle = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.direct:
                raise
            self.direct, self._handle = False, os.open(path, flags, 0o644)

    def read(self, start: int, needed: int, into: Tensor) -> None:
        """Bytes from ``start``, a page boundary, on; at least as many as are needed."""
        view, got = memoryview(into.numpy().data), 0
        while got < needed:
            count = os.preadv(self._handle, [view[got : got + CHUNK]], start + got)
            if count <= 0 or (got + count < needed and count % PAGE):
                found = os.fstat(self._handle).st_size
                raise OffloadError(
                    f"{self.path} ends at byte {found}, but a weight needs it up to byte {start + needed}: it was cut short "
                    "since training began; put the whole file back and resume"
                )
            got += count
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, start, got, os.POSIX_FADV_DONTNEED)

    def write(self, start: int, data: Tensor) -> None:
        """Whole pages, from a page boundary on."""
        view, put = memoryview(data.numpy().data), 0
        while put < len(view):
            put += os.pwritev(self._handle, [view[put : put + CHUNK]], start + put)

    def sync(self) -> None:
        os.fsync(self._handle)
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def is_in_place(self) -> bool:
        """Whether the path still leads to this file."""
        try:
            return os.path.samestat(os.fstat(self._handle), self.path.stat())
        except OSError:
            return False

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


def shaped(raw: Tensor, shift: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that starts at byte ``shift``; a copy where its elements would lie across their boundaries."""
    data = raw[shift : shift + math.prod(shape) * dtype.itemsize]
    if shift % dtype.itemsize:
        data = pages(whole_pages(data.numel()))[: data.numel()].copy_(data)
    return data.view(dtype).view(shape)


def own_pages(tensor: Tensor) -> Tensor | None:
    """The pages that :func:`pages` made for this tensor; None if it lies elsewhere."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    storage = tensor.untyped_storage()
    if storage.data_ptr() % PAGE or storage.nbytes() % PAGE:
        return None
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def extents(path: Path) -> dict[str, Extent]:
    """Where the tensors of a safetensors file are.

    Raises:
        OffloadError: it is none, or not a whole one.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise OffloadError(f"{path} is not a whole safetensors file: its header does not fit in its {size} bytes")
        try:
            header = json.loads(file.read(length))
            entries = {name: value for name, value in header.items() if name != "__metadata__"}
            found = {
                name: Extent(path, 8 + length + value["data_offsets"][0], tuple(value["shape"]), DTYPES[value["dtype"]])
                for name, value in entries.items()
            }
            ends = {name: 8 + length + value["data_offsets"][1] for name, value in entries.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OffloadError(f"{path} is not a safetensors file that offload can read: {error!r}") from error
    for name, extent in found.items():
        if extent.offset + extent.nbytes != ends[name] or ends[name] > size:
            raise OffloadError(
                f"{path} is damaged: {name!r} should be bytes {extent.offset} to {ends[name]} of a file of {size}; fetch the "
                "file again"
            )
    return found
