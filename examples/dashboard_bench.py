"""Measure the dashboard against its goals: a real server, real writers and headless Chromium over a large SQLite store.

python examples/dashboard_bench.py --out bench.json             # makes the store first; six to nine minutes in all
python examples/dashboard_bench.py --store big.db               # over a copy of one from examples/dashboard_store.py
python examples/dashboard_bench.py --runs 5 --points 500 --seconds 10 --ticks 50 --repeats 1   # is everything in its place?

Needs Chromium (apt-get install chromium) and `pip install playwright`. The goals are for two CPU cores that do nothing else:
the load average is printed beside the figures. What each figure is:

first paint   from the navigation until all charts of the page Curves are drawn, all runs in them. Cold: the first visit to a
              server that was just started, by a browser with empty caches. Warm: the next ones. The charts are there before
              Streamlit is; "page complete" is when they stand in its page, with all controls and the script at its end.
live lag      from just before a point is logged until it is drawn, at 960 points a second to four runs; all points count.
payload       bytes that the server sends over the websocket in one tick of the page Curves with four charts.
main thread   sum of the browser's long tasks (50 ms and more) in each interval of one tick.
logging       time that MLflow's log_batch takes with the page open, against without: median over calls, in turns.
sweep         the pages over a store of 1,000 runs, MLflow's own page beside them in the same browser: until all is drawn, and
              how high they are. Idle tick: the server's CPU seconds while nothing is logged.
long          the page Curves over one run of a million points of one metric: until it is drawn.
memory        growth of the server's resident memory beside the same writers; ticks follow each other faster than usual.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import psutil
from mlflow import MlflowClient
from mlflow.entities import Metric

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import BOARD, LAUNCHER, Server, Traffic, find_chromium, open_browser, serve, wait_drawn, wait_settled  # noqa: E402
from dashboard_figures import Result, circumstances, quantile, spread, table  # noqa: E402
from dashboard_store import describe, names, values  # noqa: E402
from dashboard_sweep import fresh, make, sweep, wait_ticks  # noqa: E402
from zolightning_dashboard.source import open_source  # noqa: E402

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    from playwright.sync_api import Browser, Page

KEYS = ("train/loss", "val/loss", "memory/peak", "zo/projected_grad")
COUNTED = "zo/projected_grad"  # its live values count the writer's rounds, so that the page tells which round it shows
METRICS = 12
LIVE_RUNS, STEPS_A_ROUND, ROUND_SECONDS = 4, 4, 0.2
TICK_SECONDS = 2.0
FAST_TICK_SECONDS, WARM_TICKS = 0.2, 30
# the launcher's server with shorter ticks
FAST_SERVER = (
    "import runpy, sys; runpy.run_path({launcher!r}); from zolightning_dashboard import scene, serve; "
    "scene.FAST_SECONDS = {seconds}; sys.exit(serve.main())"
)
PARTS = ("poll", "paint", "live", "memory", "long", "sweep")
LONG = 1_000_000
MIB = 2**20

# notes when all charts are drawn, in milliseconds since the navigation began
PAINTED = """
  window.tasks = [];
  const origin = performance.timeOrigin;
  new PerformanceObserver((list) => list.getEntries().forEach((one) => tasks.push([origin + one.startTime, one.duration])))
    .observe({ type: "longtask", buffered: true });
  const look = () => {
    const charts = [...document.querySelectorAll("[data-testid='zo-chart']")];
    const drawn = charts.length >= COUNT && charts.every((one) => one.dataset.points > 0);
    requestAnimationFrame(drawn ? () => { window.painted = performance.now(); } : look);
  };
  look();
