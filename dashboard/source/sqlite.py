"""An MLflow store in an SQLite file, read beside whoever writes it and never written.

The cost of a read, from MLflow's indexes: ``rowid > cursor`` is one descent of the table's tree and then the new rows only.
One series is a range of ``index_metrics_run_uuid_key_step`` and a look-up a point, all over the file. The primary key's
index has all columns and a metric's points of *all* runs together, by time: the way to read one metric of most runs, which
SQLite takes by itself, and a waste for one run.
"""

from __future__ import annotations

import math
import os
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .base import Extremes, newest_first
from .buffer import Points, SeriesBuffer, as_points, split_by_run
from .file import Look, StoreFile
from .tables import EXPERIMENTS, RUNS, Described, Latest, TableSource, as_latest, check_tables

_PARAMS = "SELECT run_uuid, key, value FROM params"
_TAGS = "SELECT run_uuid, key, value FROM tags"

_POINT = "step, timestamp, CASE WHEN is_nan THEN NULL ELSE value END"
_LATEST = f"SELECT run_uuid, key, {_POINT} FROM latest_metrics"
_FINITE = "NOT is_nan AND abs(value) < 1.7976931348623157e308"
_SERIES = f"SELECT {_POINT} FROM metrics {{}} WHERE run_uuid = ? AND key = ? AND rowid <= ?"
_ALL_SERIES = f"SELECT run_uuid, {_POINT} FROM metrics WHERE key = ? AND rowid <= ?"
_EXTREMES = f"SELECT run_uuid, min(value), max(value) FROM metrics WHERE key = ? AND {_FINITE} AND rowid <= ? GROUP BY run_uuid"
_VALUE = (
    f"SELECT value FROM metrics {{}} WHERE run_uuid = ? AND key = ? AND step = ? AND {_FINITE} AND rowid <= ? "
    "ORDER BY timestamp DESC, value DESC LIMIT 1"
)
_INDEXES = ("index_metrics_run_uuid_key_step", "index_metrics_run_uuid")  # best first; MLflow 2 has the second only
_NEW_POINTS = f"SELECT run_uuid, key, {_POINT} FROM metrics WHERE rowid > ? ORDER BY rowid"
_ROW = "SELECT rowid, run_uuid, key, step, timestamp, value, is_nan FROM metrics"
_ROWS = 2_000
_NEWEST_ROW = f"{_ROW} ORDER BY rowid DESC LIMIT 1"
_ROW_AT = f"{_ROW} WHERE rowid = ?"


class _Layout(NamedTuple):
    """How the store's tables are built.

    Args:
        version: SQLite's count of changes to them.
        by_run: the metrics table's index through which one series is found; "" when it has none.
    """

    version: int
    by_run: str


class _News(NamedTuple):
    """The findings of one poll.

    Args:
        layout: of the tables now.
        afresh: rows may have moved, so nothing that was known holds.
        newest: the metrics table's last row.
        points: its rows since the last poll, (run, metric, step, milliseconds, value); none when ``afresh``.
        latest: likewise the last point of each metric of each run; only when ``afresh``.
        described: the runs.
    """

    layout: _Layout
    afresh: bool
    newest: tuple[Any, ...] | None
    points: Sequence[tuple[Any, ...]]
    latest: Sequence[tuple[Any, ...]]
    described: Described


