"""Memory: what training needs over time, what it is for, and which runs fit on a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pandas as pd
import streamlit as st

from .. import text
from ..budgets import devices, largest, parts, peak, suggested
from ..charts import live
from ..charts.live import Rule
from ..charts.still import PARTS, stacked_memory
from ..facts import quality_key
from ..scene import Scene
from ..session import board, change, current, widget
from ..source import Run
from ..transforms import goal, summarise
from ..view import View
from ..words import is_share
from .parts import choose_axis, feed, follow, is_dark, legend, shell
from .tables import number, table_height

_TIMELINES = ("memory/peak", "memory/rss")


def render(scene: Scene) -> None:
    """The page."""
    shown = scene.shown(current())
    scene.read(shown, {key for run in shown for key in run.keys if key.startswith("memory/")})
    keys = [key for key in _TIMELINES if any(key in run.keys for run in shown)]
    measured = measured_runs(scene, shown)
    if not measured and not keys:
        st.info(
            "None of the selected runs has logged its memory. Runs with zolightning's `ZOMonitor` callback do; others can log "
            "`memory/peak` in bytes, and its parts: `memory/weights`, `memory/gradients`, `memory/optimizer_state`, "
            "`memory/activations`."
        )
        return
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        budget = _budget([peak(run, scene.store.source.series) for run in measured])
        with st.container(width=150):
            view = choose_axis()
    legend(scene, view)
    levels = [Rule(size, label) for size, label in devices(shown).items()] + [
        Rule(budget, f"budget: {budget:g} GiB", drag=True)
    ]
    columns = st.columns(max(1, len(keys)))
    for column, key in zip(columns, keys, strict=False):
        with column:
            live.chart(shell(key, view, board(), rules=levels if key == keys[0] else ()), partial(_dragged, key))
    follow(scene, lambda fresh: _draw(fresh, keys, budget))


def measured_runs(scene: Scene, shown: Sequence[Run]) -> list[Run]:
    """The runs that have logged a peak, smallest first."""
    peaks = {run.id: peak(run, scene.store.source.series) for run in shown}
    return sorted((run for run in shown if not math.isnan(peaks[run.id])), key=lambda run: peaks[run.id])


def _budget(peaks: Sequence[float]) -> float:
    begin = current().budget or suggested(peaks)
    key = widget("budget")
    st.session_state.setdefault(key, round(begin, 1))  # not as the slider's value: a dragged line sets it too
    budget: float = st.slider(
        "Budget: what your device has",
        min_value=0.1,
        max_value=largest(peaks, begin),
        step=0.1,
        format="%.1f GiB",
        key=key,
        width=420,
        help="Which runs would fit on a device with this much memory? Move the slider, or drag the line in the chart.",
    )
    if budget != round(begin, 1):
        change(budget=budget)
    return budget


def _dragged(key: str) -> None:
    """The line was let go: the slider goes where it is."""
    level = st.session_state[f"zo-chart-{board()}-{key}"].get("level")
    if isinstance(level, (int, float)) and level >= 0.1:
        change(budget=round(float(level), 1))
        st.session_state[widget("budget")] = current().budget


def _draw(scene: Scene, keys: Sequence[str], budget: float) -> None:
    feed(scene, keys, smoothed=False)
    view = current()
    runs = measured_runs(scene, scene.shown(view))
    if not runs:
        return
    _fits(scene, runs, budget, view)
    found = parts(runs, scene.store.source.series)
    ordered = {name: found[name] for name in [*(n for n in PARTS if n in found), *(n for n in found if n not in PARTS)]}
    st.echarts_chart(
        stacked_memory([scene.names[run.id] for run in runs], ordered, budget, is_dark()),
        height=120 + 30 * len(runs),
        key="memory-parts",
        alt="Bars of what each run's peak memory is for",
    )


def _fits(scene: Scene, runs: Sequence[Run], budget: float, view: View) -> None:
    series, names = scene.store.source.series, scene.names
    key = quality_key(runs, view.quality)
    share = key is not None and is_share(key)
    peaks = [peak(run, series) for run in runs]
    count = sum(one <= budget for one in peaks)
    st.markdown(f"**{count} of {len(runs)} runs fit into {budget:g} GiB**")
    table = pd.DataFrame(
        {
            "run": [names[run.id] for run in runs],
            "fits": ["fits" if one <= budget else "too large" for one in peaks],
            "peak": peaks,
            "used": [one / budget for one in peaks],
            "left": [budget - one for one in peaks],
            "quality": [
                (100 if share else 1) * summarise(series(run.id, key), goal(key)).best if key in run.keys and key else math.nan
                for run in runs
            ],
        }
    )
    st.dataframe(
        table,
        hide_index=True,
        key="memory-fits",
        height=table_height(len(table)),
        placeholder="–",
        column_config={
            "run": st.column_config.TextColumn("Run", width="medium"),
            "fits": st.column_config.TextColumn("Fits", help="Its peak is within the budget."),
            "peak": number("Peak GiB", "The most memory that training needed at any moment, in GiB (2³⁰ bytes)."),
            "used": st.column_config.ProgressColumn("Of the budget", format="percent", min_value=0, max_value=1),
            "left": number("Left GiB", "What the budget has beyond the peak; negative: what is missing."),
            "quality": number((text.plain(key, 30) if key else "Quality") + (" %" if share else ""), "The best value."),
        },
    )
