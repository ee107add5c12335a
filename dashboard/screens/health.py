"""Health: whether zeroth-order training goes well, and the fault and its cure where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import streamlit as st

from .. import text, words
from ..charts import live
from ..charts.live import Card, Figure, cards
from ..glossary import meaning
from ..health import GRAD, KEYS, ORDER, WAIT_KEYS, Finding, Verdict, examine, is_zeroth_order, overall
from ..scene import Scene
from ..session import board, current
from ..source import Run
from ..status import watched
from .parts import choose_axis, feed, follow, legend, shell
from .tables import table_height

_CHARTS = (GRAD, *KEYS[1:6])
_WORDS: Mapping[Verdict, str] = {"good": "well", "watch": "worth a look", "bad": "not well", "unknown": "nothing known"}
_TONES: Mapping[Verdict, str] = {"good": "good", "watch": "warn", "bad": "bad", "unknown": "plain"}
_ELSEWHERE = ("zo/ranks/", "zo/clients/", "zo/offload/")
"""Beginnings of metrics of training that is spread over ranks, clients, or tiers of memory."""


def render(scene: Scene) -> None:
    """The page."""
    shown = [run for run in scene.shown(current()) if is_zeroth_order(run)]
    if not shown:
        st.info(
            "None of the selected runs trains by zeroth-order estimates. Runs with zolightning's `ZOMonitor` callback log "
            "`zo/projected_grad`, `zo/tie_rate` and the like, and this page says from these how they are."
        )
        return
    follow(scene, _verdicts)
    keys = [key for key in _CHARTS if any(key in run.keys for run in shown)]
    if not keys:
        return
    st.subheader("Over the course of training")
    with st.container(width=150):
        view = choose_axis()
    legend(scene, view)
    columns = st.columns(2 if len(keys) > 1 else 1)
    for place, key in enumerate(keys):
        with columns[place % len(columns)]:
            live.chart(shell(key, view, board(), height=220))
    follow(scene, lambda fresh: feed(fresh, keys))


def _verdicts(scene: Scene) -> None:
    shown = [run for run in scene.shown(current()) if is_zeroth_order(run)]
    losses = {key for run in shown if (key := watched(run)) is not None}
    waiting = [run for run in shown if any(key.startswith(_ELSEWHERE) for key in run.keys)]
    scene.read(shown, {*KEYS, *losses})
    scene.read(waiting, WAIT_KEYS)
    found = {run.id: _examined(scene, run) for run in shown}
    shown.sort(key=lambda run: ORDER.index(overall(found[run.id])))
    counts = {verdict: sum(overall(one) == verdict for one in found.values()) for verdict in ORDER}
    st.subheader(", ".join(f"{count:,} {_WORDS[verdict]}" for verdict, count in counts.items() if count))
    _troubles(scene, shown, found)
    _table(scene, shown, found)
    _elsewhere(scene, shown)


def _examined(scene: Scene, run: Run) -> list[Finding]:
    return scene.once(("health", run.id), lambda: examine(run, scene.store.source.series))


def _troubles(scene: Scene, shown: Sequence[Run], found: Mapping[str, Sequence[Finding]]) -> None:
    """A card for each fault, with the runs that have it and its cure."""
    having: dict[tuple[str, str], list[tuple[Run, Finding]]] = {}
    for run in shown:
        for one in found[run.id]:
            if one.todo:
                having.setdefault((one.what, one.todo), []).append((run, one))
    worst_first = sorted(having.items(), key=lambda item: (min(ORDER.index(f.verdict) for _, f in item[1]), -len(item[1])))
    cards("health", [_card(scene, what, todo, several) for (what, todo), several in worst_first])


def _card(scene: Scene, what: str, todo: str, several: Sequence[tuple[Run, Finding]]) -> Card:
    worst = min((one for _, one in several), key=lambda one: ORDER.index(one.verdict))
    names = [scene.names[run.id] for run, _ in several]
    count = f"{len(names):,} runs" if len(names) > 1 else names[0]
    return Card(
        what,
        ", ".join(names[:20]),
        [Figure(_WORDS[worst.verdict], count, ", ".join(names[:20]), _TONES[worst.verdict])],
        text=f"{worst.seen} {todo}",
    )


def _table(scene: Scene, shown: Sequence[Run], found: Mapping[str, Sequence[Finding]]) -> None:
    whats = list(dict.fromkeys(one.what for run in shown for one in found[run.id]))
    whats.sort(key=lambda what: what in ("Negative scales", "Saturated scales"))
    by_what = {run.id: {one.what: one for one in found[run.id]} for run in shown}
    table = pd.DataFrame(
        {
            "run": [scene.names[run.id] for run in shown],
            "verdict": [_WORDS[overall(found[run.id])] for run in shown],
            "why": [next((one.seen for one in found[run.id] if one.todo), "Nothing stands out.") for run in shown],
            **{
                what: [_WORDS[by_what[run.id][what].verdict] if what in by_what[run.id] else None for run in shown]
                for what in whats
            },
        }
    )
    st.dataframe(
        table,
        hide_index=True,
        key="health-table",
        height=table_height(len(table), 12),
        placeholder="–",
        column_config={
            "run": st.column_config.TextColumn("Run", width="medium", pinned=True),
            "verdict": st.column_config.TextColumn("Verdict", help="The worst of the findings."),
            "why": st.column_config.TextColumn("Because", width="large"),
        },
    )


def _elsewhere(scene: Scene, shown: Sequence[Run]) -> None:
    """Ranks, clients and offload, as they logged it."""
    shown = [run for run in shown if any(key.startswith(_ELSEWHERE) for key in run.keys)]
    keys = sorted({key for run in shown for key in run.keys if key.startswith(_ELSEWHERE)})
    if not keys:
        return
    st.subheader("Ranks, clients and tiers of memory")
    values = {key: [run.latest[key][2] if key in run.latest else None for run in shown] for key in keys}
    table = pd.DataFrame(
        {
            "run": [scene.names[run.id] for run in shown],
            **{
                key: [None if v is None else words.memory(v) if "bytes" in key else words.number(v) for v in values[key]]
                for key in keys
            },
        }
    )
    config = {
        "run": st.column_config.TextColumn("Run", width="medium", pinned=True),
        **{key: st.column_config.TextColumn(text.plain(key, 40), help=f"{meaning(key)} The last value.") for key in keys},
    }
    height = table_height(len(table))
    st.dataframe(table, hide_index=True, key="health-elsewhere", height=height, placeholder="–", column_config=config)
