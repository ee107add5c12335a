"""The logger, the buffer and the store that they write to."""

from __future__ import annotations

import multiprocessing
import re
import socket
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers import PLAIN, Task, batches, loader, mlp, quiet_trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from mlflow import MlflowClient

from zolightning import ZOMonitor, ZOStrategy, mlflow_logger
from zolightning.records.mlflow_logger import MetricBuffer, prepare_store

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests of servers set is undone."""
    for name in ("MAX_RETRIES", "TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1")
    monkeypatch.setenv("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")


def values(store: str, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient(store).get_metric_history(run_id, key)]


def test_logger(store: str, tmp_path: Path) -> None:
    logger = mlflow_logger("mine", experiment="e", store=store, tags={"seed": 3}, folder=tmp_path)
    logger.log_hyperparams({"a": {"b": 1}, "long": "x" * 1000, **{f"p{i}": i for i in range(250)}})
    logger.log_metrics({"loss": 0.5, "odd|näme": 1.0, "text": "no number"}, step=3)  # type: ignore[dict-item]
    logger.log_metrics({"loss": 0.25})
    logger.finalize("success")
    client = MlflowClient(store)
    run = client.get_run(logger.run_id)
    assert client.get_experiment(run.info.experiment_id).name == "e"
    assert (run.info.run_name, run.info.status, run.data.tags["seed"]) == ("mine", "FINISHED", "3")
    assert len(run.data.params) == 252
    assert (run.data.params["a/b"], run.data.params["p249"], run.data.params["long"]) == ("1", "249", "x" * 250)
    assert values(store, logger.run_id, "loss") == [(0, 0.25), (3, 0.5)]
    assert set(run.data.metrics) == {"loss", "oddnme"}
    logger.log_metrics({"test/loss": 1.0}, step=4)  # after `fit` comes `test`
    logger.finalize("failed")
    assert client.get_run(logger.run_id).info.status == "FAILED"
    assert values(store, logger.run_id, "test/loss") == [(4, 1.0)]


def test_one_changed_setting_is_refused_and_the_rest_is_sent(store: str, tmp_path: Path) -> None:
    logger = mlflow_logger("changed", store=store, folder=tmp_path)
    logger.log_hyperparams({"lr": 1, "same": 0})
    logger.log_hyperparams({"lr": 2, "same": 0, "other": 3})
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize()
    assert MlflowClient(store).get_run(logger.run_id).data.params == {"lr": "1", "same": "0", "other": "3"}
    assert values(store, logger.run_id, "a") == [(0, 1.0)]


def test_going_on_in_a_run(store: str, tmp_path: Path) -> None:
    first = mlflow_logger("first", experiment="one", store=store, folder=tmp_path)
    first.log_metrics({"loss": 2.0}, 0)
    first.finalize("failed")
    client = MlflowClient(store)
    again = mlflow_logger(run_id=first.run_id, store=store, tags={"again": 1}, folder=tmp_path)
    again.log_metrics({"loss": 1.0}, 1)
    assert again.outbox.wait()
    run = client.get_run(first.run_id)
    assert (run.info.status, run.info.run_name, run.data.tags["again"]) == ("RUNNING", "first", "1")
    again.finalize()
    assert client.get_run(first.run_id).info.status == "FINISHED"
    assert values(store, first.run_id, "loss") == [(0, 2.0), (1, 1.0)]
    with pytest.raises(ValueError, match=r"'nope'.* is not a run of the store"):
        mlflow_logger(run_id="nope", store=store)
    client.delete_run(first.run_id)
    with pytest.raises(ValueError, match="is a deleted run"):
        mlflow_logger(run_id=first.run_id, store=store)


def test_buffer_serves_other_loggers_too(store: str, tmp_path: Path) -> None:
    """Those that the user made, each with its own way of taking rows."""
    plain, table = MLFlowLogger("e", tracking_uri=store), CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    buffer = MetricBuffer([plain, table], tmp_path)
    buffer.params({"lr": 0.1})
    buffer.tag({"zo.method": "zo"})
    for step in range(5):
        buffer.add({"loss": step / 2}, step)
    (tmp_path / "run.ledger").write_bytes(b"ledger")
    buffer.artifact(tmp_path / "run.ledger")
    buffer.flush(wait=True)
    run = MlflowClient(store).get_run(plain.run_id)
    assert (run.data.params["lr"], run.data.tags["zo.method"]) == ("0.1", "zo")
    assert values(store, plain.run_id, "loss") == [(step, step / 2) for step in range(5)]
    assert [f.path for f in MlflowClient(store).list_artifacts(plain.run_id)] == ["run.ledger"]
    rows = Path(table.log_dir, "metrics.csv").read_text().split()
    assert rows[1:] == ["0.0,0", "0.5,1", "1.0,2", "1.5,3", "2.0,4"]
    assert table.experiment.hparams == {"lr": 0.1}


def test_run_that_raises_has_what_it_logged(store: str) -> None:
    def loss(net: Any, batch: Any) -> Any:
        if len(seen) == 21:  # one is a rehearsal
            raise RuntimeError("mine")
        seen.append(net(batch[0]).square().mean())
        return seen[-1]

    seen: list[Any] = []
    logger = mlflow_logger(store=store)
    trainer = quiet_trainer(ZOStrategy(PLAIN), logger=logger, callbacks=[ZOMonitor(min_seconds=0)])
    with pytest.raises(RuntimeError, match="mine"):
        trainer.fit(Task(mlp(), loss), loader(batches(20)))
    assert [s for s, _ in values(store, logger.run_id, "train/loss")] == list(range(1, 11))
    assert MlflowClient(store).get_run(logger.run_id).info.status == "FAILED"


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_processes_that_make_one_store_at_once(tmp_path: Path) -> None:
    """Without a lock their migrations collide."""
    store = f"sqlite:///{tmp_path}/new/mlflow.db"
    workers = [multiprocessing.get_context("fork").Process(target=prepare_store, args=(store,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert mlflow_logger(store=store).run_id
    with closing(sqlite3.connect(tmp_path / "new" / "mlflow.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    ("store", "reason"),
    [
        ("sqlite:///{tmp}/text.db", "file is not a database"),
        ("sqlite:///{tmp}/text.db/mlflow.db", "File exists"),
        ("sqlite:///{tmp}", "Is a directory|unable to open database file"),
        ("http://user:secret@127.0.0.1:{port}", "refused"),
        ("http://127.0.0.1:{silent}", "timed out"),
        ("file:{tmp}/mlruns", "filesystem tracking backend"),
        ("ftp://host/path", "unsupported URI"),
    ],
)
def test_store_that_cannot_be_used(tmp_path: Path, store: str, reason: str) -> None:
    """It is said at the start, at once, without showing a password."""
    (tmp_path / "text.db").write_text("this is a text and no database" * 100)
    with socket.socket() as closed, socket.socket() as silent:
        closed.bind(("127.0.0.1", 0))
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        store = store.format(tmp=tmp_path, port=closed.getsockname()[1], silent=silent.getsockname()[1])
        with pytest.raises(ConnectionError, match=rf"`store='.*'` cannot be used: .*({reason})") as caught:
            mlflow_logger(store=store)
    assert "Give a file that can be written, such as 'sqlite:///mlflow.db', or the URL of a server" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_requests_do_not_last_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the user set counts."""
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError):
            prepare_store(f"http://127.0.0.1:{closed.getsockname()[1]}")
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    assert (MLFLOW_HTTP_REQUEST_TIMEOUT.get(), MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()) == (30, 1)


def test_documented_variables_exist() -> None:
    """A name that MLflow drops would do nothing."""
    import mlflow.environment_variables as known

    names = set(re.findall(r"``(MLFLOW_\w+)``", mlflow_logger.__doc__ or ""))
    assert len(names) == 3
    assert names <= set(vars(known))
