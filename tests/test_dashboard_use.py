"""The dashboard in daily use: by keyboard, by axe's rules, and between two keystrokes of the filter. In a real Chromium."""

from __future__ import annotations

import io
import math
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("streamlit", reason="the dashboard's packages are not installed")
pytest.importorskip("playwright", reason="the browser tests need Playwright: pip install playwright")

from browser import Server, SlowLine, charts, serve, wait_drawn, wait_settled
from dashboard_page import (
    PAGES,
    START,
    address,
    chip,
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
from dashboard_stores import log, make_store
from PIL import Image
from zolightning_dashboard.embed import embed

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.integration, needs_chromium]

RATES = ("1e-4", "1e-3", "1e-2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sweep of two methods with everything that the pages show, and a run that is going on."""
    path = tmp_path_factory.mktemp("use") / "sweep.db"
    client = make_store(path)
    experiment = client.create_experiment("sweep", artifact_location=(path.parent / "files").as_uri())
    for i, rate in enumerate((*RATES, *RATES)):
        zo = i < len(RATES)
        tags = {"zo.method": "ZO", "zo.recipe": "default", "zo.ledger": "/runs/ledger.zo"} if zo else {"zo.method": "AdamW"}
        name = f"{'zo' if zo else 'adamw'} {rate}"
        run = client.create_run(experiment, start_time=START + i, run_name=name, tags=tags).info.run_id
        for key, value in {"optimizer/lr": rate, "seed": "0", "max_steps": "100", "model": "tiny"}.items():
            client.log_param(run, key, value)
        steps = range(1, 101)
        log(client, run, "train/loss", [(s, START + 100 * s, 1 / s + i / 10) for s in steps])
        log(client, run, "memory/peak", [(s, START + 100 * s, (1 if zo else 4) * 2.0**30) for s in (1, 100)])
        log(client, run, "val/accuracy", [(s, START + 100 * s, 0.5 + i / 20) for s in (50, 100)])
        if zo:
            log(client, run, "zo/projected_grad", [(s, START + 100 * s, (-1.0) ** s) for s in steps])
            log(client, run, "zo/tie_rate", [(s, START + 100 * s, 0.5 * (rate == "1e-4")) for s in steps])
        if i == 1:
            for key, each in {
                "speed/train_seconds": 0.5,
                "zo/offload/wait_seconds": 0.2,
                "zo/offload/read_bytes": 2.0**30,
            }.items():
                log(client, run, key, [(s, START + 100 * s, each * s) for s in (1, 50, 100)])
        if i == len(RATES) - 1:
            client.log_text(run, "the film was great", "samples/step100.txt")
            picture = io.BytesIO()
            Image.new("RGB", (30, 20), "red").save(picture, "PNG")
            for file, content in {"step200.png": picture.getvalue(), "step300.png": b"\x89PNG\r\n and no more"}.items():
                (path.parent / file).write_bytes(content)
                client.log_artifact(run, str(path.parent / file), "samples")
            client.set_tag(run, "mlflow.note.content", "The **best** so far")
        if i:
            client.set_terminated(run, "FINISHED", end_time=START + 10_000)
        else:
            client.set_tag(run, "zo.heartbeat", "4000000000")
    return path


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    with serve(uri(store), store.with_suffix(".server")) as found:
        yield found


# ---- the filter --------------------------------------------------------------------------------------------------------


def shown(page: Page) -> set[str]:
    return set(page.locator(".zo-run:not([hidden]) .zo-name").all_inner_texts())


def test_the_filter_follows_each_key_and_is_kept_in_the_address(page: Page, browser: Browser, server: Server) -> None:
    page.goto(f"{server.url}/curves?key=train/loss")
    wait_drawn(page)
    wait_settled(page)
    page.locator(".zo-filter").press_sequentially("zo lr<5e-3", delay=30)
    page.wait_for_function("document.querySelector('.zo-runs').dataset.shown === '2'")
    assert shown(page) == {"zo 1e-4", "zo 1e-3"}
    page.wait_for_url(re.compile("filter=zo"))
    wait_until(lambda: page.locator(".zo-chip").count() == 2)
    with visit(browser) as other:
        other.goto(page.url)
        wait_drawn(other)
        wait_settled(other)
        wait_equal(other, lambda: shown(other), {"zo 1e-4", "zo 1e-3"})
        wait_equal(other, lambda: len(charts(other)["train/loss"]["lines"]), 2)
    page.locator(".zo-filter").fill("/(/")
    page.get_by_text("is no regular expression").wait_for()
    page.locator(".zo-filter").fill("")
    wait_until(lambda: page.locator(".zo-chip").count() == 6)


def test_ticks_name_what_is_taken_away_or_what_is_left(page: Page, server: Server, store: Path) -> None:
    page.goto(f"{server.url}/curves?key=train/loss")
    wait_drawn(page)
    listed(page, "zo 1e-3").locator("input").uncheck()
    page.wait_for_url(re.compile(f"without={run_id(store, 'zo 1e-3')[:10]}"))
    row = listed(page, "adamw 1e-3")
    row.hover()
    row.locator(".zo-only").click()
    page.wait_for_url(re.compile(f"runs={run_id(store, 'adamw 1e-3')[:10]}"))
    assert ticked(page) == {"adamw 1e-3"}
    page.locator(".zo-pick", has_text="all").click()
    page.wait_for_url(lambda url: "runs=" not in url and "without=" not in url)


# ---- quick actions -----------------------------------------------------------------------------------------------------


def test_actions_of_which_the_browser_has_not_heard_yet_all_count(page: Page, server: Server, store: Path) -> None:
    line = SlowLine(page)
    page.goto(f"{server.url}/curves?key=train/loss")
    wait_drawn(page)
    wait_settled(page)
    line.holds = True
    for act, written in (
        (chip(page, run_id(store, "zo 1e-3")).click, "hidden="),
        (listed(page, "adamw 1e-2").locator("input").uncheck, "without="),
        (toggle(page, "Log y").click, "log=1"),
        (listed(page, "adamw 1e-3").locator("input").uncheck, "%2C"),  # the second of those that are away
        (lambda: page.locator(".zo-filter").fill("1e-"), "filter="),
    ):
        act()
        wait_until(lambda written=written: not page.wait_for_timeout(50) and any(written in one for one in line.addresses()))
    line.release()
    page.wait_for_url(re.compile("filter=.*without=.*%2C.*log=1.*hidden="))
    wait_settled(page)
    assert ticked(page) == {f"{method} {rate}" for method in ("zo", "adamw") for rate in RATES} - {"adamw 1e-2", "adamw 1e-3"}
    assert [one.get_attribute("data-id") for one in page.locator(".zo-chip[aria-pressed=false]").all()] == [
        run_id(store, "zo 1e-3")
    ]
    assert toggle(page, "Log y").locator("input").is_checked()
    assert page.locator(".zo-filter").input_value() == "1e-"


def test_back_and_forward_bring_the_view_of_their_address(page: Page, server: Server, store: Path) -> None:
    page.goto(f"{server.url}/curves?key=train/loss&live=0")
    wait_drawn(page)
    wait_settled(page)
    listed(page, "adamw 1e-2").locator("input").uncheck()
    page.wait_for_url(re.compile("without="))
    page.locator(".zo-filter").fill("zo")
    page.wait_for_url(re.compile("filter=zo"))
    wait_settled(page)
    page.go_back()
    page.wait_for_url(lambda url: "filter=" not in url and "without=" in url)
    wait_until(lambda: page.locator(".zo-chip").count() == 5 and page.locator(".zo-filter").count() == 1)
    assert page.locator(".zo-filter").input_value() == ""
    page.go_back()
    page.wait_for_url(lambda url: "without=" not in url)
    wait_until(lambda: len(ticked(page)) == 6 and page.locator(".zo-chip").count() == 6)
    page.go_forward()
    page.wait_for_url(re.compile("without="))
    wait_until(lambda: "adamw 1e-2" not in ticked(page) and page.locator(".zo-chip").count() == 5)
    listed(page, "adamw 1e-3").locator("input").uncheck()  # the boxes are those of this view
    page.wait_for_url(re.compile("without=[^&]*%2C"))


# ---- one line pointed at ---------------------------------------------------------------------------------------------------


def test_a_line_is_highlighted_from_the_list_the_legend_and_the_chart(page: Page, server: Server, store: Path) -> None:
    run = run_id(store, "zo 1e-3")
    page.goto(f"{server.url}/curves?key=train/loss")
    wait_drawn(page)
    wait_settled(page)
    listed(page, "zo 1e-3").hover()
    chip(page, run).and_(page.locator(".zo-lit")).wait_for()
    chip(page, run_id(store, "adamw 1e-4")).hover()
    listed(page, "adamw 1e-4").and_(page.locator(".zo-lit")).wait_for()
    assert chip(page, run).and_(page.locator(".zo-lit")).count() == 0
    over = page.locator("[data-key='train/loss'] .u-over")
    low, high = charts(page)["train/loss"]["y"]
    height, width = over.evaluate("one => [one.clientHeight, one.clientWidth]")
    over.hover(position={"x": width - 5, "y": height * (high - 0.11) / (high - low)})  # its loss ends at 0.11
    listed(page, "zo 1e-3").and_(page.locator(".zo-lit")).wait_for()
    page.locator(".zo-tip-row.zo-lit", has_text="zo 1e-3").wait_for()


# ---- by keyboard -------------------------------------------------------------------------------------------------------

_FOCUSED = """() => {
  const one = document.activeElement;
  const place = one.closest("[data-testid]")?.dataset.testid;
  return [one.className, one.getAttribute("aria-label"), one.innerText, one.tagName, place].join(" ");
}"""


def tab_to(page: Page, wanted: str, most: int = 120) -> None:
    """Press Tab until the element of that description has the focus."""
    seen = []
    for _ in range(most):
        page.keyboard.press("Tab")
        seen.append(str(page.evaluate(_FOCUSED)))
        if re.search(wanted, seen[-1]):
            return
    raise AssertionError(f"Tab never came to {wanted}, but to\n" + "\n".join(dict.fromkeys(seen)))


def test_the_keyboard_reaches_and_operates_everything(page: Page, server: Server, store: Path) -> None:
    page.goto(f"{server.url}/curves?key=train/loss")
    wait_drawn(page)
    wait_settled(page)
    tab_to(page, "zo-filter")
    page.keyboard.type("zo")
    page.wait_for_url(re.compile("filter=zo"))
    wait_settled(page)
    tab_to(page, "zo-pick.*none")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # all
    tab_to(page, "zo-box")
    page.keyboard.press("Space")
    page.wait_for_url(re.compile("without="))
    page.keyboard.press("Space")
    page.wait_for_url(lambda url: "without=" not in url)
    tab_to(page, "zo-only")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("runs="))
    tab_to(page, "Lines")
    tab_to(page, "Live|stCheckbox")
    tab_to(page, "Report")
    page.evaluate("document.querySelector('.zo-pick').focus()")
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: "runs=" not in url)
    wait_settled(page)
    tab_to(page, "zo-chip")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("hidden="))
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: "hidden=" not in url)
    page.keyboard.press("Shift+Enter")
    wait_until(lambda: page.locator(".zo-chip[aria-pressed=false]").count() == 2)
    page.keyboard.press("Shift+Enter")
    tab_to(page, "zo-plot")
    low, high = charts(page)["train/loss"]["range"]
    page.keyboard.press("+")
    page.wait_for_url(re.compile("zoom="))
    near = charts(page)["train/loss"]["range"]
    assert near[1] - near[0] == pytest.approx((high - low) / 2, rel=0.1)
    page.keyboard.press("ArrowRight")
    page.locator(".zo-tip:not([hidden]) .zo-tip-row").first.wait_for()
    page.keyboard.press("Shift+ArrowRight")
    wait_until(lambda: charts(page)["train/loss"]["range"][0] > near[0])
    page.keyboard.press("0")
    page.wait_for_url(lambda url: "zoom=" not in url)
    tab_to(page, "zo-save")
    with page.expect_download():
        page.keyboard.press("Enter")


