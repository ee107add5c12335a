"""What a page is drawn from: the store, the runs that are looked at, and how each is doing."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import streamlit as st

from .charts.lines import Member, Plotter
from .charts.memo import Memo
from .grouping import group_label, groups_by
from .names import group_names, run_names
from .palette import Style, styles
from .query import QueryError, pick
from .source import Experiment, MetricSource, Run, Series, open_source
from .status import Status, status, watched
from .transforms import goal, seed_groups, summarise
from .view import View

FAST_SECONDS, SLOW_SECONDS = 2.0, 15.0
_NOTHING = Series(np.empty(0, np.int64), np.empty(0), np.empty(0))

T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    """A source, and what is kept of its drawings; one for all sessions of the server."""

    source: MetricSource
    plotter: Plotter


@st.cache_resource(show_spinner=False, max_entries=4)
def open_store(uri: str) -> Store:
    """The store behind an address.

    Raises:
        SourceError: it cannot be opened.
    """
    source = open_source(uri)
    return Store(source, Plotter(source))


@dataclass(frozen=True)
class Scene:
    """One look at the store.

    Args:
        store: where it comes from.
        experiments: all of them.
        runs: of the chosen experiments, newest first.
        states: how each is doing, by run id.
    """

    store: Store
    experiments: Sequence[Experiment]
    runs: Sequence[Run]
    states: Mapping[str, Status]
    _once: Memo[Any] = field(default_factory=lambda: Memo(64), compare=False)

    def once(self, what: Hashable, make: Callable[[], T]) -> T:
        """Something that depends on this look at the store and on ``what`` alone: the ticks that see the same share it."""
        found: T = self._once.get(what, make)
        return found

    @property
    def live(self) -> bool:
        """Something is running."""
        return any(run.status == "RUNNING" and self.states[run.id].kind in ("live", "diverged") for run in self.runs)

    @property
    def outline(self) -> object:
        """Changes when a page must be built anew, and not only fed."""
        return tuple((run.id, run.keys, self.states[run.id].kind) for run in self.runs)

    @cached_property
    def names(self) -> Mapping[str, str]:
        """The runs' names by id, made safe, and each its own."""
        return run_names(self.runs)

    def styles(self, view: View | None = None) -> Mapping[str, Style]:
        """How each run is drawn: a colour of its own, or where the view says so, its method's."""
        oldest_first = sorted(self.runs, key=lambda run: (run.started, run.id))
        if view is None or view.color == "run":
            return self.once("styles", lambda: styles([run.id for run in oldest_first]))
        methods = {run.id: run.tags.get("zo.method", "") for run in oldest_first}
        found = styles(list(dict.fromkeys(methods.values())))
        return {run_id: found[method] for run_id, method in methods.items()}

    def read(self, runs: Sequence[Run], keys: Iterable[str]) -> None:
        """Read metrics of many runs at once, which is faster than one by one."""
        for key in keys:
            having = [run.id for run in runs if key in run.keys]
            if having:
                self.store.source.load(having, key)

    def filtered(self, view: View) -> Sequence[Run]:
        """The runs that the view's filter leaves, newest first; all of them while it makes no sense."""

        def left() -> Sequence[Run]:
            try:
                return pick(view.filter, self.runs, {run_id: one.kind for run_id, one in self.states.items()})
            except QueryError:
                return self.runs

        return self.once(("filter", view.filter), left)

    def shown(self, view: View) -> list[Run]:
        """The selected runs, newest first."""
        return [run for run in self.filtered(view) if view.shows(run.id)]

    def sound(self, view: View) -> list[Run]:
        """The selected runs that neither failed nor were killed."""
        return [run for run in self.shown(view) if self.states[run.id].kind not in ("failed", "killed")]

    def members(self, view: View) -> list[Member]:
        """The lines that are drawn of the selected runs: each its own, or one for those that the view takes together."""

        def draw() -> list[Member]:
            found = [Member(tuple(group), any(run.status == "RUNNING" for run in group)) for group in self.groups(view)]
            return self._best(found, view)[: view.most]

        return self.once(("members", view), draw)

    def groups(self, view: View) -> list[list[Run]]:
        """The selected runs, those together that the view takes together, newest first."""
        shown = self.shown(view)
        taken = seed_groups(shown) if view.group else [[run] for run in shown]
        return groups_by(shown, view.by) if view.by else taken

    def group_names(self, groups: Sequence[Sequence[Run]], view: View) -> list[str]:
        """A name for each of these groups: the run's own where it is one, else what its runs share."""
        return [group_label(group[0], view.by) for group in groups] if view.by else group_names(groups, self.names)

    def _best(self, members: list[Member], view: View) -> list[Member]:
        """The lines, best first, where not all are drawn; else as they are."""
        if not view.rank or len(members) <= view.most:
            return members
        better = goal(view.rank)
        self.read([run for member in members for run in member.runs], [view.rank])

        def loss(member: Member) -> float:
            having = [run for run in member.runs if view.rank in run.keys]
            values = [summarise(self.store.source.series(run.id, view.rank), better).best for run in having]
            mean = float(np.mean(values)) if values else np.nan
            return np.inf if np.isnan(mean) else mean if better == "min" else -mean

        return sorted(members, key=loss)

    def labels(self, view: View) -> dict[str, str]:
        """A legend for each member, by its id: the run's name, or the group's, and how many runs stand behind it."""
        members = self.members(view)
        names = self.group_names([member.runs for member in members], view)
        return {
            member.id: name + (f" (n={len(member.runs)})" if len(member.runs) > 1 else "")
            for member, name in zip(members, names, strict=True)
        }


def look(store: Store, chosen: Sequence[str]) -> Scene:
    """The store as it is now.

    Args:
        store: where to look.
        chosen: ids of experiments; those that are not there are passed over, and none means all.

    Raises:
        SourceError: it cannot be read.
    """
    source = store.source
    source.poll()
    experiments = source.experiments()
    ids = [one.id for one in experiments if one.id in chosen] or [one.id for one in experiments]
    runs = source.runs(ids)
    telling = {run.id: watched(run) for run in runs}
    for key in {key for key in telling.values() if key is not None}:
        source.load([run_id for run_id, one in telling.items() if one == key], key)
    now, host = time.time(), socket.gethostname()
    states = {}
    for run in runs:
        loss = telling[run.id]
        points = source.series(run.id, loss) if loss is not None else _NOTHING
        states[run.id] = status(run, points, now, host)
    return Scene(store, experiments, runs, states)


def every(scene: Scene, view: View) -> float | None:
    """Seconds between two looks: short while something runs; None: the user paused."""
    if not view.live:
        return None
    return FAST_SECONDS if scene.live else SLOW_SECONDS
