"""MLflow goes away, hangs, refuses or comes back, and nothing that a run logs is lost, doubled, reordered or waited for."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from helpers import PLAIN, Task, batches, loader, mlp, quiet_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from torch import Tensor

from zolightning import ZOMonitor, ZOStrategy, mlflow_logger
from zolightning.records import outbox
from zolightning.records.mlflow_logger import prepare_store
from zolightning.records.outbox import Outbox, send_pending
from zolightning.records.pending_file import Entry, PendingFile

pytestmark = pytest.mark.integration

STEPS = 60
PATIENCE = 120  # seconds, for a server that starts on a busy machine
ANSWER = 15  # seconds, for a request; one that is on its way when the server is stopped waits for so long


class Server:
    """``mlflow server`` in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.store = f"sqlite:///{folder}/mlflow.db"  # what it serves, to look behind it
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        options = {
            "--backend-store-uri": self.store,
            "--artifacts-destination": f"{folder}/artifacts",
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--workers": "1",
        }
        self.command = [sys.executable, "-m", "mlflow", "server", *(word for pair in options.items() for word in pair)]
        prepare_store(self.store)

    def launch(self) -> None:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, env=environment, start_new_session=True, **quiet)  # type: ignore[call-overload]

    def start(self) -> None:
        self.launch()
        until(self.answers)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=1) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def send(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()


class Gate(ThreadingHTTPServer):
    """Between a run and its server: passes requests on, or answers batches with ``status``."""

    daemon_threads = True

    def __init__(self, server: Server) -> None:
        super().__init__(("127.0.0.1", 0), _GateHandler)
        self.target, self.status = server.url, 200
        self.refused: list[int] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _GateHandler(BaseHTTPRequestHandler):
    server: Gate

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, answer = self.server.status, b"go away"
        if status != 200 and "log-batch" in self.path:
            self.server.refused.append(status)
        else:
            headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
            request = urllib.request.Request(self.server.target + self.path, body or None, headers, method=self.command)
            with urllib.request.urlopen(request) as reply:
                status, answer = reply.status, reply.read()
        self.send_response(status)
        self.send_header("Retry-After", "3600")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_PATCH = _pass  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"waited for {PATIENCE} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "TICK", 0.05)
    monkeypatch.setattr(outbox, "WAIT", PATIENCE)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{ANSWER}")
    monkeypatch.setenv("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")


@pytest.fixture
def hang(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Stops the server, and requests wait for it for a second only; or lets it go on."""

    def change(hung: bool) -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1" if hung else f"{ANSWER}")
        server.send(signal.SIGSTOP if hung else signal.SIGCONT)

    return change


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the user has been told so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name == outbox.log.name and r.levelno >= logging.WARNING]


class Logging(Task):
    """Logs through the Trainer, beside the monitor."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(0.005)  # a probe's, so that several batches are sent in a run
        self.log("own", float(batch_idx))
        return super().training_step(batch, batch_idx)  # type: ignore[no-any-return]


class Events(pl.Callback):
    """Does something at the start of some steps; notes when each began and ended."""

    def __init__(self, at: dict[int, Callable[[], object]]) -> None:
        self.at, self.began, self.ended = at, list[float](), list[float]()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.at.get(batch_idx, lambda: None)()
        self.began.append(time.time() * 1000)

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended.append(time.time() * 1000)


def train(store: str, folder: Path, at: dict[int, Callable[[], object]]) -> tuple[str, Events]:
    logger, events = mlflow_logger(store=store, folder=folder), Events(at)
    trainer = quiet_trainer(ZOStrategy(PLAIN), logger=logger, callbacks=[ZOMonitor(min_seconds=0), events], log_every_n_steps=1)
    trainer.fit(Logging(mlp()), loader(batches(STEPS)))
    assert trainer.global_step == STEPS
    assert logger.run_id is not None
    return logger.run_id, events


def pending(folder: Path) -> list[Path]:
    return list(folder.rglob("pending-metrics-*"))


def check(store: str, run_id: str, events: Events) -> None:
    """Every metric of the run is there, once, in order, with its own time; the settings, tags and status, too."""
    client = MlflowClient(store)
    run = client.get_run(run_id)
    losses = client.get_metric_history(run_id, "train/loss")
    assert [m.step for m in losses] == list(range(1, STEPS + 1))
    for row, began, ended in zip(losses, events.began, events.ended, strict=True):
        assert began - 1 <= row.timestamp <= ended
    assert [m.value for m in client.get_metric_history(run_id, "examples_seen")] == [5 * s for s in range(1, STEPS + 1)]
    assert [m.value for m in client.get_metric_history(run_id, "own")] == list(range(STEPS))
    assert run.data.params["zo/eps"] == "0.001"
    assert run.data.tags["zo.method"] == "zo"
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= losses[-1].timestamp


def test_server_killed_and_back_only_after_the_last_step(server: Server, tmp_path: Path, told: Callable[[], list[str]]) -> None:
    at_end: list[bool] = []

    def restart() -> None:
        until(lambda: bool(told()))
        at_end.append(pending(tmp_path)[0].stat().st_size > 0)  # would outlive this process, too
        server.launch()

    run_id, events = train(server.url, tmp_path, {10: server.kill, STEPS - 1: restart})
    assert at_end == [True]
    check(server.store, run_id, events)
    began, over = told()
    assert f"{server.url} does not take the entries of this run" in began
    assert f"wait in {tmp_path}/1/{run_id}/pending-metrics-{run_id}.jsonl" in began
    assert "is back: everything that waited has been sent" in over
    assert not pending(tmp_path)


def test_server_hangs_and_wakes(
    server: Server, tmp_path: Path, told: Callable[[], list[str]], hang: Callable[[bool], None]
) -> None:
    """What it was sent while it hung it takes in when it wakes, though the sender gave up on that: nothing is doubled."""
    at = {10: lambda: hang(True), 50: lambda: until(lambda: bool(told())), 55: lambda: hang(False)}
    run_id, events = train(server.url, tmp_path, at)
    check(server.store, run_id, events)
    assert [("does not take" in m, "is back: " in m) for m in told()] == [(True, False), (False, True)]


def test_server_refuses(server: Server, tmp_path: Path, told: Callable[[], list[str]]) -> None:
    with Gate(server) as gate:
        threading.Thread(target=gate.serve_forever, args=(0.05,), daemon=True).start()

        def refuse(status: int) -> None:
            gate.status = status
            until(lambda: status in gate.refused)

        at = {
            10: lambda: refuse(429),
            30: lambda: refuse(500),
            50: lambda: refuse(503),
            55: lambda: setattr(gate, "status", 200),
        }
        run_id, events = train(gate.url, tmp_path, at)
        gate.shutdown()
    check(server.store, run_id, events)
    assert [("does not take" in m, "is back: " in m) for m in told()] == [(True, False), (False, True)]


def test_server_that_never_returns(
    server: Server, tmp_path: Path, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "WAIT", 1.0)
    run_id, events = train(server.url, tmp_path, {10: server.kill})
    (file,) = pending(tmp_path)
    assert "does not take" in told()[0]
    left = f"The entries that are left are in {file}: send them later"
    assert f"did not take all that this run logged within 1 s. {left}" in told()[1]
    assert len(told()) == 2
    os.rename(file, kept := tmp_path / "kept.jsonl")  # the thread of the run above is not to send it
    server.start()
    with kept.open("a") as stream:
        stream.write('{"run_id": "')  # a power cut
    entries = send_pending(kept, server.url)
    assert entries == len(kept.read_text().splitlines()) - 1
    check(server.store, run_id, events)
    assert send_pending(kept, server.url) == entries
    check(server.store, run_id, events)


def test_database_locked_by_another(tmp_path: Path, told: Callable[[], list[str]]) -> None:
    store, lock = f"sqlite:///{tmp_path}/mlflow.db", threading.Event()
    prepare_store(store)

    def hold() -> None:
        with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            lock.set()
            time.sleep(2)  # longer than the training takes

    def begin() -> None:
        holder.start()
        lock.wait()

    holder = threading.Thread(target=hold)
    run_id, events = train(store, tmp_path, {10: begin})
    holder.join()
    check(store, run_id, events)
    assert told() == []


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """What happens to this process's files when the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full(tmp_path: Path, told: Callable[[], list[str]]) -> None:
    """Both for the database and for the file: what is logged stays in memory until there is room."""
    store = f"sqlite:///{tmp_path}/mlflow.db"
    logger = mlflow_logger(store=store, folder=tmp_path)
    box: Outbox = logger.outbox  # type: ignore[attr-defined]
    with file_size_limit(0):
        for step in range(100):
            box.metrics({"loss": step / 7}, step)
        until(lambda: bool(told()))
    assert box.wait()
    history = MlflowClient(store).get_metric_history(logger.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(step, step / 7) for step in range(100)]
    assert "wait in memory (" in told()[0]
    assert "is back" in told()[1]
    assert len(told()) == 2


# --- the outbox alone, on a store in memory that fails as it is told ---


class Store:
    """A twin of what MLflow does: one row of equal ones, refusals, and failures before or after it has stored something."""

    tracking_uri = "http://user:secret@twin"

    def __init__(self, faults: Iterable[str] = ()) -> None:
        self.faults = iter(faults)
        self.rows: dict[tuple[str, int, int, str], None] = {}
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.ended: list[str] = []
        self.stage = "active"

    def _call(self, change: Callable[[], None]) -> None:
        fault = next(self.faults, "")
        if fault == "slow":
            time.sleep(0.003)
        if fault == "before":
            raise ConnectionError("away from http://user:secret@twin/api")
        change()
        if fault == "after":
            raise MlflowException("no answer")

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = (), synchronous: bool = True) -> None:
        assert len(metrics) <= 1000
        assert synchronous
        changed = [p.key for p in params if self.params.get(p.key, p.value) != p.value]
        bad = [m.key for m in metrics if "?" in m.key]
        if changed or bad or self.stage != "active":
            raise MlflowException.invalid_parameter_value(f"not {changed or bad or self.stage}")

        def change() -> None:
            self.rows.update(dict.fromkeys((m.key, m.timestamp, m.step, str(m.value)) for m in metrics))
            self.params.update({p.key: p.value for p in params})
            self.tags.update({t.key: t.value for t in tags})

        self._call(change)

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self._call(lambda: self.ended.append(status))

    def log_artifact(self, run_id: str, path: str) -> None:
        self._call(lambda: self.files.update({Path(path).name: Path(path).read_bytes()}))

    def get_run(self, run_id: str) -> Any:
        self._call(lambda: None)
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage=self.stage))

    @property
    def values(self) -> list[tuple[str, int, str]]:
        return [(key, step, value) for key, _, step, value in self.rows]


FAULTS = st.lists(st.sampled_from(["", "slow", "before", "after"]), max_size=12)
VALUES = st.floats(width=64)


@settings(max_examples=60)
@given(st.lists(VALUES, min_size=1, max_size=700), FAULTS, st.integers(1, 300), st.booleans(), st.sets(st.integers(0, 300)))
def test_any_faults(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    values: list[float],
    faults: list[str],
    memory: int,
    writable: bool,
    pauses: set[int],
) -> None:
    """Whatever fails and wherever it waits, every value arrives once, in order, to the last bit."""
    folder = tmp_path_factory.mktemp("run")
    monkeypatch.setattr(outbox, "TICK", 0.001)
    monkeypatch.setattr(outbox, "MEMORY", memory if writable else 10_000)
    store = Store(faults)
    box = Outbox(store, "run", folder if writable else Path("/dev/null/no"))
    for step, value in enumerate(values):
        box.metrics({"a": value, "b": -value}, step)
        assert len(box._entries) <= outbox.MEMORY
        time.sleep(0.002 * (step in pauses))
    box.tags({"heart": "beat"})
    box.status("FINISHED")
    assert box.wait()
    assert store.values == [(key, s, str(v)) for s, x in enumerate(values) for key, v in (("a", x), ("b", -x))]
    assert store.tags == {"heart": "beat"}
    assert set(store.ended) == {"FINISHED"}
    assert not list(folder.iterdir())


def test_told_without_passwords(tmp_path: Path, told: Callable[[], list[str]]) -> None:
    box = Outbox(Store(["before"] * 3), "run", tmp_path)
    box.metrics({"a": 1.0}, 1)
    assert box.wait()
    assert len(told()) == 2
    assert "http://twin" in told()[0]
    assert not any("secret" in message for message in told())


def test_what_is_refused_is_told_and_the_rest_arrives(tmp_path: Path, told: Callable[[], list[str]]) -> None:
    store = Store()
    box = Outbox(store, "run", tmp_path)
    box.params({"lr": "1"})
    for step in range(5):
        box.metrics({"a?" if step == 2 else "a": 1.0}, step)
    box.params({"lr": "2"})
    box.tags({"t": "v"})
    assert box.wait()
    assert [step for _, step, _ in store.values] == [0, 1, 3, 4]
    assert (store.params, store.tags) == ({"lr": "1"}, {"t": "v"})
    assert len(told()) == 1
    assert "refuses something that this run logs: {'step': 2" in told()[0]


def test_one_value_that_is_refused_takes_no_other_with_it(tmp_path: Path, told: Callable[[], list[str]]) -> None:
    store = Store()
    box = Outbox(store, "run", tmp_path)
    box.params({"lr": "1", "eps": "1"})
    box.params({"lr": "2", "other": "3", "eps": "1"})
    box.metrics({"a": 1.0, "b?": 2.0, "c": 3.0}, 0)
    assert box.wait()
    assert store.params == {"lr": "1", "eps": "1", "other": "3"}
    assert sorted(key for key, _, _ in store.values) == ["a", "c"]
    assert len(told()) == 1
    assert "logs: {'params': {'lr': '2'}}: " in told()[0]


def test_run_that_is_deleted(tmp_path: Path, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "WAIT", 0.5)
    store = Store()
    store.stage = "deleted"
    box = Outbox(store, "run", tmp_path)
    box.metrics({"a": 1.0}, 1)
    assert not box.wait()
    monkeypatch.setattr(outbox, "WAIT", 3600)
    assert not box.wait()  # at once
    assert len(told()) == 2
    store.stage = "active"
    until(lambda: len(told()) == 3)
    assert store.values == [("a", 1, "1.0")]


def test_user_who_does_not_wait(tmp_path: Path, told: Callable[[], list[str]]) -> None:
    """Ctrl-C at the end of a run: what is left is in the file."""
    answer = threading.Event()

    class Hanging(Store):
        def _call(self, change: Callable[[], None]) -> None:
            if not answer.is_set():
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
                answer.wait()
            super()._call(change)

    store = Hanging()
    box = Outbox(store, "run", tmp_path)
    box.metrics({"a": 1.0}, 1)
    with pytest.raises(KeyboardInterrupt):
        box.wait()
    assert [json.loads(line)["step"] for line in pending(tmp_path)[0].read_text().split("\n") if line] == [1]
    assert "did not take all that this run logged" in told()[0]
    answer.set()
    until(lambda: not pending(tmp_path))
    assert store.values == [("a", 1, "1.0")]


def test_nowhere_to_keep_it(tmp_path: Path, told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: the oldest go, and the user knows."""
    monkeypatch.setattr(outbox, "WAIT", 0.5)
    monkeypatch.setattr(outbox, "MEMORY", 10)
    gone = threading.Event()

    def faults() -> Iterator[str]:
        while not gone.is_set():
            yield "before"

    store = Store(faults())
    box = Outbox(store, "run", Path("/dev/null/no"))
    for step in range(100):
        box.metrics({"a": 1.0}, step)
    assert not box.wait()
    assert any("the oldest are lost" in message for message in told())
    assert any("will be lost with this process" in message for message in told())
    gone.set()
    until(lambda: len(store.rows) == 10)
    assert [step for _, step, _ in store.values] == list(range(90, 100))


def test_file_of_a_process_that_died(tmp_path: Path) -> None:
    """The next process of the same run sends it first, and its own lines do not join the torn one."""
    path = tmp_path / "pending-metrics-run.jsonl"
    whole = {"run_id": "run", "step": 1, "time_ms": 5, "metrics": {"a": "nan"}}
    path.write_text(json.dumps(whole) + "\n" + json.dumps(whole)[:30])
    store = Store(["before"])
    box = Outbox(store, "run", tmp_path)
    box.metrics({"a": math.inf}, 2)
    assert box.wait()
    assert store.values == [("a", 1, "nan"), ("a", 2, "inf")]
    assert not path.exists()


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=30), st.integers(0, 200))
def test_file_gives_back_what_it_took(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, float]], cut: int) -> None:
    """All of it; and after a cut anywhere every line that is whole."""
    path = tmp_path_factory.mktemp("file") / "f.jsonl"
    entries: list[Entry] = [{"step": i, "time_ms": i, "metrics": row} for i, row in enumerate(rows)]
    file = PendingFile(path, "run")
    file.append(entries)

    def drain(file: PendingFile) -> list[Entry]:
        found = []
        while head := file.head():
            found += head
            file.drop()
        return found

    content = path.read_bytes() if rows else b""
    assert repr(drain(file)) == repr(entries)  # repr: nan is nan
    assert not path.exists()
    path.write_bytes(content[:cut])
    whole = sum(end <= cut for end in (i for i, byte in enumerate(content) if byte == ord("\n")))
    assert repr(drain(PendingFile(path, "run"))) == repr(entries[:whole])