def choose(page: Page, label: str, text: str) -> None:
    """In a box of choices, by keys: what begins like the text."""
    tab_to(page, f"(?m){label}.*INPUT")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type(text)
    page.get_by_role("option", name=text).first.wait_for()
    page.keyboard.press("Enter")


def test_tables_tabs_and_choices_by_keyboard(page: Page, server: Server, store: Path) -> None:
    page.goto(f"{server.url}/runs?live=0")
    wait_settled(page)
    choose(page, "Sort by", "last train/loss")
    page.wait_for_url(re.compile(r"sort=last\.train"))
    tab_to(page, "Largest first|stCheckbox")
    page.keyboard.press("Space")
    page.wait_for_url(re.compile(r"sort=-last\.train"))
    wait_settled(page)
    tab_to(page, "data-grid-canvas")
    page.keyboard.press("Shift+Space")  # the first row has the largest loss
    page.get_by_role("button", name="Pin", exact=True).wait_for()
    tab_to(page, "Pin BUTTON")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(f"pinned={run_id(store, 'adamw 1e-2')[:10]}"))
    wait_settled(page)
    tab_to(page, "data-grid-canvas")
    page.keyboard.press("Shift+Space")
    page.get_by_role("button", name="Open its page").wait_for()
    tab_to(page, "Open its page BUTTON")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/run\?.*run="))
    wait_settled(page)
    choose(page, "Run", "zo 1e-2")
    page.wait_for_url(re.compile(f"run={run_id(store, 'zo 1e-2')[:10]}"))
    choose(page, "Show", "samples/step200")
    page.wait_for_function("[...document.querySelectorAll('[data-testid=stImage] img')].some((one) => one.naturalWidth === 30)")
    choose(page, "Show", "samples/step300")
    page.get_by_text("It is no picture, although its name says so.").wait_for()
    tab_to(page, "Curves.*stTopNavLink")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/curves"))
    wait_drawn(page)
    wait_settled(page)
    tab_to(page, "stTab")
    tabs = page.get_by_role("tab")
    page.keyboard.press("ArrowRight")
    wait_until(lambda: tabs.nth(1).get_attribute("aria-selected") == "true", page)
    page.keyboard.press("Home")
    wait_until(lambda: tabs.nth(0).get_attribute("aria-selected") == "true", page)


