"""Runs that differ in their seed as one line: the mean, its deviation, and how many runs stand behind each point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .curve import Curve, Floats, last_of_each

_GRID = 1000


class Band(NamedTuple):
    """Mean and deviation over the members of a group.

    Args:
        x: ascending, shape (n,).
        mean: over the members that have a finite value at x.
        std: with n - 1 in the denominator; nan where fewer than two members have one.
        n: how many have one, >= 1.
        exact: the members' own points; else straight lines between them, read off at common x.
    """

    x: Floats
    mean: Floats
    std: Floats
    n: NDArray[np.int64]
    exact: bool


def band(curves: Sequence[Curve]) -> Band:
    """The group's mean and standard deviation over x.

    Members are compared where they were logged at the same x. Only where they hardly ever were (fewer than half of the
    points of the member with the fewest) are they read off straight lines between their points. Either way a member counts
    from its first point to its last and never beyond, so n falls when one ends, and values that are not finite do not count.

    Args:
        curves: one for each member, at full resolution, smoothed or not.
    """
    members = [last_of_each(curve) for curve in curves if len(curve.x)]
    if not members:
        return Band(np.empty(0), np.empty(0), np.empty(0), np.empty(0, np.int64), exact=True)
    together = coincide(members)
    x, times = np.unique(np.concatenate([curve.x for curve in members]), return_counts=True)
    shared = np.isin(together.x, x[times > 1]).sum()  # points of one member beyond the end of the others say nothing
    if len(members) == 1 or 2 * shared >= min(len(curve.x) for curve in members):
        return together
    return interpolate(members)


def stretches(curves: Sequence[Curve], x: Floats) -> list[tuple[float, int]]:
    """Where the number of members changes: the last x of each stretch, and how many reach across it.

    Args:
        curves: one for each member.
        x: of the group's band.
    """
    members = [curve.finite for curve in curves]
    ends = np.array([(curve.x[0], curve.x[-1]) for curve in members if len(curve.x)]).reshape(-1, 2)
    reach = ((ends[:, :1] <= x) & (x <= ends[:, 1:])).sum(axis=0)
    last = np.flatnonzero(np.append(reach[1:] != reach[:-1], True)[: len(x)])
    return [(float(x[at]), int(reach[at])) for at in last]


def broken(found: Band, ends: Sequence[float]) -> Band:
    """The band with a gap behind each of these x: a mean over fewer runs does not go on from one over more.

    Args:
        found: the band.
        ends: some of its x.
    """
    at = np.searchsorted(found.x, ends[:-1], "right")
    gap = found.x[at - 1] + (found.x[at] - found.x[at - 1]) / 2
    nothing = np.full(len(at), np.nan)
    return Band(
        np.insert(found.x, at, gap),
        np.insert(found.mean, at, nothing),
        np.insert(found.std, at, nothing),
        np.insert(found.n, at, 0),
        found.exact,
    )


def coincide(members: Sequence[Curve]) -> Band:
    """The band at each x at which every member has a point, of those that reach from their first to their last across it.

    Args:
        members: each with one point for an x, and at least one.
    """
    x = np.unique(np.concatenate([curve.x for curve in members]))
    table = np.full((len(members), len(x)), np.nan)
    missing = np.zeros(len(x), bool)
    for row, curve in zip(table, members, strict=True):
        place = np.searchsorted(x, curve.x)
        row[place] = curve.y
        here = np.zeros(len(x), bool)
        here[place] = True
        missing |= ~here & (x >= curve.x[0]) & (x <= curve.x[-1])
    return _statistics(x[~missing], table[:, ~missing], exact=True)


def interpolate(members: Sequence[Curve]) -> Band:
    """The band on straight lines between the members' finite points, at the members' x or, if those are many, at 1000 x.

    Args:
        members: each with one point for an x, and at least one.
    """
    x = np.unique(np.concatenate([curve.x for curve in members]))
    if len(x) > _GRID:
        x = np.linspace(x[0], x[-1], _GRID)
    table = np.full((len(members), len(x)), np.nan)
    for row, curve in zip(table, members, strict=True):
        known = curve.finite
        if len(known.x):
            row[:] = np.interp(x, known.x, known.y, left=np.nan, right=np.nan)
    return _statistics(x, table, exact=False)


def _statistics(x: Floats, table: Floats, exact: bool) -> Band:
    """Mean and deviation of each column's finite values, for the columns that have one."""
    there = np.isfinite(table)
    some = there.any(axis=0)
    x, table, there = x[some], table[:, some], there[:, some]
    n = there.sum(axis=0)
    mean = np.where(there, table, 0.0).sum(axis=0) / n
    squares = np.where(there, table - mean, 0.0) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        std = np.where(n > 1, np.sqrt(squares.sum(axis=0) / (n - 1)), np.nan)
    return Band(x, mean, std, n, exact)
