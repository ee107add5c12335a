"""A store in PostgreSQL, and in MySQL's language, read directly: real servers, started here."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest

pytest.importorskip("streamlit", reason="the dashboard's packages are not installed")

import sqlalchemy as sa
from dashboard_stores import history, log, same
from mlflow import MlflowClient
from streamlit.testing.v1 import AppTest
from zolightning_dashboard.source import MetricSource, NoStoreYet, SourceError, open_source
from zolightning_dashboard.source.base import Run

pytestmark = pytest.mark.integration

APP = Path(__file__).parents[1] / "dashboard" / "app.py"
SECRET = "se/cret@1 2:3"
QUOTED = quote(SECRET, safe="")
PACKAGES = {"psycopg": "'psycopg[binary]'"}
START = 1_700_000_000_000


class Kind(NamedTuple):
    """A kind of database.

    Args:
        driver: its package.
        serve: starts a server that asks for a password; gives its address, without the name of a database.
        shown: how its addresses begin where they are shown.
        forbids: what it says to a write.
        refuses: what it says to a wrong password.
    """

    driver: str
    serve: Callable[[Path], AbstractContextManager[str]]
    shown: str
    forbids: str
    refuses: str

    @property
    def scheme(self) -> str:
        return self.shown.partition("://")[0]


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    pgserver = pytest.importorskip("pgserver", reason="PostgreSQL is not at hand: pip install pgserver")
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


@contextmanager
def mariadb(folder: Path) -> Iterator[str]:
    binary = shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin")
    if binary is None or shutil.which("mariadb-install-db") is None:
        pytest.skip("MariaDB is not at hand: apt-get install mariadb-server")
    quiet = ["--no-defaults", f"--datadir={folder}", "--user=root"]
    subprocess.run(["mariadb-install-db", *quiet, "--auth-root-authentication-method=normal"], check=True, capture_output=True)
    socket = folder / "socket"
    server = subprocess.Popen(
        [binary, *quiet, f"--socket={socket}", "--skip-networking"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        patience = time.monotonic() + 120
        while not socket.exists() and server.poll() is None and time.monotonic() < patience:
            time.sleep(0.1)
        root = sa.create_engine(f"mysql+pymysql://root@localhost/?unix_socket={socket}")
        with root.connect() as store:
            store.exec_driver_sql(f"CREATE USER kim@localhost IDENTIFIED BY '{SECRET}'")
            for name in ("store", "nothing"):
                store.exec_driver_sql(f"CREATE DATABASE {name}")
                store.exec_driver_sql(f"GRANT ALL ON {name}.* TO kim@localhost")
        root.dispose()
        yield f"mysql+pymysql://kim:{QUOTED}@localhost/{{}}?unix_socket={socket}"
    finally:
        server.terminate()
        server.wait(60)


KINDS = (
    Kind("psycopg", postgresql, "postgresql+psycopg:///", "read-only transaction", "password authentication failed"),
    Kind("pymysql", mariadb, "mysql+pymysql://", "READ ONLY transaction", "Access denied"),
)


@pytest.fixture(scope="module", params=KINDS, ids=[kind.driver for kind in KINDS])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    pytest.importorskip(
        found.driver, reason=f"a driver is not at hand: pip install '{PACKAGES.get(found.driver, found.driver)}'"
    )
    return found


@pytest.fixture(scope="module")
def address(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with kind.serve(tmp_path_factory.mktemp("database")) as found:
        yield found


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


def test_the_store_is_only_read(kind: Kind, source: MetricSource) -> None:
    with pytest.raises(sa.exc.DBAPIError, match=kind.forbids), source._engine.connect() as store:  # type: ignore[attr-defined]
        store.execute(sa.text("DELETE FROM metrics"))


def test_no_message_has_the_password(kind: Kind, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = address.format("nothing"), address.format("store").replace(QUOTED, "wrong-and-long")
    with pytest.raises(NoStoreYet, match="is empty"):
        open_source(right)
    with pytest.raises(SourceError, match=kind.refuses) as refused:
        open_source(wrong)
    with pytest.raises(SourceError, match="cannot be read") as absent:
        open_source(f"{kind.scheme}://kim:{QUOTED}@127.0.0.1:1/store")
    monkeypatch.setitem(sys.modules, kind.driver, None)
    with pytest.raises(SourceError, match=re.escape(f"pip install {PACKAGES.get(kind.driver, kind.driver)}")) as undriven:
        open_source(right)
    with pytest.raises(SourceError, match="is no address of a database") as nonsense:
        open_source(f"{kind.scheme.partition('+')[0]}+nothing://kim:wrong-and-long@host/store")
    for error in (refused, absent, undriven, nonsense):
        said = str(error.value)
        assert not any(secret in said for secret in (SECRET, QUOTED, "cret@1", "wrong-and-long")), said


def test_the_pages_show_the_store_and_no_password(
    kind: Kind, address: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log(client, begin(client, "on the page"), "train/loss", [(s, START + s, 1 / s) for s in range(1, 20)])
    for place in ("store", "nowhere"):
        monkeypatch.setattr(sys, "argv", ["app.py", "--store", address.format(place)])
        app = AppTest.from_file(APP, default_timeout=60).run()
        assert not app.exception
        said = [str(one.proto) for one in (*app.main, *app.sidebar)]
        assert any(kind.shown in one for one in said)
        assert not any(
            secret in one for one in (*said, caplog.text, str(app.query_params)) for secret in (SECRET, "cret%401", "kim:")
        )
    assert app.title[0].value == "This store cannot be read"
