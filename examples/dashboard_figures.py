"""What a measurement of the dashboard says: figures beside their goals, and under which circumstances."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Result:
    """A figure beside its goal.

    Args:
        name: what was measured.
        measured: the figure.
        limit: at most this is wanted; None: told for information.
        unit: of both.
        note: how it came about.
    """

    name: str
    measured: float
    limit: float | None
    unit: str
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return ""
        return "reached" if self.measured <= self.limit else "MISSED"


def quantile(found: Sequence[float], share: float) -> float:
    return float(np.quantile(found, share))


def spread(found: Sequence[float], scale: float = 1.0) -> str:
    return f"{min(found) / scale:.3g} to {max(found) / scale:.3g}"


def table(results: Sequence[Result]) -> str:
    rows = ["| what | goal | measured | | |", "|---|---:|---:|---|---|"]
    for one in results:
        limit = "" if one.limit is None else f"≤ {one.limit:g} {one.unit}"
        rows.append(f"| {one.name} | {limit} | {one.measured:.3g} {one.unit} | {one.verdict} | {one.note} |")
    return "\n".join(rows)


def circumstances(load: Sequence[float]) -> dict[str, Any]:
    import mlflow
    import streamlit

    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": round(load[0], 2),
        "load_after": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "streamlit": streamlit.__version__,
        "mlflow": mlflow.__version__,
    }
