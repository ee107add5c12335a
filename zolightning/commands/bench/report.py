"""The measurements: rows, the table, the files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from ...records.mlflow_logger import mlflow_logger
from ..tables import aligned


@dataclass(frozen=True)
class Row:
    """One method. Fields are None where they were not measured or do not apply."""

    method: str
    """Its name."""

    skipped: str = ""
    """Why it did not run; "" when it did."""

    seconds: tuple[float, ...] = ()
    """Of each timed step."""

    step_ms: float | None = None
    """Median."""

    min_ms: float | None = None
    """Fastest."""

    max_ms: float | None = None
    """Slowest."""

    ratio_to_forwards: float | None = None
    """Median over that of two forwards on weights of the compute dtype."""

    speedup: float | None = None
    """Reference MeZO's median, same storage, over this one's."""

    trained: int = 0
    """Weights that a step perturbs or updates."""

    ns_per_parameter: float | None = None
    """Time beyond the two forwards for each trained weight."""

    peak_bytes: int | None = None
    """Most memory in use during a step, the weights included; of this method in a process of its own."""

    memory_ratio: float | None = None
    """Peak over that of forwards on weights of the same storage."""

    gflops: float | None = None
    """Matrix products' operations a second; a ZO step is credited with those of its two forwards."""

    gemm_share: float | None = None
    """That over a large matrix product's."""

    exact: bool | None = None
    """Whether a step with lr 0 leaves every bit of the weights."""


def make_row(
    method: str,
    seconds: Sequence[float],
    *,
    trained: int,
    forwards: float,
    reference: float | None,
    flops: float,
    gemm_gflops: float,
    peak: int | None,
    inference_peak: int | None,
    exact: bool | None,
) -> Row:
    """The row of a method that ran.

    Args:
        method: its name.
        seconds: of each step.
        trained: weights that a step perturbs or updates.
        forwards: median seconds of two forwards.
        reference: median seconds of reference MeZO.
        flops: of one step.
        gemm_gflops: the ceiling.
        peak: most memory in use.
        inference_peak: The peak of forwards.
        exact: see :class:`Row`.
    """
    middle = median(seconds)
    gflops = flops / middle / 1e9
    return Row(
        method=method,
        seconds=tuple(seconds),
        step_ms=1e3 * middle,
        min_ms=1e3 * min(seconds),
        max_ms=1e3 * max(seconds),
        ratio_to_forwards=middle / forwards,
        speedup=None if reference is None else reference / middle,
        trained=trained,
        ns_per_parameter=1e9 * (middle - forwards) / trained if trained else None,
        peak_bytes=peak,
        memory_ratio=peak / inference_peak if peak and inference_peak else None,
        gflops=gflops,
        gemm_share=gflops / gemm_gflops,
        exact=exact,
    )


_COLUMNS: tuple[tuple[str, str, str, float], ...] = (
    ("step ms", "step_ms", ".1f", 1),
    ("min", "min_ms", ".1f", 1),
    ("max", "max_ms", ".1f", 1),
    ("÷ 2 forwards", "ratio_to_forwards", ".3f", 1),
    ("× reference", "speedup", ".2f", 1),
    ("ns/weight", "ns_per_parameter", ".2f", 1),
    ("peak MB", "peak_bytes", ".1f", 1e-6),
    ("÷ inference", "memory_ratio", ".3f", 1),
    ("GFLOP/s", "gflops", ".0f", 1),
    ("% of GEMM", "gemm_share", ".0f", 100),
)


def text_table(rows: Sequence[Row]) -> str:
    """Aligned columns for a terminal; below them, why methods are missing."""
    header = ("method", *(title for title, *_ in _COLUMNS), "exact")
    cells = [
        (
            row.method,
            *(_cell(getattr(row, name), form, scale) for _, name, form, scale in _COLUMNS),
            {True: "yes", False: "no", None: "–"}[row.exact],
        )
        for row in rows
        if not row.skipped
    ]
    return "\n".join([aligned(header, cells), *(f"{row.method}: skipped, {row.skipped}" for row in rows if row.skipped)])


def _cell(value: float | None, form: str, scale: float) -> str:
    return "–" if value is None else format(value * scale, form)


def write_json(path: Path, facts: Mapping[str, object], rows: Sequence[Row]) -> None:
    """Everything, with every single time."""
    path.write_text(json.dumps({**facts, "rows": [asdict(r) for r in rows]}, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """A line for each method with the settings it depends on, so that files of several runs can be put together."""
    shared = {"date": facts["date"], **facts["settings"], **facts["machine"]}
    names = [f.name for f in fields(Row) if f.name != "seconds"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*shared, *names])
        for row in rows:
            writer.writerow([*shared.values(), *(getattr(row, name) for name in names)])


def log_to_mlflow(store: str, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """One MLflow run: settings and machine as parameters, the figures as metrics ``method/figure``."""
    settings = facts["settings"]
    name = f"{settings['model']} {settings['batch']}x{settings['length']} {settings['dtype']}"
    logger = mlflow_logger(name, experiment="zolightning-bench", store=store)
    logger.log_hyperparams({**settings, **facts["machine"], **facts["versions"]})
    metrics = {"gemm/gflops": facts["gemm"]["gflops"]}
    for row in rows:
        for field in fields(Row):
            value = getattr(row, field.name)
            if isinstance(value, (int, float)):
                metrics[f"{row.method}/{field.name}"] = float(value)
    logger.log_metrics(metrics, 0)
    logger.finalize("success")