@pytest.mark.parametrize(
    "line",
    ["[]", "1", "{}", '{"run_id": 1, "tags": {}}', '{"run_id": "r", "tags": []}', '{"run_id": "r", "step": 1}', "\x00",
     '{"run_id": "r", "step": 1, "time_ms": 1, "metrics": {"a": "x"}}', '{"run_id": "r", "artifact": "/etc/passwd"}'],
)  # fmt: skip
def test_send_pending_takes_only_its_own(tmp_path: Path, line: str) -> None:
    (tmp_path / "f.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"holds no entries; give a pending-metrics-<run_id>\.jsonl"):
        send_pending(tmp_path / "f.jsonl", f"sqlite:///{tmp_path}/mlflow.db")


def test_artifacts(server: Server, tmp_path: Path, told: Callable[[], list[str]], hang: Callable[[bool], None]) -> None:
    """The newest content is there at the end; one that is missing disturbs nothing."""
    logger = mlflow_logger(store=server.url, folder=tmp_path)
    box: Outbox = logger.outbox  # type: ignore[attr-defined]
    file = tmp_path / "run.ledger"
    file.write_bytes(b"one")
    box.artifact(file)
    assert box.wait()
    hang(True)
    file.write_bytes(b"one two")
    box.artifact(file)
    box.artifact(tmp_path / "missing")
    box.metrics({"a": 1.0}, 1)
    until(lambda: bool(told()))
    hang(False)
    assert box.wait()
    client = MlflowClient(server.url)
    assert Path(client.download_artifacts(logger.run_id, "run.ledger", str(tmp_path))).read_bytes() == b"one two"
    assert [a.path for a in client.list_artifacts(logger.run_id)] == ["run.ledger"]
    assert sum("missing was not uploaded" in message for message in told()) == 1
