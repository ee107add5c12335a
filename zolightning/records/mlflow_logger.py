"""Metrics into MLflow: a logger and a buffer that neither slow training down nor end it when the store is away."""

from __future__ import annotations

import os
import re
import sqlite3
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from filelock import FileLock

from .._answers import needs
from ..strategy._lightning import MLFlowLogger, _convert_params, _flatten_dict, rank_zero_only
from .outbox import Outbox

DEFAULT_STORE = "sqlite:///mlflow.db"
FLUSH_SECONDS = 1.0
_PROMPT = {  # MLflow reads these from the environment only; by default it repeats a request for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
}


def mlflow_logger(
    run_name: str | None = None,
    *,
    run_id: str | None = None,
    experiment: str = "zolightning",
    store: str = DEFAULT_STORE,
    tags: Mapping[str, Any] | None = None,
    folder: str | Path = ".",
) -> MLFlowLogger:
    """A Lightning logger on an MLflow store that neither blocks nor ends training, whatever happens to the store.

    A thread sends the entries once a second. While the store is away they wait in a file and are sent, with their own times
    and in order, when the store is back; the end of a run waits half a minute for that, see :class:`.outbox.Outbox`. For a
    server, MLflow's requests in this process are repeated once and take 30 s at most, unless the variables
    ``MLFLOW_HTTP_REQUEST_MAX_RETRIES``, ``MLFLOW_HTTP_REQUEST_TIMEOUT`` and ``MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER`` say
    otherwise.

    Args:
        run_name: shown in the dashboard; MLflow invents one when it is None.
        run_id: go on in this run, under its own name and in its own experiment; None: begin a new run.
        experiment: groups runs that are compared.
        store: an SQLite file ``sqlite:///path`` (write-ahead log, so that readers never block training) or a server's URL.
        tags: searchable labels of the run.
        folder: the Trainer's ``default_root_dir``. While the store is away, the waiting entries are kept where Lightning
            keeps the run's checkpoints, ``<folder>/<experiment id>/<run id>/pending-metrics-<run id>.jsonl``.

    Raises:
        ConnectionError: the store cannot be reached now.
        ValueError: the store has no run ``run_id``, or the run is deleted.
    """
    prepare_store(store)
    if run_id is not None:
        _check_run(store, run_id)
    return BufferedMLFlowLogger(run_name, experiment, store, tags or {}, Path(folder), run_id)


def _check_run(store: str, run_id: str) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        stage = MlflowClient(store).get_run(run_id).info.lifecycle_stage
    except MlflowException as error:
        raise ValueError(
            f"`mlflow_logger(run_id={run_id!r})` is not a run of the store {store!r}; leave `run_id` out for a new run"
        ) from error
    if stage != "active":
        raise ValueError(
            f"`mlflow_logger(run_id={run_id!r})` is a deleted run; restore it, or leave `run_id` out for a new run"
        )


