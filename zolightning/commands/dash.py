"""``zolightning dash``: the dashboard, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from ..records.mlflow_logger import DEFAULT_STORE


def dash(store: str = DEFAULT_STORE, port: int = 8501, host: str = "127.0.0.1") -> None:
    """Watch and compare runs live in the browser. Example: zolightning dash --store sqlite:///mlflow.db

    Args:
        store: The MLflow tracking URI: an SQLite file, or a server's http address.
        port: The port to listen on.
        host: The address to listen on. Default: this machine only. The dashboard asks for no password.
    """
    package = find_spec("zolightning_dashboard")
    if package is None or package.origin is None:
        raise ImportError("The dashboard is not installed. Install it with `pip install zolightning`.")
    launcher = Path(package.origin).with_name("launch.py")
    replace_by(str(launcher), "--store", store, "--port", str(port), "--host", host)


def replace_by(*arguments: str) -> NoReturn:
    """Go on as another run of Python, and end as it ends."""
    command = [sys.executable, *arguments]
    if os.name == "posix":
        os.execv(sys.executable, command)  # so that whoever stops this command stops the server
    sys.exit(subprocess.call(command))
