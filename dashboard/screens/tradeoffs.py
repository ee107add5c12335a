"""Trade-offs: memory and time against quality, and the cost of reaching a target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import streamlit as st

from .. import text
from ..charts.still import Dot, trade_off
from ..comparison import QUALITIES, counted, mean, method_name
from ..facts import Facts, quality_key
from ..scene import Scene
from ..session import change, current, widget
from ..source import Run, Series
from ..transforms import COUNTERS, Goal, at_step, by_counter, by_step, first_reaching, goal, pareto, seed_groups
from ..view import View
from ..words import byte_unit, is_share
from .parts import choose_grouping, follow, is_dark
from .tables import number, table_height

_QUALITY_WORDS = ("val", "test", "eval", "acc", "f1", "loss", "score", "reward")


class Result(NamedTuple):
    """The end of a run, or the mean over the runs that differ in their seed; nan where that was not logged.

    Args:
        runs: it, or those of them that ended, if any has.
        name: a label.
        quality: the best value; shares in percent.
        spread: its standard deviation over the runs; nan for one.
        peak: memory in bytes; the largest of the runs.
        seconds: of training.
        ended: the runs have; else the figures are those logged so far.
    """

    runs: tuple[Run, ...]
    name: str
    quality: float
    spread: float
    peak: float
    seconds: float
    ended: bool


def render(scene: Scene) -> None:
    """The page."""
    shown = scene.shown(current())
    available = sorted({key for run in shown for key in run.keys if any(word in key.lower() for word in _QUALITY_WORDS)})
    if not available:
        st.info("None of the selected runs has logged how good its model is: a loss, an accuracy, or another score.")
        return
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        key = _choose_quality(shown, available)
        choose_grouping()
        target = _choose_target(results(scene, current(), key), key)
    follow(scene, lambda fresh: _draw(fresh, key, target))


def results(scene: Scene, view: View, key: str) -> list[Result]:
    """The ends of the selected runs that logged the metric.

    Args:
        scene: the store.
        view: which runs, and whether those that differ in their seed go together.
        key: the quality metric.
    """

    def find() -> list[Result]:
        shown = [run for run in scene.shown(view) if key in run.keys]
        found = scene.facts(shown, key)
        groups = seed_groups(shown) if view.group else [[run] for run in shown]
        some = [_result(scene, group, found, 100 if is_share(key) else 1) for group in groups]
        return [one for one in some if not math.isnan(one.quality)]

    return scene.once(("results", view.selection, view.group, key), find)


def _result(scene: Scene, group: Sequence[Run], found: Mapping[str, Facts], scale: int) -> Result:
    runs = counted(group)
    best = [scale * found[run.id].quality for run in runs]
    known = [value for value in best if not math.isnan(value)]
    return Result(
        tuple(runs),
        scene.names[runs[-1].id] if len(runs) == 1 else f"{text.plain(method_name(runs[-1]), 40)} (n={len(runs)})",
        mean(best),
        float(np.std(known, ddof=1)) if len(known) > 1 else math.nan,
        max((found[run.id].peak for run in runs), key=lambda peak: (not math.isnan(peak), peak)),
        mean(found[run.id].seconds for run in runs),
        all(run.status == "FINISHED" for run in runs),
    )


def _choose_quality(shown: Sequence[Run], available: Sequence[str]) -> str:
    default = quality_key(shown, current().quality) or available[0]
    options = sorted({*available, default}, key=lambda key: (key not in QUALITIES, key))
    key = st.selectbox(
        "Quality",
        options,
        options.index(default),
        format_func=lambda one: text.plain(one, 60),
        key=widget("quality"),
        width=260,
        help="The measure of how good a model is. A run's best value counts.",
    )
    if key != default:
        change(quality=key, target=None)
    return key


def _choose_target(found: Sequence[Result], key: str) -> float:
    values = [one.quality for one in found] or [0.0]
    low, high = min(values), max(values)
    begin = current().target
    if begin is None or not low <= begin <= high:
        begin = float(np.median(values))
    if high <= low:
        return low
    step = 10.0 ** math.floor(math.log10((high - low) / 50))
    target = st.slider(
        f"Target{' in %' if is_share(key) else ''}",
        float(math.floor(low / step) * step),
        float(math.ceil(high / step) * step),
        round(begin / step) * step,
        step,
        key=widget(f"target-{key}"),
        width=330,
        help="The quality to reach. The table shows the cost of each run up to the step that first reached it.",
    )
    if not math.isclose(target, round(begin / step) * step):
        change(target=target)
    return target


def _draw(scene: Scene, key: str, target: float) -> None:
    found = results(scene, current(), key)
    name = f"{text.plain(key, 40)}{' in %' if is_share(key) else ''}"
    size, unit = byte_unit([one.peak for one in found])
    left, right = st.columns(2)
    with left:
        places = [one.peak / size for one in found]
        _scatter(scene, found, places, "Memory against quality", f"peak memory in {unit}", name, goal(key))
    with right:
        places = [one.seconds for one in found]
        _scatter(scene, found, places, "Time against quality", "seconds of training", name, goal(key))
    st.caption(
        "Larger dots on the dashed line are beaten by no other run: none is better in one quantity and no worse in the other. "
        "Hollow dots are runs that have not ended: they are not judged yet."
    )
    _to_target(scene, found, key, target, size, unit)


def _scatter(
    scene: Scene, found: Sequence[Result], places: Sequence[float], title: str, x_name: str, y_name: str, better: Goal
) -> None:
    x, y = np.array(places, float), np.array([one.quality for one in found], float)
    ended = np.array([one.ended for one in found], bool)
    front = pareto(np.where(ended, x, np.nan), y, "min", better)
    looks, dark = scene.styles(current()), is_dark()
    colors = [looks[one.runs[-1].id] for one in found]
    dots = [
        Dot(one.name, float(a), float(b), look.dark if dark else look.light, bool(f), one.ended, one.spread)
        for one, look, a, b, f in zip(found, colors, x, y, front, strict=True)
        if math.isfinite(a)
    ]
    if not dots:
        st.info(f"No selected run has logged its {x_name.split(' in ')[0]} and this metric.")
        return
    xs = [dot.x for dot in dots]
    wide = min(xs) > 0 and max(xs) > 8 * min(xs)
    st.echarts_chart(
        trade_off(title, x_name, y_name, dots, dark, wide),
        height=380,
        key=f"trade-off-{title.split()[0].lower()}",
        alt=f"{title}, a dot for each run",
    )


class Reach(NamedTuple):
    """The cost of a run until it first reached the target; nan where that is not known."""

    step: float
    seconds: float
    memory: float
    forwards: float
    examples: float


def reaches(scene: Scene, runs: Sequence[Run], key: str, wanted: float) -> dict[str, Reach]:
    """When these runs first reached the target, by id; without those that have not."""
    source = scene.store.source
    scene.read(runs, [key])
    series = {run.id: source.series(run.id, key) for run in runs}
    first = {run.id: first_reaching(by_step(series[run.id]), wanted, goal(key)) for run in runs}
    steps = {run_id: int(step) for run_id, step in first.items() if step is not None}
    there = [run for run in runs if run.id in steps]
    spent = [_values_at(scene, there, one, steps) for one in ("memory/peak", COUNTERS["forwards"], COUNTERS["examples"])]
    return {
        run.id: Reach(steps[run.id], _seconds(run, series[run.id], steps[run.id]), *(one[run.id] for one in spent))
        for run in there
    }


def _seconds(run: Run, series: Series, step: int) -> float:
    """From the run's start to a step; nan where the clock of its start was another one."""
    begun = series.time.min() if math.isnan(run.started) else run.started
    seconds = float(series.time[np.searchsorted(series.step, step)] - begun)
    return seconds if seconds >= 0 else math.nan


