"""A store in PostgreSQL, read directly: a real server, started here."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("streamlit", reason="the dashboard's packages are not installed")
pytest.importorskip("pgserver", reason="PostgreSQL is not at hand: pip install pgserver")
pytest.importorskip("psycopg", reason="PostgreSQL's driver is not at hand: pip install 'psycopg[binary]'")

import pgserver
import sqlalchemy as sa
from dashboard_stores import history, log, same
from mlflow import MlflowClient
from streamlit.testing.v1 import AppTest
from zolightning_dashboard.source import MetricSource, NoStoreYet, SourceError, open_source
from zolightning_dashboard.source.base import Run

APP = Path(__file__).parents[1] / "dashboard" / "app.py"
SECRET = "se/cret@1 2:3"
QUOTED = quote(SECRET, safe="")
START = 1_700_000_000_000


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server that asks for a password; without the name of a database."""
    folder = tmp_path_factory.mktemp("pg")
    server = pgserver.get_server(folder, cleanup_mode="delete")
    try:
        server.psql(f"CREATE ROLE kim LOGIN PASSWORD '{SECRET}' CREATEDB")
        server.psql("CREATE DATABASE store OWNER kim")
        server.psql("CREATE DATABASE nothing OWNER kim")
        (folder / "pg_hba.conf").write_text("local all postgres trust\nlocal all all scram-sha-256\n")
        server.psql("SELECT pg_reload_conf()")
        yield f"postgresql+psycopg://kim:{QUOTED}@/{{}}?host={folder}"
    finally:
        server.cleanup()


@pytest.fixture(scope="module")
def client(address: str) -> MlflowClient:
    """Writes to the store: MLflow's own client."""
    found = MlflowClient(address.format("store"))
    found.search_experiments()
    return found


@pytest.fixture
def source(address: str, client: MlflowClient) -> Iterator[MetricSource]:
    found = open_source(address.format("store"))
    yield found
    found.close()


def begin(client: MlflowClient, name: str) -> str:
    run_id: str = client.create_run("0", run_name=name, start_time=START, tags={"zo.method": "ZO"}).info.run_id
    client.log_param(run_id, "lr", "1e-3")
    return run_id


def named(source: MetricSource, name: str) -> Run:
    return next(run for run in source.runs([one.id for one in source.experiments()]) if run.name == name)


def test_runs_and_points_are_those_of_mlflow(client: MlflowClient, source: MetricSource) -> None:
    run_id, values = begin(client, "all kinds"), [0.5, math.nan, math.inf, -math.inf, 1e-300, -0.0]
    log(client, run_id, "loss", [(s, START + 10 * s, v) for s, v in enumerate(values)])
    log(client, run_id, "late", [(3, START, 1.0), (1, START + 5, 2.0), (1, START + 5, 3.0)])
    client.set_terminated(run_id, "FINISHED", end_time=START + 1000)
    before = source.poll()
    run = named(source, "all kinds")
    assert (run.status, run.started, run.ended, run.keys) == ("FINISHED", START / 1e3, START / 1e3 + 1, ("late", "loss"))
    assert (run.params, run.tags["zo.method"]) == ({"lr": "1e-3"}, "ZO")
    source.load([run_id, "no such run"], "loss")
    for key in run.keys:
        same(source.series(run_id, key), history(client, run_id, key))
    assert source.poll() == before


def test_a_poll_brings_what_is_new_and_only_then_another_number(client: MlflowClient, source: MetricSource) -> None:
    run_id = begin(client, "goes on")
    log(client, run_id, "loss", [(s, START + s, 1 / s) for s in range(1, 100)])
    source.poll()
    same(source.series(run_id, "loss"), history(client, run_id, "loss"))
    seen = source.poll()
    for news in (
        [(100, START + 100, math.nan)],
        [(100, START + 100, 0.25), (50, START + 101, 0.75)],  # of the same moment, and behind
        [(7, START + 102, 7.0)],  # behind, and no other news
        [(101, START - 10**7, 0.5)],  # by a clock that is hours late
    ):
        log(client, run_id, "loss", news)
        now = source.poll()
        assert now > seen and source.edition(run_id) == now
        same(source.series(run_id, "loss"), history(client, run_id, "loss"))
        assert source.poll() == (seen := now)
    log(client, run_id, "loss", [(3, START - 10**7, 3.0)])  # seen when the run ends
    client.set_terminated(run_id, "FINISHED")
    source.poll()
    same(source.series(run_id, "loss"), history(client, run_id, "loss"))
    assert named(source, "goes on").status == "FINISHED"
    client.delete_run(run_id)
    source.poll()
    assert run_id not in {run.id for run in source.runs(["0"])}
    assert len(source.series(run_id, "loss").step) == 0


def test_a_note_on_a_run_that_has_ended_is_seen_after_some_polls(client: MlflowClient, source: MetricSource) -> None:
    run_id = begin(client, "noted")
    client.set_terminated(run_id, "FINISHED")
    source.poll()
    client.set_tag(run_id, "mlflow.note.content", "good")
    for _ in range(10):
        source.poll()
    assert named(source, "noted").tags["mlflow.note.content"] == "good"


def test_the_store_is_only_read(source: MetricSource) -> None:
    with pytest.raises(sa.exc.InternalError, match="read-only transaction"), source._engine.connect() as store:  # type: ignore[attr-defined]
        store.execute(sa.text("DELETE FROM metrics"))


def test_no_message_has_the_password(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = address.format("nothing"), address.format("store").replace(QUOTED, "wrong-and-long")
    with pytest.raises(NoStoreYet, match="is empty"):
        open_source(right)
    with pytest.raises(SourceError, match="password authentication failed") as refused:
        open_source(wrong)
    with pytest.raises(SourceError, match="cannot be read") as absent:
        open_source(f"postgresql+psycopg://kim:{QUOTED}@127.0.0.1:1/store")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(SourceError, match=r"pip install 'psycopg\[binary\]'") as undriven:
        open_source(right)
    with pytest.raises(SourceError, match="is no address of a database") as nonsense:
        open_source("postgresql+nothing://kim:wrong-and-long@host/store")
    for error in (refused, absent, undriven, nonsense):
        said = str(error.value)
        assert not any(secret in said for secret in (SECRET, QUOTED, "cret@1", "wrong-and-long")), said


def test_the_pages_show_the_store_and_no_password(
    address: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log(client, begin(client, "on the page"), "train/loss", [(s, START + s, 1 / s) for s in range(1, 20)])
    for place in ("store", "nowhere"):
        monkeypatch.setattr(sys, "argv", ["app.py", "--store", address.format(place)])
        app = AppTest.from_file(APP, default_timeout=60).run()
        assert not app.exception
        said = [str(one.proto) for one in (*app.main, *app.sidebar)]
        assert any("postgresql+psycopg:///" in one for one in said)
        assert not any(
            secret in one for one in (*said, caplog.text, str(app.query_params)) for secret in (SECRET, "cret%401", "kim:")
        )
    assert app.title[0].value == "This store cannot be read"
