"""Writing a ledger: append only, one process at a time, and no record lost while the disk is full."""

from __future__ import annotations

import copy
import os
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from ..engine.uninterrupted import uninterrupted
from .base import sync_folder
from .format import DIGEST, LedgerError, Record, encode

SYNC_SECONDS = 5.0


class Claim(NamedTuple):
    """The right to write to a path."""

    path: Path
    lock: FileLock

    def release(self) -> None:
        self.lock.release()

    def __deepcopy__(self, memo: object) -> Claim:
        raise LedgerError(f"the ledger {self.path} has one writer: copy a strategy before its fit or after it")


def claim(path: Path) -> Claim:
    """The right to write to this path, until it is released.

    Raises:
        LedgerError: another run has it.
        OSError: the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f"the ledger's folder {path.parent} is a file") from error
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LedgerError(
            f"another run writes to the ledger {path}; give this one a path of its own: ZOStrategy(ledger='...')"
        ) from None
    return Claim(path, lock)


class LedgerWriter:
    """An open ledger.

    Each record is handed to the operating system before :meth:`append` returns, so it survives the death of the process.
    It is on the disk (fsync) at most :data:`SYNC_SECONDS` later, and at :meth:`sync` and :meth:`close`: a power cut takes
    no more than that from the end. Records that the disk does not take are kept in memory and written when it does.

    Args:
        claim: where to write; a file that is there is moved to ``NAME.1``, ``NAME.2``, … Released by :meth:`close`.
        seed: the header's.
        begin: the bytes to begin with: :func:`~zolightning.ledger.format.opening`, or a ledger that this one continues.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, claim: Claim, seed: int, begin: bytes) -> None:
        self.path, self._seed, self._claim = claim.path, seed, claim
        if self.path.exists():
            self.path.rename(_spare(self.path))
        self._file = self.path.open("xb", buffering=0)
        self._written = 0
        self._pending = bytearray(begin)
        self._synced = time.monotonic()
        self._displaced = ""
        self._stuck = ""
        self.digest = begin[-DIGEST:]
        """Of the last record."""
        self._flush()
        sync_folder(self.path.parent)

    def __deepcopy__(self, memo: Any) -> LedgerWriter:
        if not self._file.closed:
            copy.deepcopy(self._claim, memo)  # raises
        return self

    def append(self, record: Record) -> None:
        """Write a record. The disk's troubles raise nothing: they are told once, and :attr:`trouble` says them.

        Raises:
            LedgerError: the ledger was closed.
        """
        if self._file.closed:
            raise LedgerError(f"the ledger {self.path} was closed when its run ended")
        data = encode(record, self.digest, self._seed)
        with uninterrupted():  # by Ctrl-C: the digest and the bytes belong together
            self.digest = data[-DIGEST:]
            self._pending += data
            self._flush()
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring everything to the disk."""
        if self._file.closed:
            return
        self._synced = time.monotonic()
        self._flush()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._hold(str(error))
        displaced = self._find_displaced()
        if displaced and not self._displaced:
            _warn(f"the ledger {self.path} {displaced} while the run writes to it; the file that is there now lacks its steps")
        self._displaced = displaced

    @property
    def trouble(self) -> str:
        """Why the file at the path lacks records of the run; "" when it has them all, as of the last :meth:`sync`."""
        return self._stuck or self._displaced

    def close(self) -> None:
        """Sync and let go of the file. Says so when records could not be written."""
        if self._file.closed:
            return
        self.sync()
        if self._stuck:
            _warn(f"the ledger {self.path} lacks its last records ({self._stuck}); it is intact up to where it ends")
        self._file.close()
        self._claim.release()

    def _find_displaced(self) -> str:
        """A change of the file by another process."""
        try:
            mine, there = os.fstat(self._file.fileno()), self.path.stat()
        except OSError:
            return "was moved or deleted"
        if not os.path.samestat(mine, there):
            return "was replaced"
        return "" if there.st_size == self._written else "was written to by something else"

    def _flush(self) -> None:
        try:
            while self._pending:
                self._file.seek(self._written)
                count = self._file.write(self._pending) or 0
                self._written += count
                del self._pending[:count]
        except OSError as error:
            self._hold(str(error))
            return
        if self._stuck:
            _warn(f"the ledger {self.path} is complete again")
        self._stuck = ""

    def _hold(self, reason: str) -> None:
        if not self._stuck:
            _warn(f"the ledger {self.path} cannot be written now ({reason}); its records are kept in memory, training goes on")
        self._stuck = reason


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _spare(path: Path) -> Path:
    """A free name for a file that has to make room."""
    number = 1
    while (spare := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return spare
