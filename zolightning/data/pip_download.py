"""First way to fetch an artifact: `pip download`, so the user's index, proxy and login settings apply."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from .artifacts import Artifact

POLL_S = 0.5


def pip_download(artifact: Artifact, folder: Path, part: Path) -> Path:
    """Download `artifact` into the existing `folder` and return its path. Nothing is installed.

    Should pip fail or be interrupted, `part` holds the bytes that had arrived, where the platform allows.

    Raises OSError with the reason when pip is missing or fails.
    """
    if importlib.util.find_spec("pip") is None:
        raise OSError("pip is not installed for this Python")
    # pip runs an sdist's setup.py to read its metadata. Hashes are only checked before that when they
    # are given in a requirements file, so the pinned hash decides which code may run.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{artifact.distribution}=={artifact.version} --hash=sha256:{artifact.sha256}\n", encoding="utf-8")
    # No pip cache: the file is kept in our own, and once is enough.
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-cache-dir"]
    command += ["--progress-bar", "off", "--retries", "3"]
    command += ["--resume-retries", "5"] if _pip_version() >= (25, 1) else []
    command += [*artifact.pip_arguments, "-d", str(folder), "-r", str(requirements)]
    code, output = _run(command, folder, artifact.filename, part)
    path = folder / artifact.filename
    if code != 0 or not path.is_file():
        raise OSError(_reason(output, code))
    return path


def index_url() -> str:
    """Return the package index pip is set to use (PyPI where nothing is configured)."""
    if chosen := os.environ.get("PIP_INDEX_URL"):
        return chosen
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    return done.stdout.strip() if done.returncode == 0 else "https://pypi.org/simple"


def _run(command: list[str], folder: Path, filename: str, part: Path) -> tuple[int, str]:
    """Run pip and return its exit status and output; its growing file meanwhile gets the second name `part`.

    pip deletes its temporary file when a download breaks off; a hard link keeps the bytes.
    """
    scratch = folder / "tmp"
    scratch.mkdir()
    with subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        while True:
            try:
                output, _ = process.communicate(timeout=POLL_S)
                return process.returncode, output
            except subprocess.TimeoutExpired:
                for growing in () if part.exists() else scratch.glob(f"*/{filename}"):
                    with contextlib.suppress(OSError):
                        os.link(growing, part)


def _pip_version() -> tuple[int, ...]:
    numbers = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("pip"))
    return tuple(map(int, numbers.groups())) if numbers else (0, 0)


def _reason(output: str, code: int) -> str:
    """Return the one part of pip's output that explains the failure."""
    if found := re.search(r"Expected sha256 (\w+)\s+Got\s+(\w+)", output):
        return f"corrupt download: expected SHA-256 {found[1]}, got {found[2]}"
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    return errors[0].removeprefix("ERROR: ") if errors else f"pip ended with status {code}"
