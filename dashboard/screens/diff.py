"""Run diff: the settings that differ, and the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import streamlit as st

from .. import text, words
from ..charts import live
from ..facts import quality_key
from ..scene import Scene
from ..session import board, current, widget
from ..source import Run
from ..transforms import differing
from .curves import first_keys
from .parts import choose_axis, feed, follow, legend, shell
from .tables import table_height

_MOST_RUNS = 12


def render(scene: Scene) -> None:
    """The page."""
    runs = scene.shown(current())[:_MOST_RUNS]
    if len(runs) < 2:
        st.info(
            "Select two or more runs in the sidebar. This page shows the parameters in which they differ, and their curves."
        )
        return
    if len(scene.shown(current())) > _MOST_RUNS:
        st.caption(f"The newest {_MOST_RUNS} of the selected runs.")
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        available = sorted({key for run in runs for key in run.keys})
        usual = first_keys(runs)
        key = None
        if available:
            key = st.selectbox(
                "Curve",
                available,
                available.index(usual[0]),
                format_func=lambda one: text.plain(one, 60),
                key=widget("diff-key"),
                width=260,
            )
        with st.container(width=150):
            view = choose_axis()
        everything = st.toggle(
            "All parameters", key=widget("diff-all"), help="Also those that are the same for all of these runs, and their tags."
        )
    left, right = st.columns([1, 1])
    with left:
        _parameters(scene, runs, everything)
    with right:
        legend(scene, view)
        if key is not None:
            live.chart(shell(key, view, board(), height=420))
    follow(scene, lambda fresh: _draw(fresh, runs, key))


def _draw(scene: Scene, runs: Sequence[Run], key: str | None) -> None:
    if key is not None:
        feed(scene, [key])
    st.subheader("Results")
    _table(scene, _outcomes(scene, runs), runs, "outcomes", "Figure")


def _parameters(scene: Scene, runs: Sequence[Run], everything: bool) -> None:
    rows: dict[str, Sequence[str | None]] = dict(differing(runs))
    if everything:
        names = sorted({name for run in runs for name in run.params})
        tags = sorted({name for run in runs for name in run.tags if not name.startswith("mlflow.")})
        rows = {name: [run.params.get(name) for run in runs] for name in names}
        rows |= {f"{name} (tag)": [run.tags.get(name) for run in runs] for name in tags}
    if rows:
        _table(scene, rows, runs, "parameters", "Parameter")
    else:
        st.info("These runs logged the same parameters, or none.")


def _outcomes(scene: Scene, runs: Sequence[Run]) -> dict[str, list[str]]:
    key = quality_key(runs, current().quality)
    figures = scene.facts(runs, key)
    found = [figures[run.id] for run in runs]
    share = key is not None and words.is_share(key)
    return {
        "Status": [scene.states[run.id].kind for run in runs],
        f"Best {text.plain(key or 'quality', 40)}": [
            words.percent(f.quality) if share else words.known(f.quality) for f in found
        ],
        "Last loss": [words.number(f.loss) if f.step is not None else "–" for f in found],
        "Peak memory": [words.memory(f.peak) for f in found],
        "Time": [words.duration(f.seconds) for f in found],
        "Forward passes": [words.count(f.forwards) if f.forwards == f.forwards else "–" for f in found],
    }


def _table(scene: Scene, rows: Mapping[str, Sequence[str | None]], runs: Sequence[Run], name: str, head: str) -> None:
    """A column for each run; columns are told apart by run id, since names may be equal."""
    names = scene.names
    table = pd.DataFrame(
        {
            "name": [text.plain(row, 80) for row in rows],
            **{
                run.id: [None if values[i] is None else text.plain(str(values[i]), 500) for values in rows.values()]
                for i, run in enumerate(runs)
            },
        }
    )
    st.dataframe(
        table,
        hide_index=True,
        key=name,
        height=table_height(len(table), 14),
        placeholder="–",
        column_config={
            "name": st.column_config.TextColumn(head, pinned=True),
            **{run.id: st.column_config.TextColumn(names[run.id]) for run in runs},
        },
    )
