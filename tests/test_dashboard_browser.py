"""The dashboard as a user meets it: a real server, real stores, trainings that go on or are killed, and a real Chromium."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("streamlit", reason="the dashboard's packages are not installed")
pytest.importorskip("playwright", reason="the browser tests need Playwright: pip install playwright")

from browser import BOARD, Server, Traffic, charts, serve, wait_drawn, wait_settled
from dashboard_page import (
    PAGES,
    START,
    address,
    chip,
    drag,
    listed,
    needs_chromium,
    run_id,
    ticked,
    toggle,
    uri,
    visit,
    wait_equal,
    wait_until,
)
from dashboard_stores import history, log, make_store
from mlflow import MlflowClient
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

pytestmark = [pytest.mark.integration, needs_chromium]

STEPS = 6000  # more than a training takes while these tests run
TICKS = 10
_LINE = "([board, line, points]) => zo.charts(board).find((one) => one.id === 'train/loss')?.lines[line] > points"
BLOWN_UP = {40: math.nan, 41: math.nan, 50: math.inf, 55: -math.inf}
HOSTILE = (
    "<script>window.owned = 1; alert(1)</script>",
    '<img src=x onerror="window.owned = 1">',
    "</script><svg onload=alert(1)>",
    "'; DROP TABLE runs; --",
    "**bold** _low_ `code` # head",
    ":red[x] :smile: :material/home:",
    "$x^2$ $$\\frac{1}{2}$$",
    "[a](javascript:alert(1)) ![b](http://evil.example/b.png)",
    "{{7*7}} ${7*7} %s",
    "שלום עולם abc",
    "🧪🇩🇪👩‍🔬 é",
    "long " + "x" * 400,
)
STRANGE_PARAM = "a_long/param name." + "y" * 200

# ---- stores ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def busy(folder: Path) -> Path:
    """Two seeds of a zeroth-order method and a backprop run that have ended, and a run that is logged to by hand."""
    path = folder / "busy.db"
    client = make_store(path)
    experiment = client.create_experiment("reviews")
    steps = range(1, STEPS + 1, 5)
    for i, (name, peak, tags) in enumerate(
        (
            ("zo-0", 1.0, {"zo.method": "ZO", "zo.recipe": "default"}),
            ("zo-1", 1.1, {"zo.method": "ZO", "zo.recipe": "default"}),
            ("adamw", 4.0, {"zo.method": "AdamW"}),
        )
    ):
        run = client.create_run(experiment, start_time=START, run_name=name, tags=tags).info.run_id
        client.log_param(run, "seed", i)
        noise = np.random.default_rng(i).normal(scale=0.02, size=STEPS + 1)
        log(client, run, "train/loss", [(s, START + 100 * s, 0.3 + 2 / (s + 1) ** 0.5 + noise[s]) for s in steps])
        log(client, run, "memory/peak", [(s, START + 100 * s, peak * 2**30) for s in steps[::40]])
        log(client, run, "val/accuracy", [(s, START + 100 * s, 0.6 + 0.1 * i) for s in steps[::40]])
        client.set_terminated(run, "FINISHED", end_time=START + 100 * STEPS)
    client.create_run(experiment, run_name="by hand")
    return path


@pytest.fixture(scope="module")
def quiet(folder: Path) -> Path:
    """Hostile text wherever a store has text, and a run whose loss came to nan and infinity; nothing is running."""
    path = folder / "quiet.db"
    client = make_store(path)
    experiment = client.create_experiment(HOSTILE[1])
    for i, name in enumerate(HOSTILE):
        tags = {"zo.method": name, "zo.recipe": name, "mlflow.note.content": name}
        run = client.create_run(experiment, start_time=START + i, run_name=name, tags=tags).info.run_id
        client.log_param(run, STRANGE_PARAM, name)
        log(client, run, "train/loss", [(s, START + 100 * s, 2 / s + i / 10) for s in range(1, 80)])
        log(client, run, "memory/peak", [(s, START + 100 * s, 2.0**30 * (1 + i)) for s in (1, 79)])
        log(client, run, "val/accuracy", [(79, START + 7900, 0.5 + i / 50)])
        client.set_terminated(run, "FINISHED", end_time=START + 8000)
    tags = {"zo.method": "AdamW", "zo.device_memory": str(2**40)}
    run = client.create_run(experiment, start_time=START + 99, run_name="blew up", tags=tags).info.run_id
    log(client, run, "train/loss", [(s, START + 100 * s, BLOWN_UP.get(s, 1 / s)) for s in range(1, 80)])
    log(client, run, "memory/peak", [(1, START, 2.0**34)])
    log(client, run, "val/accuracy", [(79, START + 7900, 0.9)])
    client.set_terminated(run, "FINISHED", end_time=START + 8000)
    return path


class Training:
    """A program that trains with zolightning, and logs to the busy store until it is ended."""

    def __init__(self, store: Path, name: str) -> None:
        self.store, self.name = store, name
        self.output = store.parent / f"{name}.log"
        script = Path(__file__).with_name("endless_training.py")
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, script, uri(store), "reviews", name],
                cwd=store.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=out, stderr=out,
            )  # fmt: skip

    def steps(self) -> int:
        """How many were logged."""
        return max(step for step, _, _ in history(MlflowClient(uri(self.store)), run_id(self.store, self.name), "train/loss"))

    def wait_started(self) -> None:
        def started() -> bool:
            assert self.process.poll() is None, self.output.read_text()
            with suppress(StopIteration, ValueError):
                return self.steps() > 10
            return False

        wait_until(started)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def started(busy: Path) -> Iterator[list[Training]]:
    """The trainings so far; the first one imports its packages while other tests run."""
    found = [Training(busy, "training 0")]
    yield found
    for one in found:
        one.kill()


@pytest.fixture
def training(busy: Path, started: list[Training]) -> Training:
    """A training that logs while the test runs."""
    if started[-1].process.poll() is not None:
        started.append(Training(busy, f"training {len(started)}"))
    started[-1].wait_started()
    return started[-1]


# ---- servers and pages -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy_server(busy: Path, started: list[Training]) -> Iterator[Server]:
    with serve(uri(busy), busy.with_suffix(".server")) as server:
        yield server


@pytest.fixture(scope="module")
def quiet_server(quiet: Path) -> Iterator[Server]:
    with serve(uri(quiet), quiet.with_suffix(".server")) as server:
        yield server


def looks(page: Page) -> dict[str, Any]:
    """All that a shared link promises to bring back."""
    return {
        "charts": {key: (one["range"], sorted(one["lines"]), one["marks"]) for key, one in charts(page).items()},
        "hidden": [one.get_attribute("data-id") for one in page.locator(".zo-chip[aria-pressed=false]").all()],
        "ticked": ticked(page),
        "toggles": [one.is_checked() for one in page.get_by_test_id("stCheckbox").locator("input").all()],
        "chosen": page.get_by_test_id("stSelectbox").all_inner_texts(),
        "smoothing": page.get_by_test_id("stSlider").all_inner_texts(),
    }


def line_colors(page: Page) -> list[list[int]]:
    """Red, green and blue of each line, as the legend has them."""
    swatches = page.locator(".zo-chip .zo-swatch").evaluate_all("all => all.map((one) => one.style.background)")
    return [[int(part) for part in re.findall(r"rgb\((\d+), (\d+), (\d+)", look)[0]] for look in swatches]


def shot(page: Page) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))


def inked(page: Page) -> float:
    """The share of the page's main part that is not paper."""
    picture = shot(page)
    paper = np.median(picture.reshape(-1, 3), 0)
    return float((np.abs(picture[120:, 350:] - paper).max(-1) > 40).mean())


