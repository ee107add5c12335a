"""The data that a page is drawn from: the store, the runs that are looked at, and how each is doing."""

from __future__ import annotations

import socket
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import streamlit as st

from .charts.lines import Member, Plotter
from .charts.memo import Memo
from .comparison import Saving, compare
from .facts import Facts, facts, quality_key
from .grouping import group_label, groups_by
from .names import group_names, run_names
from .palette import Style, styles
from .query import QueryError, pick
from .source import Experiment, MetricSource, Run, Series, open_source
from .spent import PEAKS, SECONDS, Spent, counters
from .status import Status, status, watched
from .transforms import goal, seed_groups, summarise
from .view import COLORS, View

FAST_SECONDS, SLOW_SECONDS = 2.0, 15.0
_ONCE, _CHOICES = 64, 8
_NOTHING = Series(np.empty(0, np.int64), np.empty(0), np.empty(0))

T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    """A source, and the kept parts of its drawings and of each run's figures; one for all sessions of the server."""

    source: MetricSource
    plotter: Plotter
    runs: Memo[Any] = field(default_factory=lambda: Memo(50_000))
    looks: dict[tuple[str, ...], Scene] = field(default_factory=dict)

    def of_run(self, run: Run, what: Hashable, make: Callable[[], T]) -> T:
        """Something that depends on one run and its points only: made anew when these change.

        Args:
            run: which.
            what: its name, and whatever else it depends on.
            make: works it out.
        """
        found: T = self.runs.get((run.id, self.source.edition(run.id), what), make)
        return found


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
        version: of the source, when this was seen.
    """

    store: Store
    experiments: Sequence[Experiment]
    runs: Sequence[Run]
    states: Mapping[str, Status]
    version: int = 0
    _once: Memo[Any] = field(default_factory=lambda: Memo(_ONCE), compare=False)

    def once(self, what: Hashable, make: Callable[[], T]) -> T:
        """Something that depends on this look at the store and on ``what`` only: the ticks that see the same share it."""
        found: T = self._once.get(what, make)
        return found

    def facts(self, runs: Sequence[Run], quality: str | None) -> dict[str, Facts]:
        """The runs' figures by id.

        Args:
            runs: which.
            quality: the metric that says how good a model is; None: unknown.
        """
        self.read_extremes(runs, [*PEAKS, *([quality] if quality is not None else [])])
        source, of_run = self.store.source, self.store.of_run
        return {run.id: of_run(run, ("facts", quality), partial(facts, run, source, quality)) for run in runs}

    @cached_property
    def spent(self) -> Spent:
        """The costs and results of the runs up to some point."""
        return Spent(self.store.source, self.store.of_run)

    @cached_property
    def live(self) -> bool:
        """Something is running."""
        return any(run.status == "RUNNING" and self.states[run.id].kind in ("live", "diverged") for run in self.runs)

    @cached_property
    def outline(self) -> object:
        """Changes when a page must be built anew, and not only fed."""
        return tuple((run.id, run.keys, self.states[run.id].kind) for run in self.runs)

    @cached_property
    def names(self) -> Mapping[str, str]:
        """The runs' names by id, made safe, and each its own."""
        return run_names(self.runs)

    def styles(self, view: View | None = None) -> Mapping[str, Style]:
        """How each run is drawn: a colour of its own, or where the view says so, its method's."""
        color = COLORS[0] if view is None else view.color

        def choose() -> dict[str, Style]:
            oldest_first = sorted(self.runs, key=lambda run: (run.started, run.id))
            kinds = {run.id: run.id if color == "run" else run.tags.get("zo.method", "") for run in oldest_first}
            found = styles(list(dict.fromkeys(kinds.values())))
            return {run_id: found[kind] for run_id, kind in kinds.items()}

        return self.once(("styles", color), choose)

    def read(self, runs: Sequence[Run], keys: Iterable[str]) -> None:
        """Read metrics of many runs at once, which is faster than one by one."""
        for key in keys:
            having = [run.id for run in runs if key in run.keys]
            if having:
                self.store.source.load(having, key)

    def read_extremes(self, runs: Sequence[Run], keys: Iterable[str]) -> None:
        """Likewise of their smallest and largest values only, which is cheaper."""
        for key in keys:
            having = [run.id for run in runs if key in run.keys]
            if having:
                self.store.source.load_extremes(having, key)

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

    def baseline(self, view: View) -> Run | None:
        """The run that the user pinned; None: the best backprop run of each task."""
        return next((run for run in self.runs if view.baseline and run.id.startswith(view.baseline)), None)

    def savings(self, view: View) -> list[Saving]:
        """The selected methods beside their baseline, best quality first."""

        def find() -> list[Saving]:
            key = quality_key(self.runs, view.quality)
            runs, baseline, store = self.sound(view), self.baseline(view), self.store
            everyone = runs if baseline is None else [*runs, baseline]
            quality = [key] if key is not None else []
            self.read_extremes(everyone, [*PEAKS, *quality])
            axis = view.equal or "examples"
            if len({self.spent.reach(run, axis) for run in everyone}) > 1:  # of the longer ones only the beginning counts
                self.read(everyone, {*quality, *counters(axis), *SECONDS})
            chosen = key if key == view.quality else None
            return compare(runs, store.source, chosen, view.equal, baseline, store.of_run)

        return self.once(("savings", view.selection, view.quality, view.equal, view.baseline), find)

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
        """A name for each of these groups: the run's own where it is one, else the part that its runs share."""
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
    version = source.poll()
    experiments = source.experiments()
    ids = [one.id for one in experiments if one.id in chosen] or [one.id for one in experiments]
    last = store.looks.get(tuple(ids))
    if last is None or last.version != version:
        last = _look(store, experiments, ids, version)
    states = {**last.states, **_states(store, [run for run in last.runs if run.status == "RUNNING"])}
    if states != last.states:
        last = replace(last, states=states, _once=Memo(_ONCE))
    if len(store.looks) > _CHOICES:
        store.looks.clear()
    store.looks[tuple(ids)] = last  # a session that finds the same next shares its results
    return last


def _look(store: Store, experiments: Sequence[Experiment], ids: Sequence[str], version: int) -> Scene:
    runs = store.source.runs(ids)
    telling = defaultdict(list)
    for run in runs:
        telling[watched(run)].append(run.id)
    for key, having in telling.items():
        if key is not None:
            store.source.load(having, key)
    return Scene(store, experiments, runs, _states(store, runs), version)


def _states(store: Store, runs: Sequence[Run]) -> dict[str, Status]:
    now, host = time.time(), socket.gethostname()

    def judge(run: Run) -> Status:
        key = watched(run)
        return status(run, store.source.series(run.id, key) if key is not None else _NOTHING, now, host)

    return {run.id: judge(run) if run.status == "RUNNING" else store.of_run(run, "status", partial(judge, run)) for run in runs}


def every(scene: Scene, view: View) -> float | None:
    """Seconds between two looks: short while something runs; None: the user paused."""
    if not view.live:
        return None
    return FAST_SECONDS if scene.live else SLOW_SECONDS
