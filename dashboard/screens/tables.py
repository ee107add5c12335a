"""Tables of runs: numbers sort as numbers, text from outside stays text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import streamlit as st

from ..scene import Scene
from ..source import Run
from ..transforms import goal, rows
from ..words import byte_unit, is_bytes

_WAYS = {"min": "smallest", "max": "largest"}


def best_and_last(scene: Scene, runs: Sequence[Run], key: str, at: int | None) -> None:
    """A sortable table of one metric over runs.

    Args:
        scene: the newest look.
        runs: those that are selected.
        key: the metric.
        at: the step of the column "at step"; None: each run's last.
    """
    better = goal(key)
    points = {run.id: scene.store.source.series(run.id, key) for run in runs if key in run.keys}
    found = rows(runs, points, better, at)
    if not found:
        return
    names = scene.names
    scale, unit = byte_unit([row.summary.best for row in found]) if is_bytes(key) else (1.0, "")
    table = pd.DataFrame(
        {
            "run": [names[row.run_id] for row in found],
            "best": [row.summary.best / scale for row in found],
            "best at": [row.summary.best_step for row in found],
            "last": [row.summary.last / scale for row in found],
            "last at": [row.summary.last_step for row in found],
            "at step": [row.at / scale for row in found],
            "points": [row.summary.points for row in found],
            "not finite": [row.summary.not_finite for row in found],
        }
    )
    if unit:
        st.caption(f"In {unit}.")
    st.dataframe(
        with_nan(table, {name: [True] * len(table) for name in ("last", "at step")}),
        hide_index=True,
        key=f"table-{key}",
        height=table_height(len(table)),
        placeholder="–",
        column_config={
            "run": st.column_config.TextColumn("Run"),
            "best": number("Best", f"The {_WAYS[better]} finite value."),
            "best at": number("best at", "The step at which it was reached first.", whole=True),
            "last": number("Last", "The last value that was logged, also where it is not finite."),
            "last at": number("last at", "The step at which it was logged.", whole=True),
            "at step": number("At step" if at is None else f"At step {at:,}", "The last value logged at that step or before."),
            "points": number("Points", "How many were logged.", whole=True),
            "not finite": number("NaN, ∞", "How many of them are not a number or infinite.", whole=True),
        },
    )


def with_nan(table: pd.DataFrame, logged: Mapping[str, Sequence[bool]]) -> pa.Table:
    """The table as browsers get it, where nan was logged: elsewhere it means that there is nothing.

    Args:
        table: of numbers and texts.
        logged: for columns of numbers, whether each row's value was logged, whatever it is.
    """
    found = pa.Table.from_pandas(table, preserve_index=False)
    for name, there in logged.items():
        values = pa.array(table[name].to_numpy(float), mask=~np.asarray(there, bool), from_pandas=False)
        found = found.set_column(found.column_names.index(name), name, values)
    return found


def number(label: str, explained: str, whole: bool = False, unit: str = "") -> Any:
    """A column of numbers.

    Args:
        label: the header.
        explained: shown when the pointer rests on it.
        whole: counts.
        unit: behind each number.
    """
    return st.column_config.NumberColumn(label, help=explained, format=("%d" if whole else "%.4g") + unit)


def table_height(count: int, most: int = 12) -> int:
    """Pixels for a table that scrolls beyond so many rows."""
    return 35 * (min(count, most) + 1) + 3
