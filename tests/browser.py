"""A real dashboard server and a real Chromium, for the browser tests and for examples/dashboard_bench.py."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, WebSocket, WebSocketRoute

LAUNCHER = Path(__file__).parents[1] / "dashboard" / "launch.py"
PATIENCE = 120.0
"""Seconds until a wait fails: a machine that does much else is slow, and a wait that succeeds costs nothing."""

BOARD = "board0-1"
"""The name of the first set of charts of a session."""

_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
_DRAWN = """count => {
  const charts = [...document.querySelectorAll("[data-testid='zo-chart']")];
  return charts.length >= count && charts.every((one) => one.dataset.points > 0);
}"""
# a moment is also so many looks, since a busy machine gives a page few
_SETTLED = """board => {
  const ended = document.querySelector("[data-testid='stApp'][data-test-script-state='notRunning']");
  const coming = document.querySelector(".zo-early, [data-testid='stSkeleton'], [data-stale='true']");
  const idle = ended && globalThis.zo && document.querySelector(".zo-run") && !coming;
  const parts = () => [zo.charts(board).map((one) => [one.id, one.mounts]), document.querySelectorAll("[data-testid]").length];
  const now = idle ? JSON.stringify(parts()) : performance.now();
  if (now !== window.settling?.state) window.settling = { state: now, since: performance.now(), looks: 0 };
  window.settling.looks += 1;
  return performance.now() - window.settling.since > 400 && window.settling.looks > 10;
}"""


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome; None when there is none."""
    names = ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for path in map(shutil.which, names) if path is not None), None)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def open_browser(flags: Sequence[str] = ()) -> Iterator[Browser]:
    """Headless Chromium; the caller has made sure that there is one."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    assert path is not None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=[*_FLAGS, *flags])
        try:
            yield browser
        finally:
            browser.close()


def serve(store: str, log: Path, command: Sequence[str] = (str(LAUNCHER),)) -> AbstractContextManager[Server]:
    """The dashboard over a store, in the process that ``zolightning dash`` becomes.

    Args:
        store: MLflow tracking URI.
        log: where its output goes.
        command: what Python runs; takes the launcher's arguments.

    Raises:
        RuntimeError: it did not start.
    """
    return started((*command, "--store", store), log)


@contextmanager
def started(command: Sequence[str], log: Path, port: int = 0) -> Iterator[Server]:
    """A server of Streamlit's, while the block runs.

    Args:
        command: what Python runs; takes ``--port``.
        log: where its output goes.
        port: 0: any that is free.

    Raises:
        RuntimeError: it did not start.
    """
    port = port or free_port()
    settings = {"STREAMLIT_SERVER_HEADLESS": "true", "OMP_NUM_THREADS": "1"}  # headless: open no window
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)],
            cwd=log.parent, env={**os.environ, **settings}, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        server = Server(process.pid, port, f"http://127.0.0.1:{port}", log)
        patience = time.monotonic() + PATIENCE
        while not server.answers():
            if process.poll() is not None or time.monotonic() > patience:
                raise RuntimeError(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.05)
        yield server
    finally:
        process.terminate()
        process.wait(30)


@dataclass(frozen=True)
class Server:
    """A dashboard that listens."""

    pid: int
    port: int
    url: str
    log: Path

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/_stcore/health", timeout=5).close()
        except OSError:
            return False
        return True


@dataclass
class Traffic:
    """What the server sends to a page: payload bytes of each run of the script or of its refreshing part.

    Args:
        ticks: bytes of each run of the part that refreshes, that have ended.
        runs: likewise of each run of the whole script.
    """

    ticks: list[int] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    _open: int = 0

    def watch(self, page: Page) -> None:
        """Count from now on, before the page is opened."""
        page.on("websocket", self._connected)

    def _connected(self, socket: WebSocket) -> None:
        socket.on("framereceived", self._received)

    def _received(self, frame: str | bytes) -> None:
        from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

        if isinstance(frame, str):
            return
        message = ForwardMsg.FromString(frame)
        self._open += len(frame)
        if message.WhichOneof("type") == "script_finished":
            tick = message.script_finished == ForwardMsg.FINISHED_FRAGMENT_RUN_SUCCESSFULLY
            (self.ticks if tick else self.runs).append(self._open)
            self._open = 0


@dataclass
class SlowLine:
    """A page that hears nothing of its server while it holds its messages; what it says is heard at once.

    Args:
        page: before it is opened.
    """

    page: Page
    holds: bool = False
    _held: list[str | bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.route_web_socket(re.compile("/_stcore/stream"), self._opened)

    def addresses(self) -> list[str]:
        """The addresses that it has not heard of."""
        from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

        messages = [ForwardMsg.FromString(one) for one in self._held if isinstance(one, bytes)]
        return [one.page_info_changed.query_string for one in messages if one.WhichOneof("type") == "page_info_changed"]

    def release(self) -> None:
        """Hear everything now."""
        self.holds = False
        for message in self._held:
            self._page_end.send(message)
        self._held.clear()

    def _opened(self, page_end: WebSocketRoute) -> None:
        self._page_end = page_end
        server = page_end.connect_to_server()
        page_end.on_message(server.send)
        server.on_message(self._heard)

    def _heard(self, message: str | bytes) -> None:
        if self.holds:
            self._held.append(message)
        else:
            self._page_end.send(message)


def wait_drawn(page: Page, count: int = 1, seconds: float = PATIENCE) -> None:
    """Until so many charts are there and all have points."""
    page.wait_for_function(_DRAWN, arg=count, timeout=1000 * seconds)


def wait_settled(page: Page, seconds: float = PATIENCE) -> None:
    """Until the script has run, and for a moment no part of the page came or went and no chart was made anew."""
    page.wait_for_function(_SETTLED, arg=BOARD, timeout=1000 * seconds)


def charts(page: Page, board: str = BOARD) -> dict[str, dict[str, Any]]:
    """What the page's charts show, by metric."""
    found: list[dict[str, Any]] = page.evaluate("name => zo.charts(name)", board)
    return {one["id"]: one for one in found}
