from __future__ import annotations

import contextlib
import http.server
import math
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from dashboard_stores import HOSTILE, LARGEST, Point, Server, as_tuples, copy_store, history, log, make_store, same
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Param, RunTag
from zolightning_dashboard.source import MetricSource, NoStoreYet, RestSource, Run, SourceError, SqliteSource, open_source
from zolightning_dashboard.source.base import extremes
from zolightning_dashboard.source.buffer import POINT, SeriesBuffer, as_points

pytestmark = pytest.mark.integration

NOW = 1_795_000_000_000


# ---- one suite over both sources ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs that nobody has open; MLflow takes seconds to make one."""
    made = tmp_path_factory.mktemp("blank") / "made.db"
    make_store(made)
    path = made.with_name("blank.db")
    with closing(sqlite3.connect(made)) as store, closing(sqlite3.connect(path)) as target:
        store.backup(target)
    with closing(sqlite3.connect(path)) as store:
        assert store.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
    return path


@pytest.fixture(scope="module")
def server(blank: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    server = Server(copy_store(blank, folder / "server.db"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["sqlite", "rest"])
def store(request: pytest.FixtureRequest, blank: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MlflowClient, str]:
    """A client that writes and the address to read."""
    if request.param == "rest":
        url = request.getfixturevalue("server").url
        return MlflowClient(url), url
    path = copy_store(blank, tmp_path_factory.mktemp("store") / "mlflow.db")
    return MlflowClient(f"sqlite:///{path}"), f"sqlite:///{path}"


@pytest.fixture
def client(store: tuple[MlflowClient, str]) -> MlflowClient:
    return store[0]


@pytest.fixture
def source(store: tuple[MlflowClient, str]) -> Iterator[MetricSource]:
    """Opened before the test writes anything."""
    source = open_source(store[1])
    yield source
    source.close()


@pytest.fixture
def experiment(client: MlflowClient, request: pytest.FixtureRequest) -> str:
    return client.create_experiment(f"{request.node.name} {random.random()}")


def find(source: MetricSource, experiment: str, run_id: str) -> Run:
    (found,) = [run for run in source.runs([experiment]) if run.id == run_id]
    return found


def last_values(source: MetricSource, experiment: str, run_id: str) -> dict[str, float]:
    return {key: value for key, (_, _, value) in find(source, experiment, run_id).latest.items()}


AWKWARD: dict[str, list[Point]] = {
    "plain": [(i, NOW + i, math.sin(i)) for i in range(200)],
    "not finite": [(1, NOW, 1.0), (2, NOW + 1, math.nan), (3, NOW + 2, math.inf), (4, NOW + 3, -math.inf), (5, NOW + 4, -0.5)],
    "one step": [(0, NOW + i, float(i % 7)) for i in range(50)],
    "one moment": [(3, NOW, 2.0), (3, NOW, -2.0), (3, NOW, math.inf), (3, NOW, 1e-300), (4, NOW, 0.0)],
    "out of order": [(10, NOW, 1.0), (5, NOW + 9, 2.0), (7, NOW - 9, 3.0), (5, NOW + 1, 4.0)],
    "extreme": [(-(2**40), NOW, 5e-324), (0, 0, 1 / 3), (2**62, NOW, LARGEST / 2), (2**62, 1, 0.1 + 0.2)],
}


@pytest.mark.parametrize("name", AWKWARD)
def test_points_are_those_of_mlflows_client(client: MlflowClient, source: MetricSource, experiment: str, name: str) -> None:
    run_id = client.create_run(experiment).info.run_id
    log(client, run_id, name, AWKWARD[name])
    source.poll()
    assert find(source, experiment, run_id).keys == (name,)
    expected = history(client, run_id, name)
    assert len(expected) == len(AWKWARD[name])
    same(source.series(run_id, name), expected)


def test_points_that_come_later_are_added(client: MlflowClient, source: MetricSource, experiment: str) -> None:
    run_id = client.create_run(experiment).info.run_id
    log(client, run_id, "loss", [(i, NOW + i, float(i)) for i in range(10)])
    source.poll()
    find(source, experiment, run_id)
    early = source.series(run_id, "loss")
    kept = as_tuples(early)
    for round_ in range(1, 4):
        log(client, run_id, "loss", [(10 * round_ + i, NOW + 10 * round_ + i, 1.0 / (i + 1)) for i in range(10)])
        before = source.poll()
        same(source.series(run_id, "loss"), history(client, run_id, "loss"))
        assert last_values(source, experiment, run_id) == client.get_run(run_id).data.metrics
        assert source.poll() == before
    log(client, run_id, "val", [(3, NOW, math.nan)])
    assert source.poll() > before
    assert find(source, experiment, run_id).keys == ("loss", "val")
    same(source.series(run_id, "val"), history(client, run_id, "val"))
    assert as_tuples(early) == kept, "what was given out must not change"
    assert not early.value.flags.writeable


def test_points_logged_late_at_earlier_steps_are_found(client: MlflowClient, source: MetricSource, experiment: str) -> None:
    run_id = client.create_run(experiment).info.run_id
    for key in ("a", "b"):
        log(client, run_id, key, [(100 + i, NOW + i, float(i)) for i in range(5)])
    source.poll()
    find(source, experiment, run_id)
    source.load([run_id], "a")
    source.load([run_id], "b")
    log(client, run_id, "a", [(1, NOW + 50, 7.0), (100, NOW - 50, 8.0), (102, NOW + 2, math.nan)])  # as after resuming
    log(client, run_id, "b", [(2, NOW + 60, 9.0)])
    for _ in range(2):  # over REST each poll looks at one metric for this
        source.poll()
    same(source.series(run_id, "a"), history(client, run_id, "a"))
    same(source.series(run_id, "b"), history(client, run_id, "b"))
    assert last_values(source, experiment, run_id) == client.get_run(run_id).data.metrics
    log(client, run_id, "a", [(3, NOW + 70, 1.0)])
    log(client, run_id, "b", [(3, NOW + 70, 1.0)])
    client.set_terminated(run_id)
    source.poll()  # all of a run that ended
    same(source.series(run_id, "a"), history(client, run_id, "a"))
    same(source.series(run_id, "b"), history(client, run_id, "b"))


def test_more_new_points_than_one_request_gives(
    client: MlflowClient, source: MetricSource, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zolightning_dashboard.source.rest._INTERVAL", 100)  # the server thins out beyond what is asked for
    run_id = client.create_run(experiment).info.run_id
    log(client, run_id, "loss", [(0, NOW, 0.5)])
    source.poll()
    find(source, experiment, run_id)
    source.series(run_id, "loss")
    log(client, run_id, "loss", [(i, NOW + i, math.cos(i)) for i in range(1, 230)])
    source.poll()
    same(source.series(run_id, "loss"), history(client, run_id, "loss"))


def test_series_of_many_runs_at_once(client: MlflowClient, source: MetricSource, experiment: str) -> None:
    ids = [client.create_run(experiment).info.run_id for _ in range(6)]
    for place, run_id in enumerate(ids[:5]):
        log(client, run_id, "many runs", [(i, NOW + i, place + math.sin(i)) for i in range(20)])
    source.poll()
    source.runs([experiment])
    source.load([ids[0]], "many runs")
    source.load([*ids, "no such run"], "many runs")
    for run_id in ids:
        same(source.series(run_id, "many runs"), history(client, run_id, "many runs"))
    source.load(ids, "no such metric")
    assert [len(column) for column in source.series(ids[0], "no such metric")] == [0, 0, 0]
    assert as_tuples(source.series("no such run", "many runs")) == []


def test_ends_and_values_at_a_step_are_those_of_the_points(
    client: MlflowClient, source: MetricSource, store: tuple[MlflowClient, str], experiment: str
) -> None:
    ids = {client.create_run(experiment).info.run_id: name for name in AWKWARD}
    key = experiment[-12:]
    for run_id, name in ids.items():
        log(client, run_id, key, AWKWARD[name])
    nothing = client.create_run(experiment).info.run_id
    log(client, nothing, key, [(1, NOW, math.nan), (2, NOW, math.inf)])
    loaded = open_source(store[1])
    for one in (source, loaded):
        one.poll()
        one.runs([experiment])
    loaded.load([*ids, nothing], key)
    for _ in range(2):
        source.load_extremes([*ids, nothing, "no such run"], key)
        for run_id in (*ids, nothing):
            series = loaded.series(run_id, key)
            assert repr(source.extremes(run_id, key)) == repr(extremes(series))
            steps = {*series.step.tolist(), 77}
            found = [one.values_at({run_id: step, nothing: 1}, key) for step in steps for one in (source, loaded)]
            assert repr(found[::2]) == repr(found[1::2])
        log(client, nothing, key, [(3, NOW, -(10.0**9))])  # the next round sees it
        source.poll()
        loaded.poll()
    loaded.close()
    assert source.values_at({nothing: 3, "no such run": 3}, key) == {nothing: -(10.0**9)}


def test_a_plain_mlflow_run_is_described(client: MlflowClient, source: MetricSource, experiment: str) -> None:
    run_id = client.create_run(experiment, start_time=NOW, run_name="plain").info.run_id
    client.log_batch(run_id, params=[Param("lr", "1e-3"), Param("layers", "[1, 2]")], tags=[RunTag("team", "a")])
    log(client, run_id, "my metric", [(0, NOW, 1.0)])
    source.poll()
    run = find(source, experiment, run_id)
    assert (run.name, run.status, run.started, run.experiment_id) == ("plain", "RUNNING", NOW / 1000, experiment)
    assert math.isnan(run.ended)
    assert run.params == {"lr": "1e-3", "layers": "[1, 2]"}
    assert run.tags["team"] == "a"
    assert run.keys == ("my metric",)
    client.set_terminated(run_id, "FAILED", end_time=NOW + 5000)
    before = source.poll()
    run = find(source, experiment, run_id)
    assert (run.status, run.ended) == ("FAILED", NOW / 1000 + 5)
    assert source.poll() == before


def test_changes_of_tags_params_and_names_show(client: MlflowClient, source: MetricSource, experiment: str) -> None:
    run_id = client.create_run(experiment).info.run_id
    changes: list[Callable[[], object]] = [
        lambda: client.set_tag(run_id, "zo.heartbeat", "1"),
        lambda: client.set_tag(run_id, "zo.heartbeat", "2"),
        lambda: client.log_param(run_id, "late", "x"),
        lambda: client.update_run(run_id, name="renamed"),
        lambda: client.delete_tag(run_id, "zo.heartbeat"),
    ]
    source.poll()
    source.runs([experiment])
    before = source.poll()
    for change in changes:
        change()
        after = source.poll()
        assert after > before
        before = after
    run = find(source, experiment, run_id)
    assert run.name == "renamed"
    assert run.params == {"late": "x"}
    assert "zo.heartbeat" not in run.tags


def test_runs_come_and_go(client: MlflowClient, source: MetricSource, experiment: str) -> None:
    old = client.create_run(experiment, start_time=NOW).info.run_id
    log(client, old, "loss", [(0, NOW, 1.0)])
    source.poll()
    assert [run.id for run in source.runs([experiment])] == [old]
    source.series(old, "loss")
    new = client.create_run(experiment, start_time=NOW + 1).info.run_id
    source.poll()
    assert [run.id for run in source.runs([experiment])] == [new, old]
    client.delete_run(old)
    source.poll()
    assert [run.id for run in source.runs([experiment])] == [new]
    client.restore_run(old)
    source.poll()
    assert [run.id for run in source.runs([experiment])] == [new, old]
    same(source.series(old, "loss"), history(client, old, "loss"))


def test_experiments_are_kept_apart(client: MlflowClient, source: MetricSource, experiment: str) -> None:
    other = client.create_experiment(f"other {random.random()}")
    here, there = (client.create_run(id_).info.run_id for id_ in (experiment, other))
    source.poll()
    names = {e.id: e.name for e in source.experiments()}
    assert names[experiment] == client.get_experiment(experiment).name
    assert [e.id for e in source.experiments()][-2:] == [experiment, other]
    assert [run.id for run in source.runs([experiment])] == [here]
    assert [run.id for run in source.runs([other])] == [there]
    assert {run.id for run in source.runs([experiment, other])} == {here, there}
    assert source.runs(["no such experiment"]) == []
    client.delete_experiment(other)
    source.poll()
    assert other not in [e.id for e in source.experiments()]


def test_hostile_text_comes_through_as_it_is(client: MlflowClient, source: MetricSource, experiment: str) -> None:
    for text in HOSTILE:
        run_id = client.create_run(experiment, run_name=text).info.run_id
        client.log_batch(run_id, params=[Param("param", text)], tags=[RunTag("tag", text)])
        source.poll()
        run = find(source, experiment, run_id)
        assert (run.name, run.params["param"], run.tags["tag"]) == (text, text, text)
    odd = "a/b c.d-e_f:g 1"
    log(client, run_id, odd, [(1, NOW, 2.0)])
    source.poll()
    same(source.series(run_id, odd), [(1, NOW, 2.0)])


def test_threads_may_share_a_source(client: MlflowClient, source: MetricSource, experiment: str) -> None:
    run_id = client.create_run(experiment).info.run_id
    log(client, run_id, "loss", [(0, NOW, 0.0)])
    source.poll()
    source.runs([experiment])
    wrong: list[object] = []
    stop = threading.Event()

    def read() -> None:
        seen = 0
        while not stop.is_set():
            source.poll()
            steps = source.series(run_id, "loss").step.tolist()
            if steps != list(range(len(steps))) or len(steps) < seen:
                wrong.append(steps)
            seen = len(steps)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for first in range(1, 100, 11):
        log(client, run_id, "loss", [(i, NOW + i, float(i)) for i in range(first, first + 11)])
    stop.set()
    for reader in readers:
        reader.join()
    source.poll()
    assert not wrong
    same(source.series(run_id, "loss"), history(client, run_id, "loss"))


# ---- SQLite ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(blank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store that nobody has open: one run with ten points of "loss"."""
    path = copy_store(blank, tmp_path_factory.mktemp("template") / "template.db")
    with closing(sqlite3.connect(path)) as store:
        insert_run(store, "run")
        insert(store, "run", range(10))
    return path


def insert_run(store: sqlite3.Connection, run_id: str) -> None:
    store.execute(
        "INSERT INTO runs (run_uuid, name, experiment_id, status, start_time, lifecycle_stage) "
        "VALUES (?, ?, 0, 'RUNNING', ?, 'active')",
        (run_id, run_id, NOW),
    )
    store.execute(
        "INSERT INTO latest_metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES ('loss', 0, 0, ?, 0, 0)", (run_id,)
    )
    store.commit()


def insert(store: sqlite3.Connection, run_id: str, steps: range, value: float = 1.0) -> None:
    store.executemany(
        "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES ('loss', ?, ?, ?, ?, 0)",
        [(value, NOW + step, run_id, step) for step in steps],
    )
    store.commit()


def steps(source: MetricSource, run_id: str = "run") -> list[int]:
    return source.series(run_id, "loss").step.tolist()


def folder(path: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.iterdir()}


def use(source: MetricSource) -> list[int]:
    """All that a page does."""
    source.poll()
    (run,) = source.runs([source.experiments()[0].id])
    source.load([run.id], "loss")
    return steps(source, run.id)


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_reading_leaves_no_trace(template: Path, tmp_path: Path, mode: str) -> None:
    path = copy_store(template, tmp_path / "mlflow.db")
    with closing(sqlite3.connect(path)) as store:
        store.execute(f"PRAGMA journal_mode={mode}")
    before = folder(tmp_path)
    source = SqliteSource(path)
    for _ in range(3):
        assert use(source) == list(range(10))
    source.close()
    assert folder(tmp_path) == before
    assert list(before) == ["mlflow.db"]


def test_reading_beside_a_writer_changes_none_of_its_data(template: Path, tmp_path: Path) -> None:
    path = copy_store(template, tmp_path / "mlflow.db")
    writer = sqlite3.connect(path)
    insert(writer, "run", range(10, 20))
    before = folder(tmp_path)
    source = SqliteSource(path)
    assert use(source) == list(range(20))
    after = folder(tmp_path)
    assert after.keys() == before.keys() == {"mlflow.db", "mlflow.db-wal", "mlflow.db-shm"}
    for name in ("mlflow.db", "mlflow.db-wal"):  # the third holds locks, readers' among them
        assert after[name] == before[name]
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"], "a writer that ends must still be able to tidy up"
    assert use(source) == list(range(20))


WRITER = """
import sqlite3, sys, time
store = sqlite3.connect(sys.argv[1], timeout=30)
step = int(sys.argv[2])
while True:
    rows = [(step + i, 1_795_000_000_000 + step + i) for i in range(50)]
    store.executemany("INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES ('loss', 1, ?, 'run', ?, 0)",
                      [(stamp, step) for step, stamp in rows])
    store.commit()
    step += 50
    print(step, flush=True)
    time.sleep(0.002)
"""


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_process_writes_meanwhile_and_is_killed(template: Path, tmp_path: Path, mode: str) -> None:
    path = copy_store(template, tmp_path / "mlflow.db")
    with closing(sqlite3.connect(path)) as store:
        store.execute(f"PRAGMA journal_mode={mode}")
    source = SqliteSource(path)
    assert steps(source) == list(range(10))
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path), "10"], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        seen = 10
        while seen < 1000:
            source.poll()
            now = steps(source)
            assert now == list(range(len(now)))  # whole transactions, each point once
            assert len(now) >= seen
            assert len(now) % 50 == 10
            seen = len(now)
        os.kill(writer.pid, signal.SIGKILL)
        committed = int(writer.stdout.read().split()[-1])
    if mode == "delete" and Path(f"{path}-journal").exists():
        repair(path)
    source.poll()
    assert len(steps(source)) >= committed
    assert steps(SqliteSource(path)) == steps(source)


def repair(path: Path) -> None:
    """What any program does that opens the store to write."""
    with closing(sqlite3.connect(path)) as store:
        store.execute("SELECT * FROM runs").fetchall()


def test_a_writer_killed_in_the_middle_of_a_write(template: Path, tmp_path: Path) -> None:
    path = copy_store(template, tmp_path / "mlflow.db")
    copy = tmp_path / "copy"
    copy.mkdir()
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode=DELETE")
        writer.execute("PRAGMA cache_size=5")
        writer.executemany(
            "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES ('loss', 1, ?, 'run', ?, 0)",
            [(NOW + step, step) for step in range(10, 3000)],
        )
        for name in ("mlflow.db", "mlflow.db-journal"):  # as they are on the disk now, half written
            (copy / name).write_bytes((tmp_path / name).read_bytes())
        writer.rollback()
    before = folder(copy)
    with pytest.raises(SourceError, match="was killed in the middle of a write; MLflow repairs the store"):
        SqliteSource(copy / "mlflow.db")
    assert folder(copy) == before
    repair(copy / "mlflow.db")
    assert use(SqliteSource(copy / "mlflow.db")) == list(range(10))


def test_a_writer_that_begins_and_one_that_ends(template: Path, tmp_path: Path) -> None:
    path = copy_store(template, tmp_path / "mlflow.db")
    source = SqliteSource(path)
    for first in range(10, 50, 10):
        writer = sqlite3.connect(path)
        assert use(source) == list(range(first))
        insert(writer, "run", range(first, first + 10))
        assert use(source) == list(range(first + 10))
        writer.close()
        assert use(source) == list(range(first + 10))


def test_nothing_new_costs_no_read(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy_store(template, tmp_path / "mlflow.db")
    os.utime(path, (time.time() - 60,) * 2)
    source = SqliteSource(path)
    opened: list[str] = []
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: opened.append(a[0]) or connect(*a, **k))
    version = source.poll()
    assert (source.poll(), opened) == (version, [])
    os.utime(path)
    assert source.poll() == version
    assert len(opened) == 1


def test_rows_deleted_at_the_end(template: Path, tmp_path: Path) -> None:
    path = copy_store(template, tmp_path / "mlflow.db")
    with closing(sqlite3.connect(path)) as store:
        source = SqliteSource(path)
        assert steps(source) == list(range(10))
        store.execute("DELETE FROM metrics WHERE step >= 5")
        store.commit()
        before = source.poll()
        assert steps(source) == list(range(5))
        store.execute("DELETE FROM metrics WHERE step >= 3")
        insert(store, "run", range(100, 130))  # their numbers are in use again, and more
        assert source.poll() > before
        assert steps(source) == [0, 1, 2, *range(100, 130)]
        store.execute("DELETE FROM metrics")
        store.commit()
        source.poll()
        assert steps(source) == []
        insert(store, "run", range(3))
        source.poll()
        assert steps(source) == [0, 1, 2]


def test_rows_numbered_anew(template: Path, tmp_path: Path) -> None:
    path = copy_store(template, tmp_path / "mlflow.db")
    with closing(sqlite3.connect(path)) as store:
        insert_run(store, "gone")
        insert(store, "gone", range(5))
        insert(store, "run", range(10, 20))
        source = SqliteSource(path)
        assert (steps(source), steps(source, "gone")) == (list(range(20)), list(range(5)))
        store.execute("DELETE FROM metrics WHERE run_uuid = 'gone'")
        store.execute("DELETE FROM latest_metrics WHERE run_uuid = 'gone'")
        store.execute("DELETE FROM runs WHERE run_uuid = 'gone'")
        store.commit()
        store.execute("VACUUM")
        insert(store, "run", range(20, 40))
        source.poll()
        assert steps(source) == list(range(40))
        assert steps(source, "gone") == []
        assert [run.id for run in source.runs(["0"])] == ["run"]


def test_the_file_is_replaced(template: Path, tmp_path: Path) -> None:
    path = copy_store(template, tmp_path / "mlflow.db")
    other = copy_store(template, tmp_path / "other.db")
    with closing(sqlite3.connect(other)) as store:
        insert_run(store, "other")
        insert(store, "other", range(500), value=2.0)
    source = SqliteSource(path)
    assert steps(source) == list(range(10))
    os.replace(other, path)
    source.poll()
    assert {run.id for run in source.runs(["0"])} == {"run", "other"}
    assert steps(source, "other") == list(range(500))


def test_the_tables_are_rebuilt(template: Path, tmp_path: Path) -> None:
    path = copy_store(template, tmp_path / "mlflow.db")
    source = SqliteSource(path)
    assert steps(source) == list(range(10))
    with closing(sqlite3.connect(path)) as store:  # as migrations do, and an older MLflow has fewer indexes
        store.execute("DROP INDEX index_metrics_run_uuid_key_step")
        insert(store, "run", range(10, 15))
        source.poll()
        assert steps(source) == list(range(15))
        store.execute("DROP INDEX index_metrics_run_uuid")
        source.poll()
        assert steps(source) == list(range(15))
        store.execute("ALTER TABLE metrics RENAME COLUMN is_nan TO nan")
        with pytest.raises(SourceError, match=r"table metrics has no column is_nan.*mlflow db upgrade"):
            source.poll()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, NoStoreYet, "does not exist yet; log a first run"),
        (b"", NoStoreYet, "is empty; log a first run"),
        (b"SQLite format 3" + b"?" * 100, SourceError, "is not an SQLite database"),
        (b"hello" * 1000, SourceError, "is not an SQLite database"),
    ],
)
def test_what_is_no_store_is_refused(tmp_path: Path, content: bytes | None, error: type, message: str) -> None:
    path = tmp_path / "mlflow.db"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        SqliteSource(path)
    assert str(path) in str(caught.value)
    assert path.exists() == (content is not None), "looking must not make the file"