"""
COMPLETE = """() => !document.querySelector(".zo-early")
  && document.querySelector("[data-testid='stApp'][data-test-script-state='notRunning'] [data-testid='zo-chart']")"""
# notes each drawing of a chart: when, and the newest value of each line
DRAWINGS = """([board, key, lines]) => {
  window.drawings = [];
  const note = () => {
    const { newest } = zo.charts(board).find((one) => one.id === key);
    drawings.push([Date.now(), lines.map((line) => newest[line] ?? null)]);
  };
  new MutationObserver(note).observe(document.querySelector(`[data-key="${key}"]`), { attributeFilter: ["data-points"] });
}"""
# notes when the list says that a run is no longer live
FLAGGED = """id => {
  const status = document.querySelector(`.zo-run[data-id="${id}"] .zo-status`);
  window.flagged ??= {};
  const note = () => { if (status.textContent !== "live") flagged[id] ??= [status.textContent, Date.now()]; };
  new MutationObserver(note).observe(status, { childList: true, characterData: true, subtree: true });
}"""


class Call(NamedTuple):
    """A round of points given to a run's logger: which round, the run's place, and begin and end in seconds."""

    turn: int
    place: int
    began: float
    ended: float


# ---- the writers -------------------------------------------------------------------------------------------------------


def write(store: str, run_ids: Sequence[str], pause: Event, stop: Event, out: Path) -> None:
    """Log rounds to runs until stopped; leaves a file with a :class:`Call` for each round and run.

    Args:
        store: MLflow tracking URI.
        run_ids: the first is logged to as zolightning's logger does, sent once a second; the others by MLflow's log_batch.
        pause: while it is set, nothing is logged.
        stop: ends it.
        out: the file.
    """
    from zolightning.records.outbox import Outbox

    client, keys = MlflowClient(store), names(METRICS)
    for run_id in run_ids:
        for name, value in identity().items():
            client.set_tag(run_id, name, value)
    outbox, calls, count = Outbox(client, run_ids[0], out.parent), [], 0
    while not stop.is_set():
        began = time.time()
        count += not pause.is_set()
        for place, run_id in enumerate(run_ids) if not pause.is_set() else ():
            steps = np.arange(count * STEPS_A_ROUND, (count + 1) * STEPS_A_ROUND)
            rows = values(2 * place, steps, METRICS)  # of even numbers none blows up
            rows[:, keys.index(COUNTED)] = count
            steps_and_rows = list(zip(steps.tolist(), rows.tolist(), strict=True))
            now = round(1000 * time.time())
            points = [
                Metric(key, value, now, step) for step, row in steps_and_rows for key, value in zip(keys, row, strict=True)
            ]
            start = time.time()
            if place == 0:
                for step, row in steps_and_rows:
                    outbox.metrics(dict(zip(keys, row, strict=True)), step)
            else:
                client.log_batch(run_id, points)
            calls.append(Call(count, place, start, time.time()))
        time.sleep(max(0.0, began + ROUND_SECONDS - time.time()))
    outbox.wait()
    out.write_text(json.dumps(calls))


def log_until_killed(store: str, here: str, elsewhere: str) -> None:
    """Log to a run that says which process it is, and to one that says it is on another machine."""
    client, count = MlflowClient(store), 0
    for name, value in identity().items():
        client.set_tag(here, name, value)
        client.set_tag(elsewhere, name, "elsewhere" if name == "zo.host" else value)
    while True:
        for run_id in (here, elsewhere):
            client.log_metric(run_id, "train/loss", 1.0, step=count)
        count += 1
        time.sleep(0.5)


def identity() -> dict[str, str]:
    return {"zo.host": socket.gethostname(), "zo.pid": str(os.getpid()), "zo.heartbeat": str(time.time())}


class Writer:
    """:func:`write` in a process of its own."""

    def __init__(self, store: Path, folder: Path) -> None:
        client = MlflowClient(uri(store))
        experiment = experiment_of(client)
        now = round(1000 * time.time())
        self.runs = [describe(client, experiment, 100 + 5 * i, now) for i in range(LIVE_RUNS)]
        context = multiprocessing.get_context("spawn")
        self._pause, self._stop, self._out = context.Event(), context.Event(), folder / "calls.json"
        self._process = context.Process(target=write, args=(uri(store), self.runs, self._pause, self._stop, self._out))
        self._process.start()
        wait_until(lambda: bool(client.get_run(self.runs[0]).data.metrics), 120)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._pause.set()
        try:
            yield
        finally:
            self._pause.clear()

    def stop(self) -> list[Call]:
        self._stop.set()
        self._process.join()
        return [Call(*one) for one in json.loads(self._out.read_text())]


# ---- measurements ------------------------------------------------------------------------------------------------------


def first_paint(browser: Browser, store: Path, repeats: int) -> Iterator[Result]:
    """Cold and warm, one chart and four."""
    for keys, cold_limit, warm_limit in ((KEYS[:1], 3.0, 1.0), (KEYS, 5.0, 2.5)):
        cold: list[float] = []
        warm: list[float] = []
        complete: list[float] = []
        for _ in range(repeats):
            with serve(uri(store), store.parent / "server.log") as server:
                context = browser.new_context(viewport={"width": 1400, "height": 900})
                for kept in (cold, warm, warm):
                    page = context.new_page()
                    page.add_init_script(PAINTED.replace("COUNT", str(len(keys))))
                    page.goto(curves(server, keys))
                    page.wait_for_function("window.painted", timeout=120_000)
                    kept.append(page.evaluate("window.painted") / 1000)
                    if kept is warm:
                        page.wait_for_function(COMPLETE, timeout=120_000)
                        complete.append(page.evaluate("performance.now()") / 1000)
                    page.close()
                context.close()
        charts = "one chart" if len(keys) == 1 else "four charts"
        yield Result(f"first paint of {charts}, cold", float(np.median(cold)), cold_limit, "s", spread(cold))
        yield Result(f"first paint of {charts}, warm", float(np.median(warm)), warm_limit, "s", spread(warm))
        yield Result(f"page complete with {charts}, warm", float(np.median(complete)), None, "s", spread(complete))


def long_run(browser: Browser, folder: Path, repeats: int) -> Iterator[Result]:
    """A run of a million points, cold and warm."""
    store = make(folder / "long.db", "--runs", 1, "--points", LONG, "--metrics", 1)
    cold: list[float] = []
    warm: list[float] = []
    for _ in range(repeats):
        with serve(uri(store), folder / "server.log") as server, fresh(browser) as context:
            for kept in (cold, warm, warm):
                page = context.new_page()
                page.add_init_script(PAINTED.replace("COUNT", "1"))
                page.goto(curves(server, KEYS[:1]))
                page.wait_for_function("window.painted", timeout=120_000)
                kept.append(page.evaluate("window.painted") / 1000)
                page.close()
    yield Result(f"a run of {LONG:,} points, cold", float(np.median(cold)), 2.5, "s", spread(cold))
    yield Result(f"a run of {LONG:,} points, warm", float(np.median(warm)), 2.5, "s", spread(warm))


def live(browser: Browser, store: Path, seconds: float, turns: int) -> Iterator[Result]:
    """Lag, payload and main thread beside a writer, and what the open page costs the writer."""
    writer = Writer(store, store.parent)
    with serve(uri(store), store.parent / "server.log") as server:
        with watched_page(browser, server) as (page, traffic):
            lines = [f"{run} line" for run in writer.runs]
            page.wait_for_function("([board, line]) => line in zo.charts(board)[0].lines", arg=[BOARD, lines[0]])
            wait_settled(page)
            page.evaluate(DRAWINGS, [BOARD, COUNTED, lines])
            traffic.ticks.clear()
            began = time.time()
            page.wait_for_timeout(1000 * seconds)
            drawings, tasks, news = page.evaluate("window.drawings"), page.evaluate("window.tasks"), list(traffic.ticks)
            with writer.paused():
                page.wait_for_timeout(3000 + 2000 * TICK_SECONDS)  # what was on its way has come
                traffic.ticks.clear()
                page.wait_for_timeout(6000 * TICK_SECONDS)
                idle = list(traffic.ticks)
        spans: dict[str, list[tuple[float, float]]] = {"open": [], "closed": []}
        for _ in range(turns):
            with watched_page(browser, server) as (page, _):
                spans["open"].append(span(partial(page.wait_for_timeout, 250 * seconds)))
            spans["closed"].append(span(partial(time.sleep, seconds / 4)))
    calls = writer.stop()

    direct = lags(drawings, calls, range(1, len(lines)), began)
    buffered = lags(drawings, calls, [0], began)
    yield Result("live lag, p50", quantile(direct, 0.5), None, "s", f"{len(direct)} points")
    yield Result("live lag, p95", quantile(direct, 0.95), 3.0, "s", f"at most {max(direct):.2f} s")
    yield Result("live lag through zolightning's logger, p95", quantile(buffered, 0.95), 3.0, "s", "it sends once a second")
    blocks = blocked(tasks, began, seconds)
    yield Result("main thread blocked in a tick, p95", quantile(blocks, 0.95), 200, "ms", f"at most {max(blocks):.0f} ms")
    yield Result(
        "payload of a tick with news, largest", max(news) / 1000, 1000, "kB", f"{len(news)} ticks, {spread(news, 1000)}"
    )
    yield Result(
        "payload of a tick without news, largest", max(idle) / 1000, 5, "kB", f"{len(idle)} ticks, {spread(idle, 1000)}"
    )
    medians = {name: median_call(calls, times) for name, times in spans.items()}
    yield Result(
        "training's logging, slower with the page open", 100 * (medians["open"] / medians["closed"] - 1), 10, "%",
        f"median log_batch of {STEPS_A_ROUND * METRICS} points: {1e3 * medians['closed']:.1f}, {1e3 * medians['open']:.1f} ms",
    )  # fmt: skip


def memory_and_flags(browser: Browser, store: Path, ticks: int) -> Iterator[Result]:
    """Many fast ticks in one server, while another one waits for runs that were killed to be flagged."""
    client = MlflowClient(uri(store))
    here, elsewhere = (describe(client, experiment_of(client), run, round(1000 * time.time())) for run in (200, 205))
    victim = multiprocessing.get_context("spawn").Process(target=log_until_killed, args=(uri(store), here, elsewhere))
    victim.start()
    wait_until(lambda: "train/loss" in client.get_run(elsewhere).data.metrics, 120)
    writer = Writer(store, store.parent)
    command = ("-c", FAST_SERVER.format(launcher=str(LAUNCHER), seconds=FAST_TICK_SECONDS))
    log = store.parent / "server.log"
    with (
        serve(uri(store), log) as usual,
        serve(uri(store), log, command) as fast,
        watched_page(browser, usual, KEYS[:1]) as (page, _),
        watched_page(browser, fast) as (other, traffic),
    ):
        for run_id in (here, elsewhere):
            page.locator(f".zo-run[data-id='{run_id}'] .zo-status", has_text="live").wait_for(timeout=120_000)
            page.evaluate(FLAGGED, run_id)
        victim.kill()
        victim.join()
        killed = time.time()
        wait_ticks(other, traffic, WARM_TICKS)
        before, began = rss(fast), time.time()
        wait_ticks(other, traffic, ticks)
        grown, took = rss(fast) - before, time.time() - began
        page.wait_for_function("Object.keys(flagged).length === 2", timeout=120_000)
        flagged = page.evaluate("window.flagged")
    writer.stop()
    yield Result(
        f"server's memory over {ticks} ticks", grown / MIB, 20, "MiB",
        f"{before / MIB:.0f} MiB after the first {WARM_TICKS}; {took / ticks:.2f} s a tick",
    )  # fmt: skip
    for run_id, what, limit in (
        (here, "killed run flagged, same machine", 60 + TICK_SECONDS),
        (elsewhere, "silent run flagged, other machine", 60 + TICK_SECONDS),
    ):
        word, when = flagged[run_id]
        yield Result(what, when / 1000 - killed, limit, "s", f"as {word}")


def poll(store: Path, repeats: int) -> Iterator[Result]:
    """The time in which a source takes up 2,000 new points, with the metrics of four charts loaded."""
    source = open_source(uri(store))
    client = MlflowClient(uri(store))
    run_id = describe(client, experiment_of(client), 300, round(1000 * time.time()))
    runs = source.runs([one.id for one in source.experiments()])
    for key in KEYS:
        source.load([run.id for run in runs], key)
    polls, reads = [], []
    keys = names(METRICS)
    for turn in range(repeats):
        now = round(1000 * time.time())
        points = [Metric(keys[i % METRICS], float(i), now, 1000 * turn + i // METRICS) for i in range(2000)]
        for first in (0, 1000):
            client.log_batch(run_id, points[first : first + 1000])
        began = time.perf_counter()
        source.poll()
        polled = time.perf_counter()
        for key in KEYS:
            source.series(run_id, key)
        polls.append(1000 * (polled - began))
        reads.append(1000 * (time.perf_counter() - began))
    source.close()
    yield Result("poll of 2,000 new points, median", float(np.median(polls)), 10, "ms", spread(polls))
    yield Result("the same, and the series put in order", float(np.median(reads)), None, "ms", spread(reads))


# ---- parts of them -----------------------------------------------------------------------------------------------------


@contextmanager
def watched_page(browser: Browser, server: Server, keys: Sequence[str] = KEYS) -> Iterator[tuple[Page, Traffic]]:
    """The page Curves with all runs, drawn."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page, traffic = context.new_page(), Traffic()
    traffic.watch(page)
    page.add_init_script(PAINTED.replace("COUNT", str(len(keys))))
    page.goto(curves(server, keys))
    wait_drawn(page, len(keys), 120)
    try:
        yield page, traffic
    finally:
        context.close()


