"""MLflow stores for the dashboard's tests, and what MLflow's own client says is in them."""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric
from zolightning_dashboard.source import Series

LARGEST = 1.7976931348623157e308
HOSTILE = (
    "<script>alert(1)</script>",
    "'; DROP TABLE runs; --",
    "\u202egnp.exe \U0001f9ea é",
    "a" * 240,
    "% _ ? * [x]",
)

Point = tuple[int, int, float]
"""Step, milliseconds, value."""


def make_store(path: Path) -> MlflowClient:
    """A new store as :func:`zolightning.records.mlflow_logger.prepare_store` leaves it: tables and a write-ahead log."""
    client = MlflowClient(f"sqlite:///{path}")
    client.search_experiments()
    with closing(sqlite3.connect(path)) as store:
        store.execute("PRAGMA journal_mode=WAL")
    return client


def log(client: MlflowClient, run_id: str, key: str, points: Iterable[Point]) -> None:
    rows = [Metric(key, value, stamp, step) for step, stamp, value in points]
    for first in range(0, len(rows), 1000):
        client.log_batch(run_id, rows[first : first + 1000], synchronous=True)


def history(client: MlflowClient, run_id: str, key: str) -> list[Point]:
    """What MlflowClient gives, in the order that the dashboard promises, with infinities as they were logged."""
    points = [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, key)]
    points.sort(key=lambda p: (p[0], p[1], 0.0 if math.isnan(p[2]) else p[2], math.isnan(p[2])))
    return [(s, t, math.copysign(math.inf, v) if abs(v) == LARGEST else v) for s, t, v in points]


def as_tuples(series: Series) -> list[Point]:
    """The series' points; milliseconds as they were before the division."""
    assert (series.step.dtype, series.time.dtype, series.value.dtype) == (np.int64, np.float64, np.float64)
    stamps = [round(1000 * time) for time in series.time.tolist()]
    return list(zip(series.step.tolist(), stamps, series.value.tolist(), strict=True))


def same(series: Series, points: list[Point]) -> None:
    """Assert equality, nan to nan."""
    assert repr(as_tuples(series)) == repr(points)


class Server:
    """A real ``mlflow server`` on loopback, over an SQLite file.

    Args:
        path: the file.
        more: arguments of the command.
        environment: variables of its process.
    """

    def __init__(self, path: Path, more: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self.more, self.environment = more, environment or {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.path, self.folder = path, path.parent
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self.path}", "--artifacts-destination", str(self.folder)]
        command = [sys.executable, "-m", "mlflow", "server", *store, "--port", str(self.port), "--workers", "1", *self.more]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self.environment},
            )  # fmt: skip
        patience = time.monotonic() + 120
        while time.monotonic() < patience and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        self.stop()
        raise RuntimeError((self.folder / "server.log").read_text())

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def copy_store(source: Path, target: Path) -> Path:
    """A copy of a store that nobody has open."""
    assert not Path(f"{source}-wal").exists()
    return Path(shutil.copy(source, target))
