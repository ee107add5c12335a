import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job's; Ctrl-C is to reach tests and their children
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores that this process may use, as some wait for servers; beyond eight for the longest file."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores + 1, 8)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, metavar="N", help="of each parametrised test only N cases, evenly spread")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--cases N``: products over recipes and modules are looked at here and there only."""
    most = config.getoption("cases")
    if most is None:
        return
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {cases[i * len(cases) // most] for cases in tests.values() for i in range(most)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_stays() -> None:
    """The garbage collector looks at new objects only: going through a million of the libraries' took a fifth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave their files where they are started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")  # while it is open no test of this process can have an event loop of its own
def browser() -> "Iterator[Browser]":
    """Headless Chromium."""
    from browser import open_browser

    with open_browser(["--host-resolver-rules=MAP rebound.example 127.0.0.1"]) as found:
        yield found


@pytest.fixture(scope="module")
def visitor(browser: "Browser") -> "Iterator[BrowserContext]":
    """Somebody whose browser keeps the server's code from one test to the next, which spares a second of CPU each."""
    from dashboard_page import visitor

    with visitor(browser) as found:
        yield found


@pytest.fixture
def page(visitor: "BrowserContext") -> "Iterator[Page]":
    """A page of 1400 × 900; whatever goes wrong on it fails the test."""
    from dashboard_page import watched

    with watched(visitor) as found:
        yield found
    visitor.clear_cookies()