def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.db"
    with closing(sqlite3.connect(path)) as store:
        store.execute("CREATE TABLE metrics (a)")
    with pytest.raises(
        SourceError, match=r"is not an MLflow store .* no table experiments, latest_metrics, params, runs, tags"
    ):
        SqliteSource(path)
    with closing(sqlite3.connect(path)) as store:
        store.execute("DROP TABLE metrics")
    with pytest.raises(NoStoreYet, match="is empty"):
        SqliteSource(path)
    with pytest.raises(SourceError, match="is not a file"):
        SqliteSource(tmp_path)


def test_a_store_that_goes_away_and_comes_back(template: Path, tmp_path: Path) -> None:
    path = copy_store(template, tmp_path / "mlflow.db")
    source = SqliteSource(path)
    assert steps(source) == list(range(10))
    path.rename(tmp_path / "away.db")
    with pytest.raises(NoStoreYet):
        source.poll()
    assert steps(source) == list(range(10)), "what was read can still be shown"
    copy_store(template, path)
    source.poll()
    assert steps(source) == list(range(10))


def test_a_locked_store_says_so(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy_store(template, tmp_path / "mlflow.db")
    monkeypatch.setattr("zolightning_dashboard.source.file._BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode=DELETE")
        source = SqliteSource(path)
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SourceError, match=r"locked by a writer.*journal_mode=WAL"):
            source.poll()
        writer.execute("ROLLBACK")
        assert use(source) == list(range(10))


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that any user can reach, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        Path(name).chmod(0o700)


