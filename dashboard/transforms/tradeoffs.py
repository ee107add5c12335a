"""The costs of a result: runs that no other beats in both of two quantities, and how far it was to a target."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .curve import Curve, Floats
from .summaries import Goal


def pareto(x: Floats, y: Floats, better_x: Goal, better_y: Goal) -> NDArray[np.bool_]:
    """Which points no other point beats: none is at least as good in both quantities and better in one.

    Args:
        x: one quantity, shape (n,); points where either is nan are never on the front.
        y: the other, shape (n,).
        better_x: which way x is better.
        better_y: which way y is better.
    """
    a = x if better_x == "min" else -x
    b = y if better_y == "min" else -y
    no_worse = (a[:, None] <= a) & (b[:, None] <= b)
    beaten = no_worse & ((a[:, None] < a) | (b[:, None] < b))
    return ~beaten.any(axis=0) & ~np.isnan(a) & ~np.isnan(b)


def first_reaching(curve: Curve, target: float, better: Goal) -> float | None:
    """x of the first logged point that is at the target or better; None when none is. Nothing is interpolated.

    Args:
        curve: the metric over a cost: seconds, forward passes, peak memory.
        target: the value to reach.
        better: which way the metric is better.
    """
    there = np.isfinite(curve.y) & (curve.y <= target if better == "min" else curve.y >= target)
    return float(curve.x[there.argmax()]) if there.any() else None