def _values_at(scene: Scene, runs: Sequence[Run], key: str, steps: Mapping[str, int]) -> dict[str, float]:
    """The value of a metric at a step of each run; nan: not known. A counter grows along a line between its points."""
    source, having = scene.store.source, [run for run in runs if key in run.keys]
    found = source.values_at({run.id: steps[run.id] for run in having}, key)
    between = [run for run in having if run.id not in found]
    scene.read(between, [key])
    for run in between:
        points, step = source.series(run.id, key), steps[run.id]
        if key in COUNTERS.values():
            found.update((run.id, float(x)) for x in by_counter(Series(np.array([step]), np.zeros(1), np.zeros(1)), points).x)
        else:
            found[run.id] = at_step(points, step)[0]
    return {run.id: found.get(run.id, math.nan) for run in runs}


def _to_target(scene: Scene, found: Sequence[Result], key: str, target: float, size: float, unit: str) -> None:
    share, grouped = is_share(key), current().group

    def columns() -> pd.DataFrame:
        wanted = target / 100 if share else target
        reached = reaches(scene, [run for one in found for run in one.runs], key, wanted)
        rows: list[tuple[str, bool, str, list[float]]] = []
        for one in found:
            there = [reached[run.id] for run in one.runs if run.id in reached]
            spent = [mean(column) for column in zip(*there, strict=True)] if there else [math.nan] * len(Reach._fields)
            spent[2] /= size
            seeds = f"{len(there)} of {len(one.runs)}"
            rows.append((one.name, len(there) == len(one.runs), seeds, [*spent, one.quality, one.spread]))
        rows.sort(key=lambda row: (not row[1], math.inf if math.isnan(row[3][1]) else row[3][1]))
        names = ["run", "reached", "seeds", *Reach._fields, "best", "spread"]
        cells = [(*words, *numbers) for *words, numbers in rows]
        table = pd.DataFrame(cells, columns=names).astype(dict.fromkeys(names[3:], float))
        return table if grouped else table.drop(columns=["seeds", "spread"])

    view = current()
    st.subheader("To the target")
    table = scene.once(("to target", view.selection, grouped, key, target), columns)
    st.dataframe(
        table,
        hide_index=True,
        key="to-target",
        height=table_height(len(table)),
        placeholder="–",
        column_config={
            "run": st.column_config.TextColumn("Method" if grouped else "Run", width="medium"),
            "reached": st.column_config.CheckboxColumn(
                "Reached", help="It has logged the target or better. Nothing is interpolated."
            ),
            "seeds": st.column_config.TextColumn("Seeds", help="Those that reached it; the figures are their means."),
            "step": number("Step", "The first step at which it had.", whole=True),
            "seconds": number("Seconds", "Since the run started, validation included."),
            "memory": number(f"Peak {unit} until then", "The most memory that it had needed up to that step."),
            "forwards": number(
                "Forward passes", "Up to that step. A backprop step counts as one and costs about three.", whole=True
            ),
            "examples": number("Examples", "Seen up to that step.", whole=True),
            "best": number("Best" + (" %" if share else ""), "The best value of the metric."),
            "spread": number("±", "One standard deviation over the seeds."),
        },
    )
