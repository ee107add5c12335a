"""Chart data on the wire: one JSON header and the arrays behind it, as small as they can be without showing another value."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ref = tuple[str, int, int]
"""Element type, byte offset behind the header, and count of an array."""


class Line(NamedTuple):
    """One polyline.

    Args:
        id: of the run or group it belongs to.
        role: ``line``; ``raw``: faint, behind it; ``low`` and ``high``: the edges of a band.
        x: ascending, shape (n,).
        y: shape (n,); nan where the line breaks.
    """

    id: str
    role: str
    x: Floats
    y: Floats


class Mark(NamedTuple):
    """Values that have no place on the y axis: ``nan``, ``inf``, ``-inf``, or ``dropped`` from a log axis.

    Args:
        id: of the run.
        kind: one of the four.
        x: where, ascending, shape (n,).
        points: how many values each stands for, shape (n,).
    """

    id: str
    kind: str
    x: Floats
    points: NDArray[np.int64]


class Count(NamedTuple):
    """How many runs stand behind a mean, from the end of the stretch before to ``x``."""

    id: str
    x: float
    n: int


class Drawing(NamedTuple):
    """The lines of some runs in one chart; ``note`` says how the points were thinned."""

    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    note: str = ""
    counts: Sequence[Count] = ()


def pack(board: str, part: str, charts: Mapping[str, Drawing], zoom: tuple[float, float] | None = None) -> bytes:
    """The message that the page's feed component takes.

    Args:
        board: name of the page's set of charts.
        part: which of its parts this is; a later message replaces the part.
        charts: the charts to draw, by chart id.
        zoom: the range of x that the points are for; None: all.
    """
    arrays = _Arrays()
    header = {
        "board": board,
        "part": part,
        "zoom": zoom,
        "charts": {name: _drawing(drawing, arrays) for name, drawing in charts.items()},
    }
    return _message(header, arrays)


def bundle(legend: Mapping[str, Any], charts: Sequence[Mapping[str, Any]], messages: Iterable[bytes]) -> bytes:
    """All that a page's charts need in one message: settings and points.

    Args:
        legend: the argument of :func:`dashboard.charts.live.legend`.
        charts: likewise for each chart.
        messages: of :func:`pack`.
    """
    arrays = _Arrays()
    feeds = [arrays.add(np.frombuffer(one, np.uint8)) for one in messages]
    return _message({"legend": legend, "charts": charts, "feeds": feeds}, arrays)


def _message(header: Mapping[str, Any], arrays: _Arrays) -> bytes:
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    start = struct.pack("<I", len(text)) + text
    return b"".join([start, bytes(-len(start) % 8), *arrays.blobs])


class _Arrays:
    """Arrays one after the other, each aligned to 8 bytes."""

    def __init__(self) -> None:
        self.blobs: list[bytes] = []
        self._size = 0

    def add(self, array: NDArray[Any]) -> Ref:
        blob = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        blob += bytes(-len(blob) % 8)
        ref = (f"{array.dtype.kind}{array.dtype.itemsize}", self._size, len(array))
        self.blobs.append(blob)
        self._size += len(blob)
        return ref


def _drawing(drawing: Drawing, arrays: _Arrays) -> dict[str, Any]:
    distinct = {id(line.x): line.x for line in drawing.lines}
    x = np.unique(np.concatenate([*distinct.values(), np.empty(0)]))
    places = {key: np.searchsorted(x, one) for key, one in distinct.items()}
    lines = []
    for line in drawing.lines:
        place = places[id(line.x)]
        dense = len(place) > 0 and place[-1] - place[0] == len(place) - 1
        index = None if dense else arrays.add(place.astype("u2" if len(x) < 2**16 else "u4"))
        lines.append([line.id, line.role, arrays.add(compact(line.y)), index, int(place[0]) if dense else 0])
    marks = [[m.id, m.kind, m.x.tolist(), m.points.tolist()] for m in drawing.marks]
    return {"x": arrays.add(x), "lines": lines, "marks": marks, "counts": drawing.counts, "note": drawing.note}


def compact(values: Floats) -> NDArray[np.floating[Any]]:
    """The values in single precision if nobody can see the difference on a chart, else as they are."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return values.astype("f4")
    with np.errstate(over="ignore"):
        error = np.abs(finite.astype("f4").astype("f8") - finite).max()
    span = finite.max() - finite.min()
    return values.astype("f4") if error <= 1e-4 * span or error == 0 else values