def lags(
    drawings: Sequence[tuple[float, Sequence[float | None]]], calls: Sequence[Call], places: Sequence[int], began: float
) -> list[float]:
    """Seconds from before each round was logged to a run until the run's line showed it or a later one."""
    found = []
    for place in places:
        seen = [(when / 1000, newest[place]) for when, newest in drawings if newest[place] is not None]
        shown = np.array([count for _, count in seen])
        for call in calls:
            after = np.flatnonzero(shown >= call.turn)
            if call.place == place and call.began >= began and len(after):
                found.append(seen[after[0]][0] - call.began)
    return found


def blocked(tasks: Sequence[tuple[float, float]], began: float, seconds: float) -> list[float]:
    """Milliseconds of long tasks in each interval of one tick."""
    found = np.zeros(max(1, int(seconds / TICK_SECONDS)))
    for start, duration in tasks:
        place = int((start / 1000 - began) / TICK_SECONDS)
        if 0 <= place < len(found):
            found[place] += duration
    return found.tolist()


def median_call(calls: Sequence[Call], times: Sequence[tuple[float, float]]) -> float:
    """Seconds of one log_batch within these times."""
    return float(np.median([c.ended - c.began for c in calls if c.place and any(a <= c.began <= b for a, b in times)]))


def span(wait: Callable[[], object]) -> tuple[float, float]:
    """When the wait began and ended."""
    began = time.time()
    wait()
    return began, time.time()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    patience = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > patience:
            raise TimeoutError(f"nothing came of it within {seconds:g} s")
        time.sleep(0.2)


