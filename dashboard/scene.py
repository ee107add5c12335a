"""What a page is drawn from: the store, the runs that are looked at, and how each is doing."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import streamlit as st

from . import text
from .charts.lines import Member, Plotter
from .palette import Style, styles
from .source import Experiment, MetricSource, Run, Series, open_source
from .status import Status, status, watched
from .transforms import legends, seed_groups
from .view import View

FAST_SECONDS, SLOW_SECONDS = 2.0, 15.0
MOST_LINES = 50
_NOTHING = Series(np.empty(0, np.int64), np.empty(0), np.empty(0))


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

    @property
    def live(self) -> bool:
        """Something is running."""
        return any(run.status == "RUNNING" and self.states[run.id].kind in ("live", "diverged") for run in self.runs)

    @property
    def outline(self) -> object:
        """Changes when a page must be built anew, and not only fed."""
        return tuple((run.id, run.keys, self.states[run.id].kind) for run in self.runs)

    @property
    def names(self) -> dict[str, str]:
        """The runs' names by id, made safe; runs of the same name get the beginning of their id."""
        names = {run.id: text.plain(run.name) for run in self.runs}
        times = Counter(names.values())
        return {run_id: name if times[name] == 1 else f"{name} ({run_id[:6]})" for run_id, name in names.items()}

    def styles(self) -> dict[str, Style]:
        """How each run is drawn."""
        return styles([run.id for run in sorted(self.runs, key=lambda run: (run.started, run.id))])

    def read(self, runs: Sequence[Run], keys: Iterable[str]) -> None:
        """Read metrics of many runs at once, which is faster than one by one."""
        for key in keys:
            having = [run.id for run in runs if key in run.keys]
            if having:
                self.store.source.load(having, key)

    def shown(self, view: View) -> list[Run]:
        """The selected runs, newest first."""
        return [run for run in self.runs if view.shows(run.id)]

    def sound(self, view: View) -> list[Run]:
        """The selected runs that neither failed nor were killed."""
        return [run for run in self.shown(view) if self.states[run.id].kind not in ("failed", "killed")]

    def members(self, view: View) -> list[Member]:
        """The lines of the selected runs: each its own, or one for the runs that differ in their seed alone."""
        shown = self.shown(view)
        groups = seed_groups(shown) if view.group else [[run] for run in shown]
        found = [Member(tuple(group), any(run.status == "RUNNING" for run in group)) for group in groups]
        return found[:MOST_LINES]

    def labels(self, view: View) -> dict[str, str]:
        """A legend for each member, by its id: its method where these differ, and what tells it from others of its method."""
        members = self.members(view)
        kinds: dict[str, list[Run]] = {}
        for member in members:
            kinds.setdefault(_method(member), []).append(member.runs[-1])
        telling = {run_id: label for kind in kinds.values() for run_id, label in legends(kind).items()}

        def label(member: Member) -> str:
            method = _method(member)
            if not method or (len(kinds) == 1 and not view.group):
                return telling[member.id]
            return method if len(kinds[method]) == 1 else f"{method}: {telling[member.id]}"

        return {m.id: label(m) + (f" (n={len(m.runs)})" if len(m.runs) > 1 else "") for m in members}


def _method(member: Member) -> str:
    return member.runs[-1].tags.get("zo.method", "")


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
