"""The dashboard's pages, run by Streamlit's own test harness over real MLflow stores."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("streamlit", reason="the dashboard's packages are not installed")

import zolightning_dashboard
from dashboard_stores import HOSTILE, log, make_store
from mlflow import MlflowClient
from streamlit import file_util
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash
from zolightning_dashboard import early, serve
from zolightning_dashboard.charts.lines import Plotter
from zolightning_dashboard.page import SCREENS
from zolightning_dashboard.scene import Store, look
from zolightning_dashboard.screens import parts, tradeoffs
from zolightning_dashboard.source import open_source
from zolightning_dashboard.view import View

from zolightning.federated import Round, RoundLog

pytestmark = pytest.mark.integration

ROOT = Path(zolightning_dashboard.__file__).parent
PAGES = ("overview", "runs", "curves", "memory", "tradeoffs", "sweep", "health", "diff", "run")
START = 1_700_000_000_000
MARKUP = ("*bold*", "$x$", ":red[x]", "[a](http://b)", ":smile:", "`code`", "<b>x</b>")


@pytest.fixture(scope="module", autouse=True)
def _main_module() -> Iterator[None]:
    """Streamlit leaves the app as ``__main__``, which processes that are spawned later would run."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Path:
    """Two zeroth-order runs that differ in their seed, a backprop run, and one that is going on."""
    path = folder / "ours.db"
    client = make_store(path)
    experiment = client.create_experiment("reviews")
    steps = range(1, 61)
    for name, peak, accuracy, tags, params in (
        ("zo-0", 1.0, 0.80, {"zo.method": "ZO", "zo.recipe": "default"}, {"lr": "1e-3", "seed": "0", "max_steps": "60"}),
        ("zo-1", 1.1, 0.82, {"zo.method": "ZO", "zo.recipe": "default"}, {"lr": "1e-3", "seed": "1", "max_steps": "60"}),
        ("adamw", 4.0, 0.92, {"zo.method": "AdamW"}, {"lr": "2e-5", "seed": "0", "max_steps": "60"}),
        ("going on", 1.0, 0.70, {"zo.method": "ZO", "zo.recipe": "slow"}, {"lr": "1e-4", "seed": "0", "max_steps": "600"}),
    ):
        live = name == "going on"
        if live:
            tags["zo.heartbeat"] = str(time.time() + 3600)  # also where the tests are slow
        start = time.time_ns() // 1_000_000 - 60_000 if live else START
        run = client.create_run(experiment, start_time=start, run_name=name, tags=tags).info.run_id
        for key, value in params.items():
            client.log_param(run, key, value)
        stamps = [start + 1000 * s for s in steps]
        losses = [1 / s for s in steps]
        losses[29] = math.nan
        log(client, run, "train/loss", list(zip(steps, stamps, losses, strict=True)))
        log(client, run, "memory/peak", [(s, t, peak * 2**30) for s, t in zip(steps, stamps, strict=True)])
        log(client, run, "memory/weights", [(1, stamps[0], 0.5 * 2**30)])
        log(client, run, "val/accuracy", [(30, stamps[29], accuracy / 2), (60, stamps[59], accuracy)])
        log(client, run, "speed/train_seconds", [(s, t, 0.5 * s) for s, t in zip(steps, stamps, strict=True)])
        log(client, run, "forward_passes", [(s, t, 2.0 * s) for s, t in zip(steps, stamps, strict=True)])
        if not live:
            client.set_terminated(run, "FINISHED", end_time=START + 61_000)
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """Runs that know nothing of zolightning."""
    path = folder / "plain.db"
    client = make_store(path)
    for i in range(2):
        run = client.create_run("0", start_time=START, run_name="same name").info.run_id
        log(client, run, "reward", [(s, START + s, i + s / 10) for s in range(20)])
        client.set_terminated(run, "FINISHED", end_time=START + 100)
    return path


