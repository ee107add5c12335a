"""Metrics into MLflow without slowing training down: buffered, sent from a thread, one batch a second."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ._lightning import MLFlowLogger, rank_zero_warn

DEFAULT_STORE = "sqlite:///mlflow.db"
FLUSH_SECONDS = 1.0


def mlflow_logger(
    run_name: str | None = None,
    *,
    experiment: str = "zolightning",
    store: str = DEFAULT_STORE,
    tags: Mapping[str, Any] | None = None,
) -> MLFlowLogger:
    """A Lightning logger on an MLflow store that takes writes without blocking.

    Args:
        run_name: shown in the dashboard; MLflow invents one when it is None.
        experiment: groups runs that are compared.
        store: an SQLite file ``sqlite:///path`` (write-ahead log, so that readers never block training) or a server's URL.
        tags: searchable labels of the run.
    """
    prepare_store(store)
    return MLFlowLogger(experiment, run_name, tracking_uri=store, tags=dict(tags or {}), synchronous=False)


def prepare_store(store: str) -> None:
    """Make an SQLite store's file and tables when they are not there, with a write-ahead log."""
    if not store.startswith("sqlite:///"):
        return
    from mlflow import MlflowClient

    path = Path(store.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    MlflowClient(store).search_experiments(max_results=1)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


class MetricBuffer:
    """Collects metrics and hands them to the Trainer's loggers, at most once a second.

    Args:
        loggers: of the Trainer. MLflow gets batches from a thread; any other is called at each flush.
    """

    def __init__(self, loggers: Sequence[Any]) -> None:
        self._loggers = list(loggers)
        self._rows: list[tuple[int, int, dict[str, float]]] = []
        self._flushed = time.monotonic()
        self._pending: list[Any] = []

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the metrics of a step; they carry the time of this call."""
        self._rows.append((step, int(time.time() * 1000), dict(metrics)))
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self, *, wait: bool = False) -> None:
        """Send what was collected; with ``wait``, return when MLflow has stored it."""
        rows, self._rows = self._rows, []
        self._flushed = time.monotonic()
        for logger in self._loggers:
            if isinstance(logger, MLFlowLogger):
                self._to_mlflow(logger, rows)
            else:
                for step, _, metrics in rows:
                    logger.log_metrics(metrics, step)
        if wait:
            for operation in self._pending:
                operation.wait()
            self._pending = []

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the MLflow runs."""
        from mlflow.entities import RunTag

        entries = [RunTag(key, value) for key, value in tags.items()]
        for logger in self._loggers:
            if isinstance(logger, MLFlowLogger):
                self._send(logger, tags=entries)

    def _to_mlflow(self, logger: MLFlowLogger, rows: list[tuple[int, int, dict[str, float]]]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(k, float(v), stamp, step) for step, stamp, values in rows for k, v in values.items()]
        for first in range(0, len(metrics), 1000):  # MLflow's limit for one batch
            self._send(logger, metrics=metrics[first : first + 1000])

    def _send(self, logger: MLFlowLogger, **content: Any) -> None:
        try:
            operation = logger.experiment.log_batch(logger.run_id, synchronous=False, **content)
        except Exception as error:  # a tracking server that is away must not end the training
            rank_zero_warn(f"MLflow did not take a batch of metrics, training goes on without them: {error}")
            return
        self._pending = [*self._pending[-8:], operation]
