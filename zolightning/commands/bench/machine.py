"""The machine on which a figure depends, in addition to the code: processor, libraries, kernels."""

from __future__ import annotations

import importlib.metadata
import os
import platform
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


def cpu_name() -> str:
    """As the system calls it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
