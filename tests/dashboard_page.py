"""The dashboard's page as the browser tests use it: opened, waited for, and its parts by name."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import PATIENCE, Server, find_chromium
from mlflow import MlflowClient

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page

PAGES = ("overview", "runs", "curves", "memory", "tradeoffs", "sweep", "health", "diff", "run")
START = 1_700_000_000_000
"""Milliseconds at which runs of the stores begin."""

needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="no Chromium found: apt-get install chromium")


def uri(path: Path) -> str:
    return f"sqlite:///{path}"


def run_id(store: Path, name: str) -> str:
    client = MlflowClient(uri(store))
    experiments = [one.experiment_id for one in client.search_experiments()]
    return next(run.info.run_id for run in client.search_runs(experiments) if run.info.run_name == name)


def wait_until(condition: Callable[[], bool], page: Page | None = None, seconds: float = PATIENCE) -> None:
    """Until the condition holds.

    Args:
        condition: cheap to ask.
        page: what it looks at: its events are heard meanwhile.
        seconds: how long to wait at most.
    """
    patience = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < patience, f"nothing came of {condition.__qualname__} within {seconds} s"
        if page is None:
            time.sleep(0.2)
        else:
            page.wait_for_timeout(100)


def wait_equal(page: Page, get: Callable[[], object], wanted: object, seconds: float = PATIENCE) -> None:
    """Until ``get`` returns what is wanted; else the comparison fails as an assertion does."""
    patience = time.monotonic() + seconds
    while get() != wanted and time.monotonic() < patience:
        page.wait_for_timeout(100)
    assert get() == wanted


@dataclass
class Watched:
    """A page, and all that should not happen on it."""

    page: Page
    trouble: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        page = self.page
        page.on("pageerror", lambda error: self.trouble.append(f"error {error}"))
        page.on("dialog", self._dialog)
        page.on("console", self._said)
        page.on("response", self._answered)
        page.on("request", self._asked)

    def _dialog(self, dialog: Any) -> None:
        self.trouble.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def _said(self, message: Any) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):  # its response tells more
            self.trouble.append(message.text)

    def _answered(self, response: Any) -> None:
        # opened at /curves, Streamlit first looks for its server below that
        if response.status >= 400 and not re.search(r":\d+/\w+/_stcore/", response.url):
            self.trouble.append(f"{response.status} {response.url}")

    def _asked(self, request: Any) -> None:
        if re.match(r"https?://(?!127\.0\.0\.1:)", request.url):
            self.trouble.append(f"asked {request.url}")


@contextmanager
def visitor(browser: Browser, size: tuple[int, int] = (1400, 900), dark: bool = False) -> Iterator[BrowserContext]:
    """A browser without a history."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light", accept_downloads=True
    )
    context.set_default_timeout(1000 * PATIENCE)
    try:
        yield context
    finally:
        context.close()


@contextmanager
def watched(context: BrowserContext) -> Iterator[Page]:
    """A page of this browser; whatever goes wrong on it fails the test."""
    page = context.new_page()
    try:
        seen = Watched(page)
        yield page
        assert page.get_by_test_id("stException").count() == 0
        assert not seen.trouble
    finally:
        page.close()


@contextmanager
def visit(browser: Browser, size: tuple[int, int] = (1400, 900), dark: bool = False) -> Iterator[Page]:
    """A page in a browser without a history; whatever goes wrong on it fails the test."""
    with visitor(browser, size, dark) as context, watched(context) as page:
        yield page


def drag(page: Page, key: str, start: float, end: float) -> None:
    """Select a range of x, given as shares of the chart's width."""
    over = page.locator(f"[data-key='{key}'] .u-over")
    width = over.evaluate("one => one.clientWidth")
    over.hover(position={"x": start * width, "y": 60})
    page.mouse.down()
    over.hover(position={"x": end * width, "y": 70})
    page.mouse.up()


def address(server: Server, which: str) -> str:
    return f"{server.url}/{'' if which == 'overview' else which}"


def chip(page: Page, run: str) -> Locator:
    return page.locator(f".zo-chip[data-id='{run}']")


def listed(page: Page, name: str) -> Locator:
    return page.locator(".zo-run", has=page.get_by_text(name, exact=True))


def ticked(page: Page) -> set[str]:
    return set(page.locator(".zo-run", has=page.locator("input:checked")).locator(".zo-name").all_inner_texts())


def toggle(page: Page, label: str) -> Locator:
    return page.get_by_test_id("stCheckbox").filter(has_text=label)
