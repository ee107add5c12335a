"""Runs: a table with the columns that one chooses, to sort, select and pin; one row for the runs that are taken together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

from .. import text
from ..columns import Cell, Column, available, column, read, usual
from ..export import as_csv
from ..facts import quality_key
from ..scene import Scene
from ..session import change, current, go_to, settle, widget
from ..source import Run
from ..status import watched
from ..view import View
from .parts import follow
from .tables import table_height


def render(scene: Scene) -> None:
    """The page."""
    shown = scene.shown(current())
    if not shown:
        st.info("No run is selected: the filter and the boxes in the sidebar say which are shown.")
        return
    columns = _choose_columns(scene, shown)
    follow(scene, lambda fresh: _draw(fresh, columns))


def _choose_columns(scene: Scene, shown: Sequence[Run]) -> list[Column]:
    view = current()
    options = available(shown)
    there = {one.id for one in options}
    begin = [one for one in view.columns if one in there]
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        chosen = st.multiselect(
            "Columns",
            [one.id for one in options],
            begin,
            format_func=_label,
            placeholder="The usual ones: differing parameters, and results",
            key=widget("columns"),
            width=560,
        )
        change(columns=tuple(chosen))
        picked = [found for id_ in chosen if (found := column(id_)) is not None]
        loss = next((key for run in shown if (key := watched(run)) is not None), None)
        columns = picked or usual(shown, quality_key(shown, view.quality), loss)
        _choose_order(columns)
    return columns


def _label(id_: str) -> str:
    return found.label if (found := column(id_)) is not None else id_


def _choose_order(columns: Sequence[Column]) -> None:
    """A click on a column's head sorts too, but no key comes there, and the address does not keep it."""
    view = current()
    by, options = view.sort.removeprefix("-"), ["", *(one.id for one in columns)]
    chosen = st.selectbox(
        "Sort by",
        options,
        options.index(by) if by in options else 0,
        format_func=lambda id_: _label(id_) if id_ else "the newest first",
        key=widget("sort"),
        width=220,
    )
    down = st.toggle("Largest first", view.sort.startswith("-"), key=widget("down"), disabled=not chosen)
    change(sort=("-" if down else "") * bool(chosen) + chosen)


def _ordered(rows: Sequence[int], cells: dict[Column, list[Cell]], sort: str) -> list[int]:
    """The rows by a column's values, those without one last."""
    found = next((values for one, values in cells.items() if sort and one.id == sort.removeprefix("-")), None)
    if found is None:
        return list(rows)

    def place(row: int) -> tuple[bool, str | float]:
        value = found[row].value
        assert value is not None
        return isinstance(value, str), value

    known = [row for row in rows if not _is_nothing(found[row].value)]
    return [*sorted(known, key=place, reverse=sort.startswith("-")), *(row for row in rows if _is_nothing(found[row].value))]


def _is_nothing(value: str | float | None) -> bool:
    return value is None or value != value


def _draw(scene: Scene, columns: Sequence[Column]) -> None:
    view = current()
    groups = scene.groups(view)
    names = scene.group_names(groups, view)
    cells = read(scene, groups, columns)
    pinned = [i for i, group in enumerate(groups) if any(view.pins(run.id) for run in group)]
    others = _ordered([i for i in range(len(groups)) if i not in set(pinned)], cells, view.sort)
    picked: list[Run] = []
    if pinned:
        st.subheader("Pinned")
        picked += _table(columns, groups, names, cells, pinned, "pinned")
        st.subheader(f"Others: {len(others):,}")
    picked += _table(columns, groups, names, cells, others, "others")
    _actions(scene, view, picked)
    st.download_button(
        "CSV of this table",
        data=lambda: _csv(columns, groups, names, cells, [*pinned, *others]),
        file_name="runs.csv",
        mime="text/csv",
        icon=":material/download:",
        on_click="ignore",
    )


