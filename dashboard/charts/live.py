"""Live charts as Streamlit components: the engine once, a shell for each chart, and feeds that bring data.

Shells stand outside the page's refreshing fragment, feeds inside: a tick never touches a chart's element, so zoom, hidden
lines and scroll stay. The engine's code travels once, a shell's or a feed's is one line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import streamlit as st

Zoom = tuple[float, float] | None

_HERE = Path(__file__).parent
_served = False
_SCRIPTS = (
    "format.js",
    "unpack.js",
    "chart.js",
    "keys.js",
    "paint.js",
    "runlist.js",
    "alerts.js",
    "cards.js",
    "early.js",
    "board.js",
)
_READY = (
    'const ready = () => globalThis.zo ?? new Promise((done) => addEventListener("zo-ready", () => done(globalThis.zo), '
    "{ once: true }));\nexport default async (c) => (await ready()).%s(c);"
)


class Rule(NamedTuple):
    """A level across a chart; with ``drag`` the user can move it."""

    y: float
    label: str
    drag: bool = False


class Figure(NamedTuple):
    """A number on a card: its name, an explanation for the pointer, and ``good``, ``warn``, ``bad`` or ``plain``."""

    value: str
    label: str
    why: str
    tone: str = "plain"


class Card(NamedTuple):
    """A card of the overview; all strings are shown as text.

    Args:
        title: its head.
        hover: the whole title, and more.
        figures: its numbers.
        light: colour of its dot on a light page; "": no dot.
        dark: likewise on a dark one.
        chip: a run's status and the reason for it.
        progress: share that is done, None if nobody knows, and words about it.
        spark: values of a small line.
        text: a sentence or two below the figures.
    """

    title: str
    hover: str
    figures: Sequence[Figure]
    light: str = ""
    dark: str = ""
    chip: tuple[str, str] | None = None
    progress: tuple[float | None, str] | None = None
    spark: Sequence[float] = ()
    text: str = ""


def engine() -> None:
    """Bring uPlot and our code into the page; once in a run of the script, before any chart."""
    _component("engine")(key="zo-engine")


def legend(data: Mapping[str, Any]) -> None:
    """The chips above a page's charts; they carry the lines' styles too, so every page with charts has one.

    Args:
        data: ``board``, the name of the set of charts; ``series``, for each line ``id``, ``label``, ``title`` (on hover),
            ``light`` and ``dark`` colours and ``dash`` lengths; and to begin with ``zoom``, a range of x or None for
            everything, and ``hidden``, the ids of lines that are off.
    """
    _component("legend")(key=f"zo-legend-{data['board']}", data=data)


def chart(data: Mapping[str, Any], on_level: Callable[[], None] | None = None) -> None:
    """The shell of a chart; its data come by :func:`feed`.

    Args:
        data: the result of :func:`shell`. The component's key is ``zo-chart-<board>-<name>``.
        on_level: called when the user has dragged a rule; the level is in the component's state.
    """
    _component("chart")(key=f"zo-chart-{data['board']}-{data['id']}", data=data, on_level_change=on_level or _nothing)


def shell(
    board: str,
    name: str,
    *,
    x_label: str,
    x_kind: str = "count",
    title: str | None = None,
    why: str = "",
    unit: str = "",
    log: bool = False,
    from_zero: bool = False,
    height: int = 280,
    rules: Sequence[Rule] = (),
) -> dict[str, Any]:
    """How a chart is drawn.

    Args:
        board: name of the set of charts.
        name: the chart's id on the board.
        x_label: the name of the x axis.
        x_kind: ``count``, or ``time`` for seconds.
        title: shown above; None: the name.
        why: an explanation for the pointer on the title.
        unit: of y, in the title.
        log: logarithmic y axis.
        from_zero: the y axis begins at 0.
        height: in pixels.
        rules: levels drawn across.
    """
    return {
        "board": board,
        "id": name,
        "title": title or name,
        "why": why,
        "x": {"label": x_label, "kind": x_kind},
        "unit": unit,
        "log": log,
        "zero": from_zero,
        "height": height,
        "rules": [rule._asdict() for rule in rules],
        "empty": "No run that is shown has logged this.",
    }


def feed(board: str, part: str, data: bytes, zoom: Zoom, hidden: Sequence[str]) -> None:
    """Hand a packed message to the board's charts.

    Args:
        board: name of the set of charts.
        part: as packed.
        data: the result of :func:`dashboard.charts.pack.pack`.
        zoom: as the user has it by now.
        hidden: likewise.
    """
    begin = {"seen": {"zoom": zoom, "hidden": list(hidden)}}
    _component("feed")(key=_feed_key(board, part), data=data, default=begin, on_seen_change=_nothing, height=1)


def seen(board: str, zoom: Zoom, hidden: Sequence[str]) -> tuple[Zoom, tuple[str, ...]]:
    """The user's zoom and hidden lines on the board's charts, before they are fed again.

    Args:
        board: name of the set of charts.
        zoom: the answer while the user has done nothing.
        hidden: likewise.
    """
    state = st.session_state.get(_feed_key(board, "live"))
    found = state.get("seen") if isinstance(state, Mapping) else None
    if not isinstance(found, Mapping):
        return zoom, tuple(hidden)
    ends = found.get("zoom")
    return (float(ends[0]), float(ends[1])) if ends else None, tuple(str(one) for one in found.get("hidden", ()))


def _feed_key(board: str, part: str) -> str:
    return f"zo-feed-{board}-{part}"


class Selection(NamedTuple):
    """Which runs are looked at.

    Args:
        filter: those that this text means.
        all: of these, all but :attr:`ids`; else only :attr:`ids`.
        ids: of runs.
    """

    filter: str
    all: bool
    ids: tuple[str, ...]


def selection(key: str, begin: Selection) -> Selection:
    """The user's changes to the list of runs, before it is drawn again.

    Args:
        key: of the component.
        begin: the selection that it began with.
    """
    state = st.session_state.get(key)
    text, selected = (state.get("filter"), state.get("selected")) if isinstance(state, Mapping) else (None, None)
    ticked = begin
    if isinstance(selected, Mapping):
        ticked = begin._replace(all=bool(selected.get("all")), ids=tuple(str(one) for one in selected.get("ids", ())))
    return ticked._replace(filter=text) if isinstance(text, str) else ticked


def run_list(key: str, runs: Sequence[Mapping[str, Any]], chosen: Selection, left: Sequence[str] | None, trouble: str) -> None:
    """The list of runs with its filter and with boxes to tick; :func:`selection` gives the user's choice.

    Args:
        key: of the component; another one begins anew.
        runs: for each ``id``, ``label``, ``title`` (on hover), ``light``, ``dark``, ``dash``, ``status`` and ``why``.
        chosen: the selection so far.
        left: ids of the runs that its filter leaves; None: all.
        trouble: why its filter makes no sense; "": it does.
    """
    data = {
        "key": key,
        "runs": [dict(run) for run in runs],
        "all": chosen.all,
        "ids": list(chosen.ids),
        "filter": chosen.filter,
        "left": None if left is None else list(left),
        "trouble": trouble,
    }
    state = {"selected": {"all": chosen.all, "ids": list(chosen.ids)}, "filter": chosen.filter}
    _component("runs")(key=key, data=data, default=state, on_selected_change=_nothing, on_filter_change=_nothing)


def alerts(runs: Sequence[Mapping[str, str]]) -> None:
    """Tell the user of runs that end or go wrong while the page is open: in its title, and if asked, by a notification.

    Args:
        runs: for each ``id``, ``label`` and ``status``.
    """
    _component("alerts")(key="zo-alerts", data={"runs": [dict(run) for run in runs]})


def cards(name: str, shown: Sequence[Card]) -> None:
    """A row of cards.

    Args:
        name: which row it is.
        shown: the cards.
    """
    _component("cards")(key=f"zo-cards-{name}", data={"cards": [card._asdict() for card in shown]})


def _nothing() -> None:
    """Streamlit keeps a component's state only where a callback is named."""


