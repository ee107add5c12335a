"""Overview: what is running, how far it is, whether it learns, what it costs, and what was saved against backprop."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import pandas as pd
import streamlit as st

from .. import text, words
from ..charts.live import Card, Figure, cards
from ..comparison import Saving, compare
from ..facts import READ, Facts, facts, quality_key
from ..scene import Scene
from ..session import current
from ..source import Run
from ..transforms import goal
from .parts import follow
from .tables import number, table_height

_MOST_CARDS = 6


def render(scene: Scene) -> None:
    """The page."""
    follow(scene, _draw)


def _draw(scene: Scene) -> None:
    view = current()
    shown = scene.shown(view)
    key = quality_key(scene.runs, view.quality)
    scene.read(scene.runs, [*READ, *([key] if key is not None else [])])
    series = scene.store.source.series
    found = {run.id: facts(run, series, key) for run in scene.runs}
    savings = compare(scene.sound(view), series, key if key == view.quality else None)
    _running(scene, found)
    _savings(savings)
    if shown:
        st.subheader("Runs")
        _table(scene, shown, found, key, savings)
    else:
        st.info("Select runs in the sidebar.")


def _running(scene: Scene, found: Mapping[str, Facts]) -> None:
    going = [
        run for run in scene.runs if run.status == "RUNNING" and scene.states[run.id].kind in ("live", "diverged", "stale")
    ]
    silent = sum(scene.states[run.id].kind == "stale" for run in going)
    running = f"Running now: {len(going) - silent}" if len(going) > silent else "Nothing is running"
    st.subheader(running + (f", {silent} silent" if silent else ""))
    if not going:
        last = max(scene.runs, key=lambda run: run.ended if not math.isnan(run.ended) else 0.0)
        if not math.isnan(last.ended):
            st.text(f"{text.plain(last.name)} ended {words.ago(max(0.0, time.time() - last.ended))}.")
        return
    looks = scene.styles()
    cards(
        "running",
        [_run_card(scene, run, found[run.id], looks[run.id].light, looks[run.id].dark) for run in going[:_MOST_CARDS]],
    )
    if len(going) > _MOST_CARDS:
        st.caption(f"and {len(going) - _MOST_CARDS} more, in the table below")


def _run_card(scene: Scene, run: Run, fact: Facts, light: str, dark: str) -> Card:
    state = scene.states[run.id]
    figures = []
    if fact.loss_key is not None:
        figures.append(Figure(words.number(fact.loss), text.plain(fact.loss_key, 30), "Its last value. It should fall."))
    if not math.isnan(fact.quality):
        figures.append(Figure(_quality(fact.quality, scene), "best quality", "The best value of the quality metric so far."))
    if not math.isnan(fact.peak):
        figures.append(
            Figure(words.memory(fact.peak), "peak memory", "The most memory training has needed at any moment so far.")
        )
    if not math.isnan(fact.pace):
        figures.append(Figure(words.number(fact.pace), "steps/s", "Over the last half of its points."))
    return Card(
        text.plain(run.name, 60),
        text.plain(run.name, 500),
        figures,
        light,
        dark,
        (state.kind, text.plain(state.text, 300)),
        _progress(fact),
        fact.spark,
    )


def _quality(value: float, scene: Scene) -> str:
    key = quality_key(scene.runs, current().quality)
    return f"{100 * value:.1f} %" if key is not None and words.is_share(key) else words.number(value)


def _progress(fact: Facts) -> tuple[float | None, str]:
    if fact.step is None:
        return None, "no point yet"
    if fact.total is None:
        return None, f"step {fact.step:,}"
    share = min(1.0, fact.step / fact.total)
    left = "" if math.isnan(fact.left) else f", {words.duration(max(0.0, fact.left))} left"
    return share, f"{100 * share:.0f} %{left}"


def _savings(savings: Sequence[Saving]) -> None:
    if not savings:
        return
    st.subheader(
        "Zeroth-order training against backprop",
        help="Zeroth-order (ZO) training learns from the loss of forward passes alone. It keeps no gradients, no activations "
        "and no optimizer state, so it needs little more memory than inference; it pays with time, and often with quality. "
        "Each method stands beside the backprop run of the same task that came to the best quality.",
    )
    cards("savings", [_saving_card(saving) for saving in savings])


def _saving_card(saving: Saving) -> Card:
    figures = []
    if not math.isnan(saving.memory):
        share = f"{100 * saving.memory:+.0f} %".replace("-", "−")
        figures.append(
            Figure(share, "memory", "Peak memory of training against the baseline's.", "good" if saving.memory < 0 else "bad")
        )
    if not math.isnan(saving.time):
        times = f"{saving.time:.2g}×" if saving.time < 10 else f"{saving.time:.0f}×"
        figures.append(Figure(times, "the time", "Seconds of training against the baseline's, validation not counted."))
    if saving.quality_key is not None and not math.isnan(saving.quality):
        shares = words.is_share(saving.quality_key)
        change = f"{100 * saving.quality:+.1f} pts" if shares else f"{saving.quality:+.3g}"
        better = (saving.quality > 0) == (goal(saving.quality_key) == "max")
        figures.append(
            Figure(
                change.replace("-", "−"),
                text.plain(saving.quality_key, 24),
                "The best value less the baseline's; points are hundredths.",
                "good" if better else "bad",
            )
        )
    seeds = f", {len(saving.method.runs)} seeds" if len(saving.method.runs) > 1 else ""
    title = f"{text.plain(saving.method.name, 50)}{seeds}"
    state = "" if saving.ended else " (so far)"
    return Card(
        f"{title}{state}",
        text.plain(saving.detail, 600),
        figures,
        progress=(None, f"against {text.plain(saving.baseline.name, 50)}"),
    )


def _table(scene: Scene, shown: Sequence[Run], found: Mapping[str, Facts], key: str | None, savings: Sequence[Saving]) -> None:
    saved = {run.id: saving for saving in savings for run in saving.method.runs}
    share = key is not None and words.is_share(key)
    names = scene.names
    columns: dict[str, list[object]] = {
        "run": [names[run.id] for run in shown],
        "status": [scene.states[run.id].kind for run in shown],
        "done": [_share_done(found[run.id]) for run in shown],
        "shape": [list(found[run.id].spark) or None for run in shown],
        "loss": [found[run.id].loss for run in shown],
        "quality": [found[run.id].quality * (100 if share else 1) for run in shown],
        "peak": [found[run.id].peak / words.GIB for run in shown],
        "saved": [100 * saved[run.id].memory if run.id in saved else math.nan for run in shown],
        "seconds": [found[run.id].seconds for run in shown],
        "forwards": [found[run.id].forwards for run in shown],
        "started": [pd.Timestamp(run.started, unit="s", tz="UTC") if not math.isnan(run.started) else pd.NaT for run in shown],
    }
    table = pd.DataFrame(columns)
    table = table.drop(columns=[name for name in ("done", "quality", "peak", "saved", "forwards") if table[name].isna().all()])
    st.dataframe(
        table,
        hide_index=True,
        key="runs",
        height=table_height(len(table), 16),
        placeholder="–",
        column_config={
            "run": st.column_config.TextColumn("Run", width="medium"),
            "status": st.column_config.TextColumn(
                "Status",
                help="live: it logs. stale: silent for too long. killed: its process is gone. diverged: its loss came to NaN "
                "or far above its start.",
            ),
            "done": st.column_config.ProgressColumn(
                "Done", help="Share of its steps.", format="percent", min_value=0, max_value=1, width="small"
            ),
            "shape": st.column_config.LineChartColumn(
                "Learning", help="Its training loss from first to last. It should fall.", width="small"
            ),
            "loss": number("Loss", "The last value of that loss."),
            "quality": number(
                (text.plain(key, 30) if key else "Quality") + (" %" if share else ""),
                "How good the model is: the best value. Another metric can be chosen on the page Trade-offs.",
            ),
            "peak": number("Peak GiB", "The most memory that training needed at any moment, in GiB (2³⁰ bytes)."),
            "saved": st.column_config.NumberColumn(
                "vs backprop", help="Peak memory against the best backprop run of the same task.", format="%+.0f %%"
            ),
            "seconds": number("Train s", "Seconds of training; validation not counted where the run logged that."),
            "forwards": number("Forwards", "Forward passes of training. A backprop step counts as one.", whole=True),
            "started": st.column_config.DatetimeColumn("Started", format="distance"),
        },
    )


def _share_done(fact: Facts) -> float:
    if fact.step is None or fact.total is None:
        return math.nan
    return min(1.0, fact.step / fact.total)