def prepare_store(store: str) -> None:
    """Make sure that a store can be used; make an SQLite store's file and tables when they are not there.

    Raises:
        ConnectionError: it cannot.
    """
    with needs("mlflow", "recording in MLflow"):
        from mlflow import MlflowClient

    path = store.removeprefix("sqlite:///")
    try:
        if path == store:
            for name, value in _PROMPT.items():
                os.environ.setdefault(name, value)
            MlflowClient(store).search_experiments(max_results=1)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # two processes that make the tables at once would collide
            with closing(sqlite3.connect(path, timeout=30)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
            MlflowClient(store).search_experiments(max_results=1)
    except Exception as error:
        shown, reason = (re.sub(r"//[^/@\s]+@", "//", str(text)) for text in (store, error))
        raise ConnectionError(
            f"`store={shown!r}` cannot be used: {reason}\nGive a file that can be written, such as {DEFAULT_STORE!r}, or the "
            "URL of a server that runs (`mlflow server`)."
        ) from error


class BufferedMLFlowLogger(MLFlowLogger):
    """Lightning's logger with everything that it logs sent through an outbox; :func:`mlflow_logger` explains it.

    ``experiment`` is MLflow's own client: its calls are sent at once and may raise.
    """

    def __init__(
        self,
        run_name: str | None,
        experiment: str,
        store: str,
        tags: Mapping[str, Any],
        folder: Path,
        run_id: str | None = None,
    ) -> None:
        super().__init__(experiment, run_name, tracking_uri=store, tags=dict(tags), run_id=run_id)
        self._folder, self._goes_on = folder, run_id is not None
        self._outbox: Outbox | None = None

    @property
    def outbox(self) -> Outbox:
        """Made at the first use, as it needs the run."""
        if self._outbox is None:
            self._outbox = _new_outbox(self, self._folder)
            if self._goes_on:
                self._outbox.status("RUNNING")
                self._outbox.tags({name: str(value) for name, value in (self.tags or {}).items()})
        return self._outbox

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.outbox.metrics({_metric_name(k): v for k, v in metrics.items() if not isinstance(v, str)}, step or 0)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        _log_params(self.outbox, params)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        if self._initialized:
            self.outbox.status({"success": "FINISHED", "failed": "FAILED"}.get(status, status.upper()))
            self.outbox.wait()


class MetricBuffer:
    """Collects metrics and hands them to the Trainer's loggers, at most once a second.

    Args:
        loggers: The Trainer's loggers. A thread sends the metrics for MLflow; any other logger is called at each flush.
        folder: the Trainer's ``default_root_dir``, for MLflow loggers that are not :func:`mlflow_logger`'s.
    """

    def __init__(self, loggers: Sequence[Any], folder: Path = Path()) -> None:
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # elsewhere there is no run to log to
        loggers = loggers if first else []
        self._outboxes = [_outbox(logger, folder) for logger in loggers if isinstance(logger, MLFlowLogger)]
        self._others = [logger for logger in loggers if not isinstance(logger, MLFlowLogger)]
        self._rows: list[tuple[Mapping[str, float], int]] = []
        self._flushed = time.monotonic()

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep the metrics of a step; in MLflow they carry the time of this call."""
        for outbox in self._outboxes:
            outbox.metrics(metrics, step)
        if self._others:
            self._rows.append((dict(metrics), step))
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self, *, wait: bool = False) -> None:
        """Hand over the collected metrics; with ``wait``, return when MLflow has stored it, or after half a minute."""
        rows, self._rows = self._rows, []
        self._flushed = time.monotonic()
        for logger in self._others:
            for metrics, step in rows:
                logger.log_metrics(metrics, step)
        if wait:
            for outbox in self._outboxes:
                outbox.wait()

    @property
    def run_ids(self) -> list[str]:
        """Of the MLflow runs."""
        return [outbox.run_id for outbox in self._outboxes]

    def params(self, params: dict[str, Any]) -> None:
        """Log settings of the run."""
        for outbox in self._outboxes:
            _log_params(outbox, params)
        for logger in self._others:
            logger.log_hyperparams(params)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the MLflow runs."""
        for outbox in self._outboxes:
            outbox.tags(tags)

    def artifact(self, path: Path) -> None:
        """Upload a file to the MLflow runs, in place of an earlier one of the same name."""
        for outbox in self._outboxes:
            outbox.artifact(path)


def _outbox(logger: MLFlowLogger, folder: Path) -> Outbox:
    if isinstance(logger, BufferedMLFlowLogger):
        return logger.outbox
    return _new_outbox(logger, folder)


def _new_outbox(logger: MLFlowLogger, folder: Path) -> Outbox:
    run_id = logger.run_id  # starts the run, if need be
    assert run_id is not None
    return Outbox(logger.experiment, run_id, folder / str(logger.name) / run_id)


def _log_params(outbox: Outbox, params: dict[str, object] | Namespace) -> None:
    """Nested settings as ``outer/inner``, in MLflow's limits: 100 at once, and Lightning's 250 characters."""
    items = [(key, str(value)[:250]) for key, value in _flatten_dict(_convert_params(params)).items()]
    for first in range(0, len(items), 100):
        outbox.params(dict(items[first : first + 100]))


def _metric_name(name: str) -> str:
    """Only characters that MLflow takes; others are left out, as Lightning does."""
    return re.sub("[^a-zA-Z0-9_/. -]+", "", name)