# ---- by axe's rules ----------------------------------------------------------------------------------------------------

_AXE = """async () => {
  const found = await axe.run(document, { resultTypes: ["violations"] });
  const said = (node) => [node.html.slice(0, 300), node.failureSummary];
  return found.violations.map((one) => [one.id, one.impact, one.nodes.slice(0, 5).map(said)]);
}"""


@pytest.fixture(scope="module")
def axe() -> str:
    package = pytest.importorskip("axe_playwright_python", reason="axe's rules: pip install axe-playwright-python")
    return (resources.files(package) / "axe.min.js").read_text("utf-8")


_WIDE, _MIDDLE, _NARROW = (1400, 900), (900, 1000), (390, 844)


@pytest.mark.parametrize(
    ("size", "dark"),
    [
        pytest.param(_WIDE, False, id="wide, light", marks=pytest.mark.slow),
        pytest.param(_NARROW, True, id="narrow, dark"),
        pytest.param(_WIDE, True, id="wide, dark", marks=pytest.mark.slow),
        pytest.param(_MIDDLE, False, id="middle, light", marks=pytest.mark.slow),
        pytest.param(_MIDDLE, True, id="middle, dark", marks=pytest.mark.slow),
        pytest.param(_NARROW, False, id="narrow, light", marks=pytest.mark.slow),
    ],
)
def test_every_page_by_axe_and_by_keyboard(
    size: tuple[int, int], dark: bool, browser: Browser, server: Server, store: Path, axe: str
) -> None:
    run = run_id(store, "zo 1e-2")[:10]  # has a note, a ledger and files
    found: dict[str, Any] = {}
    with visit(browser, size, dark) as page:
        for which in PAGES:
            page.goto(f"{address(server, which)}?live=0&run={run}")  # what a tick replaces fades out and in
            wait_settled(page)
            page.wait_for_timeout(1000)
            page.evaluate(axe)
            found[which] = page.evaluate(_AXE)
            if size == _WIDE and not dark:
                assert_tab_reaches_all(page, which)
    assert {which: one for which, one in found.items() if one} == {}