READ_AS_NOBODY = """
import os, sys
from zolightning_dashboard.source import SourceError, SqliteSource
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
try:
    open(os.path.join(os.path.dirname(sys.argv[1]), "probe"), "w")
except PermissionError:
    try:
        print(len(SqliteSource(sys.argv[1]).series("run", "loss").step))
    except SourceError as error:
        print(error)
"""


def read_as_nobody(path: Path) -> str:
    """What someone sees who may read the folder but not write to it: the number of points, or the error."""
    path.parent.chmod(0o555)
    for file in path.parent.iterdir():
        file.chmod(0o444)
    root = Path(__file__).parents[1]
    out = subprocess.run(
        [sys.executable, "-c", READ_AS_NOBODY, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    path.parent.chmod(0o755)
    for file in path.parent.iterdir():
        file.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


@pytest.mark.skipif(os.name != "posix", reason="users and permissions of POSIX")
def test_a_folder_without_write_permission(template: Path, public_folder: Path) -> None:
    path = copy_store(template, public_folder / "mlflow.db")
    assert read_as_nobody(path) == "10"
    assert [file.name for file in public_folder.iterdir()] == ["mlflow.db"]

    writer = sqlite3.connect(path)
    insert(writer, "run", range(10, 15))
    assert read_as_nobody(path) == "15", "another user's training is running"

    copy = public_folder / "copy"
    copy.mkdir()
    for name in ("mlflow.db", "mlflow.db-wal"):  # what a killed writer leaves, and a copy without the lock file
        (copy / name).write_bytes((public_folder / name).read_bytes())
    writer.close()
    assert "mlflow.db-wal" in read_as_nobody(copy / "mlflow.db")
    assert SqliteSource(copy / "mlflow.db").series("run", "loss").step.tolist() == list(range(15))


def test_the_made_up_store_is_one_that_mlflow_reads(tmp_path: Path) -> None:
    path = tmp_path / "made up.db"
    script = Path(__file__).parents[1] / "examples" / "dashboard_store.py"
    size = ["--runs", "5", "--points", "30", "--metrics", "14"]
    subprocess.run([sys.executable, script, path, *size], check=True, capture_output=True)
    source, client = SqliteSource(path), MlflowClient(f"sqlite:///{path}")
    runs = source.runs([experiment.id for experiment in source.experiments()])
    assert len(runs) == 5
    assert {run.status for run in runs} == {"FINISHED"}
    for run in runs:
        assert len(run.keys) == 14
        assert run.params == client.get_run(run.id).data.params
        for key in (run.keys[0], run.keys[-1]):
            assert len(history(client, run.id, key)) == 30
            same(source.series(run.id, key), history(client, run.id, key))


# ---- REST --------------------------------------------------------------------------------------------------------------


class _Page(http.server.BaseHTTPRequestHandler):
    body = b"<html>welcome</html>"

    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def web_site(body: bytes) -> Iterator[str]:
    handler = type("Page", (_Page,), {"body": body})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        threading.Thread(target=site.serve_forever).start()
        try:
            yield f"http://someone:secret@127.0.0.1:{site.server_port}"
        finally:
            site.shutdown()


@pytest.mark.parametrize("body", [b"<html>welcome</html>", b"[1, 2]"])
def test_another_web_site_is_refused(body: bytes) -> None:
    with web_site(body) as url, pytest.raises(SourceError, match="is not an MLflow tracking server") as caught:
        RestSource(url)
    assert "secret" not in str(caught.value)


def test_an_old_server_that_knows_no_page_tokens(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zolightning_dashboard.source.rest._page_token", lambda offset: None)  # MLflow 2 passes over them
    client, source = MlflowClient(server.url), RestSource(server.url)
    experiment = client.create_experiment(f"old {random.random()}")
    run_id = client.create_run(experiment).info.run_id
    log(client, run_id, "loss", [(i, NOW + i, float(i)) for i in range(20)])
    source.poll()
    source.runs([experiment])
    source.load([run_id], "loss")
    log(client, run_id, "loss", [(20, NOW + 20, 0.0), (3, NOW + 21, 0.0)])
    source.poll()
    source.poll()
    log(client, run_id, "loss", [(4, NOW + 22, 0.0)])
    client.set_terminated(run_id)
    source.poll()
    same(source.series(run_id, "loss"), history(client, run_id, "loss"))


def test_a_server_that_goes_away_and_comes_back(server: Server) -> None:
    client, source = MlflowClient(server.url), RestSource(server.url)
    experiment = client.create_experiment(f"gone {random.random()}")
    run_id = client.create_run(experiment).info.run_id
    log(client, run_id, "loss", [(0, NOW, 1.0)])
    source.poll()
    source.runs([experiment])
    same(source.series(run_id, "loss"), [(0, NOW, 1.0)])
    server.stop()
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:\d+ does not answer .*is `mlflow server` running there"):
        source.poll()
    same(source.series(run_id, "loss"), [(0, NOW, 1.0)])
    server.start()
    log(client, run_id, "loss", [(1, NOW + 1, 2.0)])
    source.poll()
    same(source.series(run_id, "loss"), [(0, NOW, 1.0), (1, NOW + 1, 2.0)])


# ---- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["sqlite:///{}", "{}", "relative"])
def test_addresses_of_files(template: Path, tmp_path: Path, form: str) -> None:
    path = copy_store(template, tmp_path / "runs of #1 50%?.db")  # what means something in a URI
    address = path.name if form == "relative" else form.format(path)
    source = open_source(address)
    assert isinstance(source, SqliteSource)
    assert use(source) == list(range(10))


@pytest.mark.parametrize(
    "address", ["", "mssql://host/db", "file:./mlruns", "file:///x", "databricks", "sqlite:///", "sqlite://x"]
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(SourceError, match="give sqlite:///path, the path of an SQLite file, postgresql:"):
        open_source(address)


# ---- the buffer against a sorted list ------------------------------------------------------------------------------------

values = st.sampled_from([0.0, 1.0, -1.0, math.nan, LARGEST, -LARGEST, 0.5])
points = st.tuples(st.integers(-3, 8), st.integers(0, 4).map(lambda t: NOW + t), values)


def twin(rows: list[Point]) -> list[Point]:
    rows = sorted(rows, key=lambda p: (p[0], p[1], 0.0 if math.isnan(p[2]) else p[2], math.isnan(p[2])))
    return [(s, t, math.copysign(math.inf, v) if abs(v) == LARGEST else v) for s, t, v in rows]


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from(["extend", "add", "replace"]), st.lists(points, max_size=6), st.integers(-3, 8)), max_size=8
    )
)
def test_a_buffer_keeps_order_and_what_it_gave_out(chunks: list[tuple[str, list[Point], int]]) -> None:
    buffer, rows = SeriesBuffer(), list[Point]()
    given_out = []
    for action, chunk, step in chunks:
        if action == "extend":
            buffer.extend(as_points(chunk))
            rows += chunk
        elif action == "add":
            for row in chunk:
                buffer.add(row)
            rows += chunk
        else:
            chunk = [p for p in chunk if p[0] >= step] + [p for p in rows if p[0] >= step][:2]
            buffer.replace_from(step, as_points(chunk))
            rows = [p for p in rows if p[0] < step] + chunk
        assert len(buffer) == len(rows)
        same(buffer.series, twin(rows))
        given_out.append((buffer.series, twin(rows)))
        if rows:
            newest = max(rows, key=lambda p: (p[1], p[0]))
            assert buffer.newest == newest[:2]
    for series, expected in given_out:
        same(series, expected)


def test_a_buffer_of_many_appends_is_one_block() -> None:
    buffer = SeriesBuffer()
    for first in range(0, 5000, 10):
        buffer.extend(np.array([(i, NOW + i, i / 3) for i in range(first, first + 7)], dtype=POINT))
        for i in range(first + 7, first + 10):
            buffer.add((i, NOW + i, None))
    assert buffer.series.value.flags.c_contiguous
    assert buffer.series.step.tolist() == list(range(5000))
    for i in range(5000, 6000):  # without anyone looking
        buffer.add((i, NOW + i, 0.0))
    assert len(buffer) == 6000
    assert buffer.series.step.tolist() == list(range(6000))
