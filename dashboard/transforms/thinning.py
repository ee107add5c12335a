"""No more points than the screen has room for, without losing a peak, and marks for values that have no place on the y axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .curve import Curve, Floats

SLOTS = 4
"""Points that a bucket keeps at most: its first, smallest, largest and last."""


class Grid(NamedTuple):
    """The buckets that all lines of a chart share: equal parts of the visible range of x.

    Args:
        low: left edge of the first bucket.
        high: right edge of the last one, > low.
        buckets: how many, >= 1; about one for each pixel across.
    """

    low: float
    high: float
    buckets: int

    def bucket(self, x: Floats) -> NDArray[np.int64]:
        """The bucket of each x inside the range."""
        part = (x - self.low) * (self.buckets / (self.high - self.low))
        return np.clip(part.astype(np.int64), 0, self.buckets - 1)

    def slot(self, bucket: NDArray[np.int64], number: NDArray[np.int64]) -> Floats:
        """Where a bucket's point of that number is drawn: the same x for every line."""
        return self.low + (bucket + (number + 0.5) / SLOTS) * ((self.high - self.low) / self.buckets)


class Marks(NamedTuple):
    """Points of one kind that have no place on the y axis.

    Args:
        kind: ``nan``, ``inf``, ``-inf``, or ``dropped``: zero or negative on a logarithmic axis.
        x: ascending, shape (n,).
        points: how many each mark stands for, shape (n,).
    """

    kind: str
    x: Floats
    points: NDArray[np.int64]


def grid(curves: Sequence[Curve], buckets: int, zoom: tuple[float, float] | None = None) -> Grid:
    """The grid of a chart: over its zoom, or over everything.

    Args:
        curves: all lines of the chart, also those that come from other parts of it.
        buckets: about one for each pixel across, >= 1.
        zoom: the visible range of x.
    """
    if zoom is not None and zoom[1] > zoom[0]:
        return Grid(*zoom, buckets)
    ends = [(curve.x[0], curve.x[-1]) for curve in curves if len(curve.x)]
    low = float(min((first for first, _ in ends), default=0.0))
    high = float(max((last for _, last in ends), default=1.0))
    return Grid(low, high if high > low else np.nextafter(low, np.inf) + 1.0, buckets)


def thin(curves: Sequence[Curve], to: Grid) -> list[Curve]:
    """The points of each line inside the grid: the logged points where they fit, else the extremes of each bucket.

    A line of at most ``buckets`` points in the range keeps them as they are; where the lines of that kind have too many
    different x between them, they are thinned too. A thinned line keeps the first, smallest, largest and last finite value
    of each bucket, in the order in which they were logged, at x that all lines share and that lie inside the bucket. The
    neighbours outside the range stay, so that lines run to the edge. Lines break (y is nan) at points that are not finite.

    Args:
        curves: at full resolution.
        to: the chart's grid.
    """
    inside = [_visible(curve, to) for curve in curves]
    small = [curve for curve, first, last in inside if last - first <= to.buckets]
    few = sum(len(curve.x) for curve in small) <= SLOTS * to.buckets or (
        len(np.unique(np.concatenate([curve.x for curve in small]))) <= SLOTS * to.buckets
    )
    return [
        _as_they_are(curve) if few and last - first <= to.buckets else _extremes(curve, first, last, to)
        for curve, first, last in inside
    ]


def marks(curve: Curve, to: Grid, log: bool = False) -> list[Marks]:
    """The points inside the grid that its y axis cannot show, at their x; those of one bucket share a mark at the first.

    Args:
        curve: at full resolution.
        to: the chart's grid.
        log: the y axis is logarithmic.
    """
    low, high = np.searchsorted(curve.x, to.low), np.searchsorted(curve.x, to.high, "right")
    x, y = curve.x[low:high], curve.y[low:high]
    kinds = {"nan": np.isnan(y), "inf": y == np.inf, "-inf": y == -np.inf}
    if log:
        kinds["dropped"] = np.isfinite(y) & (y <= 0)
    found = []
    for kind, there in kinds.items():
        if there.any():
            _, first, points = np.unique(to.bucket(x[there]), return_index=True, return_counts=True)
            found.append(Marks(kind, x[there][first], points))
    return found


def log_axis(curve: Curve) -> tuple[Curve, int]:
    """The line as a logarithmic axis can show it, with breaks for zero and below, and how many points that left out."""
    drop = np.isfinite(curve.y) & (curve.y <= 0)
    return Curve(curve.x, np.where(drop, np.nan, curve.y)), int(drop.sum())


def _visible(curve: Curve, to: Grid) -> tuple[Curve, int, int]:
    """The part in the range and one neighbour on each side; where in it the range begins and ends."""
    low, high = int(np.searchsorted(curve.x, to.low)), int(np.searchsorted(curve.x, to.high, "right"))
    start, stop = max(0, low - 1), min(len(curve.x), high + 1)
    return Curve(curve.x[start:stop], curve.y[start:stop]), low - start, high - start


def _as_they_are(curve: Curve) -> Curve:
    y = np.where(np.isfinite(curve.y), curve.y, np.nan)
    return Curve(_apart(curve.x), y)


def _apart(x: Floats) -> Floats:
    """A chart has one point for each x: those of the same x move apart by the least that a float can."""
    return x + _place_in_run(x) * np.spacing(x)


def _begins(keys: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a run of equal keys begins."""
    return np.append(True, keys[1:] != keys[:-1])[: len(keys)]


def _place_in_run(keys: NDArray[Any]) -> NDArray[np.int64]:
    """0, 1, 2, … in each run of equal keys."""
    begins = _begins(keys)
    number = np.arange(len(keys))
    first: NDArray[np.int64] = number[begins][np.cumsum(begins) - 1]
    return number - first


def _extremes(curve: Curve, first: int, last: int, to: Grid) -> Curve:
    x, y = curve.x[first:last], curve.y[first:last]
    bucket = to.bucket(x)
    kept = _kept(bucket, y)
    slot = to.slot(bucket[kept], _place_in_run(bucket[kept]))
    left, right = _as_they_are(Curve(*(c[:first] for c in curve))), _as_they_are(Curve(*(c[last:] for c in curve)))
    return Curve(
        np.concatenate([left.x, slot, right.x]),
        np.concatenate([left.y, np.where(np.isfinite(y[kept]), y[kept], np.nan), right.y]),
    )


def _kept(bucket: NDArray[np.int64], y: Floats) -> NDArray[np.int64]:
    """Which points stay: of each bucket the first, smallest, largest and last finite one, or one that is not finite."""
    there = np.flatnonzero(np.isfinite(y))
    b, finite = bucket[there], y[there]
    # a break is the one thing to show of a bucket with nothing finite in it
    lost = np.setdiff1d(bucket, b) if len(there) < len(y) else bucket[:0]
    breaks = np.searchsorted(bucket, lost)
    if not len(there):
        return breaks
    starts = np.flatnonzero(_begins(b))
    ends = np.append(starts[1:], len(b)) - 1
    sizes = ends - starts + 1
    lowest = _first_equal(finite, np.repeat(np.minimum.reduceat(finite, starts), sizes), b)
    highest = _first_equal(finite, np.repeat(np.maximum.reduceat(finite, starts), sizes), b)
    return np.unique(np.concatenate([there[starts], there[lowest], there[highest], there[ends], breaks]))


def _first_equal(values: Floats, wanted: Floats, bucket: NDArray[np.int64]) -> NDArray[np.int64]:
    where = np.flatnonzero(values == wanted)
    return where[_begins(bucket[where])]
