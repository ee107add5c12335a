"""The ranking page's server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..serve import address_options, is_loopback, open_browser, settings

APP = Path(__file__).resolve().parent.parent / "rank.py"  # where Streamlit finds the dashboard's settings
DEFAULT_PORT = 8502


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and serve until interrupted; returns the exit code."""
    parser = argparse.ArgumentParser("rank", description="Rank the candidates that a training shows, by mouse or keyboard.")
    parser.add_argument("folder", type=Path, help="The folder in which the training asks.")
    address_options(parser, DEFAULT_PORT)
    given = parser.parse_args(arguments)
    try:
        told = settings(given.port, given.host)
    except ValueError as error:
        parser.error(str(error))
    if given.folder.exists() and not given.folder.is_dir():
        parser.error(f"{given.folder} is a file; give the folder in which the training asks")
    if not is_loopback(given.host):
        print(f"Warning: listening on {given.host}. Whoever reaches this port can rank.", file=sys.stderr)
    try:
        from starlette.middleware import Middleware
        from streamlit import App

        from ..headers import Headers
    except ImportError:
        print("The page needs Streamlit: pip install streamlit", file=sys.stderr)
        return 1
    sys.argv = [str(APP), str(given.folder.resolve())]
    App(APP, middleware=[Middleware(Headers)], lifespan=open_browser).run(config=told)
    return 0
