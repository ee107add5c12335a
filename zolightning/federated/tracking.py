"""A federation's rounds in an MLflow store, for the dashboard."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from .server import Round


class RoundLog:
    """Logs rounds: a run of the server, and one of each client, all with the tag ``zo.federation`` to group them by.

    ::

        with RoundLog("sqlite:///mlflow.db", name="digits") as log:
            simulate(module, shards, method, rounds=300, evaluate=accuracy, on_round=log)

    The server's run has the loss, bytes up and down so far, clients asked, joined and refused by round, and what was
    evaluated; a client's its bytes and rounds so far. The step of all is the federation's. The dashboard's Health page shows
    them, and its charts take runs together by a tag.

    Args:
        store: an SQLite file ``sqlite:///path`` or a server's URL.
        experiment: groups runs that are compared.
        name: of the federation.
        value: the metric's name of what is evaluated.
    """

    def __init__(
        self, store: str = "sqlite:///mlflow.db", *, experiment: str = "zolightning", name: str = "federation",
        value: str = "val/accuracy",
    ) -> None:  # fmt: skip
        from mlflow import MlflowClient

        from ..records.mlflow_logger import prepare_store

        prepare_store(store)
        self._client, self._name, self._value = MlflowClient(store), name, value
        found = self._client.get_experiment_by_name(experiment)
        self._experiment = found.experiment_id if found else self._client.create_experiment(experiment)
        self._runs: dict[str, str] = {}
        self._up: Counter[str] = Counter()
        self._joined: Counter[str] = Counter()
        self._down = self._refused = 0

    def __call__(self, done: Round, values: Mapping[str, float]) -> None:
        """Log a round, as ``on_round`` of :func:`~zolightning.federated.simulate` and of the Flower app."""
        self._down += done.bytes_down
        self._refused += len(done.refused)
        self._joined.update(done.joined)
        self._up.update(done.sent)
        metrics = {
            "train/loss": done.loss,
            "zo/clients/bytes_up": self._up.total(),
            "zo/clients/bytes_down": self._down,
            "zo/clients/asked": len(done.asked),
            "zo/clients/joined": len(done.joined),
            "zo/clients/refused": self._refused,
            **{self._value if name == "value" else name: value for name, value in values.items()},
        }
        self._log("", done.step, metrics)
        for client in done.asked:
            theirs = {"zo/clients/bytes_up": self._up[client], "zo/clients/joined": self._joined[client]}
            self._log(client, done.step, theirs)

    def close(self, status: str = "FINISHED") -> None:
        """End the runs."""
        for run in self._runs.values():
            self._client.set_terminated(run, status)

    def __enter__(self) -> RoundLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close("FAILED" if error else "FINISHED")

    def _log(self, client: str, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if client not in self._runs:
            named = f"{self._name}, {client or 'server'}"
            role = "client" if client else "server"
            tags: dict[str, Any] = {"zo.recipe": "federated", "zo.federation": self._name, "zo.role": role}
            self._runs[client] = self._client.create_run(self._experiment, run_name=named, tags=tags).info.run_id
        now = int(time.time() * 1000)
        entries = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._runs[client], entries)