# all that can be clicked or typed into, but what lies in a group of which Tab enters one part only, and what is folded away
_OPERABLE = """() => {
  const all = document.querySelectorAll("button, a[href], input, select, textarea, summary, [tabindex='0']");
  const inside = "[role=radiogroup], [role=tablist], [data-baseweb='select'], [data-testid='stDataFrame'], [aria-hidden=true]";
  const shown = (one) => one.checkVisibility({ visibilityProperty: true, opacityProperty: true }) && one.tabIndex >= 0;
  const apart = (one) => !one.disabled && !one.closest(inside) && !one.matches("iframe, section");
  const there = [...all].filter((one) => shown(one) && apart(one));
  window.unreached = new Set(there);
  document.addEventListener("focusin", (e) => { for (let at = e.target; at; at = at.parentElement) unreached.delete(at); });
  document.activeElement?.blur();
  return there.length;
}"""


def assert_tab_reaches_all(page: Page, which: str) -> None:
    """Tab comes to everything that a pointer can operate, and each place shows that it has the focus."""
    count = page.evaluate(_OPERABLE)
    assert count > 10
    for _ in range(3 * count):
        page.keyboard.press("Tab")
        if not page.evaluate("unreached.size"):
            return
    assert page.evaluate("[...unreached].map((one) => one.outerHTML.slice(0, 200))") == [], which