# ---- live, to share and to keep ----------------------------------------------------------------------------------------


def test_new_points_are_shown(page: Page, busy_server: Server, busy: Path) -> None:
    client, run = MlflowClient(uri(busy)), run_id(busy, "by hand")
    log(client, run, "probe", [(1, time.time_ns() // 1_000_000, 1.0)])
    page.goto(f"{busy_server.url}/curves?key=probe&runs={run[:10]}")
    wait_drawn(page)
    for step in (2, 3):
        log(client, run, "probe", [(step, time.time_ns() // 1_000_000, float(step))])
        page.wait_for_function("([board, step]) => zo.charts(board)[0]?.last === step", arg=[BOARD, step])
    chart = charts(page)["probe"]
    assert chart["points"] == 3
    assert chart["mounts"] == 1


def test_a_page_that_is_built_anew_keeps_its_charts(page: Page, busy_server: Server, busy: Path) -> None:
    """A metric that comes up, or another selection, runs the whole script again."""
    client, run = MlflowClient(uri(busy)), run_id(busy, "by hand")
    log(client, run, "steady", [(1, time.time_ns() // 1_000_000, 1.0)])
    traffic = Traffic()
    traffic.watch(page)
    page.goto(f"{busy_server.url}/curves?key=steady&runs={run[:10]}")
    wait_drawn(page)
    wait_settled(page)
    built = len(traffic.runs)
    log(client, run, "new", [(1, time.time_ns() // 1_000_000, 1.0)])
    wait_until(lambda: len(traffic.runs) > built, page)
    listed(page, "adamw").locator("input").check()  # has no such metric: a chip, no line
    chip(page, run_id(busy, "adamw")).wait_for()
    wait_settled(page)
    assert charts(page)["steady"]["mounts"] == 1


def test_charts_are_drawn_before_streamlit_is_up_and_stay(page: Page, quiet_server: Server) -> None:
    page.route("**/_stcore/health", lambda route: None)  # Streamlit waits for it
    page.goto(f"{quiet_server.url}/curves?key=train/loss&key=memory/peak")
    wait_drawn(page, 2)
    assert page.locator(".zo-early .zo-chart").count() == 2
    assert page.locator(".stApp .zo-chart").count() == 0
    before = charts(page)
    assert len(before["train/loss"]["lines"]) == len(HOSTILE) + 1
    assert {mark["kind"] for mark in before["train/loss"]["marks"]} == {"nan", "inf", "-inf"}
    drag(page, "train/loss", 0.2, 0.5)
    page.unroute("**/_stcore/health")  # lets it through
    page.wait_for_url(re.compile("zoom="))
    wait_settled(page)
    after = charts(page)
    assert page.locator(".stApp .zo-chart").count() == 2
    assert page.locator(".zo-legend").count() == 1
    for key, chart in after.items():
        assert chart["mounts"] == 1  # it has moved, and was not drawn anew
        low, high = before[key]["range"]
        assert low < chart["range"][0] < chart["range"][1] < high


def test_the_address_brings_the_view_back(page: Page, browser: Browser, busy_server: Server, busy: Path) -> None:
    runs = {name: run_id(busy, name)[:10] for name in ("adamw", "zo-0", "zo-1", "by hand")}  # not one that begins meanwhile
    page.goto(f"{busy_server.url}/curves?live=0&key=train/loss&key=memory/peak&runs={','.join(runs.values())}")
    wait_drawn(page, 2)
    listed(page, "by hand").locator("input").uncheck()
    page.wait_for_url(lambda url: "runs=" in url and runs["by hand"] not in url)
    toggle(page, "Log y").click()
    page.wait_for_url(re.compile("log=1"))
    page.get_by_role("slider", name="Smoothing").press("ArrowRight")
    page.wait_for_url(re.compile("smoothing="))
    wait_settled(page)
    drag(page, "train/loss", 0.2, 0.5)
    page.wait_for_url(re.compile("zoom="))
    chip(page, run_id(busy, "adamw")).click()
    page.wait_for_url(re.compile("hidden="))
    wait_settled(page)
    before = looks(page)
    assert before["hidden"] == [run_id(busy, "adamw")]
    assert before["ticked"] == {"adamw", "zo-0", "zo-1"}
    assert {name.split()[-1] for _, lines, _ in before["charts"].values() for name in lines} == {"line", "raw"}  # smoothed
    low, high = before["charts"]["train/loss"][0]
    assert 0.15 * STEPS < low < high < 0.55 * STEPS

    page.reload()
    wait_drawn(page, 2)
    wait_settled(page)
    wait_equal(page, lambda: looks(page), before)
    with visit(browser, (1400, 900)) as other:
        other.goto(page.url)
        wait_drawn(other, 2)
        wait_settled(other)
        wait_equal(other, lambda: looks(other), before)


def test_what_is_taken_away_is_what_is_shown(page: Page, busy_server: Server, busy: Path, tmp_path: Path) -> None:
    runs = {name: run_id(busy, name) for name in ("zo-0", "adamw")}
    chosen = ",".join(one[:10] for one in runs.values())
    page.goto(f"{busy_server.url}/curves?live=0&key=train/loss&zoom=100~200&runs={chosen}")
    wait_drawn(page)
    wait_settled(page)

    with page.expect_download() as found:
        page.get_by_role("link", name="CSV of these curves").click()
    found.value.save_as(tmp_path / "curves.csv")
    with (tmp_path / "curves.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    client = MlflowClient(uri(busy))
    logged = {(run, step, value) for run in runs.values() for step, _, value in history(client, run, "train/loss")}
    assert {(row["run_id"], int(float(row["step"])), float(row["value"])) for row in rows} == {
        one for one in logged if 100 <= one[1] <= 200
    }

    page.locator("[data-key='train/loss']").hover()
    with page.expect_download() as found:
        page.locator("[data-key='train/loss'] .zo-save").click()
    found.value.save_as(tmp_path / "chart.png")
    picture = np.asarray(Image.open(tmp_path / "chart.png").convert("RGB"))
    box = page.locator("[data-key='train/loss'] canvas").bounding_box()
    assert box is not None
    assert picture.shape[0] >= box["height"] and picture.shape[1] >= box["width"]
    for rgb in line_colors(page):
        assert (picture == rgb).all(-1).sum() > 100, f"no line of {rgb}"

    with page.expect_download() as found:
        page.get_by_role("link", name="Report").click()
    found.value.save_as(tmp_path / "report.html")
    assert "<script" not in (tmp_path / "report.html").read_text().lower()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.get_by_role("cell", name="zo-0").count() == 1
    assert page.get_by_role("cell", name="zo-1").count() == 0
    svg = page.locator("svg").bounding_box()
    assert svg is not None and svg["height"] > 100


# ---- honest, and safe --------------------------------------------------------------------------------------------------


def test_values_that_are_not_finite_stand_at_their_step(page: Page, quiet_server: Server, quiet: Path) -> None:
    run = run_id(quiet, "blew up")
    page.goto(f"{quiet_server.url}/curves?key=train/loss&zoom=35~60&runs={run[:10]}")
    wait_drawn(page)
    wait_settled(page)
    chart = charts(page)["train/loss"]
    marks = {place: one["kind"] for one in chart["marks"] for place in one["x"]}
    assert marks == {40: "nan", 41: "nan", 50: "inf", 55: "-inf"}
    low, high = chart["range"]
    over = page.locator("[data-key='train/loss'] .u-over")
    box = over.bounding_box()
    assert box is not None
    (rgb,) = line_colors(page)
    picture = shot(page)
    for step, text in ((40, r"not a number\b.* 40"), (50, r"\+ infinity\b.* 50"), (55, r"− infinity\b.* 55")):
        x = box["x"] + box["width"] * (step - low) / (high - low)
        edge = box["y"] if step < 55 else box["y"] + box["height"] - 8
        mark = picture[round(edge) : round(edge) + 9, round(x) - 4 : round(x) + 5]
        assert (np.abs(mark.astype(int) - rgb).sum(-1) < 60).sum() > 5, f"nothing is drawn at step {step}"
        page.mouse.move(x, box["y"] + 60)
        page.locator(".zo-tip", has_text=re.compile(text)).wait_for()


def test_the_budget_is_dragged_and_a_device_far_above_does_not_flatten_the_lines(page: Page, quiet_server: Server) -> None:
    page.goto(f"{quiet_server.url}/memory?budget=20")
    wait_drawn(page)
    wait_settled(page)
    low, high = charts(page)["memory/peak"]["y"]
    assert 20 < high < 30  # the largest peak is 16 GiB, the device has 1024
    page.get_by_text("13 of 13 runs fit into 20 GiB").wait_for()
    over = page.locator("[data-key='memory/peak'] .u-over")
    height = over.evaluate("one => one.clientHeight")
    for level, press in ((20, page.mouse.down), (10.5, page.mouse.up)):
        over.hover(position={"x": 100, "y": height * (high - level) / (high - low)})
        press()
    page.wait_for_url(re.compile(r"budget=10\.[3-7]"))
    page.get_by_text(re.compile(r"10 of 13 runs fit into 10\.\d GiB")).wait_for()


def assert_text_stays_text(page: Page, which: str) -> None:
    """What names, parameters and tags of the store try to be on a page, they are not."""
    shown = page.locator(".zo-run .zo-name").all_text_contents()
    for name in HOSTILE:
        verbatim = name if len(name) <= 80 else name[:79]
        assert any(verbatim in one for one in shown), name
    if which in ("curves", "memory", "diff"):
        page.locator(".zo-chip").first.hover()
        chips = "\n".join(page.locator(".zo-chip .zo-name").all_text_contents())
        assert all(name in chips for name in HOSTILE if len(name) <= 40)
    assert page.evaluate("window.owned") is None
    assert page.locator("img[src='x'], img[src*=evil], a[href^='javascript'], .katex").count() == 0
    assert page.locator("[data-testid=stMain] strong, [data-testid=stSidebar] strong").filter(has_text="bold").count() == 0


def contents(store: Path) -> dict[str, str]:
    """A digest of each of the store's files; the index of the log beside it is where readers say that they read."""
    files = [one for one in store.parent.glob(f"{store.name}*") if not one.name.endswith("-shm")]
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


@pytest.mark.parametrize("dark", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["light", "dark"])
def test_every_page_draws_text_as_text_and_leaves_the_store_alone(
    dark: bool, browser: Browser, quiet_server: Server, quiet: Path
) -> None:
    before = contents(quiet)
    with visit(browser, dark=dark) as page:
        for which in PAGES:
            page.goto(address(quiet_server, which))
            wait_settled(page)
            if which in ("curves", "memory", "diff"):
                wait_drawn(page)
            if not (which == "sweep" and page.get_by_test_id("stAlertContentInfo").count()):  # no parameter to sweep
                wait_until(lambda: inked(page) > 0.01, page)
            paper = np.median(shot(page).reshape(-1, 3), 0)
            assert (paper < 60).all() if dark else (paper > 200).all()
            assert page.get_by_test_id("stException").count() == 0
            assert page.get_by_test_id("stAlertContentError").count() == 0
            assert_text_stays_text(page, which)
    assert contents(quiet) == before


def test_an_empty_store_waits_for_its_first_run(browser: Browser, folder: Path) -> None:
    path = folder / "first.db"
    with serve(uri(path), path.with_suffix(".server")) as server, visit(browser) as page:
        page.goto(server.url)
        page.get_by_text("No runs here yet").wait_for()
        page.get_by_test_id("stCode").filter(has_text="import mlflow").wait_for()
        assert not path.exists()
        client = make_store(path)
        run = client.create_run("0", run_name="my first run").info.run_id
        log(client, run, "train/loss", [(s, time.time_ns() // 1_000_000, 1 / s) for s in range(1, 30)])
        listed(page, "my first run").wait_for()
        page.locator(".zo-card", has_text="my first run").wait_for()
        page.get_by_test_id("stDataFrame").wait_for()


def test_pages_of_other_sites_cannot_look(browser: Browser, quiet_server: Server) -> None:
    context: BrowserContext = browser.new_context()
    context.route("http://evil.example/**", lambda route: route.fulfill(body="<h1>evil</h1>", content_type="text/html"))
    try:
        page = context.new_page()
        page.goto("http://evil.example/")
        assert page.evaluate(_KNOCK, f"ws://127.0.0.1:{quiet_server.port}/_stcore/stream") == "refused"
        page.goto(quiet_server.url)
        assert page.evaluate(_KNOCK, f"ws://127.0.0.1:{quiet_server.port}/_stcore/stream") == "open"
        page.goto(f"http://rebound.example:{quiet_server.port}/")  # a name of somebody else's that leads here
        assert page.evaluate(_KNOCK, f"ws://rebound.example:{quiet_server.port}/_stcore/stream") == "refused"
        assert page.locator(".zo-run").count() == 0
        for path in ("_stcore/agent/interact", "_stcore/agent/openapi.json"):
            answer = page.evaluate("async path => (await fetch('/' + path, { method: 'POST' })).status", path)
            assert answer >= 400
    finally:
        context.close()


_KNOCK = """address => new Promise((done) => {
  const socket = new WebSocket(address, ["streamlit"]);
  socket.onopen = () => done("open");
  socket.onerror = () => done("refused");
})"""


def test_the_server_listens_on_this_machine_only(quiet_server: Server) -> None:
    import psutil

    listens = [one.laddr for one in psutil.Process(quiet_server.pid).net_connections() if one.status == psutil.CONN_LISTEN]
    assert listens == [("127.0.0.1", quiet_server.port)]


# ---- beside a training: the last of these tests ends it -----------------------------------------------------------------


def test_ten_ticks_of_new_points_undo_nothing(page: Page, busy_server: Server, training: Training) -> None:
    page.set_viewport_size({"width": 1300, "height": 500})
    traffic = Traffic()
    traffic.watch(page)
    page.goto(f"{busy_server.url}/curves?key=train/loss&key=memory/peak")
    wait_drawn(page, 2)
    wait_settled(page)
    chip(page, run_id(training.store, "zo-1")).click()
    listed(page, "adamw").locator("input").uncheck()
    page.locator(".zo-filter").fill("o")
    page.wait_for_url(re.compile("filter=o&.*without=.*hidden="))
    wait_settled(page)
    drag(page, "train/loss", 0.02, 0.9)
    page.wait_for_url(re.compile("zoom="))
    wait_settled(page)
    main = page.get_by_test_id("stMain")
    main.evaluate("one => one.scrollTo(0, 150)")
    live = f"{run_id(training.store, training.name)} line"
    before, scrolled = looks(page), main.evaluate("one => one.scrollTop")
    mounts = {key: one["mounts"] for key, one in charts(page).items()}
    assert before["hidden"] == [run_id(training.store, "zo-1")]
    assert scrolled == 150
    begin, points, steps = len(traffic.ticks), charts(page)["train/loss"]["lines"][live], training.steps()

    wait_until(lambda: len(traffic.ticks) - begin >= TICKS, page)
    wait_until(lambda: training.steps() > steps, page)

    assert looks(page) == before
    assert main.evaluate("one => one.scrollTop") == scrolled
    assert page.locator(".zo-filter").input_value() == "o"
    after = charts(page)
    page.wait_for_function(_LINE, arg=[BOARD, live, points])
    assert {key: one["mounts"] for key, one in after.items()} == mounts


def test_pause_stops_and_resumes(page: Page, busy_server: Server, training: Training) -> None:
    run = run_id(training.store, training.name)
    traffic = Traffic()
    traffic.watch(page)
    page.goto(f"{busy_server.url}/curves?key=train/loss&runs={run[:10]}")
    wait_drawn(page)
    toggle(page, "Live").click()
    page.wait_for_url(re.compile("live=0"))
    wait_settled(page)
    last, ticks, steps = charts(page)["train/loss"]["last"], len(traffic.ticks), training.steps()
    page.wait_for_timeout(5000)  # two ticks and a half
    wait_until(lambda: training.steps() > steps, page)
    assert charts(page)["train/loss"]["last"] == last
    assert len(traffic.ticks) == ticks
    toggle(page, "Live").click()
    page.wait_for_function("([board, last]) => zo.charts(board)[0]?.last > last", arg=[BOARD, last])


def test_a_killed_training_is_shown_as_killed(page: Page, busy_server: Server, training: Training) -> None:
    page.goto(busy_server.url)
    state = listed(page, training.name).locator(".zo-status")
    page.locator(".zo-card", has_text=training.name).wait_for()
    state.filter(has_text="live").wait_for()
    pid = training.process.pid
    training.kill()
    listed(page, training.name).locator(".zo-status", has_text="killed").wait_for()
    assert f"Its process {pid} on this machine is gone" in (state.get_attribute("title") or "")
    page.locator(".zo-card", has_text=training.name).wait_for(state="detached")  # the page follows its sidebar