@pytest.fixture(scope="module")
def hostile(folder: Path) -> Path:
    """Names, params, tags, metrics and an experiment that try to be more than text."""
    path = folder / "hostile.db"
    client = make_store(path)
    experiment = client.create_experiment("<img src=x onerror=alert(1)> :red[x]")
    for i, name in enumerate([*HOSTILE, *MARKUP, "שלום"]):
        run = client.create_run(experiment, start_time=START + i, run_name=name, tags={"zo.method": name, "zo.recipe": name})
        client.log_param(run.info.run_id, "param", name)
        log(client, run.info.run_id, "train loss: _x_ .y", [(1, START, 1.0), (2, START, math.inf)])
        log(client, run.info.run_id, "memory/peak", [(1, START, 2.0**30)])
        client.set_terminated(run.info.run_id, "FINISHED", end_time=START + 100)
    return path


def open_app(store: Path | str, page: str = "overview", query: dict[str, Any] | None = None) -> AppTest:
    """The page as a browser would open it; use inside the ``argv`` fixture."""
    sys.argv = ["app.py", "--store", store if isinstance(store, str) else f"sqlite:///{store}"]
    app = AppTest.from_file(ROOT / "app.py", default_timeout=60)
    app.query_params = query or {}
    go(app, page)
    return app.run()


def go(app: AppTest, page: str) -> None:
    app._page_hash = calc_hash("" if page == "overview" else page)


@pytest.fixture(autouse=True)
def argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))


def texts(app: AppTest) -> Iterator[tuple[str, str]]:
    """(kind, text) of everything that Streamlit reads as Markdown or HTML."""
    for kind in ("markdown", "caption", "subheader", "title", "header", "info", "warning", "error", "html", "metric"):
        for one in app.get(kind):
            proto = getattr(one, "proto", one)
            yield kind, getattr(proto, "body", "") or getattr(proto, "label", "")
            yield kind, getattr(proto, "help", "")
    for tab in app.tabs:
        yield "tab", tab.label


def feeds(app: AppTest) -> list[bytes]:
    return [one.proto.bytes for one in app.get("bidi_component") if one.proto.component_name == "zolightning.feed"]


def table(app: AppTest, column: str) -> Sequence[Any]:
    return list(next(one.value for one in app.dataframe if column in one.value.columns)[column])


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("store", ["ours", "plain", "hostile"])
def test_every_page_draws_every_store(page: str, store: str, request: pytest.FixtureRequest) -> None:
    app = open_app(request.getfixturevalue(store), page)
    assert not app.exception
    assert not app.error