# ---- a run's page, and buttons of tables ---------------------------------------------------------------------------------


def test_a_run_s_page_shows_its_note_its_ledger_and_its_samples(page: Page, server: Server, store: Path) -> None:
    run = run_id(store, "zo 1e-3")
    page.goto(f"{server.url}/run?run={run[:10]}")
    page.get_by_text("Ledger /runs/ledger.zo, logged up to step 100").wait_for()
    code = page.get_by_test_id("stCode")
    code.filter(has_text=f"zolightning replay {run} --step 100 --out step-100 --store sqlite:///").wait_for()
    page.get_by_role("spinbutton", name="Step").fill("42")
    page.get_by_role("spinbutton", name="Step").press("Enter")
    code.filter(has_text=f"zolightning replay {run} --step 42 --out step-42").wait_for()
    page.goto(f"{server.url}/run?run={run_id(store, 'zo 1e-2')[:10]}")
    page.get_by_text("The **best** so far").wait_for()
    code.filter(has_text="the film was great").wait_for()
    page.goto(f"{server.url}/run?run={run_id(store, 'adamw 1e-2')[:10]}")
    page.get_by_text("It left none.").wait_for()
    assert page.get_by_text("Back to a step").count() == 0
    page.get_by_role("button", name="Its curves").click()
    page.wait_for_url(re.compile(f"/curves.*runs={run_id(store, 'adamw 1e-2')[:10]}"))


def tick_row(page: Page, row: int) -> None:
    """Tick a row of the page's first table: its cells are drawn, and are no elements."""
    box = page.get_by_test_id("stDataFrame").first.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 15, box["y"] + 35 * (row + 1.5))


def press_for(page: Page, row: int, button: str, url: Any) -> None:
    """Select a row, press a button of its selection, and wait for the address that this leads to."""
    tick_row(page, row)
    page.get_by_role("button", name=button, exact=True).click()
    page.wait_for_url(url)


