"""The points of one metric, growing at the end: the cost of adding depends on the new points only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Series

POINT = np.dtype([("step", np.int64), ("time", np.int64), ("value", np.float64)])
"""A point as a store gives it: time in milliseconds, value nan or the largest float where it is not finite."""

_LARGEST = np.finfo(np.float64).max
_MANY = 256

Points = NDArray[Any]
Row = tuple[int, int, "float | None"]
"""Step, milliseconds and value; None is nan."""


def as_points(rows: Iterable[Row]) -> Points:
    """Rows as an array of :data:`POINT`."""
    return np.fromiter(rows, dtype=POINT)


def split_by_run(chunks: Iterable[Sequence[Sequence[Any]]], run_ids: Sequence[str]) -> dict[str, Points]:
    """The points of each of these runs, out of rows of run, step, milliseconds and value; other runs' are passed over.

    Args:
        chunks: the rows, many at a time: they are taken apart by columns, which takes a third less than by rows.
        run_ids: which.
    """
    place = defaultdict(lambda: len(run_ids), {run_id: i for i, run_id in enumerate(run_ids)})
    places, points = [np.empty(0, int)], [as_points(())]
    for some in chunks:
        run, step, stamp, value = zip(*some, strict=True)
        places.append(np.fromiter(map(place.__getitem__, run), int, len(run)))
        points.append(np.empty(len(some), POINT))
        points[-1]["step"], points[-1]["time"], points[-1]["value"] = step, stamp, np.array(value, float)
    whose = np.concatenate(places)
    order = np.argsort(whose, kind="stable")
    ends = np.searchsorted(whose[order], range(1, len(run_ids) + 1))
    return dict(zip(run_ids, np.split(np.concatenate(points)[order], ends), strict=False))


class SeriesBuffer:
    """Keeps points in the order (step, time, value); series that :attr:`series` gave out before stay as they were."""

    def __init__(self) -> None:
        self._columns = Series(np.empty(0, np.int64), np.empty(0, np.float64), np.empty(0, np.float64))
        self._size = 0
        self._waiting: list[Row] = []

    def __len__(self) -> int:
        return self._size + len(self._waiting)

    @property
    def series(self) -> Series:
        """All points so far: read-only views, not copies."""
        self._settle()
        return _each(_part(self._columns, 0, self._size), _read_only)

    @property
    def newest(self) -> tuple[int, int]:
        """Step and milliseconds of the point with the latest time; of several the largest step. There must be one."""
        step, time, _ = self.series
        at = np.flatnonzero(time == time.max())[-1]
        return int(step[at]), round(1000 * float(time[at]))

    def add(self, row: Row) -> None:
        """Add one point; cheaply, as it is put in place with others when the series is asked for."""
        self._waiting.append(row)
        if len(self._waiting) >= _MANY:
            self._settle()

    def extend(self, points: Points) -> None:
        """Add points in any order."""
        self._append(Series(points["step"], points["time"] / 1000.0, _with_infinities(points["value"])))

    def _settle(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self.extend(as_points(waiting))

    def replace_from(self, step: int, points: Points) -> None:
        """Put these points in the place of all that are at this step or later."""
        fresh = SeriesBuffer()
        fresh.extend(points)
        there = self.series
        keep = int(np.searchsorted(there.step, step))
        known, again = _part(there, keep, self._size), _part(fresh.series, 0, self._size - keep)
        if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(known, again, strict=True)):
            self._append(_part(fresh.series, self._size - keep, len(fresh)))
        else:
            self._columns, self._size = _joined(_part(there, 0, keep), fresh.series), keep + len(fresh)

    def _append(self, new: Series) -> None:
        start, self._size = self._size, self._size + len(new.step)
        if self._size > len(self._columns.step):
            room = max(self._size, 2 * start)
            self._columns = _each(_part(self._columns, 0, start), lambda column: _grown(column, room))
        for column, fresh in zip(self._columns, new, strict=True):
            column[start : self._size] = fresh
        if not _in_order(_part(self._columns, max(0, start - 1), self._size)):
            self._columns = _sorted(_part(self._columns, 0, self._size))  # new arrays, since views of the old are in use


def _each(series: Series, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Series:
    return Series(change(series.step), change(series.time), change(series.value))


def _part(series: Series, start: int, stop: int) -> Series:
    return _each(series, lambda column: column[start:stop])


def _joined(a: Series, b: Series) -> Series:
    return Series(*(np.concatenate(pair) for pair in zip(a, b, strict=True)))


def _in_order(series: Series) -> bool:
    step, time = series.step, series.time
    later = (step[1:] > step[:-1]) | ((step[1:] == step[:-1]) & (time[1:] > time[:-1]))
    return bool(later.all())


def _sorted(series: Series) -> Series:
    """Points of one step and moment go by value, nan where 0 would be: so MLflow stores it."""
    nan = np.isnan(series.value)
    order = np.lexsort((nan, np.where(nan, 0.0, series.value), series.time, series.step))
    return _each(series, lambda column: column[order])


def _grown(column: NDArray[Any], room: int) -> NDArray[Any]:
    grown = np.empty(room, column.dtype)
    grown[: len(column)] = column
    return grown


def _read_only(column: NDArray[Any]) -> NDArray[Any]:
    view = column.view()
    view.flags.writeable = False
    return view


def _with_infinities(value: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.abs(value) == _LARGEST, np.copysign(np.inf, value), value)
