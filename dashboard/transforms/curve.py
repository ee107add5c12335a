"""A line of a chart, which every transform takes and gives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Curve(NamedTuple):
    """Points of a line.

    Args:
        x: never falling, shape (n,).
        y: shape (n,); nan and ±inf where that was logged.
    """

    x: Floats
    y: Floats

    @property
    def finite(self) -> Curve:
        """The points that have a place on a y axis."""
        there = np.isfinite(self.y)
        return self if there.all() else Curve(self.x[there], self.y[there])


def ascending(x: Floats, y: Floats) -> Curve:
    """The points by x; those of the same x keep their order."""
    if (x[1:] >= x[:-1]).all():
        return Curve(x, y)
    order = np.argsort(x, kind="stable")
    return Curve(x[order], y[order])


def last_of_each(curve: Curve) -> Curve:
    """One point for each x: the last one."""
    last = np.append(curve.x[1:] != curve.x[:-1], True)[: len(curve.x)]
    return curve if last.all() else Curve(curve.x[last], curve.y[last])