def curves(server: Server, keys: Sequence[str]) -> str:
    return f"{server.url}/curves?" + "&".join(f"key={key}" for key in keys)


def uri(store: Path) -> str:
    return f"sqlite:///{store}"


def experiment_of(client: MlflowClient) -> str:
    return str(client.get_experiment_by_name("made up").experiment_id)


def rss(server: Server) -> int:
    return int(psutil.Process(server.pid).memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a copy of this file is used instead of a new store")
    parser.add_argument("--runs", type=int, default=50, help="finished runs of a new store (default 50)")
    parser.add_argument("--points", type=int, default=10_000, help="points of each of its metrics (default 10000)")
    parser.add_argument("--seconds", type=float, default=40, help="watch the live page for so long (default 40)")
    parser.add_argument("--ticks", type=int, default=500, help="over which memory is measured (default 500)")
    parser.add_argument("--repeats", type=int, default=3, help="cold starts, and turns with and without the page (default 3)")
    parser.add_argument("--many", type=int, default=1000, help="runs of the store of a sweep (default 1000)")
    parser.add_argument("--sweeps", type=Path, help="a folder that keeps the stores of the sweep for the next time")
    parser.add_argument("--only", choices=PARTS, help="measure this part only")
    parser.add_argument("--out", type=Path, help="write the figures as JSON here, and the table beside it as .md")
    args = parser.parse_args()
    if find_chromium() is None:
        parser.error("no Chromium found: apt-get install chromium")

    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store.db"
        if args.only in ("long", "sweep"):
            pass  # they make their own
        elif args.store is not None:
            shutil.copy(args.store, store)
        else:
            size = ["--runs", str(args.runs), "--points", str(args.points), "--metrics", str(METRICS)]
            subprocess.run([sys.executable, ROOT / "examples" / "dashboard_store.py", store, *size], check=True)
        results: list[Result] = []
        with open_browser() as browser:
            parts = (
                poll(store, 5 * args.repeats),
                first_paint(browser, store, args.repeats),
                live(browser, store, args.seconds, args.repeats),
                memory_and_flags(browser, store, args.ticks),
                long_run(browser, args.sweeps or Path(folder), args.repeats),
                sweep(browser, args.sweeps or Path(folder), args.many, args.repeats),
            )
            for name, part in zip(PARTS, parts, strict=True):
                if args.only not in (None, name):
                    continue
                began = time.monotonic()
                for result in part:
                    results.append(result)
                    print(f"{result.name}: {result.measured:.3g} {result.unit} {result.verdict} {result.note}", flush=True)
                print(f"({time.monotonic() - began:.0f} s)", flush=True)
        about = circumstances(load)
    print(f"\n{table(results)}\n\n{about}")
    if args.out is not None:
        figures = [{**asdict(one), "verdict": one.verdict} for one in results]
        args.out.write_text(json.dumps({"circumstances": about, "results": figures}, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
