"""The view of the user, as a value: it is read from the page's address and written back to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from .spent import EQUAL
from .transforms import MOST_SMOOTHING

AXES = {
    "step": "step",
    "elapsed": "elapsed time",
    "examples": "examples",
    "tokens": "tokens",
    "forwards": "forward passes",
}
COLORS = ("run", "method")
MOST_LINES = 50
_LONGEST_FILTER = 2000
_IDS = ("runs", "without", "hidden", "pinned")
_SEVERAL = {"keys": "key", "sections": "section", "columns": "column", "by": "by"}
"""Fields whose values stand one by one in the address, and their name there."""
_SHORT = 10  # characters of a run's id that the address keeps
_NONE = "none"


@dataclass(frozen=True)
class View:
    """Everything that a shared link brings back, but for the page itself, which is the address's path.

    Args:
        store: the store that was looked at, without credentials; only compared, never opened.
        experiments: ids; empty: all.
        filter: which runs are looked at, as :mod:`query` reads it; "": all.
        runs: of these, ids or their beginnings; None: all.
        without: but not these, ids or their beginnings.
        keys: metrics of the Curves page; empty: the page's own choice.
        sections: of metrics of that page that are open, by the first part of their names.
        axis: x of curves, a key of :data:`AXES`.
        smoothing: weight of the past in the moving average, 0 <= smoothing <= 0.999.
        log: logarithmic y.
        group: runs that differ in nothing but the seed as one mean with its deviation.
        by: parameters; runs that are equal in these as one mean with its deviation. Empty: as ``group`` says.
        color: a colour for each ``run`` or for each ``method``.
        rank: the metric whose best lines are drawn where there is no room for all; "": the newest are.
        most: how many lines are drawn, 1 to 50.
        columns: of the table of runs; empty: the table's own choice.
        sort: the column that its rows are sorted by, with "-" before it: largest first; "": the newest come first.
        pinned: ids of the runs that come first in it, or their beginnings.
        run: id of the run that its own page shows, or its beginning; "": the newest.
        parameter: the parameter on the sweep's x axis; "": the page's own choice.
        equal: the amount of work at which runs are compared, a key of :data:`dashboard.spent.EQUAL`.
        baseline: id of the run that others are compared with, or its beginning; "": the best backprop run of their task.
        budget: a device's memory in GiB.
        quality: the metric that says how good a model is.
        target: the quality to reach.
        at: the step of the "at step" column.
        zoom: range of x.
        hidden: ids of runs whose lines are off, or their beginnings.
        live: refresh by itself.
    """

    store: str = ""
    experiments: tuple[str, ...] = ()
    filter: str = ""
    runs: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    axis: str = "step"
    smoothing: float = 0.0
    log: bool = False
    group: bool = False
    by: tuple[str, ...] = ()
    color: str = COLORS[0]
    rank: str = ""
    most: int = MOST_LINES
    columns: tuple[str, ...] = ()
    sort: str = ""
    pinned: tuple[str, ...] = ()
    run: str = ""
    parameter: str = ""
    equal: str = ""
    baseline: str = ""
    budget: float | None = None
    quality: str = ""
    target: float | None = None
    at: int | None = None
    zoom: tuple[float, float] | None = None
    hidden: tuple[str, ...] = ()
    live: bool = True

    @property
    def selection(self) -> tuple[object, ...]:
        """The fields that select runs."""
        return self.filter, self.runs, self.without

    def shows(self, run_id: str) -> bool:
        """The run is selected, if the filter leaves it."""
        return (self.runs is None or run_id in self._runs) and run_id not in self._without

    def hides(self, run_id: str) -> bool:
        """The run's line is off."""
        return run_id in self._hidden

    def pins(self, run_id: str) -> bool:
        """The run comes first in the table."""
        return run_id in self._pinned

    @cached_property
    def _runs(self) -> Beginnings:
        return Beginnings(self.runs or ())

    @cached_property
    def _without(self) -> Beginnings:
        return Beginnings(self.without)

    @cached_property
    def _hidden(self) -> Beginnings:
        return Beginnings(self.hidden)

    @cached_property
    def _pinned(self) -> Beginnings:
        return Beginnings(self.pinned)


