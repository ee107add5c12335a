"""The state of a run so far, in the figures of the overview."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .comparison import QUALITIES
from .source.base import Reads, Run, Series
from .spent import SECONDS, Spent
from .status import watched
from .transforms import total_steps

_SPARKS = 24
_EDGES = np.arange(_SPARKS + 1) / _SPARKS


class Facts(NamedTuple):
    """A run's figures; nan where nothing was logged.

    Args:
        step: the last one; None before the first.
        total: steps it is to take; None: it did not say.
        left: seconds to its end, at its pace so far.
        loss_key: the metric that tells how it is doing.
        loss: its last value.
        spark: its shape, a few finite values.
        quality: the best value of the quality metric.
        peak: memory in bytes.
        seconds: of training.
        forwards: forward passes.
        pace: steps a second.
        heard: when its last point came, seconds since the epoch.
    """

    step: int | None
    total: int | None
    left: float
    loss_key: str | None
    loss: float
    spark: tuple[float, ...]
    quality: float
    peak: float
    seconds: float
    forwards: float
    pace: float
    heard: float


def facts(run: Run, source: Reads, quality: str | None) -> Facts:
    """Look at the metrics of a run.

    Args:
        run: which.
        source: its points.
        quality: the metric that says how good a model is; None: unknown.
    """
    loss_key = watched(run)
    loss = source.series(run.id, loss_key) if loss_key is not None else None
    known = loss is not None and len(loss.step) > 0
    step = int(loss.step[-1]) if loss is not None and known else None
    total = total_steps(run)
    pace = _pace(loss) if loss is not None else math.nan
    spent = Spent(source)
    seconds = spent.last(run, SECONDS)
    if math.isnan(seconds) and known and loss is not None:
        seconds = float(loss.time.max() - (loss.time.min() if math.isnan(run.started) else run.started))
        seconds = seconds if seconds >= 0 else math.nan  # an imported log's times need not be after its run's start
    return Facts(
        step=step,
        total=total,
        left=(total - step) / pace if total is not None and step is not None and pace > 0 else math.nan,
        loss_key=loss_key,
        loss=float(loss.value[-1]) if loss is not None and known else math.nan,
        spark=_spark(loss) if loss is not None else (),
        quality=spent.best(run, quality) if quality is not None and quality in run.keys else math.nan,
        peak=spent.peak(run),
        seconds=seconds,
        forwards=spent.last(run, ("forward_passes",)),
        pace=pace,
        heard=float(loss.time.max()) if loss is not None and known else math.nan,
    )


def quality_key(runs: Sequence[Run], wanted: str = "") -> str | None:
    """The metric that says how good a model is: the wanted one if any run has it, else the usual one that most runs have."""
    counts = {key: sum(key in run.keys for run in runs) for key in (wanted, *QUALITIES)}
    if wanted and counts[wanted]:
        return wanted
    best = max(QUALITIES, key=lambda key: counts[key])
    return best if counts[best] else None


def _pace(points: Series) -> float:
    """Steps a second over the last half of the points."""
    half = len(points.step) // 2
    if len(points.step) - half < 2:
        return math.nan
    seconds = points.time[-1] - points.time[half]
    return float((points.step[-1] - points.step[half]) / seconds) if seconds > 0 else math.nan


def _spark(points: Series) -> tuple[float, ...]:
    values = points.value[np.isfinite(points.value)]
    if len(values) > _SPARKS:
        ends = (len(values) * _EDGES).astype(int)
        values = np.add.reduceat(values, ends[:-1]) / np.diff(ends)
    return tuple(values.astype(np.float32).tolist())
