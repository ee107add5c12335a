"""Sweep: a metric against any numeric parameter by method, and all parameters side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import streamlit as st

from .. import text
from ..charts.sweep import Axis, Trial, against, parallel
from ..columns import Cell, Column, read
from ..facts import quality_key
from ..palette import styles
from ..query import number
from ..scene import Scene
from ..session import change, current, widget
from ..source import Run
from ..transforms import differing, goal
from ..words import is_bytes
from .parts import follow, is_dark

_MOST_UPRIGHTS = 7
_MOST_PARALLEL = 300  # lines beyond which nothing is to be seen, and the browser labours
_NOT_SWEPT = ("seed", "random_seed", "zo/seed", "seed_everything")


def render(scene: Scene) -> None:
    """The page."""
    shown = scene.shown(current())
    parameters = swept(shown)
    keys = sorted({key for run in shown for key in run.keys})
    if not keys or not parameters:
        st.info(
            "A sweep needs two or more runs with a parameter that differs among them and is a number, and a metric that says "
            "how good each was."
        )
        return
    view = current()
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        default = quality_key(shown, view.quality) or keys[0]
        key = st.selectbox(
            "Metric",
            keys,
            keys.index(default) if default in keys else 0,
            format_func=lambda one: text.plain(one, 60),
            key=widget("quality"),
            width=280,
            help="Its best value counts: the largest of an accuracy, the smallest of a loss.",
        )
        if key != default:
            change(quality=key, target=None)
        parameter = st.selectbox(
            "Against",
            parameters,
            parameters.index(view.parameter) if view.parameter in parameters else 0,
            format_func=lambda one: text.plain(one, 60),
            key=widget("parameter"),
            width=280,
        )
        change(parameter="" if parameter == parameters[0] else parameter)
    follow(scene, lambda fresh: _draw(fresh, key, parameter, parameters))


def swept(runs: Sequence[Run]) -> list[str]:
    """Parameters that differ and of which most values are numbers; seeds last."""
    found = []
    for name, values in differing(runs).items():
        known = [value for value in values if value is not None]
        if sum(number(value) is not None for value in known) > len(known) / 2:
            found.append(name)
    return sorted(found, key=lambda name: (name in _NOT_SWEPT, "lr" not in name.lower() and "rate" not in name.lower(), name))


def _draw(scene: Scene, key: str, parameter: str, parameters: Sequence[str]) -> None:
    runs = [run for run in scene.shown(current()) if key in run.keys]
    metric = Column("best", key)
    columns = [metric, *(Column("params", name) for name in differing(runs))]
    cells = read(scene, [[run] for run in runs], columns)
    values = [cell.value for cell in cells[metric]]
    methods = [run.tags.get("zo.method", "") for run in runs]
    looks, dark = styles(sorted(set(methods))), is_dark()
    colors = {method: look.dark if dark else look.light for method, look in looks.items()}
    trials = []
    for run, method, y in zip(runs, methods, values, strict=True):
        x = number(run.params.get(parameter, ""))
        if x is not None and isinstance(y, float) and math.isfinite(x) and math.isfinite(y):
            trials.append(Trial(scene.names[run.id], text.plain(method, 40) or "runs", x, y, colors[method]))
    if trials:
        options = against(text.plain(parameter, 40), metric.label, trials, dark)
        st.echarts_chart(options, height=420, key="sweep", alt=f"{metric.label} against the parameter, a dot for each run")
        best = (min if goal(key) == "min" or is_bytes(key) else max)(trials, key=lambda one: one.y)
        st.caption(f"Best of {len(trials):,}: {text.code(best.name)} with {best.x:g}. Lines join each method's means.")
    else:
        st.info("No selected run has both a number for this parameter and this metric.")
    _across(runs[:_MOST_PARALLEL], scene, cells, metric, parameters, [colors[method] for method in methods][:_MOST_PARALLEL])
    if len(runs) > _MOST_PARALLEL:
        st.caption(f"The newest {_MOST_PARALLEL} of {len(runs):,} runs; the filter in the sidebar says which are selected.")


def _across(
    runs: Sequence[Run],
    scene: Scene,
    cells: dict[Column, list[Cell]],
    metric: Column,
    parameters: Sequence[str],
    colors: Sequence[str],
) -> None:
    names = [one.name for one in cells if one.kind == "params" and one.name not in _NOT_SWEPT]
    chosen = sorted(names, key=lambda name: name not in parameters)[: _MOST_UPRIGHTS - 1]
    axes = [_axis(Column("params", name), cells, len(runs)) for name in chosen]
    if not axes or len(runs) < 2:
        return
    axes.append(_axis(metric, cells, len(runs))._replace(best=goal(metric.name)))
    options = parallel(axes, [scene.names[run.id] for run in runs], colors, is_dark())
    st.echarts_chart(options, height=380, key="parallel", alt="A line for each run across its parameters and the metric")


def _axis(one: Column, cells: dict[Column, list[Cell]], count: int) -> Axis:
    values = [cell.value for cell in cells[one]][:count]
    return Axis(one.label, [text.plain(value, 24) if isinstance(value, str) else value for value in values])
