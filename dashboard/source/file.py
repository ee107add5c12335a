"""An SQLite file that someone else writes: read in consistent snapshots, leaving nothing behind in its folder."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, TypeVar

from .base import NoStoreYet, SourceError

LOG_A_RUN = "log a first run with MLflow, and it will be shown here"

_BUSY_SECONDS = 5.0
_ATTEMPTS = 10
_SETTLED_NS = 2_000_000_000  # coarser than any file system's clock

T = TypeVar("T")


class Look(NamedTuple):
    """How the files look from outside.

    Args:
        identity: device and inode: another file has another one.
        main: bytes and time of change of the database.
        log: likewise of its write-ahead log; zeros when there is none.
        settled: the last change is so old that another one would show.
    """

    identity: tuple[int, int]
    main: tuple[int, int]
    log: tuple[int, int]
    settled: bool


class StoreFile:
    """Runs queries on an SQLite file.

    A connection lives for one read. One that stayed open would keep the writer's last points in the write-ahead log when
    the writer ends, beside the file instead of in it. While there is no such log there is no writer, and even a
    connection that only reads would make one: then the file is read as immutable, and again if it changed meanwhile.

    Args:
        path: the file; it may appear later.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        self._write_ahead = False

    def look(self) -> Look:
        """Raises NoStoreYet when the file is missing or empty, SourceError when it is no file."""
        now = time.time_ns()
        try:
            main = self.path.stat()
        except FileNotFoundError:
            raise NoStoreYet(f"{self.path} does not exist yet; {LOG_A_RUN}") from None
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}") from error
        if not self.path.is_file():
            raise SourceError(f"{self.path} is not a file; give the SQLite file of an MLflow store, such as mlflow.db")
        if main.st_size == 0:
            raise NoStoreYet(f"{self.path} is empty; {LOG_A_RUN}")
        log = _size_and_time(f"{self.path}-wal")
        settled = now - max(main.st_mtime_ns, log[1]) > _SETTLED_NS
        return Look((main.st_dev, main.st_ino), (main.st_size, main.st_mtime_ns), log, settled)

    def read(self, ask: Callable[[sqlite3.Connection], T]) -> T:
        """The result of ``ask``, given a connection that sees one state of the store. It may be called more than once.

        Raises:
            SourceError: the file is not a database, is locked for long, or cannot be opened.
        """
        for _ in range(_ATTEMPTS):
            before = self.look()
            immutable = self._has_log(before.identity) and before.log[0] == 0
            try:
                answer = self._ask(ask, immutable)
            except sqlite3.Error as error:
                if immutable and self.look()[:3] != before[:3]:
                    continue
                raise SourceError(self._explain(error)) from error
            if not immutable or self.look()[:3] == before[:3]:
                return answer
        raise SourceError(f"{self.path} keeps changing without a write-ahead log; it cannot be read safely")

    def _ask(self, ask: Callable[[sqlite3.Connection], T], immutable: bool) -> T:
        address = f"{self.path.as_uri()}?mode=ro" + "&immutable=1" * immutable
        with closing(sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)) as store:
            store.execute("BEGIN")
            return ask(store)

    def _has_log(self, identity: tuple[int, int]) -> bool:
        """Whether writers use a write-ahead log. The file is opened for it once: closing it again ends this process's locks."""
        if identity != self._identity:
            try:
                with self.path.open("rb") as file:
                    self._write_ahead = file.read(20)[18:] == b"\2\2"
            except OSError as error:
                raise SourceError(f"{self.path} cannot be read: {error.strerror}") from error
            self._identity = identity
        return self._write_ahead

    def _explain(self, error: sqlite3.Error) -> str:
        text = str(error)
        if "not a database" in text or "malformed" in text:
            return f"{self.path} is not an SQLite database, or is damaged ({text}); give the file of an MLflow store"
        if "locked" in text:
            return (
                f"{self.path} is locked by a writer; with a write-ahead log (PRAGMA journal_mode=WAL, once) "
                "readers and writers do not wait for each other"
            )
        if _size_and_time(f"{self.path}-journal")[0]:
            return (
                f"a writer of {self.path} was killed in the middle of a write; MLflow repairs the store when it next opens it "
                f"(mlflow experiments search, with MLFLOW_TRACKING_URI=sqlite:///{self.path})"
            )
        if self._write_ahead:
            return (
                f"{self.path} has newer points in {self.path.name}-wal, which cannot be read in a folder without write "
                "permission when its writer is gone; open the store once with MLflow, or copy both files to a folder of your "
                f"own ({text})"
            )
        return f"{self.path} cannot be read: {text}"


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
