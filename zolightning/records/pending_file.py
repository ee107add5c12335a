"""The file in which entries wait while the store is away: a JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypedDict


class Entry(TypedDict, total=False):
    """The values of one call: ``step``, ``time_ms`` and ``metrics``; ``params``; ``tags``; or ``status`` and ``time_ms``."""

    step: int
    time_ms: int
    metrics: dict[str, float]
    params: dict[str, str]
    tags: dict[str, str]
    status: str


class PendingFile:
    """Entries in a file, a JSON object a line, read in order from the start.

    Args:
        path: The path of the file; one left by an earlier process of the run is taken up.
        run_id: noted in each line.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self.path, self._run_id = path, run_id
        self.waiting = self._torn = path.exists()  # its writer may have died in the middle of a line
        self._sent = self._read = 0

    def append(self, entries: Iterable[Entry]) -> None:
        """Write entries; they outlive this process when it returns. Raises OSError when they may not all be there."""
        lines = [json.dumps({"run_id": self._run_id, **_encoded(entry)}) + "\n" for entry in entries]
        if not lines:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn, self._torn = self._torn, True
        with self.path.open("a", encoding="utf-8") as stream:
            self.waiting = True
            stream.write("\n" * torn + "".join(lines))
        self._torn = False

    def sync(self) -> None:
        """Return when appended lines survive a power cut."""
        with suppress(OSError), self.path.open("rb") as stream:
            os.fsync(stream.fileno())

    def head(self) -> list[Entry]:
        """The next entries; when there are none, the file is removed."""
        while self.waiting:
            with self.path.open("rb") as stream:
                stream.seek(self._sent)
                lines = stream.readlines(1 << 16)
                self._read = stream.tell()
            if entries := [entry for _, entry in filter(None, map(decoded, lines))]:
                return entries
            self.drop()
            if not lines:
                self.path.unlink()
                self.waiting, self._sent, self._read = False, 0, 0
        return []

    def drop(self) -> None:
        """Tick off the last result of :meth:`head`."""
        self._sent = self._read


def _encoded(entry: Entry) -> dict[str, object]:
    """JSON has no NaN and no infinity."""
    if "metrics" not in entry:
        return {**entry}
    return {**entry, "metrics": {k: v if math.isfinite(v) else str(v) for k, v in entry["metrics"].items()}}


_FIELDS = ({"step": int, "time_ms": int, "metrics": dict}, {"params": dict}, {"tags": dict}, {"status": str, "time_ms": int})


def decoded(line: bytes) -> tuple[str, Entry] | None:
    """(run id, entry), or nothing for a line that is damaged or blank."""
    try:
        entry = json.loads(line)
        run_id = entry.pop("run_id")
        kinds = {name: type(value) for name, value in entry.items()}
        if not isinstance(run_id, str) or kinds not in _FIELDS:
            return None
        if "metrics" in entry:
            entry["metrics"] = {key: float(value) for key, value in entry["metrics"].items()}
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
    return run_id, entry
