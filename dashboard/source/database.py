"""An MLflow store in PostgreSQL or MySQL, read by SQLAlchemy in read-only transactions and never written.

These databases number no rows, so news is found by its time. A poll reads the table of runs, and of the runs that are going
on, or whose row has changed, their parameters, tags and last points; every tenth reads this of all runs. Of the loaded metrics
of these runs it then reads the points logged since a minute before the last known one. A metric whose last point is still not
there after that, and all of a run that has ended, are read anew: clocks differ, and imported points may have any time.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import numpy as np
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from ..addresses import shown_address
from .base import Series, SourceError, newest_first
from .buffer import SeriesBuffer, split_by_run
from .tables import COLUMNS, EXPERIMENTS, RUNS, Described, Latest, TableSource, as_latest, check_tables

_PACKAGES = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Of drivers that are installed by another name."""

_READ_ONLY = {
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY",
    "mysql": "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY",
}
_PARAMS, _TAGS, _LATEST, _METRICS = (
    sa.table(name, *(sa.column(one, sa.Boolean() if one == "is_nan" else None) for one in sorted(COLUMNS[name])))
    for name in ("params", "tags", "latest_metrics", "metrics")
)
_CONNECT_SECONDS = 5
_OVERLAP_MS = 60_000
_ALL_EVERY = 10
_ROWS = 20_000

Name = tuple[str, str]
"""Run and metric."""


