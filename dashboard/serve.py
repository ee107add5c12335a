"""The dashboard's server: its address, and the store read while the browser starts."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

APP = Path(__file__).resolve().parent / "app.py"
DEFAULT_STORE = "sqlite:///mlflow.db"
DEFAULT_PORT = 8501
LOOPBACK = "127.0.0.1"


def settings(port: int, host: str) -> dict[str, Any]:
    """Streamlit's settings; all others are in ``.streamlit/config.toml`` beside the app.

    Args:
        port: to listen on, 1 to 65535.
        host: address to listen on.

    Raises:
        ValueError: no such port.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"`--port` must be from 1 to 65535, got {port}")
    found: dict[str, Any] = {"server.port": port, "server.address": host}
    if not is_loopback(host):
        everywhere = host in ("0.0.0.0", "::", "")
        found["server.allowedHosts"] = ["*"] if everywhere else [host, "localhost", LOOPBACK]
    return found


def is_loopback(host: str) -> bool:
    """Only programs of this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_options(parser: argparse.ArgumentParser, port: int) -> None:
    """Add ``--port``, with this default, and ``--host``."""
    parser.add_argument("--port", type=int, default=port, help="The port to listen on. Default: %(default)s.")
    parser.add_argument("--host", default=LOOPBACK, help="The address to listen on. Default: %(default)s, this machine only.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and serve until interrupted; returns the exit code."""
    parser = argparse.ArgumentParser("dashboard", description="Watch and compare the runs of an MLflow store, live.")
    parser.add_argument("--store", default=DEFAULT_STORE, help="The MLflow tracking URI of the store. Default: %(default)s.")
    address_options(parser, DEFAULT_PORT)
    given = parser.parse_args(arguments)
    try:
        told = settings(given.port, given.host)
    except ValueError as error:
        parser.error(str(error))
    if not is_loopback(given.host):
        print(
            f"Warning: listening on {given.host}. The dashboard asks for no password: whoever reaches this port sees all runs.",
            file=sys.stderr,
        )
    try:
        from starlette.middleware import Middleware
        from streamlit import App

        from .early import routes
        from .headers import Headers

        app = App(APP, routes=routes(given.store), middleware=[Middleware(Headers)], lifespan=open_browser)
    except ImportError:
        print("The dashboard needs Streamlit and uPlot: pip install streamlit uplot-python", file=sys.stderr)
        return 1
    threading.Thread(target=_read_ahead, args=(given.store,), daemon=True).start()
    sys.argv = [str(APP), "--store", given.store]
    app.run(config=told)
    return 0


@contextlib.asynccontextmanager
async def open_browser(_: object) -> AsyncIterator[None]:
    """Show the page to whoever sits here; not under ``STREAMLIT_SERVER_HEADLESS=true`` nor where there is no screen."""
    from streamlit import config

    if not config.get_option("server.headless"):
        host, port = config.get_option("server.address"), config.get_option("server.port")
        threading.Thread(target=webbrowser.open, args=(f"http://{host}:{port}",), daemon=True).start()
    yield


def _read_ahead(store: str) -> None:
    """Open the store while the browser starts: the first page then finds it read, and its figures worked out."""
    # Streamlit would note that nobody is looking yet
    logging.getLogger("streamlit.runtime.scriptrunner_utils.script_run_context").setLevel(logging.ERROR)
    with contextlib.suppress(Exception):  # the page will name the fault
        from .facts import quality_key
        from .scene import look, open_store
        from .view import View

        scene = look(open_store(store), ())
        scene.facts(scene.runs, quality_key(scene.runs))
        scene.savings(View())
