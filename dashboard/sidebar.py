"""The side of every page: which store, which runs, how their lines are drawn, live or paused, and the report."""

from __future__ import annotations

import streamlit as st

from . import text
from .charts import live
from .charts.live import Selection
from .downloads import REPORT
from .grouping import METHOD
from .query import QueryError, parse
from .scene import Scene
from .screens.parts import download
from .session import change, current, settle, widget
from .transforms import differing
from .view import COLORS, MOST_LINES, View

_MOST_PARAMETERS = 200
_WATCHED = 200  # newest runs whose end is told
_COLORED = {"run": "run", "method": "method"}


def sidebar(scene: Scene, shown_store: str) -> View:
    """Draw it; returns the view with the user's choices.

    Args:
        scene: the store.
        shown_store: its address as it may be shown.
    """
    with st.sidebar:
        _store(shown_store)
        _experiments(scene)
        _runs(scene)
        _lines(scene)
        live_now = st.toggle(
            "Live",
            current().live,
            key=widget("live"),
            help="Look for new points every 2 seconds while something runs, and every 15 seconds while nothing does. "
            "Off: the page does not refresh by itself.",
        )
        view = change(live=live_now)
        live.alerts(
            [{"id": run.id, "label": scene.names[run.id], "status": scene.states[run.id].kind} for run in scene.runs[:_WATCHED]]
        )
        download(
            scene,
            view,
            REPORT,
            "Report",
            shown_store,
            "One HTML file with the selected runs: their costs and results, their parameters and their curves. It needs no "
            "server and no network.",
        )
    return view


def _store(shown_store: str) -> None:
    st.markdown("#### zolightning")
    st.text(text.plain(shown_store, 60), help=text.code(shown_store))


def _experiments(scene: Scene) -> None:
    if len(scene.experiments) < 2 or (not current().experiments and len({run.experiment_id for run in scene.runs}) == 1):
        return  # MLflow makes an experiment for itself, which mostly stays empty
    names = {one.id: text.plain(one.name, 60) for one in scene.experiments}
    chosen = st.multiselect(
        "Experiments",
        list(names),
        [one for one in current().experiments if one in names],
        format_func=lambda one: names[one],
        placeholder="All",
        key=widget("experiments"),
    )
    if tuple(chosen) != current().experiments:
        settle(experiments=tuple(chosen), runs=None, without=(), hidden=(), zoom=None)
        st.rerun()


def _runs(scene: Scene) -> None:
    key, view = widget("zo-runs"), current()
    chosen = live.selection(key, Selection(view.filter, view.runs is None, view.without if view.runs is None else view.runs))
    view = change(filter=chosen.filter, runs=None if chosen.all else chosen.ids, without=chosen.ids if chosen.all else ())
    looks, names = scene.styles(view), scene.names
    rows = [
        {
            "id": run.id,
            "label": names[run.id],
            "title": text.plain(run.name, 500),
            "status": scene.states[run.id].kind,
            "why": text.plain(scene.states[run.id].text, 300),
            **looks[run.id]._asdict(),
        }
        for run in scene.runs
    ]
    named = [run.id for run in scene.runs if view.shows(run.id) != chosen.all]
    left = [run.id for run in scene.filtered(view)] if view.filter else None
    live.run_list(key, rows, chosen._replace(ids=tuple(named)), left, _trouble(view.filter))


def _trouble(filter_: str) -> str:
    try:
        parse(filter_)
    except QueryError as error:
        return text.plain(str(error), 300)
    return ""


def _lines(scene: Scene) -> None:
    """How the runs become lines: together, coloured, and which of them where there is no room for all."""
    view = current()
    lines = st.expander("Lines", icon=":material/show_chart:", key=widget("lines"), on_change="rerun")
    if not lines.open:  # most visits do without
        return
    with lines:
        names = [METHOD, *differing(scene.runs)][:_MOST_PARAMETERS]
        by = st.multiselect(
            "Mean over runs alike in",
            [*names, *(one for one in view.by if one not in names)],
            list(view.by),
            format_func=lambda one: "method" if one == METHOD else text.plain(one, 60),
            placeholder="Each run by itself",
            key=widget("by"),
            help="Runs that are set to the same values become one line, the mean, with one standard deviation around it.",
        )
        color = st.segmented_control(
            "A colour for each", COLORS, default=view.color, key=widget("color"), format_func=lambda one: _COLORED[one]
        )
        keys = sorted({key for run in scene.runs for key in run.keys})
        rank = st.selectbox(
            "Draw first",
            ["", *keys],
            keys.index(view.rank) + 1 if view.rank in keys else 0,
            format_func=lambda one: f"the best by {text.plain(one, 50)}" if one else "the newest",
            key=widget("rank"),
        )
        most = st.number_input("Lines at most", 1, MOST_LINES, view.most, key=widget("most"))
    change(by=tuple(by), color=color or view.color, rank=rank, most=int(most))
