"""Weights on a disk: files that are only read, and two work files that keep the last checkpoint while training goes on."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from .files import DTYPES, PAGE, Extent, File, OffloadError, Source, own_pages, pages, shaped, whole_pages
from .tiers import Tier

_TABLE, _BEFORE = "weights.json", "weights-before.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Room(NamedTuple):
    """Pages that one tensor has to itself, in both work files."""

    start: int
    shift: int  # of the first byte in the first page: as in the file that it comes from, so that nothing moves in memory
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def needed(self) -> int:
        return self.shift + math.prod(self.shape) * self.dtype.itemsize

    @property
    def length(self) -> int:
        return whole_pages(self.needed)


class DiskTier(Tier):
    """Reads weights where they are, and writes their updates to files of its own.

    A tensor has room in two work files. The one that holds it as of the last :meth:`commit` is not touched until the next:
    a process that dies at any moment leaves the weights of its last checkpoint whole.

    Args:
        base: name → its bytes before training; these files are never written to.
        dtypes: name → the dtype that it is trained in, where that is another than the stored one.
        folder: of the work files; it is made with the first write.
        numbered: where another run works in the folder, take ``FOLDER-2``, ``FOLDER-3``, … instead.
    """

    def __init__(
        self,
        base: Mapping[str, Source] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        folder: Path | None = None,
        numbered: bool = False,
    ) -> None:
        super().__init__()
        self.folder, self.numbered = folder, numbered
        self._base, self._dtypes = dict(base or {}), dict(dtypes or {})
        self._files = {path: File(path) for path in sorted({run.file for source in self._base.values() for run in source.runs})}
        self._work: list[File] = []
        self._locks: dict[Path, FileLock] = {}
        self._rooms: dict[str, _Room] = {}
        self._now: dict[str, int] = {}  # the work file that has the tensor
        self._kept: dict[str, int] = {}  # the same as of the last commit
        self._end = self._base_end = 0
        self._changed = False
        self._writing = threading.Lock()  # of files and rooms
        self._tables: list[Mapping[str, Any]] = []
        self._stale: tuple[str, ...] = (_TABLE, _BEFORE)  # name bytes that the next write may go over

    # ------------------------------------------------------------------ one tensor

    def read(self, name: str) -> Tensor:
        if name in self._now:
            room = self._rooms[name]
            return self._load(self._work[self._now[name]], room)
        source = self._base[name]
        runs, wanted = source.runs, self._dtypes.get(name, source.runs[0].dtype)
        if len(runs) == 1 and wanted == runs[0].dtype:
            return self._run(runs[0]).view(source.shape)
        out = shaped(pages(whole_pages(math.prod(source.shape) * wanted.itemsize)), 0, source.shape, wanted)
        at, flat = 0, out.view(-1)
        for run in runs:
            piece = self._run(run)
            flat[at : (at := at + piece.numel())] = piece
        return out

    def _run(self, run: Extent) -> Tensor:
        at = run.offset // PAGE * PAGE
        return self._load(self._files[run.file], _Room(at, run.offset - at, (math.prod(run.shape),), run.dtype))

    def _load(self, file: File, room: _Room) -> Tensor:
        raw = pages(room.length)
        file.read(room.start, room.needed, raw)
        self.read_bytes += raw.numel()
        return shaped(raw, room.shift, room.shape, room.dtype)

    def write(self, name: str, tensor: Tensor) -> None:
        with self._writing:  # a flush writes beside the thread that writes behind
            self._open()
            for stale in self._stale:
                self._path(stale).unlink(missing_ok=True)
            self._stale = ()
            room = self._rooms.get(name)
            if room is None:
                shift = int(tensor.storage_offset()) * tensor.itemsize % PAGE if own_pages(tensor) is not None else 0
                room = self._rooms[name] = _Room(self._end, shift, tuple(tensor.shape), tensor.dtype)
                self._end += room.length
            side = 1 - self._kept.get(name, 1)
        self._work[side].write(room.start, _page_image(tensor, room))
        with self._writing:
            self.written_bytes += room.length
            self._now[name], self._changed = side, True

    def keep(self, name: str, tensor: Tensor) -> None:
        self._claim()
        path = self._path("base.bin")
        if path not in self._files:
            path.unlink(missing_ok=True)
            self._files[path] = File(path, write=True)
        room = _Room(self._base_end, 0, tuple(tensor.shape), tensor.dtype)
        self._files[path].write(room.start, _page_image(tensor, room))
        self._base_end += room.length
        self._base[name] = Source.of(Extent(path, room.start, room.shape, room.dtype))
        self._now.pop(name, None)

    # ------------------------------------------------------------------ all of them

    def commit(self, notes: Mapping[str, Any]) -> None:
        if not self._changed:
            return
        for work in self._work:
            work.sync()
            if not work.is_in_place():
                raise OffloadError(
                    f"the work file {work.path} was moved or deleted while the run writes to it; the ledger has all steps: "
                    "resume from the last checkpoint, and the weights are rebuilt"
                )
        rooms = {name: [room.start, room.shift, room.shape, _NAMES[room.dtype]] for name, room in self._rooms.items()}
        table, part = self._path(_TABLE), self._path(f".{_TABLE}")
        with part.open("w") as file:
            json.dump({"rooms": rooms, "files": self._now, "notes": notes}, file)
            file.flush()
            os.fsync(file.fileno())
        if table.exists():
            os.replace(table, self._path(_BEFORE))
        os.replace(part, table)
        self._kept, self._stale, self._changed = dict(self._now), (_BEFORE,), False

    def committed(self) -> list[Mapping[str, Any]]:
        self._tables = []
        for name in (_TABLE, _BEFORE) if self.folder is not None else ():
            path = self._path(name)
            if path.exists():
                self._open()
                self._tables.append(json.loads(path.read_text()))
        return [table["notes"] for table in self._tables]

    def adopt(self, place: int, names: Mapping[str, bool]) -> None:
        """Go on from one of :meth:`committed`.

        Args:
            place: in that list.
            names: of tensors whose bytes count; the others come from the base.
        """
        table = self._tables[place]
        for name, (start, shift, shape, dtype) in table["rooms"].items():
            room = self._rooms[name] = _Room(start, shift, tuple(shape), DTYPES[dtype])
            self._end = max(self._end, room.start + room.length)
        self._now = {name: side for name, side in table["files"].items() if names.get(name)}
        self._kept, self._stale = dict(table["files"]), (_BEFORE,) if place == 0 else (_TABLE, _BEFORE)

    def rewind(self) -> None:
        self._now = {}

    def move_to(self, folder: Path) -> bool:
        """Work in this folder, as long as nothing was written elsewhere; False if another run does."""
        here, self.folder = self.folder, folder
        try:
            if not self._work and self._lock(folder):
                return True
        except OSError:
            pass
        self.folder = here
        return False

    def check_space(self, nbytes: int) -> None:
        """Refuse a disk that is too small for two copies of so many bytes.

        Raises:
            OffloadError: it is.
        """
        if self.folder is None:
            return
        place = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        there = sum(path.stat().st_blocks * 512 for path in self.folder.glob("weights-*.bin"))
        free, needed = shutil.disk_usage(place).free + there, 2 * nbytes
        if free < needed:
            raise OffloadError(
                f"offload needs {needed / 1e9:.2f} GB in {self.folder} for two copies of the trained weights, and "
                f"{free / 1e9:.2f} GB are free; give another place with Offload(folder=...)"
            )

    def close(self) -> None:
        for file in (*self._work, *self._files.values()):
            file.close()
        self._work = []
        for lock in self._locks.values():
            lock.release()

    def _path(self, name: str) -> Path:
        if self.folder is None:
            raise OffloadError("weights on a disk were updated outside of a fit, and there is no work folder to keep them in")
        return self.folder / name

    def _open(self) -> None:
        if not self._work:
            self._claim()
            self._work = [File(self._path(f"weights-{side}.bin"), write=True) for side in (0, 1)]

    def _claim(self) -> None:
        """The right to write into the folder, or into one beside it.

        Raises:
            OffloadError: another run has it, or nobody may.
        """
        folder, number = self._path(""), 1
        try:
            while not self._lock(folder):
                if not self.numbered:
                    raise OffloadError(
                        f"another run writes to the work folder {folder}; give this one its own with Offload(folder=...)"
                    )
                number += 1
                folder = self._path("").with_name(f"{self._path('').name}-{number}")
        except OSError as error:
            raise OffloadError(
                f"the work folder {folder} cannot be written to ({error}); give another with Offload(folder=...)"
            ) from error
        self.folder = folder

    def _lock(self, folder: Path) -> bool:
        if folder not in self._locks:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return False
            self._locks[folder] = lock
        return True


def _page_image(tensor: Tensor, room: _Room) -> Tensor:
    """The pages that hold the tensor as its room does: its own, or a copy."""
    data = own_pages(tensor)
    if data is not None and data.numel() == room.length and int(tensor.storage_offset()) * tensor.itemsize == room.shift:
        return data
    data = pages(room.length)
    shaped(data, room.shift, room.shape, room.dtype).copy_(tensor)
    return data