class SqliteSource(TableSource):
    """Reads an MLflow store in an SQLite file.

    Args:
        path: the file.

    Raises:
        NoStoreYet: there is no such file, or nothing in it.
        SourceError: it is not an MLflow store, or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._file = StoreFile(Path(path).absolute())
        self._version = 0
        self._look: Look | None = None
        self._forget()
        self.poll()

    def _forget(self) -> None:
        """Nothing is known, as at the start."""
        self._layout: _Layout | None = None
        self._newest: tuple[Any, ...] | None = None
        self._latest: defaultdict[str, dict[str, Latest]] = defaultdict(dict)
        self._buffers = {}
        self._extremes: dict[tuple[str, str], Extremes] = {}
        self._described = Described()
        self._runs = []
        self._editions: defaultdict[str, int] = defaultdict(lambda: self._version)

    # ---- the contract --------------------------------------------------------------------------------------------------

    def poll(self) -> int:
        with self._lock:
            look = self._file.look()
            if look.settled and look == self._look:
                return self._version
            if self._look is not None and look.identity != self._look.identity:
                self._forget()
            self._take(self._file.read(self._ask_news))
            self._look = look
            return self._version

    def edition(self, run_id: str) -> int:
        with self._lock:
            return self._editions[run_id]

    def load(self, run_ids: Sequence[str], key: str) -> None:
        with self._lock:
            missing = self._having(run_ids, key, self._buffers)
            if not missing:
                return
            ask = self._ask_all if self._are_most(missing, key) else self._ask_each
            for run_id, points in self._file.read(lambda store: ask(store, missing, key)).items():
                self._buffers[run_id, key] = buffer = SeriesBuffer()
                buffer.extend(points)

    def load_extremes(self, run_ids: Sequence[str], key: str) -> None:
        with self._lock:
            missing = self._having(run_ids, key, {*self._extremes, *self._buffers})
            if not self._are_most(missing, key):
                self.load(missing, key)
            elif missing:
                rows = self._file.read(lambda store: self._ask_extremes(store, key))
                self._extremes.update(((run_id, key), Extremes(math.nan, math.nan)) for run_id in missing)
                self._extremes.update(((run_id, key), Extremes(*ends)) for run_id, *ends in rows)

    def extremes(self, run_id: str, key: str) -> Extremes:
        with self._lock:
            found = self._extremes.get((run_id, key))
            return found if found is not None else super().extremes(run_id, key)

    def values_at(self, steps: Mapping[str, int], key: str) -> dict[str, float]:
        with self._lock:
            ids = self._having(steps, key, self._buffers)
            known = super().values_at({run_id: step for run_id, step in steps.items() if (run_id, key) in self._buffers}, key)
            asked = {run_id: steps[run_id] for run_id in ids}
            return known | (self._file.read(lambda store: self._ask_at(store, asked, key)) if asked else {})

    def close(self) -> None:
        with self._lock:
            self._forget()
            self._look = None

    def _having(self, run_ids: Iterable[str], key: str, known: Collection[tuple[str, str]]) -> list[str]:
        """Those of the runs that have logged the metric and of which it is not known."""
        return [run_id for run_id in run_ids if (run_id, key) not in known and key in self._latest.get(run_id, ())]

    def _are_most(self, run_ids: Sequence[str], key: str) -> bool:
        """They are many enough of those that have logged the metric to read it of all."""
        return len(run_ids) > 1 and 2 * len(run_ids) >= sum(key in keys for keys in self._latest.values())

    # ---- questions to the store ----------------------------------------------------------------------------------------

    @property
    def _by_run(self) -> str:
        assert self._layout is not None
        return f"INDEXED BY {self._layout.by_run}" if self._layout.by_run else ""

    def _ask_extremes(self, store: sqlite3.Connection, key: str) -> list[tuple[str, float, float]]:
        return store.execute(_EXTREMES, (key, self._last_rowid)).fetchall()

    def _ask_at(self, store: sqlite3.Connection, steps: Mapping[str, int], key: str) -> dict[str, float]:
        query, last = _VALUE.format(self._by_run), self._last_rowid
        rows = {run_id: store.execute(query, (run_id, key, step, last)).fetchone() for run_id, step in steps.items()}
        return {run_id: row[0] for run_id, row in rows.items() if row is not None}

    def _ask_each(self, store: sqlite3.Connection, run_ids: Sequence[str], key: str) -> dict[str, Points]:
        query = _SERIES.format(self._by_run)
        return {run_id: as_points(store.execute(query, (run_id, key, self._last_rowid))) for run_id in run_ids}

    def _ask_all(self, store: sqlite3.Connection, run_ids: Sequence[str], key: str) -> dict[str, Points]:
        rows = store.execute(_ALL_SERIES, (key, self._last_rowid))
        return split_by_run(iter(lambda: rows.fetchmany(_ROWS), []), run_ids)

    @property
    def _last_rowid(self) -> int:
        return self._newest[0] if self._newest else 0

    def _ask_news(self, store: sqlite3.Connection) -> _News:
        (version,) = store.execute("PRAGMA schema_version").fetchone()
        afresh = self._layout is None or version != self._layout.version
        if not afresh and self._newest is not None:  # deleted rows leave their numbers to new ones, VACUUM gives others
            afresh = store.execute(_ROW_AT, (self._last_rowid,)).fetchone() != self._newest
        if afresh:
            layout = _Layout(version, _check_tables(store, self._file.path))
        else:
            assert self._layout is not None
            layout = self._layout
        return _News(
            layout,
            afresh,
            newest=store.execute(_NEWEST_ROW).fetchone(),
            points=[] if afresh else store.execute(_NEW_POINTS, (self._last_rowid,)).fetchall(),
            latest=store.execute(_LATEST).fetchall() if afresh else [],
            described=Described(*(store.execute(query).fetchall() for query in (EXPERIMENTS, RUNS, _PARAMS, _TAGS))),
        )

    def _take(self, news: _News) -> None:
        if news.afresh:
            self._forget()
            for run_id, key, *point in news.latest:
                self._latest[run_id][key] = as_latest(*point)
        elif not news.points and news.described == self._described:
            return
        self._version += 1
        more_keys = self._append(news.points)
        if news.afresh or more_keys or news.described != self._described:
            before = {run.id: run for run in self._runs}
            self._runs = newest_first(news.described.build(self._latest))
            self._editions.update((run.id, self._version) for run in self._runs if run != before.get(run.id))
            there = {run.id for run in self._runs}
            self._buffers = {name: buffer for name, buffer in self._buffers.items() if name[0] in there}
            self._extremes = {name: ends for name, ends in self._extremes.items() if name[0] in there}
        self._layout, self._newest, self._described = news.layout, news.newest, news.described

    def _append(self, points: Sequence[tuple[Any, ...]]) -> bool:
        """Add the points to the series that are loaded; whether there are metrics among them that were not known."""
        known = sum(map(len, self._latest.values()))
        for run_id, key, step, stamp, value in points:
            latest, point = self._latest[run_id], as_latest(step, stamp, value)
            if key not in latest or point > latest[key]:  # as MLflow compares them
                latest[key] = point
            self._editions[run_id] = self._version
            buffer = self._buffers.get((run_id, key))
            if buffer is not None:
                buffer.add((step, stamp, value))
            self._extremes.pop((run_id, key), None)
        return sum(map(len, self._latest.values())) > known


def _check_tables(store: sqlite3.Connection, path: Path) -> str:
    """The best index to find a series by. Raises SourceError when this is no MLflow store that can be read."""
    tables = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = "SELECT name FROM pragma_table_info(?)"
    check_tables(path, {table: {name for (name,) in store.execute(columns, (table,))} for table in tables})
    indexes = {row[1] for row in store.execute("PRAGMA index_list(metrics)")}
    return next((index for index in _INDEXES if index in indexes), "")
