"""A federation's rounds in an MLflow store, for the dashboard."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .server import Round

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_PARENT = "mlflow.parentRunId"


class RoundLog:
    """Logs rounds: a run of the server, and one of each client, all with the tag ``zo.federation`` to group them by.

    ::

        with RoundLog("sqlite:///mlflow.db", name="digits") as log:
            simulate(module, shards, method, rounds=300, evaluate=accuracy, on_round=log)

    The server's run has the loss, bytes up and down so far, clients asked, joined and refused by round, and what was
    evaluated; a client's its bytes and rounds so far. The step of all is the federation's. The dashboard's Health page shows
    them, and its charts take the clients together by the setting ``role``. A server that was started again, whose first
    round is not the federation's, goes on in the runs of before. A store that goes away is told of once,
    and ends no federation.

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
        self._store, self._experiment, self._name, self._value = store, experiment, name, value
        self._client: MlflowClient | None = None
        self._group = ""
        self._runs: dict[str, str] = {}
        self._up: Counter[str] = Counter()
        self._joined: Counter[str] = Counter()
        self._down = self._refused = 0
        self._away = False

    def __call__(self, done: Round, values: Mapping[str, float]) -> None:
        """Log a round, as ``on_round`` of :func:`~zolightning.federated.simulate` and of the Flower app."""
        if self._client is None:
            self._open()
        try:
            if done.number and not self._runs:
                self._go_on()
            self._round(done, values)
            self._away = False
        except Exception as error:  # of the store, which is not the federation's
            if not self._away:
                warnings.warn(f"round {done.number} could not be logged to {self._store}: {error!r}", stacklevel=2)
            self._away = True

    def close(self, status: str = "FINISHED") -> None:
        """End the runs."""
        if self._client is not None:
            for run in self._runs.values():
                self._client.set_terminated(run, status)

    def __enter__(self) -> RoundLog:
        self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close("FAILED" if error else "FINISHED")

    def _open(self) -> None:
        from mlflow import MlflowClient

        from ..records.mlflow_logger import prepare_store

        prepare_store(self._store)
        client = self._client = MlflowClient(self._store)
        found = client.get_experiment_by_name(self._experiment)
        self._group = found.experiment_id if found else client.create_experiment(self._experiment)

    def _go_on(self) -> None:
        """In the runs of the last federation of this name."""
        for server in self._found(f"tags.`zo.federation` = {self._name!r} AND tags.`zo.role` = 'server'")[:1]:
            last = server.data.metrics
            self._down, self._refused = (int(last.get(f"zo/clients/{what}", 0)) for what in ("bytes_down", "refused"))
            self._runs[""] = server.info.run_id
            for run in self._found(f"tags.`{_PARENT}` = {server.info.run_id!r}"):
                name, last = run.data.tags["zo.client"], run.data.metrics
                self._runs[name] = run.info.run_id
                self._up[name], self._joined[name] = (int(last.get(f"zo/clients/{what}", 0)) for what in ("bytes_up", "joined"))

    def _found(self, which: str) -> list[Run]:
        assert self._client is not None
        return list(self._client.search_runs([self._group], which, order_by=["attributes.start_time DESC"]))

    def _round(self, done: Round, values: Mapping[str, float]) -> None:
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

    def _log(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric, Param

        assert self._client is not None
        if name not in self._runs:
            role = "client" if name else "server"
            tags: dict[str, Any] = {"zo.recipe": "federated", "zo.federation": self._name, "zo.role": role}
            tags |= {"zo.client": name, _PARENT: self._runs[""]} if name else {}
            made = self._client.create_run(self._group, run_name=f"{self._name}, {name or 'server'}", tags=tags)
            self._runs[name] = made.info.run_id
            settings = [Param("federation", self._name), Param("role", role)]  # by which the dashboard takes runs together
            self._client.log_batch(self._runs[name], params=settings)
        now = int(time.time() * 1000)
        entries = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        self._client.log_batch(self._runs[name], entries)
