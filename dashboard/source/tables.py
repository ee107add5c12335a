"""MLflow's tables as every database has them: the columns that are read, and the runs that they describe."""

from __future__ import annotations

import math
import threading
from abc import ABC
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .base import Experiment, MetricSource, NoStoreYet, Run, Series, SourceError
from .buffer import SeriesBuffer
from .file import LOG_A_RUN

COLUMNS = {
    "experiments": {"experiment_id", "name", "lifecycle_stage", "creation_time"},
    "runs": {"run_uuid", "name", "experiment_id", "status", "start_time", "end_time", "lifecycle_stage", "artifact_uri"},
    "params": {"run_uuid", "key", "value"},
    "tags": {"run_uuid", "key", "value"},
    "latest_metrics": {"run_uuid", "key", "step", "timestamp", "value", "is_nan"},
    "metrics": {"run_uuid", "key", "step", "timestamp", "value", "is_nan"},
}
"""The columns that are read of MLflow's tables."""

EXPERIMENTS = (
    "SELECT experiment_id, name FROM experiments WHERE lifecycle_stage = 'active' ORDER BY creation_time, experiment_id"
)
RUNS = (
    "SELECT run_uuid, name, experiment_id, status, start_time, end_time, artifact_uri FROM runs "
    "WHERE lifecycle_stage = 'active'"
)

Latest = tuple[int, int, float]
"""Step, milliseconds and value of a metric's last point, as MLflow compares them."""


class Described(NamedTuple):
    """The tables that describe runs, as read."""

    experiments: Sequence[tuple[Any, ...]] = ()
    runs: Sequence[tuple[Any, ...]] = ()
    params: Sequence[tuple[str, str, str]] = ()
    tags: Sequence[tuple[str, str, str]] = ()

    def found(self) -> list[Experiment]:
        """The experiments."""
        return [Experiment(str(id_), name) for id_, name in self.experiments]

    def build(self, latest: Mapping[str, dict[str, Latest]]) -> Iterator[Run]:
        """The runs.

        Args:
            latest: of each run the last point of each metric.
        """
        params, tags = by_run(self.params), by_run(self.tags)
        for id_, name, experiment, status, started, ended, artifacts in self.runs:
            name, last = name or tags[id_].get("mlflow.runName") or id_, latest.get(id_, {})
            yield Run(
                id_, name, str(experiment), status, _seconds(started), _seconds(ended), params[id_], tags[id_],
                tuple(sorted(last)), last, artifacts or "",
            )  # fmt: skip


def check_tables(where: object, found: Mapping[str, Collection[str]]) -> None:
    """Refuse a database that is no store of MLflow.

    Args:
        where: the store, as it may be shown.
        found: the columns of each of its tables.

    Raises:
        NoStoreYet: it has no tables.
        SourceError: a table or a column is missing.
    """
    if not found:
        raise NoStoreYet(f"{where} is empty; {LOG_A_RUN}")
    if missing := sorted(COLUMNS.keys() - found.keys()):
        raise SourceError(
            f"{where} is not an MLflow store that can be read: it has no table {', '.join(missing)}; give the address that "
            "MLflow has for its store, and if MLflow is older than 1.0 upgrade the store with `mlflow db upgrade`"
        )
    for table, columns in COLUMNS.items():
        if lacking := sorted(columns.difference(found[table])):
            raise SourceError(
                f"{where} was made by another version of MLflow: table {table} has no column {', '.join(lacking)}; "
                "upgrade a copy of the store with `mlflow db upgrade`"
            )


class TableSource(MetricSource, ABC):
    """A store whose tables are read here: the runs and the loaded points, as the last poll found them.

    Subclasses fill the attributes under the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._described = Described()
        self._runs: list[Run] = []
        self._buffers: dict[tuple[str, str], SeriesBuffer] = {}
        """Run and metric → its points."""

    def experiments(self) -> Sequence[Experiment]:
        with self._lock:
            return self._described.found()

    def runs(self, experiment_ids: Sequence[str]) -> Sequence[Run]:
        with self._lock:
            wanted = set(experiment_ids)
            return [run for run in self._runs if run.experiment_id in wanted]

    def series(self, run_id: str, key: str) -> Series:
        with self._lock:
            self.load([run_id], key)
            return self._buffers.get((run_id, key), SeriesBuffer()).series


def by_run(rows: Sequence[tuple[str, str, str]]) -> defaultdict[str, dict[str, str]]:
    """Run, name and value as the values by name of each run."""
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for run_id, key, value in rows:
        found[run_id][key] = value
    return found


def as_latest(step: int, stamp: int, value: float | None) -> Latest:
    """A row of the last points, nan where the value is none."""
    return step, stamp, math.nan if value is None else value


def _seconds(milliseconds: int | None) -> float:
    return math.nan if milliseconds is None else milliseconds / 1000.0
