"""The common parts of pages: the tick, the legend, the x axis, tables to take away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import streamlit as st

from .. import text
from ..charts import live
from ..charts.lines import Look
from ..charts.live import Rule
from ..downloads import File, link
from ..glossary import meaning
from ..scene import Scene, every, look
from ..session import board, change, current, edition, keep, new_board, widget
from ..source import SourceError
from ..spent import EQUAL
from ..view import AXES, View
from ..words import is_bytes


def follow(scene: Scene, draw: Callable[[Scene], None]) -> None:
    """Draw now, and again at each tick with the new points; build the whole page anew when runs came, went or ended.

    Args:
        scene: the store as the page was built from it.
        draw: the part of the page that changes; called with a newer look.
    """
    turns, built = 0, edition()

    @st.fragment(run_every=every(scene, current()))
    def tick() -> None:
        nonlocal turns
        turns += 1
        if edition() != built:  # a button of this part has changed the view
            st.rerun()
        try:
            fresh = scene if turns == 1 else look(scene.store, current().experiments)
        except SourceError as error:
            st.warning(f"The store cannot be read now, and the page shows an older state. {text.code(str(error))}")
            fresh = scene
        if fresh.outline != scene.outline or fresh.live != scene.live:
            st.rerun()
        draw(fresh)
        keep()

    tick()


def legend(scene: Scene, view: View) -> None:
    """The chips of the lines on this page."""
    data = lines(scene, view, board())
    if (shown := len(data["series"])) == view.most and len(scene.shown(view)) > shown:
        which = f"best {shown} by {text.code(view.rank, 60)}" if view.rank else f"newest {shown}"
        st.caption(f"The {which} of the selected lines are drawn; the tables have all.")
    live.legend(data)


def lines(scene: Scene, view: View, board: str) -> dict[str, Any]:
    """The arguments of the legend of a set of charts."""
    looks, labels = scene.styles(view), scene.labels(view)
    members, deltas = scene.members(view), _deltas(scene, view)
    series = [
        {
            "id": member.id,
            "label": text.plain(labels[member.id], 60) + next((deltas[run.id] for run in member.runs if run.id in deltas), ""),
            "title": text.plain(", ".join(run.name for run in member.runs), 500),
            "runs": [run.id for run in member.runs],
            **looks[member.id]._asdict(),
        }
        for member in members
    ]
    return {"board": board, "series": series, "zoom": view.zoom, "hidden": [m.id for m in members if view.hides(m.id)]}


def _deltas(scene: Scene, view: View) -> dict[str, str]:
    """Additions to the runs' labels when one is pinned: how much better or worse they came out; by run id."""
    baseline = scene.baseline(view)
    if baseline is None:
        return {}
    found = {baseline.id: " · baseline"}
    for saving in scene.savings(view):
        value = next((one.value for one in saving.differences if one.of == saving.quality_key), None)
        found |= {run.id: f" · {value}" for run in saving.method.runs if value is not None}
        found |= {run.id: " · baseline" for run in saving.baseline.runs}
    return found


def shell(key: str, view: View, board: str, *, height: int = 280, rules: Sequence[Rule] = ()) -> dict[str, Any]:
    """The arguments of the chart of a metric over the view's axis."""
    return live.shell(
        board,
        key,
        title=text.plain(key, 120),
        why=meaning(key),
        x_label=AXES[view.axis],
        x_kind="time" if view.axis == "elapsed" else "count",
        unit="GiB" if is_bytes(key) else "",
        log=view.log,
        from_zero=is_bytes(key) and not view.log,
        height=height,
        rules=rules,
    )


def feed(scene: Scene, keys: Sequence[str], smoothed: bool = True) -> None:
    """Bring the points of the page's charts; call it inside :func:`follow`.

    Args:
        scene: the newest look.
        keys: the metrics that have a shell on this page.
        smoothed: by the view's smoothing and log axis; False: as they are.
    """
    view = current()
    begin = [member.id for member in scene.members(view) if view.hides(member.id)]
    zoom, hidden = live.seen(board(), view.zoom, begin)
    view = change(zoom=zoom, hidden=hidden)
    how = Look(view.axis, view.smoothing, view.log, zoom) if smoothed else Look(view.axis, zoom=zoom)
    messages = scene.store.plotter.messages(board(), keys, scene.members(view), how)
    with st.container(key="zo-feeds"):  # without a place on the page
        for part, data in messages.items():
            live.feed(board(), part, data, zoom, hidden)


def is_dark() -> bool:
    """The page is dark, for charts whose colours are chosen here and not in the browser."""
    return st.context.theme.type == "dark"


def choose_axis() -> View:
    """The choice of the x axis."""
    axis = st.selectbox(
        "Over",
        list(AXES),
        list(AXES).index(current().axis),
        format_func=lambda name: AXES[name],
        key=widget("axis"),
        help="Steps compare settings of one method. Between methods a step is not the same work: compare over time, examples, "
        "or forward passes. A backprop step counts as one forward pass here and costs about three.",
    )
    if axis != current().axis:
        change(axis=axis)
        new_board()
    return current()


def choose_comparison(scene: Scene) -> View:
    """The choice of the baseline, and of the work at which methods are compared."""
    view, names = current(), scene.names
    pinned = scene.baseline(view)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        equal = st.selectbox(
            "Compare at",
            list(EQUAL),
            list(EQUAL).index(view.equal),
            format_func=EQUAL.__getitem__,
            key=widget("equal"),
            width=260,
            help="Two methods are compared at the same amount of work, which is that of the shorter of the two runs. "
            "A backprop step counts as one forward pass and costs about three.",
        )
        baseline = st.selectbox(
            "Against",
            ["", *(run.id for run in scene.runs)],
            0 if pinned is None else 1 + scene.runs.index(pinned),
            format_func=lambda run_id: names.get(run_id, "the best backprop run"),
            key=widget("baseline"),
            width=300,
            help="Pin a run, and all other methods are compared with it and its seeds: in the cards, in the tables and in the "
            "legends.",
        )
    return change(equal=equal, baseline=baseline or "")


def choose_grouping() -> View:
    """Whether runs that differ only in their seed are one line, one dot, one row."""
    group = st.toggle(
        "Mean over seeds",
        current().group,
        key=widget("group"),
        help="Runs that differ in nothing but the seed as one: their mean, with one standard deviation. n is how many runs "
        "stand behind it. Those that have not ended count on curves as far as they came, and not in final figures.",
    )
    return change(group=group)


def download(scene: Scene, view: View, file: File, label: str, store: str, explained: str) -> None:
    """A button that makes a file of the page and saves it.

    Args:
        scene: the store.
        view: the runs, metrics and axes that are shown.
        file: which.
        label: of the button.
        store: the store's address as it may be shown.
        explained: shown when the pointer rests on it.
    """
    icon = ":material/download:"
    address = link(file, view)
    if address is not None:
        st.link_button(label, address, icon=icon, help=explained, width="stretch")
    else:
        st.download_button(
            label,
            data=lambda: file.make(scene, view, store),
            file_name=file.name,
            mime=file.mime,
            icon=icon,
            on_click="ignore",
            width="stretch",
            help=explained,
        )