class DatabaseSource(TableSource):
    """Reads an MLflow store in PostgreSQL or MySQL.

    Args:
        uri: SQLAlchemy's, as for MLflow's ``--backend-store-uri``.

    Raises:
        NoStoreYet: the database has no tables.
        SourceError: no such database answers, its driver is not installed, or it is no MLflow store.
    """

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._shown = shown_address(uri)
        self._engine = self._open(uri)
        self._version = self._polls = 0
        self._latest: dict[str, dict[str, Latest]] = {}
        self._editions: dict[str, int] = {}
        with self._reading() as store:
            inspector = sa.inspect(store)
            tables = inspector.get_table_names()
            check_tables(
                self._shown, {one: {c["name"] for c in inspector.get_columns(one)} for one in tables if one in COLUMNS}
            )
        self.poll()

    # ---- the contract --------------------------------------------------------------------------------------------------

    def poll(self) -> int:
        with self._lock, self._reading() as store:
            described, latest = self._describe(store)
            self._polls += 1
            before = {run.id: (run, self._latest[run.id]) for run in self._runs}
            runs = newest_first(described.build(latest))
            changed = {run.id for run in runs if before.get(run.id) != (run, latest[run.id])}
            news = bool(changed) or len(runs) != len(before) or described.experiments != self._described.experiments
            self._buffers = {name: buffer for name, buffer in self._buffers.items() if name[0] in latest}
            changed |= self._catch_up(store, {run.id for run in runs if run.status == "RUNNING"}, changed, latest)
            if news or changed:
                self._version += 1
                self._editions.update(dict.fromkeys(changed, self._version))
            self._described, self._latest, self._runs = described, latest, runs
            return self._version

    def edition(self, run_id: str) -> int:
        with self._lock:
            return self._editions.get(run_id, self._version)

    def load(self, run_ids: Sequence[str], key: str) -> None:
        with self._lock:
            missing = [id_ for id_ in run_ids if (id_, key) not in self._buffers and key in self._latest.get(id_, ())]
            if missing:
                with self._reading() as store:
                    self._read(store, missing, key)

    def close(self) -> None:
        with self._lock:
            self._engine.dispose()

    # ---- questions to the store ----------------------------------------------------------------------------------------

    def _describe(self, store: sa.Connection) -> tuple[Described, dict[str, dict[str, Latest]]]:
        """The runs and their last points; of runs that have ended as they were, but for each tenth time."""
        experiments, runs = ([tuple(row) for row in store.execute(sa.text(query))] for query in (EXPERIMENTS, RUNS))
        old = self._described
        ended = {row[0] for row in {*runs} & {*old.runs} if row[3] != "RUNNING"} if self._polls % _ALL_EVERY else set()
        asked = [row[0] for row in runs if row[0] not in ended]

        def of_runs(table: sa.TableClause, *columns: Any) -> list[tuple[Any, ...]]:
            question = sa.select(table.c.run_uuid, table.c.key, *columns)
            return [tuple(row) for row in store.execute(question.where(table.c.run_uuid.in_(asked)) if ended else question)]

        params = sorted([*(row for row in old.params if row[0] in ended), *of_runs(_PARAMS, _PARAMS.c.value)])
        tags = sorted([*(row for row in old.tags if row[0] in ended), *of_runs(_TAGS, _TAGS.c.value)])
        latest = {run_id: self._latest[run_id] for run_id in ended} | {run_id: {} for run_id in asked}
        for run_id, key, *point in of_runs(_LATEST, *_point(_LATEST)):
            if run_id in latest:  # the run is not deleted
                latest[run_id][key] = as_latest(*point)
        return Described(experiments, runs, params, tags), latest

    def _read(self, store: sa.Connection, run_ids: Sequence[str], key: str) -> None:
        """All points of a metric of these runs."""
        of_runs = _METRICS.c.run_uuid.in_(run_ids)
        question = sa.select(_METRICS.c.run_uuid, *_point(_METRICS)).where(_METRICS.c.key == key, of_runs)
        rows = store.execution_options(yield_per=_ROWS).execute(question)
        for run_id, points in split_by_run(rows.partitions(), run_ids).items():
            self._buffers[run_id, key] = buffer = SeriesBuffer()
            buffer.extend(points)

    def _catch_up(
        self, store: sa.Connection, running: set[str], changed: set[str], latest: dict[str, dict[str, Latest]]
    ) -> set[str]:
        """Bring the loaded metrics up to date; returns the runs that have new points."""
        new = self._add_new(store, [name for name in self._buffers if name[0] in running])
        afresh: dict[str, list[str]] = {}
        for (run_id, key), buffer in self._buffers.items():
            last = latest[run_id].get(key)
            if run_id in changed and not (run_id in running and last is not None and _has(buffer.series, last)):
                afresh.setdefault(key, []).append(run_id)
        for key, run_ids in afresh.items():
            self._read(store, run_ids, key)
        return new

    def _add_new(self, store: sa.Connection, names: Sequence[Name]) -> set[str]:
        """Add the newest points to these metrics; returns the runs for which there was something."""
        begun = {name: _newest(self._buffers[name].series) - _OVERLAP_MS for name in names if len(self._buffers[name])}
        if not begun:
            return set()
        lately = (
            sa.and_(_METRICS.c.key == key, _METRICS.c.run_uuid == run_id, _METRICS.c.timestamp >= since)
            for (run_id, key), since in begun.items()
        )
        question = sa.select(_METRICS.c.run_uuid, _METRICS.c.key, *_point(_METRICS)).where(sa.or_(*lately))
        known = {name: _since(self._buffers[name].series, since) for name, since in begun.items()}
        new = set()
        for run_id, key, step, stamp, value in store.execute(question):
            if (step, stamp, _shown(value)) not in known[run_id, key]:
                self._buffers[run_id, key].add((step, stamp, value))
                new.add(run_id)
        return new

    # ---- the connection ------------------------------------------------------------------------------------------------

    def _open(self, uri: str) -> sa.Engine:
        try:
            url = sa.make_url(uri)
            self._password = url.password or ""
            engine = sa.create_engine(url, pool_size=1, pool_pre_ping=True, pool_recycle=600, connect_args=_patience(url))
        except ImportError as error:
            driver = error.name or "the driver's package"
            raise SourceError(f"{self._shown} needs a driver: pip install {_PACKAGES.get(driver, driver)}") from error
        except (ArgumentError, NoSuchModuleError, ValueError) as error:
            raise SourceError(f"{self._shown} is no address of a database: {error}") from error

        def connected(connection: Any, _: object) -> None:
            with contextlib.closing(connection.cursor()) as cursor:
                cursor.execute(_READ_ONLY["postgresql" if engine.dialect.name == "postgresql" else "mysql"])
            connection.commit()

        sa.event.listen(engine, "connect", connected)
        return engine

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the store."""
        try:
            with self._engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            said = " ".join(str(getattr(error, "orig", None) or error).split())
            if self._password:
                said = said.replace(self._password, "…").replace(quote(self._password, safe=""), "…")
            raise SourceError(f"{self._shown} cannot be read: {said[:500]}") from None


def _patience(url: sa.URL) -> dict[str, Any]:
    """How long to wait for an answer, in the driver's own words."""
    known = {"psycopg2", "psycopg", "pymysql", "mysqldb"}
    return {"connect_timeout": _CONNECT_SECONDS} if url.get_driver_name() in known else {}


def _point(table: sa.TableClause) -> tuple[Any, ...]:
    return table.c.step, table.c.timestamp, sa.case((table.c.is_nan, sa.null()), else_=table.c.value)


def _newest(series: Series) -> int:
    return round(1000 * float(series.time.max()))


def _has(series: Series, last: Latest) -> bool:
    return bool(((series.step == last[0]) & (np.rint(1000 * series.time) == last[1])).any())


def _since(series: Series, since: int) -> set[tuple[int, int, float | None]]:
    """The points from this millisecond on."""
    late = series.time >= since / 1000.0
    step, time, value = (column[late].tolist() for column in series)
    return {(s, round(1000 * t), _shown(v)) for s, t, v in zip(step, time, value, strict=True)}


def _shown(value: float | None) -> float | None:
    """A value that equals itself, whichever way the store or a series writes it."""
    if value is None or math.isnan(value):
        return None
    return math.copysign(math.inf, value) if abs(value) == sys.float_info.max else value