class Beginnings:
    """A set of ids of which only the first characters may be known.

    Args:
        parts: ids, or how they begin.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        self._parts, self._lengths = frozenset(parts), {len(part) for part in parts}

    def __contains__(self, run_id: str) -> bool:
        return any(run_id[:length] in self._parts for length in self._lengths)


def read(query: Mapping[str, Sequence[str]]) -> View:
    """The view of an address; fields that it does not name or that make no sense are as in a fresh view.

    Args:
        query: values by name, as many as the address gives.
    """
    first = {name: values[-1] for name, values in query.items() if values}
    fresh = View()
    zoom = [_float(part) for part in first.get("zoom", "").split("~")]
    low, high = zoom if len(zoom) == 2 else (None, None)
    smoothing = _float(first.get("smoothing"))
    axis = first.get("axis", fresh.axis)
    at = first.get("at", "")
    return View(
        store=first.get("store", fresh.store),
        experiments=_list(first.get("experiments")) or (),
        filter=first.get("filter", fresh.filter)[:_LONGEST_FILTER],
        runs=_list(first.get("runs")),
        without=_list(first.get("without")) or (),
        keys=_several(query, "keys"),
        sections=_several(query, "sections"),
        axis=axis if axis in AXES else fresh.axis,
        smoothing=min(smoothing, MOST_SMOOTHING) if smoothing is not None and 0 <= smoothing < 1 else fresh.smoothing,
        log=first.get("log") == "1",
        group=first.get("group") == "1",
        by=_several(query, "by"),
        color=first["color"] if first.get("color") in COLORS else fresh.color,
        rank=first.get("rank", fresh.rank),
        most=min(int(most), fresh.most) if _is_count(most := first.get("most", "")) and int(most) else fresh.most,
        columns=_several(query, "columns"),
        sort=first.get("sort", fresh.sort),
        pinned=_list(first.get("pinned")) or (),
        run=first.get("run", fresh.run),
        parameter=first.get("parameter", fresh.parameter),
        equal=(equal := first.get("equal", fresh.equal)) * (equal in EQUAL),
        baseline=first.get("baseline", fresh.baseline),
        budget=_positive(first.get("budget")),
        quality=first.get("quality", fresh.quality),
        target=_float(first.get("target")),
        at=int(at) if _is_count(at) else None,
        zoom=(low, high) if low is not None and high is not None and low < high else None,
        hidden=_list(first.get("hidden")) or (),
        live=first.get("live") != "0",
    )


def write(view: View) -> dict[str, str | list[str]]:
    """The view as the values of an address; fields as in a fresh view are left out."""
    fresh = View()
    found: dict[str, str | list[str]] = {}
    for field in fields(view):
        value = getattr(view, field.name)
        if value == getattr(fresh, field.name):
            continue
        if field.name in _SEVERAL:
            found[_SEVERAL[field.name]] = list(value)
        elif field.name in _IDS:
            found[field.name] = ",".join(one[:_SHORT] for one in value) or _NONE
        elif field.name == "baseline":
            found[field.name] = value[:_SHORT]
        elif field.name == "experiments":
            found[field.name] = ",".join(value)
        elif field.name == "zoom":
            found[field.name] = "~".join(str(one) for one in value)
        elif isinstance(value, bool):
            found[field.name] = str(int(value))
        else:
            found[field.name] = str(value)
    return found


def _several(query: Mapping[str, Sequence[str]], field: str) -> tuple[str, ...]:
    return tuple(value for value in query.get(_SEVERAL[field], ()) if value)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 18


def _list(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part for part in text.split(",") if part and part != _NONE)


def _float(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _positive(text: str | None) -> float | None:
    value = _float(text)
    return value if value is not None and value > 0 else None
