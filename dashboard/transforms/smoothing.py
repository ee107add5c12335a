"""A moving average over all points, taken before any of them is left out for the screen."""

from __future__ import annotations

import numpy as np

from .curve import Curve, Floats

MOST_SMOOTHING = 0.999
_BLOCK = 128


def smooth(curve: Curve, weight: float) -> Curve:
    r"""The debiased exponential moving average over points.

    .. math:: s_t = \frac{\sum_{i \le t} w^{t-i} y_i}{\sum_{i \le t} w^{t-i}}

    Values that are not finite are passed over by the average and stay where they are.

    Args:
        curve: every point that was logged.
        weight: w, of the past, 0 <= weight <= 0.999; 0 changes nothing.

    Raises:
        ValueError: another weight.
    """
    if not 0 <= weight <= MOST_SMOOTHING:
        raise ValueError(f"`smooth(weight=...)` must lie between 0 and 0.999, got {weight}")
    if weight == 0:
        return curve
    there = np.isfinite(curve.y)
    y = curve.y.copy()
    y[there] = _decayed_sum(curve.y[there], weight) / _decayed_count(int(there.sum()), weight)
    return Curve(curve.x, y)


def _decayed_count(size: int, weight: float) -> Floats:
    powers = weight ** np.arange(1, size + 1)
    return np.asarray((1 - powers) / (1 - weight))


def _decayed_sum(y: Floats, weight: float) -> Floats:
    """``sum_{i <= t} weight**(t - i) * y[i]`` for each t: whole blocks by a matrix, the carry from block to block by a loop."""
    if not len(y):
        return y
    rows = np.zeros((-(-len(y) // _BLOCK), _BLOCK))
    rows.reshape(-1)[: len(y)] = y
    age = np.subtract.outer(np.arange(_BLOCK), np.arange(_BLOCK))
    sums = rows @ np.where(age >= 0, weight ** np.maximum(age, 0), 0.0).T
    fade = weight ** np.arange(1, _BLOCK + 1)
    for row in range(1, len(sums)):
        sums[row] += sums[row - 1, -1] * fade
    return sums.reshape(-1)[: len(y)]