def test_rows_of_the_table_of_runs_are_pinned_and_selected(page: Page, server: Server) -> None:
    page.goto(f"{server.url}/runs?live=0")
    wait_settled(page)
    press_for(page, 1, "Pin", re.compile("pinned="))
    page.get_by_text("Others: 5").wait_for()
    wait_settled(page)
    press_for(page, 0, "Only these", re.compile("runs="))
    wait_until(lambda: len(ticked(page)) == 1, page)
    wait_settled(page)
    press_for(page, 0, "Unpin", lambda url: "pinned=" not in url)
    wait_settled(page)
    wait_until(lambda: len(ticked(page)) == 1, page)  # the list may be drawn anew after the address has changed
    page.locator(".zo-pick", has_text="all").click()
    page.wait_for_url(lambda url: "runs=" not in url)
    wait_settled(page)
    press_for(page, 2, "Take away", re.compile("runs=[^&]*%2C"))
    wait_until(lambda: len(ticked(page)) == 5, page)
    wait_settled(page)
    press_for(page, 0, "Open its page", re.compile("/run.*run="))


# ---- axes, news, frames --------------------------------------------------------------------------------------------------


def test_a_logarithmic_axis_is_labelled_at_whole_decades(page: Page, server: Server) -> None:
    page.goto(f"{server.url}/curves?key=train/loss&key=memory/peak&log=1")
    wait_drawn(page, 2)
    wait_settled(page)
    shown = charts(page)
    assert shown["train/loss"]["y"] == [pytest.approx(0.01), pytest.approx(10)]  # from 0.01 to 1.5
    assert shown["train/loss"]["labels"] == ["0.01", "0.1", "1", "10"]
    assert shown["memory/peak"]["labels"] == ["1", "2", "5", "10"]  # GiB; from 1 to 4


_ASIDE = """() => {
  Object.defineProperty(document, "hidden", { get: () => window.aside !== false, configurable: true });
  window.told = [];
  const Real = Notification;
  window.Notification = class extends Real { constructor(title, options) { super(title, options); told.push(options.body); } };
}"""


def test_ends_and_failures_are_told_in_the_title_and_by_the_browser(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "news.db"
    client = make_store(path)
    now = time.time_ns() // 1_000_000
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    tags = {"zo.host": socket.gethostname(), "zo.heartbeat": str(now / 1000 + 10**6)}
    runs = {
        name: client.create_run("0", run_name=name, tags={**tags, **more}).info.run_id
        for name, more in (("ends", {}), ("blows up", {}), ("dies", {"zo.pid": str(gone.pid)}))
    }
    for run in runs.values():
        log(client, run, "train/loss", [(s, now, 1 / s) for s in range(1, 10)])
    with serve(uri(path), tmp_path / "server.log") as server, visit(browser) as page:
        page.context.grant_permissions(["notifications"])
        page.goto(server.url)
        wait_until(lambda: page.locator(".zo-status[data-status=live]").count() >= 3, page)
        page.evaluate(_ASIDE)
        page.get_by_role("button", name="Notify me").click()
        page.get_by_role("button", name="Notifies of").wait_for()
        news: dict[str, Callable[[], object]] = {
            "ends has finished": lambda: client.set_terminated(runs["ends"], "FINISHED"),
            "blows up has diverged": lambda: log(client, runs["blows up"], "train/loss", [(10, now, math.nan)]),
            "dies was killed": lambda: (gone.kill(), gone.wait()),
        }
        for count, (text, happens) in enumerate(news.items(), 1):
            happens()
            page.locator(".zo-news", has_text=text).wait_for()
            page.wait_for_function("n => document.title.startsWith(`(${n}) `)", arg=count)
            assert page.evaluate("told.at(-1)") == text
        page.evaluate("window.aside = false; document.dispatchEvent(new Event('visibilitychange'))")
        page.wait_for_function("!/^\\(/.test(document.title)")


def test_a_notebook_frames_a_page(page: Page, server: Server, tmp_path: Path) -> None:
    with serve_folder(tmp_path) as notebook:
        (tmp_path / "cell.html").write_text(embed("curves", url=server.url, keys=("train/loss",), filter="zo")._repr_html_())
        page.goto(f"{notebook}/cell.html")
        frame = page.frame_locator("iframe")
        frame.locator(".zo-chart canvas").first.wait_for()
        frame.locator(".zo-runs[data-shown='3']").wait_for()


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """A web server of the folder, as a notebook's is beside the dashboard's."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.server_port}"
        finally:
            found.shutdown()
            thread.join()
