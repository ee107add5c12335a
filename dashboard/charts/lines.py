"""From the store's points to the lines of a page's live charts: smoothed, averaged, thinned, and in two parts.

The runs that have ended are one part, those that are going on the other. The first is the same bytes at each tick, so that
Streamlit sends its hash alone.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..source import MetricSource, Run
from ..transforms import (
    COUNTERS,
    Band,
    Curve,
    Grid,
    band,
    broken,
    by_counter,
    by_elapsed,
    by_step,
    log_axis,
    marks,
    smooth,
    stretches,
    thin,
)
from ..words import GIB, is_bytes
from .memo import Memo
from .pack import Count, Drawing, Line, Mark, pack

_BYTES = 900_000  # of one message with all points
_BUCKETS = (60, 1000)  # fewest and most across a chart
_POINT = 24  # bytes of a bucket: four points of a value and a place
_ROUND = 32  # buckets are added by so many, so that old points stay where they are drawn


class Member(NamedTuple):
    """A line: a run, or the runs that differ in their seed only. Its id and its colour are the oldest one's."""

    runs: tuple[Run, ...]
    live: bool

    @property
    def id(self) -> str:
        return self.runs[-1].id


@dataclass(frozen=True)
class Look:
    """How the lines of a page are drawn.

    Args:
        axis: the x axis.
        smoothing: weight of the past.
        log: logarithmic y.
        zoom: visible range of x; None: everything.
    """

    axis: str
    smoothing: float = 0.0
    log: bool = False
    zoom: tuple[float, float] | None = None


