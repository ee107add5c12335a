"""Memory: the need of training over time, its parts, and the runs that fit on a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import streamlit as st

from .. import text
from ..budgets import devices, largest, named, parts, suggested, unit
from ..charts import live
from ..charts.live import Rule
from ..charts.still import PARTS, stacked_memory
from ..comparison import method_name
from ..facts import quality_key
from ..scene import Scene
from ..session import board, change, current, widget
from ..source import Run
from ..spent import PEAKS
from ..view import View
from ..words import GIB, byte_unit, is_share
from .parts import choose_axis, feed, follow, is_dark, legend, shell
from .tables import number, table_height

_TIMELINES = ("memory/peak", "memory/rss")
_MOST_BARS = 20
_SLIDER = "zo.budget-slider"


def render(scene: Scene) -> None:
    """The page."""
    shown = scene.shown(current())
    scene.read_extremes(shown, PEAKS)
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
        budget = _budget([_peak(scene, run) for run in measured])
        with st.container(width=150):
            view = choose_axis()
    legend(scene, view)
    levels = [Rule(size, label) for size, label in devices(shown).items()] + [
        Rule(budget, f"budget: {named(budget)}", drag=True)
    ]
    columns = st.columns(max(1, len(keys)))
    for column, key in zip(columns, keys, strict=False):
        with column:
            live.chart(
                shell(key, replace(view, log=False), board(), rules=levels if key == keys[0] else ()), partial(_dragged, key)
            )
    follow(scene, lambda fresh: _draw(fresh, keys, budget))


def measured_runs(scene: Scene, shown: Sequence[Run]) -> list[Run]:
    """The runs that have logged a peak, smallest first."""
    peaks = {run.id: _peak(scene, run) for run in shown}
    return sorted((run for run in shown if not math.isnan(peaks[run.id])), key=lambda run: peaks[run.id])


def _peak(scene: Scene, run: Run) -> float:
    """In GiB."""
    return scene.spent.peak(run) / GIB


def _budget(peaks: Sequence[float]) -> float:
    """Chosen in the unit that suits the runs; in GiB."""
    begin = current().budget or suggested(peaks)
    most = largest(peaks, begin)
    size, name = unit(most)
    key = widget(f"budget{'' if name == 'GiB' else name}")
    lowest = 0.1
    st.session_state.setdefault(key, max(lowest, round(begin / size, 1)))  # not the slider's value: a dragged line sets it too
    chosen: float = st.slider(
        "Budget: the memory of your device",
        min_value=lowest,
        max_value=float(most / size),
        step=0.1,
        format=f"%.1f {name}",
        key=key,
        width=420,
        help="Which runs would fit on a device with this much memory? Move the slider, or drag the line in the chart.",
    )
    st.session_state[_SLIDER] = key, size
    if chosen != round(begin / size, 1):
        change(budget=chosen * size)
    return chosen * size


def _dragged(key: str) -> None:
    """The line was let go: the slider goes where it is."""
    level = st.session_state[f"zo-chart-{board()}-{key}"].get("level")
    slider, size = st.session_state[_SLIDER]
    if isinstance(level, (int, float)) and level >= 0.1 * size:
        st.session_state[slider] = round(float(level) / size, 1)
        change(budget=st.session_state[slider] * size)


def _draw(scene: Scene, keys: Sequence[str], budget: float) -> None:
    feed(scene, keys, smoothed=False)
    view = current()
    runs = measured_runs(scene, scene.shown(view))
    if not runs:
        return
    _fits(scene, runs, budget, view)
    _parts(scene, runs, budget)
    st.caption("The memory that a method would need on a model, predicted before anything runs:")
    st.code(
        f"zolightning plan --model FOLDER-OR-ID --batch 8 --length 128 --device-memory {budget:.4g}",
        language=None,
        wrap_lines=True,
    )


def _parts(scene: Scene, runs: Sequence[Run], budget: float) -> None:
    """Bars for each run; where these are too many, for the run of each method that needed most."""
    bars, names = list(runs), [scene.names[run.id] for run in runs]
    if len(bars) > _MOST_BARS:
        largest_of = {method_name(run): run for run in runs}  # they come smallest first
        bars = sorted(largest_of.values(), key=lambda run: _peak(scene, run))[-_MOST_BARS:]
        names = [text.plain(method_name(run)) for run in bars]
        more = f" The largest {len(bars)} of {len(largest_of):,} methods." if len(bars) < len(largest_of) else ""
        st.caption(f"A bar for each method: its run that needed most.{more}")
    scene.read(bars, {key for run in bars for key in run.keys if key.startswith("memory/")})
    found = parts(bars, scene.store.source)
    ordered = {name: found[name] for name in [*(n for n in PARTS if n in found), *(n for n in found if n not in PARTS)]}
    size, unit_name = byte_unit([GIB * max(budget, *(_peak(scene, run) for run in bars))])
    scaled = {name: [value * GIB / size for value in values] for name, values in ordered.items()}
    st.echarts_chart(
        stacked_memory(names, scaled, budget * GIB / size, unit_name, is_dark()),
        height=120 + 30 * len(bars),
        key="memory-parts",
        alt="Bars of the parts of each run's peak memory",
    )


def _fits(scene: Scene, runs: Sequence[Run], budget: float, view: View) -> None:
    key = quality_key(runs, view.quality)
    share = key is not None and is_share(key)
    peaks = [_peak(scene, run) for run in runs]
    count = sum(one <= budget for one in peaks)
    st.markdown(f"**{count:,} of {len(runs):,} runs fit into {named(budget)}**")
    size, unit_name = byte_unit([GIB * one for one in peaks])

    def columns() -> pd.DataFrame:
        found = scene.facts(runs, key)
        return pd.DataFrame(
            {
                "run": [scene.names[run.id] for run in runs],
                "fits": ["fits" if one <= budget else "too large" for one in peaks],
                "peak": [one * GIB / size for one in peaks],
                "used": [one / budget for one in peaks],
                "left": [(budget - one) * GIB / size for one in peaks],
                "quality": [(100 if share else 1) * found[run.id].quality for run in runs],
            }
        )

    table = scene.once(("fits", view.selection, key, budget), columns)
    st.dataframe(
        table,
        hide_index=True,
        key="memory-fits",
        height=table_height(len(table)),
        placeholder="–",
        column_config={
            "run": st.column_config.TextColumn("Run", width="medium"),
            "fits": st.column_config.TextColumn("Fits", help="Its peak is within the budget."),
            "peak": number(f"Peak {unit_name}", "The most memory that training needed at any moment."),
            "used": st.column_config.ProgressColumn("Of the budget", format="percent", min_value=0, max_value=1),
            "left": number(f"Left {unit_name}", "The budget minus the peak. A negative number is missing memory."),
            "quality": number((text.plain(key, 30) if key else "Quality") + (" %" if share else ""), "The best value."),
        },
    )