@cache
def _component(kind: str) -> Callable[..., Any]:
    if kind != "engine":
        return st.components.v2.component(f"zolightning.{kind}", js=_READY % kind, isolate_styles=False)
    js, css = code()
    if _served:
        js = f"await import(new URL({json.dumps(module()[0])}, document.baseURI).href);\nexport default () => {{}};"
    return st.components.v2.component("zolightning.engine", js=js, css=css, isolate_styles=False)


def module() -> tuple[str, str]:
    """The engine as a file of the server, which browsers keep: its path, and the code. Whoever calls this serves it."""
    global _served
    _served = True
    js, css = code()
    text = f"{js}\nif (location.pathname.endsWith('/curves')) zo.early({json.dumps(css)});"
    return f"./zo/engine-{hashlib.sha256(text.encode()).hexdigest()[:16]}.js", text


@cache
def code() -> tuple[str, str]:
    """The engine: uPlot and ours, as a JavaScript module and a style sheet."""
    uplot = resources.files("uplot") / "static"
    scripts = [(uplot / "uPlot.iife.js").read_text("utf-8"), *((_HERE / name).read_text("utf-8") for name in _SCRIPTS)]
    styles = [(uplot / "uPlot.min.css").read_text("utf-8"), (_HERE / "charts.css").read_text("utf-8")]
    # Streamlit takes a text without line breaks for a file's name
    return "\n".join(scripts), "\n".join(styles)
