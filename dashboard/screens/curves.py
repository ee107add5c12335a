"""Curves: any metrics over steps, time or work, with a table of best, last and at-step values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from .. import text
from ..charts import live
from ..downloads import CURVES
from ..scene import Scene
from ..session import board, change, current, widget
from ..source import Run
from ..view import View
from .parts import choose_axis, choose_grouping, download, feed, follow, legend, shell
from .tables import best_and_last

_FIRST = ("train/loss", "val/loss", "val/accuracy", "test/accuracy", "memory/peak", "zo/projected_grad")
_TELLING = ("loss", "acc", "f1", "reward", "score", "error", "perplexity")
_FIRST_COUNT = 4
_MOST_CHARTS = 12  # of a section
_ALONE = "others"
_SMOOTHINGS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


def render(scene: Scene) -> None:
    """The page."""
    shown = scene.shown(current())
    available = sorted({key for run in shown for key in run.keys})
    view = _controls(available)
    keys = chosen(scene, view)
    legend(scene, view)
    columns = st.columns(2 if len(keys) > 1 else 1)
    for place, data in enumerate(shells(keys, view, board())):
        with columns[place % len(columns)]:
            live.chart(data)
    if not keys:
        st.info("Select runs in the sidebar, and metrics above.")
    else:
        change(at=_at_step(view))
    opened = _sections(view, [key for key in available if key not in keys])
    follow(scene, lambda fresh: _draw(fresh, keys, opened))
    if keys:
        download(
            scene,
            replace(current(), keys=(*keys, *opened)),
            CURVES,
            "CSV of these curves",
            "",
            "Every point of the selected runs and metrics, as it was logged, within the zoom.",
        )


def _sections(view: View, others: Sequence[str]) -> list[str]:
    """The other metrics by the first part of their names, folded up; only those of an open section are read and drawn."""
    sections: dict[str, list[str]] = {}
    for key in others:
        sections.setdefault(key.partition("/")[0] if "/" in key else _ALONE, []).append(key)
    drawn: list[str] = []
    opened: list[str] = []
    for name, keys in sorted(sections.items()):
        many = "metric" if len(keys) == 1 else "metrics"
        section = st.expander(
            f"{text.code(name, 60)} {len(keys):,} {many}",
            name in view.sections,
            key=widget(f"section-{name}"),
            on_change="rerun",
        )
        if not section.open:
            continue
        opened.append(name)
        with section:
            columns = st.columns(2 if len(keys) > 1 else 1)
            for place, data in enumerate(shells(keys[:_MOST_CHARTS], view, board())):
                with columns[place % len(columns)]:
                    live.chart(data)
            if len(keys) > _MOST_CHARTS:
                st.caption(f"The first {_MOST_CHARTS} of {len(keys):,}; choose others by name above.")
        drawn += keys[:_MOST_CHARTS]
    change(sections=tuple(opened))
    return drawn


def _draw(scene: Scene, keys: Sequence[str], opened: Sequence[str]) -> None:
    feed(scene, [*keys, *opened])
    view = current()
    if keys:
        for tab, key in zip(st.tabs([text.code(key, 60) for key in keys]), keys, strict=True):
            with tab:
                best_and_last(scene, scene.shown(view), key, view.at)


def chosen(scene: Scene, view: View) -> list[str]:
    """The metrics that are drawn: the view's, else the usual ones."""
    shown = scene.shown(view)
    there = {key for run in shown for key in run.keys}
    return [key for key in view.keys if key in there] or _lines(scene, shown)


def _lines(scene: Scene, runs: Sequence[Run]) -> list[str]:
    """The usual metrics but for those that are one dot for each run, as a test's result is: the tables have these."""
    keys = first_keys(runs)
    scene.read(runs, keys)
    longest = {key: max(len(scene.store.source.series(run.id, key).step) for run in runs if key in run.keys) for key in keys}
    return [key for key in keys if longest[key] > 1] or keys


def shells(keys: Sequence[str], view: View, board: str) -> list[dict[str, Any]]:
    """The arguments of the page's charts."""
    return [shell(key, view, board, height=280 if len(keys) > 1 else 420) for key in keys]


def first_keys(runs: Sequence[Run]) -> list[str]:
    """The metrics of somebody who has not chosen any: the usual ones, else whatever most runs have logged."""
    counts = {key: sum(key in run.keys for run in runs) for key in {key for run in runs for key in run.keys}}
    usual = [key for key in _FIRST if key in counts]
    others = sorted((key for key in counts if key not in usual), key=lambda key: (-counts[key], key))
    telling = [key for key in others if any(word in key.lower() for word in _TELLING)]
    return (usual + telling or others)[:_FIRST_COUNT]


def _controls(available: Sequence[str]) -> View:
    view = current()
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        keys = st.multiselect(
            "Metrics",
            available,
            [key for key in view.keys if key in available],
            format_func=lambda key: text.plain(key, 80),
            placeholder="The usual ones",
            key=widget("keys"),
            width=330,
        )
        change(keys=tuple(keys))
        with st.container(width=150):
            choose_axis()
        smoothing = st.select_slider(
            "Smoothing",
            _SMOOTHINGS,
            min(_SMOOTHINGS, key=lambda one: abs(one - view.smoothing)),
            format_func=lambda one: "off" if one == 0 else f"{one:g}",
            key=widget("smoothing"),
            width=170,
            help="A moving average over all points: each counts this much of the one after it. The points as they were logged "
            "stay behind it, faint.",
        )
        log = st.toggle(
            "Log y",
            view.log,
            key=widget("log"),
            help="Values of zero and below have no place on a logarithmic axis: they are marked at its lower edge.",
        )
        choose_grouping()
    return change(smoothing=smoothing, log=log)


def _at_step(view: View) -> int | None:
    return st.number_input(
        "Values at step",
        min_value=0,
        value=view.at,
        step=1,
        placeholder="last",
        key=widget("at"),
        width=150,
        help="The column “At step” of the tables: the last value logged at that step or before.",
    )