def test_a_federations_clients_are_on_the_health_page(tmp_path: Path) -> None:
    with RoundLog(f"sqlite:///{tmp_path / 'm.db'}", name="digits") as rounds:
        for number in range(3):
            asked, sent = ("anna", "ben"), {"anna": 100, "ben": 50 * (number < 2)}
            done = Round(number, number + 1, 0.5, asked, asked[: 2 - number // 2], {}, 300, sum(sent.values()), sent)
            rounds(done, {"value": 0.1 * number})
    app = open_app(tmp_path / "m.db", "health")
    assert not app.exception
    shown = next(one.value for one in app.dataframe if "zo/clients/bytes_up" in one.value.columns)
    assert len(shown) == 3
    assert set(shown["zo/clients/joined"]) == {"1", "3", "2"}


@pytest.mark.parametrize("page", PAGES)
def test_text_from_outside_is_never_markup(page: str, hostile: Path) -> None:
    app = open_app(hostile, page)
    assert not app.exception
    shown = [re.sub(r"(`+).*?\1(?!`)", "", text) for _, text in texts(app)]  # code spans are not interpreted
    for name in [*HOSTILE, *MARKUP, "onerror", "_x_"]:
        assert not any(name in text for text in shown), name


@pytest.mark.parametrize("page", PAGES)
def test_looking_changes_no_store(page: str, ours: Path) -> None:
    before = hashlib.sha256(ours.read_bytes()).hexdigest()
    assert not open_app(ours, page).exception
    assert hashlib.sha256(ours.read_bytes()).hexdigest() == before


def test_overview_says_what_runs_what_it_costs_and_what_was_saved(ours: Path) -> None:
    app = open_app(ours)
    assert table(app, "status") == ["live", "finished", "finished", "finished"]
    peaks = dict(zip(table(app, "run"), table(app, "peak"), strict=True))
    assert peaks == pytest.approx({"going on": 1.0, "zo-0": 1.0, "zo-1": 1.1, "adamw": 4.0})
    assert dict(zip(table(app, "run"), table(app, "done"), strict=True))["going on"] == pytest.approx(0.1)
    saved = dict(zip(table(app, "run"), table(app, "saved"), strict=True))
    assert saved["zo-0"] == saved["zo-1"] == pytest.approx(100 * (1.1 / 4 - 1))
    assert math.isnan(saved["adamw"])
    assert "Running now: 1" in [one.value for one in app.subheader]


def test_curves_bring_their_points_in_two_parts(ours: Path) -> None:
    app = open_app(ours, "curves", {"key": ["train/loss"]})
    settled, live = feeds(app)
    assert b'"part":"settled"' in settled and b'"part":"live"' in live
    assert b'"nan"' in settled  # the loss that was not a number has its mark
    app.run()
    assert feeds(app)[0] == settled


def test_new_points_change_only_the_live_part(folder: Path) -> None:
    path = folder / "growing.db"
    client = make_store(path)
    now = time.time_ns() // 1_000_000
    old, new = (client.create_run("0", start_time=now, run_name=name).info.run_id for name in ("old", "new"))
    for run in (old, new):
        log(client, run, "loss", [(s, now, 1.0 + s) for s in range(10)])
    client.set_terminated(old)
    app = open_app(path, "curves")
    before = feeds(app)
    log(client, new, "loss", [(s, now, 2.0 + s) for s in range(10, 15)])
    app.run()
    assert feeds(app)[0] == before[0]
    assert feeds(app)[1] != before[1]


def test_a_view_comes_back_by_its_address(ours: Path) -> None:
    query = {"key": ["train/loss", "memory/peak"], "axis": "elapsed", "smoothing": "0.9", "log": "1", "group": "1"}
    app = open_app(ours, "curves", query)
    assert app.selectbox(key="axis-1").value == "elapsed"
    assert app.multiselect(key="keys-1").value == ["train/loss", "memory/peak"]
    kept = {name: values for name, values in app.query_params.items() if name != "store"}
    assert kept == query
    again = open_app(ours, "curves", app.query_params)
    assert again.query_params == app.query_params
    assert feeds(again) == feeds(app)


def test_an_address_that_lags_behind_undoes_nothing(ours: Path) -> None:
    app = open_app(ours, "curves")
    before = app.query_params
    app.toggle(key="log-1").set_value(True).run()
    app.query_params = before  # the browser sent the next click before it heard of the new address
    app.selectbox(key="axis-1").set_value("forwards").run()
    assert (app.query_params["log"], app.query_params["axis"]) == ("1", "forwards")
    app.query_params = before  # however late it comes
    app.run()
    assert app.toggle(key="log-1").value is True
    assert app.query_params["log"] == "1"


def test_controls_write_the_address_and_pages_share_the_view(ours: Path) -> None:
    app = open_app(ours, "curves")
    app.selectbox(key="axis-1").set_value("forwards").run()
    app.toggle(key="live-1").set_value(False).run()
    assert (app.query_params["axis"], app.query_params["live"]) == ("forwards", "0")
    app.query_params = {}  # what Streamlit does when another page is opened
    go(app, "memory")
    app.run()
    assert not app.exception
    assert app.query_params["axis"] == "forwards"
    assert app.selectbox(key="axis-1").value == "forwards"


def test_selected_runs_are_the_ones_that_are_shown(ours: Path) -> None:
    client = MlflowClient(f"sqlite:///{ours}")
    run = client.search_runs(["1"], "attributes.run_name = 'zo-0'")[0].info.run_id
    app = open_app(ours, query={"runs": [run[:10]]})
    assert table(app, "run") == ["zo-0"]
    nothing = open_app(ours, query={"runs": ["none"]})
    assert not nothing.exception and not nothing.dataframe


def test_an_experiment_without_runs_can_be_left_again(ours: Path) -> None:
    app = open_app(ours, query={"experiments": "0"})
    assert [one.value for one in app.info] == ["The chosen experiments have no runs yet."]
    app.multiselect(key="experiments-1").set_value(["1"]).run()
    assert len(table(app, "run")) == 4


@pytest.mark.parametrize("page", PAGES)
def test_nonsense_in_the_address_is_passed_over(page: str, ours: Path) -> None:
    query = {
        "axis": ["<x>"],
        "smoothing": ["7"],
        "zoom": ["9~1"],
        "budget": ["-1"],
        "target": ["nan"],
        "at": ["x"],
        "key": ["no"],
    }
    app = open_app(ours, page, {**query, "experiments": ["99"], "hidden": ["zz"], "quality": ["no"], "runs": ["zz,"]})
    assert not app.exception


def test_memory_says_which_runs_fit(ours: Path) -> None:
    app = open_app(ours, "memory", {"budget": ["2"]})
    assert dict(zip(table(app, "run"), table(app, "fits"), strict=True)) == {
        "zo-0": "fits", "zo-1": "fits", "going on": "fits", "adamw": "too large",
    }  # fmt: skip
    app.slider(key="budget-1").set_value(5.0).run()
    assert set(table(app, "fits")) == {"fits"}
    assert app.query_params["budget"] == "5.0"
    assert "zolightning plan" in app.code[0].value
    assert app.code[0].value.endswith("--device-memory 5")


def test_tradeoffs_say_what_the_target_took(ours: Path) -> None:
    app = open_app(ours, "tradeoffs", {"target": ["81"]})
    found = next(one.value for one in app.dataframe if "reached" in one.value.columns).set_index("run")
    assert dict(found["reached"]) == {"zo-0": False, "zo-1": True, "adamw": True, "going on": False}
    assert found.loc["zo-1", ["step", "seconds", "memory", "forwards"]].tolist() == pytest.approx([60, 60, 1.1, 120])


def test_diff_shows_differing_parameters_only(ours: Path) -> None:
    app = open_app(ours, "diff")
    frame = next(one.value for one in app.dataframe if "lr" in set(one.value["name"]))
    assert set(frame["name"]) == {"lr", "seed", "max_steps"}
    app.toggle(key="diff-all-1").set_value(True).run()
    assert "zo.method (tag)" in set(next(one.value for one in app.dataframe if "lr" in set(one.value["name"]))["name"])


def id_of(store: Path, name: str) -> str:
    client = MlflowClient(f"sqlite:///{store}")
    return str(client.search_runs(["1"], f"attributes.run_name = '{name}'")[0].info.run_id)


def test_the_table_of_runs_has_the_columns_and_pins_of_the_address(ours: Path) -> None:
    columns = ["params.lr", "best.val/accuracy"]
    app = open_app(ours, "runs", {"column": columns, "pinned": [id_of(ours, "adamw")[:10]]})
    assert not app.exception
    pinned, others = (one.value for one in app.dataframe)
    assert list(pinned.columns) == list(others.columns) == ["run", *columns]
    assert pinned.values.tolist() == [["adamw", 2e-5, pytest.approx(92)]]
    assert others["run"].tolist()[0] == "going on" and set(others["run"]) == {"going on", "zo-0", "zo-1"}


def test_runs_that_are_set_alike_are_one_row_with_a_deviation(ours: Path) -> None:
    app = open_app(ours, "runs", {"column": ["best.val/accuracy"], "by": ["lr", "zo.method"]})
    frame = app.dataframe[0].value.set_index("run")
    assert frame.loc["lr=1e-3, ZO"].tolist() == pytest.approx([2, 81, np.std([80, 82], ddof=1)])
    assert frame.loc["lr=2e-5, AdamW", "n"] == 1


def test_a_filter_in_the_address_narrows_every_page(ours: Path) -> None:
    assert table(open_app(ours, query={"filter": ["lr<1e-3"]}), "run") == ["going on", "adamw"]
    assert len(table(open_app(ours, query={"filter": ["/(/"]}), "run")) == 4


def test_a_section_of_metrics_is_drawn_when_it_is_open(ours: Path) -> None:
    closed = open_app(ours, "curves", {"key": ["train/loss"]})
    assert [one.label for one in closed.expander if "metric" in one.label] == [
        "`memory` 2 metrics", "`others` 1 metric", "`speed` 1 metric", "`val` 1 metric",
    ]  # fmt: skip
    assert b"speed/train_seconds" not in feeds(closed)[0]
    opened = open_app(ours, "curves", {"key": ["train/loss"], "section": ["speed"]})
    assert b"speed/train_seconds" in feeds(opened)[0]
    assert opened.query_params["section"] == "speed"


def test_the_page_of_a_run_shows_what_it_said(ours: Path) -> None:
    app = open_app(ours, "run", {"run": [id_of(ours, "zo-1")]})
    assert not app.exception
    assert app.subheader[0].value.startswith("finished: it ran to its end")
    frames = [one.value for one in app.dataframe]
    assert dict(frames[0].set_index("metric")["last"])["memory/peak"] == "1.10 GiB"
    assert dict(zip(frames[1]["Name"], frames[1]["Value"], strict=True)) == {"lr": "1e-3", "seed": "1", "max_steps": "60"}


def test_best_last_and_at_step(ours: Path) -> None:
    app = open_app(ours, "curves", {"key": ["val/accuracy"], "at": ["45"]})
    frame = app.dataframe[0].value.set_index("run")
    assert frame.loc["adamw", ["best", "best at", "last", "at step"]].tolist() == pytest.approx([0.92, 60, 0.92, 0.46])


def test_a_missing_store_says_how_to_log_a_first_run_and_that_works(tmp_path: Path) -> None:
    app = open_app(tmp_path / "mlflow.db")
    assert not app.exception
    assert app.title[0].value == "No runs here yet"
    script = next(one.value for one in app.code if "import mlflow" in one.value).replace("1000", "10")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, capture_output=True)
    app.run()
    assert table(app, "run") == ["my first run"]


def test_a_store_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no database")
    app = open_app(tmp_path / "notes.txt")
    assert not app.exception
    assert app.title[0].value == "This store cannot be read"


def test_a_link_opens_no_other_store(ours: Path) -> None:
    app = open_app(ours, query={"store": ["http://169.254.169.254/"]})
    assert "169.254" in app.info[0].value
    assert "zo-0" in table(app, "run")
    assert app.query_params["store"] == f"sqlite:///{ours}"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (View(), {"zo-0", "zo-1", "adamw", "going on"}),
        (View(group=True), {"adamw", "ZO (n=2)", "going on"}),
        (View(by=("seed", "zo.method")), {"seed=1, ZO", "seed=0, AdamW", "seed=0, ZO (n=2)"}),
        (View(filter="lr>=1e-3"), {"zo-0", "zo-1"}),
        (View(filter="zo lr<1 or adamw", without=("zz",)), {"zo-0", "zo-1", "adamw", "going on"}),
        (View(filter="/(/"), {"zo-0", "zo-1", "adamw", "going on"}),
        (View(rank="val/accuracy", most=2), {"adamw", "zo-1"}),
        (View(rank="train/loss", most=1), {"going on"}),
    ],
)
def test_lines_are_named_as_their_runs_and_chosen_by_the_view(shown: View, expected: set[str], ours: Path) -> None:
    source = open_source(f"sqlite:///{ours}")
    scene = look(Store(source, Plotter(source)), ())
    assert set(scene.labels(shown).values()) == expected


