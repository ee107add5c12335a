"""The x axis: steps, seconds, or another metric of the same run, such as examples or forward passes."""

from __future__ import annotations

import numpy as np

from ..source.base import Run, Series
from .curve import Curve, ascending, last_of_each

COUNTERS = {"examples": "examples_seen", "tokens": "tokens_seen", "forwards": "forward_passes"}
"""The metric that is x, for each axis that needs one. The other axes are ``step`` and ``elapsed``."""


def by_step(series: Series) -> Curve:
    """The metric over steps."""
    return Curve(series.step.astype(np.float64), series.value)


def by_elapsed(series: Series, run: Run) -> Curve:
    """The metric over seconds since the run started, or since the metric's first point where that is not known."""
    if not len(series.time):
        return Curve(series.time, series.value)
    start = series.time.min() if np.isnan(run.started) else run.started
    return ascending(series.time - start, series.value)


def by_counter(series: Series, counter: Series) -> Curve:
    """The metric over another metric of the same run.

    A point's x is the counter's value at the same step; between two steps of the counter it lies on the straight line
    between them. A point before the counter's first step or behind its last one has no x and is left out.

    Args:
        series: the metric.
        counter: the metric on the x axis. Of several values at a step the last one holds; infinite values and NaN are left out.
    """
    known = last_of_each(by_step(counter).finite)
    if not len(known.x):
        return Curve(np.empty(0), np.empty(0))
    step = series.step.astype(np.float64)
    inside = (step >= known.x[0]) & (step <= known.x[-1])
    return ascending(np.interp(step[inside], known.x, known.y), series.value[inside])
