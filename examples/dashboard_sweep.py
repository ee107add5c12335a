"""The part of dashboard_bench.py about many runs: its pages over a sweep, and MLflow's own page over the same store."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
from browser import LAUNCHER, Traffic, serve
from dashboard_figures import Result, spread
from dashboard_stores import Server as MLflow

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

POINTS, FEW = 200, 100
PAGES = {"": ("Overview", 3.0, 1.5), "tradeoffs": ("Trade-offs", 3.0, None), "memory": ("Memory", 3.0, None)}
MOST_PIXELS = 5000
IDLE_SECONDS, IDLE_TICKS = 1.0, 20
IDLE_SERVER = (
    "import runpy, sys; runpy.run_path({launcher!r}); from zolightning_dashboard import scene, serve; "
    "scene.SLOW_SECONDS = {seconds}; sys.exit(serve.main())"
)
# all that a page has is drawn: its script has ended, each table and chart has a canvas, and the runs are listed
COMPLETE = """() => {
  const app = document.querySelector("[data-testid='stApp'][data-test-script-state='notRunning']");
  const parts = [...document.querySelectorAll("[data-testid='stDataFrame'], .zo-plot, [data-testid='stEChartsChart']")];
  const there = app && document.querySelector("[data-testid='stDataFrame']") && document.querySelector(".zo-run");
  return there && parts.every((one) => one.querySelector("canvas"))
    && performance.now();
}"""
# CPU seconds of everything that the server does with a store, without the browser's part
WORK = """
import sys, time
from zolightning_dashboard.charts.lines import Plotter
from zolightning_dashboard.facts import quality_key
from zolightning_dashboard.scene import Store, look
from zolightning_dashboard.source import open_source
from zolightning_dashboard.view import View
began = time.process_time()
source = open_source(sys.argv[1])
scene = look(Store(source, Plotter(source)), ())
key = quality_key(scene.runs)
scene.facts(scene.runs, key)
assert scene.savings(View())
print(time.process_time() - began)
"""


def sweep(browser: Browser, folder: Path, runs: int, repeats: int) -> Iterator[Result]:
    """Each page cold and warm, its height, an idle tick, the cost beside that of fewer runs, and MLflow's page.

    Args:
        browser: Chromium.
        folder: for the stores; those that are there are used again.
        runs: of the sweep.
        repeats: cold starts.
    """
    many, few = (make(folder / f"{n}.db", "--runs", n, "--points", POINTS, "--sweep") for n in (runs, min(FEW, runs)))
    for path, (title, cold_limit, warm_limit) in PAGES.items():
        cold, warm, heights, spent, busy = [], [], [], [], []
        for _ in range(repeats):
            with serve(f"sqlite:///{many}", folder / "server.log") as server, fresh(browser) as context:
                for kept in (cold, warm, warm):
                    page, before = context.new_page(), cpu_seconds(server.pid)
                    thread = context.new_cdp_session(page)
                    thread.send("Performance.enable", {"timeDomain": "threadTicks"})
                    page.goto(f"{server.url}/{path}")
                    kept.append(page.wait_for_function(COMPLETE, timeout=600_000).json_value() / 1000)
                    spent.append(cpu_seconds(server.pid) - before)
                    found = {one["name"]: one["value"] for one in thread.send("Performance.getMetrics")["metrics"]}
                    busy.append(found["TaskDuration"])
                    heights.append(page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight"))
                    page.close()
        name = f"{title} of {runs:,} runs"
        took = [
            f"the server took {np.median(a):.2f} CPU s, the browser's main thread {np.median(b):.2f}"
            for a, b in zip(*([one[::3], [*one[1::3], *one[2::3]]] for one in (spent, busy)), strict=True)
        ]
        yield Result(f"{name}, cold", float(np.median(cold)), cold_limit, "s", f"{took[0]}; {spread(cold)}")
        yield Result(f"{name}, warm", float(np.median(warm)), warm_limit or cold_limit, "s", f"{took[1]}; {spread(warm)}")
        yield Result(f"{name}, height", max(heights), MOST_PIXELS, "px", "at 1400 px")
    yield idle(browser, many, folder, runs)
    costs = {path: [work(path) for _ in range(repeats)] for path in (few, many)}
    ratio = np.median(costs[many]) / np.median(costs[few])
    note = f"{np.median(costs[few]):.2f} and {np.median(costs[many]):.2f} CPU s: read, judge and compare all"
    yield Result(f"cost of {runs:,} runs over that of {min(FEW, runs)}", float(ratio), 12, "×", note)
    yield theirs(browser, many, runs, repeats)


def make(path: Path, *options: object) -> Path:
    """A store by dashboard_store.py with these options; the one that is there, if there is."""
    if path.exists():
        return path
    script = Path(__file__).with_name("dashboard_store.py")
    subprocess.run([sys.executable, script, path, *map(str, options)], check=True, capture_output=True)
    return path


def idle(browser: Browser, store: Path, folder: Path, runs: int) -> Result:
    """What a tick costs the server while nothing is logged, with the Overview open."""
    command = ("-c", IDLE_SERVER.format(launcher=str(LAUNCHER), seconds=IDLE_SECONDS))
    with serve(f"sqlite:///{store}", folder / "server.log", command) as server, fresh(browser) as context:
        page, traffic = context.new_page(), Traffic()
        traffic.watch(page)
        page.goto(server.url)
        page.wait_for_function(COMPLETE, timeout=600_000)
        wait_ticks(page, traffic, 3)
        ticks, before = len(traffic.ticks), cpu_seconds(server.pid)
        wait_ticks(page, traffic, IDLE_TICKS)
        spent = (cpu_seconds(server.pid) - before) / (len(traffic.ticks) - ticks)
    return Result(f"idle tick of the Overview of {runs:,} runs", spent, 0.1, "CPU s", f"mean of {IDLE_TICKS} ticks")


def cpu_seconds(pid: int) -> float:
    """What a process has taken so far, of all its threads."""
    return sum(psutil.Process(pid).cpu_times()[:2])


def work(store: Path) -> float:
    """CPU seconds of :data:`WORK`, in a process of its own."""
    out = subprocess.run([sys.executable, "-c", WORK, f"sqlite:///{store}"], check=True, capture_output=True, text=True)
    return float(out.stdout.split()[-1])


def theirs(browser: Browser, store: Path, runs: int, repeats: int) -> Result:
    """Until MLflow's own page shows the newest runs of the same store, warm."""
    server, found = MLflow(store), []
    server.start()
    try:
        with fresh(browser) as context:
            for _ in range(repeats + 1):
                page = context.new_page()
                began = time.monotonic()
                page.goto(f"{server.url}/#/experiments/1/runs")
                page.get_by_text(f"seed{(runs - 1) // 5}").first.wait_for(timeout=600_000)
                found.append(time.monotonic() - began)
                page.close()
    finally:
        server.stop()
    note = f"until its newest runs are listed; {spread(found[1:])}"
    return Result(f"MLflow's own page of {runs:,} runs, warm", float(np.median(found[1:])), None, "s", note)


@contextmanager
def fresh(browser: Browser) -> Iterator[BrowserContext]:
    """A browser with empty caches."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    try:
        yield context
    finally:
        context.close()


def wait_ticks(page: Page, traffic: Traffic, count: int) -> None:
    """Until so many more runs of the part that refreshes have ended."""
    last = len(traffic.ticks) + count
    while len(traffic.ticks) < last:
        page.wait_for_timeout(200)