def test_a_run_whose_process_is_gone_is_killed(folder: Path) -> None:
    path = folder / "gone.db"
    client = make_store(path)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    ended = client.create_run("0", run_name="adamw", tags={"zo.method": "AdamW"}).info.run_id
    log(client, ended, "val/loss", [(1, time.time_ns() // 1_000_000, 0.5)])
    client.set_terminated(ended)
    tags = {"zo.pid": str(child.pid), "zo.host": socket.gethostname(), "zo.method": "ZO", "zo.recipe": "default"}
    run = client.create_run("0", run_name="gone", tags=tags).info.run_id
    log(client, run, "val/loss", [(1, time.time_ns() // 1_000_000, 1.0)])
    app = open_app(path)
    assert table(app, "status") == ["killed", "finished"]
    headings = [one.value for one in app.subheader]
    assert "Nothing is running" in headings
    assert "Zeroth-order training against backprop" not in headings


def test_the_launcher_stays_on_this_machine_unless_told() -> None:
    assert serve.settings(8501, "127.0.0.1") == {"server.port": 8501, "server.address": "127.0.0.1"}
    assert "10.0.0.5" in serve.settings(8501, "10.0.0.5")["server.allowedHosts"]
    with pytest.raises(ValueError, match="`--port` must be from 1 to 65535, got 0"):
        serve.settings(0, "127.0.0.1")


@pytest.mark.parametrize("script", ["app.py", "launch.py"])
def test_a_checkout_runs_its_own_code_whatever_is_installed(script: str, tmp_path: Path) -> None:
    copy = tmp_path / "somewhere"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    serve_py = copy / "serve.py"
    serve_py.write_text(serve_py.read_text().replace("sqlite:///mlflow.db", "sqlite:///of-the-copy.db"))
    shown = subprocess.run([sys.executable, str(copy / script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert "sqlite:///of-the-copy.db" in "".join(shown.stdout.split()), shown.stderr  # a narrow terminal breaks the line


@pytest.mark.parametrize(("host", "here"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)])
def test_loopback(host: str, here: bool) -> None:
    assert serve.is_loopback(host) is here


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def handshake(port: int, host: str, origin: str) -> int:
    """The status of a request to open the app's websocket."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        wire.sendall(
            f"GET /_stcore/stream HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        return int(wire.recv(4096).split()[1])


def fetch(port: int, host: str, site: str = "same-origin") -> tuple[int, bytes]:
    """The answer to a page that asks for its points before Streamlit is up."""
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/zo/charts?key=train/loss", headers={"Host": host, "Sec-Fetch-Site": site}
    )
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize("command", ["streamlit", "zolightning"])
def test_the_server_takes_no_foreign_host_or_origin(command: str, ours: Path, tmp_path: Path) -> None:
    (tmp_path / "dashboard.py").write_text("raise SystemExit('the working folder has a dashboard of its own')")
    port = free_port()
    module = {
        "streamlit": ["streamlit", "run", str(ROOT / "app.py"), "--server.headless=true", f"--server.port={port}", "--"],
        "zolightning": ["zolightning.cli", "dash", "--port", str(port)],
    }[command]
    environment = {**os.environ, "STREAMLIT_SERVER_HEADLESS": "true", "PYTHONPATH": str(ROOT.parent)}
    with (tmp_path / "log").open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", *module, "--store", f"sqlite:///{ours}"],
            cwd=tmp_path,
            env=environment,
            stdout=out,
            stderr=out,
        )
    try:
        patience = time.monotonic() + 180
        while time.monotonic() < patience:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        own = f"127.0.0.1:{port}"
        assert handshake(port, own, f"http://{own}") == 101, (tmp_path / "log").read_text()
        assert handshake(port, own, "http://evil.example") == 403
        assert handshake(port, "evil.example", "http://evil.example") == 403
        if command == "zolightning":
            assert fetch(port, own)[0] == 200
            assert fetch(port, "evil.example")[0] == fetch(port, own, site="cross-site")[0] == 403
        addresses = {line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"}
        assert f"0100007F:{port:04X}" in addresses and f"00000000:{port:04X}" not in addresses
    finally:
        server.terminate()
        server.wait(20)


def test_points_reach_the_feed_as_they_were_logged(ours: Path) -> None:
    from test_dashboard_charts import unpack

    header = unpack(feeds(open_app(ours, "curves", {"key": ["train/loss"]}))[0])
    chart = header["charts"]["train/loss"]
    expected = np.array([1 / s for s in range(1, 61)])
    expected[29] = np.nan
    assert len(chart["lines"]) == 3
    for line in chart["lines"]:
        np.testing.assert_array_equal(chart["x"][line["places"]], np.arange(1.0, 61.0))
        np.testing.assert_allclose(line["y"], expected, rtol=1e-4)
    assert all(mark[1:] == ["nan", [30.0], [1]] for mark in chart["marks"])


def test_a_page_opened_while_the_store_is_locked_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zolightning_dashboard.source.file._BUSY_SECONDS", 0.05)
    path = tmp_path / "locked.db"
    client = MlflowClient(f"sqlite:///{path}")  # no write-ahead log: a writer locks readers out
    run = client.create_run("0", run_name="there").info.run_id
    log(client, run, "train/loss", [(1, START, 1.0)])
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    app = open_app(path)
    assert app.title[0].value == "This store cannot be read"
    assert any("Trying again" in one.value for one in app.caption)
    writer.execute("COMMIT")
    writer.close()
    app.run()
    assert table(app, "run") == ["there"]


def test_every_answer_says_who_may_frame_it_and_downloads_are_links() -> None:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import Response
    from starlette.routing import Route
    from starlette.testclient import TestClient
    from zolightning_dashboard.headers import HEADERS, Headers

    own = {"X-Frame-Options": "DENY"}
    app = Starlette(routes=[Route("/", lambda _: Response("", headers=own))], middleware=[Middleware(Headers)])
    answer = TestClient(app).get("/")
    assert answer.headers["X-Frame-Options"] == "DENY", "what a page says for itself stays"
    assert answer.headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
    assert "frame-ancestors 'self'" in HEADERS["Content-Security-Policy"]


def test_a_pinned_run_is_kept_in_the_address_and_named_in_cards_and_legend(ours: Path) -> None:
    source = open_source(f"sqlite:///{ours}")
    scene = look(Store(source, Plotter(source)), ())
    adamw = next(run for run in scene.runs if run.name == "adamw")
    app = open_app(ours, query={"baseline": [adamw.id[:10]], "equal": ["step"]})
    assert app.query_params["baseline"] == [adamw.id[:10]] or app.query_params["baseline"] == adamw.id[:10]
    assert any("Against `adamw`" in one.value for one in app.subheader)
    shown = parts.lines(scene, View(baseline=adamw.id[:10], group=True), "b")["series"]
    labels = {one["id"]: one["label"] for one in shown}
    assert labels[adamw.id].endswith(" · baseline")
    assert any(label.endswith("pts") for label in labels.values())


def test_trade_offs_take_seeds_together_and_mark_what_has_not_ended(ours: Path) -> None:
    source = open_source(f"sqlite:///{ours}")
    scene = look(Store(source, Plotter(source)), ())
    found = {one.name: one for one in tradeoffs.results(scene, View(group=True), "val/accuracy")}
    zo = next(one for name, one in found.items() if name.endswith("(n=2)"))
    assert (zo.quality, zo.spread, zo.peak, zo.ended) == pytest.approx((81.0, math.sqrt(2), 1.1 * 2**30, True))
    assert [name for name, one in found.items() if not one.ended] == ["going on"]
    assert len(tradeoffs.results(scene, View(), "val/accuracy")) == len(scene.runs)


def test_every_page_names_the_code_that_it_will_need() -> None:
    assert set(early.PAGES) == {"", *SCREENS}
    folder = Path(file_util.get_static_dir()) / "static" / "js"
    for wanted in early.PAGES.values():
        for part in wanted:
            assert part == early.chunks(folder, [part])[0].partition(".")[0]  # this version of Streamlit has it
    assert all((folder / file).is_file() for file in early.chunks(folder, ["DataFrame"]))
    assert early.chunks(folder, ["NoSuchPart"]) == []