class Plotter:
    """Draws the charts of any page over one source; remembers lines that did not change."""

    def __init__(self, source: MetricSource) -> None:
        self._source = source
        self._extents: Memo[tuple[float, float] | None] = Memo(20_000)
        self._drawings: Memo[Drawing] = Memo(32)
        self._messages: Memo[bytes] = Memo(6)

    def messages(self, board: str, keys: Sequence[str], members: Sequence[Member], look: Look) -> dict[str, bytes]:
        """The messages of a page's feeds, by part: ``settled`` and ``live``.

        Args:
            board: name of the page's set of charts.
            keys: a metric for each chart.
            members: the lines.
            look: how they are drawn.
        """
        buckets = _fitting(len(keys) * len(members) * (2 if look.smoothing else 1))
        parts = {"settled": [m for m in members if not m.live], "live": [m for m in members if m.live]}
        charts: dict[str, dict[str, tuple[Hashable, Sequence[Member], Grid]]] = {part: {} for part in parts}
        for key in keys:
            self._source.load([run.id for member in members for run in member.runs], key)
            grid = self._grid(key, members, look, buckets)
            for part, some in parts.items():
                charts[part][key] = (self._stamp(key, some, look, grid), some, grid)
        return {part: self._message(board, part, some, look) for part, some in charts.items()}

    def _message(self, board: str, part: str, charts: dict[str, tuple[Hashable, Sequence[Member], Grid]], look: Look) -> bytes:
        def draw() -> bytes:
            drawings = {
                key: self._drawings.get(stamp, lambda k=key, m=some, g=grid: self._draw(k, m, look, g))  # type: ignore[misc]
                for key, (stamp, some, grid) in charts.items()
            }
            return pack(board, part, drawings, zoom=look.zoom)

        return self._messages.get((board, part, tuple(stamp for stamp, _, _ in charts.values())), draw)

    def curve(self, run: Run, key: str, axis: str) -> Curve:
        """All points of a metric over an axis; bytes in GiB."""
        series = self._source.series(run.id, key)
        if is_bytes(key):
            series = series._replace(value=series.value / GIB)
        if axis == "elapsed":
            return by_elapsed(series, run)
        if axis in COUNTERS:
            return by_counter(series, self._source.series(run.id, COUNTERS[axis]))
        return by_step(series)

    def _draw(self, key: str, members: Sequence[Member], look: Look, grid: Grid) -> Drawing:
        owners: list[tuple[str, str]] = []
        curves: list[Curve] = []
        found: list[Mark] = []
        counts: list[Count] = []
        exact = True
        for member in members:
            raw = [self.curve(run, key, look.axis) for run in member.runs]
            found += [Mark(member.id, m.kind, m.x, m.points) for curve in raw for m in marks(curve, grid, look.log)]
            raw = [log_axis(curve)[0] for curve in raw] if look.log else raw
            smoothed = [smooth(curve, look.smoothing) for curve in raw]
            if len(raw) == 1:
                drawn = {"line": smoothed[0]} if not look.smoothing else {"raw": raw[0], "line": smoothed[0]}
            else:
                mean = band(smoothed)
                ends = stretches(smoothed, mean.x)
                counts += [Count(member.id, x, n) for x, n in ends]
                drawn = _edged(broken(mean, [x for x, _ in ends]), look.log)
                exact &= mean.exact
            for role, curve in drawn.items():
                if len(curve.x):
                    owners.append((member.id, role))
                    curves.append(curve)
        thinned = thin(curves, grid)
        lines = [Line(id_, role, one.x, one.y) for (id_, role), one in zip(owners, thinned, strict=True)]
        notes = [_thinning(curves, grid), "" if exact else "means on lines between the seeds' own points"]
        return Drawing(lines, found, "; ".join(filter(None, notes)), counts)

    def _grid(self, key: str, members: Sequence[Member], look: Look, buckets: int) -> Grid:
        """The page's buckets; wide by a power of two and begun at a multiple of it, so that more points move none."""
        if look.zoom is not None:
            return Grid(*look.zoom, buckets)
        ends = [end for member in members for run in member.runs if (end := self._extent(run, key, look.axis))]
        if not ends:
            return Grid(0.0, 1.0, buckets)
        low, high = min(first for first, _ in ends), max(last for _, last in ends)
        width = 2.0 ** math.ceil(math.log2(max(high - low, 1e-9) / buckets))
        start = math.floor(low / width) * width
        count = math.ceil((high - start) / width / _ROUND + 1e-9) * _ROUND
        return Grid(start, start + count * width, count)

    def _extent(self, run: Run, key: str, axis: str) -> tuple[float, float] | None:
        def measure() -> tuple[float, float] | None:
            x = self.curve(run, key, axis).x
            return (float(x[0]), float(x[-1])) if len(x) else None

        return self._extents.get((axis, self._version(run, key, axis)), measure)

    def _stamp(self, key: str, members: Sequence[Member], look: Look, grid: Grid) -> Hashable:
        runs = tuple(tuple(self._version(run, key, look.axis) for run in member.runs) for member in members)
        return key, look, grid, runs

    def _version(self, run: Run, key: str, axis: str) -> Hashable:
        """Changes whenever the curve does: points are only ever added, or all read again."""
        keys = (key, COUNTERS[axis]) if axis in COUNTERS else (key,)
        found = [self._source.series(run.id, one) for one in keys]
        return run.id, run.started, key, *((len(s.step), float(s.time[-1]) if len(s.time) else 0.0) for s in found)


def _edged(found: Band, log: bool) -> dict[str, Curve]:
    """Mean and its edges, one deviation away; on a log axis the lower edge stops where it is not positive."""
    low = found.mean - found.std
    if log:
        low = np.where(low > 0, low, np.nan)
    high = np.where(np.isnan(low), np.nan, found.mean + found.std)
    return {"low": Curve(found.x, low), "high": Curve(found.x, high), "line": Curve(found.x, found.mean)}


def _fitting(lines: int) -> int:
    """How many buckets a chart may have for a message to stay in its bounds."""
    fewest, most = _BUCKETS
    return max(fewest, min(most, _BYTES // _POINT // max(1, lines)))


def _thinning(curves: Sequence[Curve], grid: Grid) -> str:
    """The points left out for want of pixels."""
    inside = [np.searchsorted(c.x, grid.high, "right") - np.searchsorted(c.x, grid.low) for c in curves]
    most = max(inside, default=0)
    if most <= grid.buckets:
        return ""
    return f"extremes of {math.ceil(most / grid.buckets)} points at a time; zoom in for all"
