"""Where the bytes of weights live while no operation needs them: in host memory, or on a disk."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
    """Weights cannot be streamed as asked; the message says what was found and what to do."""


class Tier(ABC):
    """Holds tensors by name, and counts the bytes that come and go."""

    def __init__(self) -> None:
        self.read_bytes = self.written_bytes = 0

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A copy in memory of its own.

        Raises:
            OSError, OffloadError: the bytes cannot be had.
        """

    @abstractmethod
    def write(self, name: str, tensor: Tensor) -> None:
        """Keep what the tensor holds now. A new name is given room.

        Raises:
            OSError, OffloadError: there is no room.
        """

    @abstractmethod
    def sync(self) -> None:
        """Bring what was written to where it outlives the machine's power, as far as the tier can."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""


class HostTier(Tier):
    """Host memory, pinned where weights go to an accelerator.

    Args:
        device: where operations read the weights.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._tensors: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        host = self._tensors[name]
        self.read_bytes += host.nbytes
        return host.to(self._device, copy=True)

    def write(self, name: str, tensor: Tensor) -> None:
        host = self._tensors.get(name)
        if host is None:
            pinned = self._device.type == "cuda"
            host = self._tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        host.copy_(tensor)
        self.written_bytes += host.nbytes

    def sync(self) -> None:
        """It does not outlive the process."""

    def close(self) -> None:
        self._tensors.clear()


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


def pages(nbytes: int) -> Tensor:
    """So many bytes that start on a page, given back to the system with the tensor.

    Not the allocator's, which keeps freed blocks, and where direct I/O would find no page boundary.
    """
    return torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8)


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


class _Room(NamedTuple):
    """Pages of the work file that one tensor has to itself."""

    start: int
    shift: int  # of the tensor's first byte in the first page: as in the file that it comes from, so that nothing moves
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def length(self) -> int:
        return whole_pages(self.shift + math.prod(self.shape) * self.dtype.itemsize)


class DiskTier(Tier):
    """Files that are only read, and a work file where a tensor moves with its first update.

    Args:
        base: name → where the weights are before training; never written to.
        dtypes: name → the dtype that it is trained in, where that is another than the stored one.
    """

    def __init__(self, base: Mapping[str, Extent], dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        super().__init__()
        self._base, self._dtypes = dict(base), dict(dtypes or {})
        self._files = {path: File(path) for path in sorted({extent.file for extent in base.values()})}
        self._work: File | None = None
        self._rooms: dict[str, _Room] = {}
        self._moved: set[str] = set()
        self._end = 0

    def work_in(self, path: Path) -> None:
        """Write to this file from now on. What it holds already counts after :meth:`adopt` only."""
        self._moved.clear()
        if self._work is not None:
            self._work.close()
        self._work = File(path, write=True)

    def rooms(self) -> dict[str, list[int]]:
        """Where each tensor is in the work file, for :meth:`adopt`."""
        return {name: [room.start, room.shift] for name, room in self._rooms.items()}

    def adopt(self, name: str, place: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> None:
        """The work file has this tensor, as an earlier process left it."""
        room = self._rooms[name] = _Room(place[0], place[1], tuple(shape), dtype)
        self._end = max(self._end, room.start + room.length)
        self._moved.add(name)

    def forget(self, name: str) -> None:
        """What the work file has of this tensor does not count: the next read gives the base's."""
        self._moved.discard(name)

    def read(self, name: str) -> Tensor:
        if name in self._moved and self._work is not None:
            return self._load(self._work, *self._rooms[name])
        extent = self._base[name]
        at = extent.offset // PAGE * PAGE
        tensor = self._load(self._files[extent.file], at, extent.offset - at, extent.shape, extent.dtype)
        wanted = self._dtypes.get(name, extent.dtype)
        if wanted == extent.dtype:
            return tensor
        raw = pages(whole_pages(tensor.numel() * wanted.itemsize))
        return _shaped(raw, 0, extent.shape, wanted).copy_(tensor)

    def _load(self, file: File, at: int, shift: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        needed = shift + math.prod(shape) * dtype.itemsize
        raw = pages(whole_pages(needed))
        file.read(at, needed, raw)
        self.read_bytes += raw.numel()
        return _shaped(raw, shift, shape, dtype)

    def write(self, name: str, tensor: Tensor) -> None:
        if self._work is None:
            raise OffloadError(f"{name!r} was updated outside of a fit, and there is no work folder to keep it in")
        room = self._rooms.get(name)
        shift = int(tensor.storage_offset()) * tensor.itemsize % PAGE
        if room is None:
            room = self._rooms[name] = _Room(self._end, shift, tuple(tensor.shape), tensor.dtype)
            self._end += room.length
        data = _own_pages(tensor)
        if data is None or room.shift != shift or data.numel() != room.length:
            data = pages(room.length)
            _shaped(data, room.shift, room.shape, room.dtype).copy_(tensor)
        self._work.write(room.start, data)
        self.written_bytes += room.length
        self._moved.add(name)

    def sync(self) -> None:
        if self._work is None:
            return
        self._work.sync()
        if not self._work.is_in_place():
            raise OffloadError(
                f"the work file {self._work.path} was moved or deleted while the run writes to it; the ledger holds all "
                "steps: resume from the last checkpoint, and the weights are rebuilt"
            )

    def close(self) -> None:
        for file in (*self._files.values(), *([self._work] if self._work else [])):
            file.close()


def _shaped(raw: Tensor, shift: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that starts at byte ``shift``; a copy where its elements would lie across their boundaries."""
    data = raw[shift : shift + math.prod(shape) * dtype.itemsize]
    if shift % dtype.itemsize:
        data = pages(whole_pages(data.numel()))[: data.numel()].copy_(data)
    return data.view(dtype).view(shape)


def _own_pages(tensor: Tensor) -> Tensor | None:
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
