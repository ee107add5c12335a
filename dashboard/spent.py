"""Cost and quality of a run after so much work, so that runs of different length can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

from .source.base import Reads, Run
from .transforms import COUNTERS, Curve, by_counter, by_step, goal, reached, summarise

T = TypeVar("T")
Keep = Callable[[Run, Hashable, Callable[[], T]], T]
"""Gives the result of ``make``, from memory while neither the run nor its points changed."""

PEAKS = ("memory/peak", "summary/peak_memory")
SECONDS = ("speed/train_seconds", "summary/train_seconds")

EQUAL = {
    "": "equal examples, else equal steps",
    "examples": "equal examples",
    "step": "equal steps",
    "forwards": "equal forward passes",
    "elapsed": "equal seconds of training",
    "whole": "whole runs, whatever their length",
}
"""The amount of work at which two runs are compared."""

UNITS = {"examples": "examples", "forwards": "forward passes", "elapsed": "of training"}
_NEARLY = 1e-6
_NOTHING = Curve(np.empty(0), np.empty(0))


class Spent:
    """Looks runs up.

    Args:
        source: the points of a run's metric.
        keep: remembers results about a run; None: nothing is remembered.
    """

    def __init__(self, source: Reads, keep: Keep[float] | None = None) -> None:
        self._source, self._series = source, source.series
        self._keep: Keep[float] = keep if keep is not None else lambda run, what, make: make()

    def reach(self, run: Run, axis: str) -> float:
        """How far the run came; infinity for ``whole``, nan when it has not logged the axis.

        Args:
            run: which.
            axis: a key of :data:`EQUAL` but "".
        """
        if axis == "whole":
            return math.inf
        if axis == "step":
            steps = reached(run)
            return self._keep(run, "steps", lambda: self._last_step(run)) if steps is None else float(steps)
        return self._keep(run, ("reach", axis), lambda: self.last(run, counters(axis)))

    def best(self, run: Run, key: str) -> float:
        """The best finite value of the metric; nan when there is none."""
        ends = self._source.extremes(run.id, key)
        return ends.low if goal(key) == "min" else ends.high

    def quality(self, run: Run, key: str, axis: str, limit: float) -> float:
        """The best finite value of the metric up to the limit; nan when there is none."""

        def best() -> float:
            if self._is_whole(run, axis, limit):
                return self.best(run, key)
            curve = self._over(run, key, axis)
            y = curve.y[: np.searchsorted(curve.x, limit * (1 + _NEARLY), "right")]
            y = y[np.isfinite(y)]
            return float(y.min() if goal(key) == "min" else y.max()) if len(y) else math.nan

        return self._keep(run, ("quality", key, axis, limit), best) if key in run.keys else math.nan

    def seconds(self, run: Run, axis: str, limit: float) -> float:
        """Seconds of training up to the limit, read off a straight line between two points; nan where they were not logged."""

        def spent() -> float:
            if self._is_whole(run, axis, limit):
                return self.last(run, SECONDS)
            key = next((key for key in SECONDS if key in run.keys), None)
            curve = self._over(run, key, axis).finite if key is not None else _NOTHING
            if not len(curve.x) or not curve.x[0] <= limit <= curve.x[-1] * (1 + _NEARLY):
                return math.nan
            return _not_negative(float(np.interp(limit, curve.x, curve.y)))

        return limit if axis == "elapsed" else self._keep(run, ("seconds", axis, limit), spent)

    def peak(self, run: Run) -> float:
        """The most memory in bytes, of the whole run: it comes early and does not grow with the length."""
        key = next((key for key in PEAKS if key in run.keys), None)
        if key is None:
            return math.nan
        return self._keep(run, "peak", lambda: _not_negative(self._source.extremes(run.id, key).high))

    def last(self, run: Run, keys: Sequence[str]) -> float:
        """The last value of a counter: that of the first of these metrics that the run has; nan when it has none."""
        key = next((key for key in keys if key in run.keys), None)
        if key is None:
            return math.nan
        return _not_negative(run.latest[key][2] if key in run.latest else summarise(self._series(run.id, key), "max").last)

    def _is_whole(self, run: Run, axis: str, limit: float) -> bool:
        return limit >= self.reach(run, axis) * (1 - _NEARLY)

    def _over(self, run: Run, key: str, axis: str) -> Curve:
        series = self._series(run.id, key)
        if axis == "step":
            return by_step(series)
        counter = next((one for one in counters(axis) if one in run.keys), None)
        return by_counter(series, self._series(run.id, counter)) if counter is not None else _NOTHING

    def _last_step(self, run: Run) -> float:
        ends = [series.step[-1] for key in run.keys if len((series := self._series(run.id, key)).step)]
        return float(max(ends, default=math.nan))


def counters(axis: str) -> Sequence[str]:
    """Metrics that count the work of the axis, a key of :data:`EQUAL`: the first that a run has holds; none for steps."""
    return SECONDS if axis == "elapsed" else (COUNTERS[axis],) if axis in COUNTERS else ()


def _not_negative(value: float) -> float:
    """Imported logs hold all kinds of numbers: one below 0 measures nothing."""
    return value if value >= 0 else math.nan
