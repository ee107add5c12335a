"""The machine on which a figure depends, in addition to the code: processor, libraries, kernels."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ...noise import active_backend


def machine(device: torch.device) -> dict[str, Any]:
    """Processors, threads, the backend of the noise kernels."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "kernels": active_backend(device),
    }
    return facts


def versions() -> dict[str, str]:
    """Of Python and of the packages that a step's speed depends on."""
    import zolightning

    names = ("lightning", "transformers", "peft", "numpy")
    found = {
        "zolightning": zolightning.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the build, as +cu130
    }
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def origin() -> dict[str, Any]:
    """The command, the day, the versions and, in a clone, the commit that a figure comes from."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:  # a package that is installed inside another project's clone is not in that
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=True
        )
        commit = described.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "date": datetime.now(UTC).date().isoformat(), "commit": commit, "versions": versions()}


def cpu_name() -> str:
    """As the system calls it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