def _table(
    columns: Sequence[Column],
    groups: Sequence[Sequence[Run]],
    names: Sequence[str],
    cells: dict[Column, list[Cell]],
    rows: Sequence[int],
    name: str,
) -> list[Run]:
    """Draw the rows; returns the runs that are picked in it."""
    grouped = any(len(groups[i]) > 1 for i in rows)
    table = pd.DataFrame({"run": [names[i] for i in rows]})
    config: dict[str, Any] = {"run": st.column_config.TextColumn("Run", width="medium", pinned=True)}
    if grouped:
        table["n"] = [len(groups[i]) for i in rows]
        config["n"] = st.column_config.NumberColumn("n", help="How many runs stand behind the row.", format="%d", width="small")
    for one in columns:
        found = [cells[one][i] for i in rows]
        table[one.id] = _typed(one, found)
        config[one.id] = _config(one, found)
        if grouped and one.kind != "params" and any(not math.isnan(cell.std) for cell in found):
            table[f"± {one.id}"] = [cell.std for cell in found]
            config[f"± {one.id}"] = st.column_config.NumberColumn(
                f"± {one.label}", help="One standard deviation.", format="%.3g"
            )
    event = st.dataframe(
        table,
        hide_index=True,
        key=widget(f"runs-{name}"),
        height=table_height(len(table), 22 if name == "others" else 8),
        placeholder="–",
        column_config=config,
        on_select="rerun",
        selection_mode="multi-row",
    )
    return [run for row in event.selection.rows if row < len(rows) for run in groups[rows[row]]]


def _typed(one: Column, found: Sequence[Cell]) -> list[object]:
    if one.id == "started":
        return [pd.NaT if cell.value is None else pd.Timestamp(float(cell.value), unit="s", tz="UTC") for cell in found]
    return [text.plain(cell.value, 200) if isinstance(cell.value, str) else cell.value for cell in found]


def _config(one: Column, found: Sequence[Cell]) -> Any:
    if one.id == "started":
        return st.column_config.DatetimeColumn(one.label, format="distance")
    numbers = [cell.value for cell in found if isinstance(cell.value, float)]
    if not numbers:
        return st.column_config.TextColumn(one.label)
    finite = [value for value in numbers if math.isfinite(value)]
    grouped = all(value.is_integer() for value in finite) or any(abs(value) >= 1e4 for value in finite)
    small = any(0 < abs(value) < 1e-3 for value in numbers)
    return st.column_config.NumberColumn(one.label, format="scientific" if small else "localized" if grouped else "%.4g")


def _actions(scene: Scene, view: View, picked: Sequence[Run]) -> None:
    """The actions on the rows that are ticked."""
    ids = tuple(run.id for run in picked)
    with st.container(horizontal=True, gap="small"):
        if not ids:
            st.caption("Tick rows, or press Shift and Space on them, to pin them, to look at only these, or to take them away.")
            return
        st.button(
            "Only these", help="Select only these runs, on all pages.", on_click=settle, kwargs={"runs": ids, "without": ()}
        )
        others = tuple(run.id for run in scene.shown(view) if run.id not in set(ids))
        st.button("Take away", help="Select all but these runs.", on_click=settle, kwargs={"runs": others})
        if all(view.pins(id_) for id_ in ids):
            left = tuple(run.id for run in scene.runs if view.pins(run.id) and run.id not in set(ids))
            st.button("Unpin", help="Put these rows back among the others.", on_click=settle, kwargs={"pinned": left})
        else:
            pinned = (*view.pinned, *(id_ for id_ in ids if not view.pins(id_)))
            st.button("Pin", help="Keep these rows above the others.", on_click=settle, kwargs={"pinned": pinned})
        if st.button("Open its page", help="Show the page of the first of them."):
            change(run=ids[0])
            go_to("run")


def _csv(
    columns: Sequence[Column],
    groups: Sequence[Sequence[Run]],
    names: Sequence[str],
    cells: dict[Column, list[Cell]],
    rows: Sequence[int],
) -> str:
    heads = ["run", "n", *(part for one in columns for part in (one.label, f"± {one.label}"))]
    lines = [
        [names[i], len(groups[i]), *(part for one in columns for part in (cells[one][i].value, cells[one][i].std))]
        for i in rows
    ]
    return as_csv(heads, lines)
