"""Run: everything that one run said of itself, its files, and how to go back to any of its steps."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PurePosixPath

import numpy as np
import pandas as pd
import streamlit as st
from numpy.typing import NDArray

from .. import text, words
from ..scene import Scene
from ..session import change, current, go_to, settle, widget
from ..source import Run, SourceError
from ..transforms import total_steps
from .parts import follow
from .tables import number, table_height

_NOTE = "mlflow.note.content"
_LEDGER = "zo.ledger"
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
_TEXTS = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".log", ".toml", ".py")
_MOST_TEXT, _MOST_PICTURE = 20_000, 8_000_000
_WHO = {"mlflow.user": "by", "mlflow.source.name": "from", "mlflow.source.git.commit": "at commit", "zo.host": "on"}


def render(scene: Scene) -> None:
    """The page."""
    run = _choose(scene)
    follow(scene, lambda fresh: _live(fresh, run.id))
    _settings(run)
    _ledger(scene, run)
    _files(scene, run)


def _choose(scene: Scene) -> Run:
    view = current()
    ids = [run.id for run in scene.filtered(view)] or [run.id for run in scene.runs]
    wanted = next((run.id for run in scene.runs if view.run and run.id.startswith(view.run)), ids[0])
    options = ids if wanted in ids else [wanted, *ids]
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        chosen = st.selectbox(
            "Run", options, options.index(wanted), format_func=lambda id_: scene.names[id_], key=widget("run"), width=420
        )
        change(run=chosen)
        if st.button("Its curves", icon=":material/show_chart:", help="The page Curves with only this run."):
            settle(runs=(chosen,), without=())
            go_to("curves")
    return next(run for run in scene.runs if run.id == chosen)


def _live(scene: Scene, run_id: str) -> None:
    run = next((one for one in scene.runs if one.id == run_id), None)
    if run is None:
        st.info("This run has been deleted.")
        return
    state = scene.states[run.id]
    st.subheader(f"{state.kind}: {state.text[:1].lower()}{text.plain(state.text[1:], 300)}")
    st.caption(_story(run))
    _metrics(scene, run)


def _story(run: Run) -> str:
    """When it ran, for how long, and who started it from where."""
    parts = [f"Id {run.id}"]
    if not math.isnan(run.started):
        parts.append(datetime.fromtimestamp(run.started, UTC).strftime("started %Y-%m-%d %H:%M UTC"))
    if run.ended >= run.started:
        parts.append(f"took {words.duration(run.ended - run.started)}")
    if (steps := total_steps(run)) is not None:
        parts.append(f"{steps:,} steps planned")
    parts += [f"{word} {text.code(run.tags[tag], 60)}" for tag, word in _WHO.items() if run.tags.get(tag)]
    return ", ".join(parts)


def _metrics(scene: Scene, run: Run) -> None:
    if not run.keys:
        st.info("It has logged no metric yet.")
        return
    found = {key: scene.store.source.series(run.id, key) for key in run.keys}
    extremes = {key: _ends(points.value) for key, points in found.items()}
    table = pd.DataFrame(
        {
            "metric": [text.plain(key, 80) for key in found],
            "last": [_shown(key, points.value[-1]) if len(points.value) else None for key, points in found.items()],
            "smallest": [_shown(key, extremes[key][0]) for key in found],
            "largest": [_shown(key, extremes[key][1]) for key in found],
            "step": [points.step[-1] if len(points.step) else None for points in found.values()],
            "points": [len(points.step) for points in found.values()],
        }
    )
    st.dataframe(
        table,
        hide_index=True,
        key="run-metrics",
        height=table_height(len(table), 10),
        placeholder="–",
        column_config={
            "metric": st.column_config.TextColumn("Metric", pinned=True),
            "last": st.column_config.TextColumn("Last", alignment="right"),
            "smallest": st.column_config.TextColumn("Smallest", help="Of the finite values.", alignment="right"),
            "largest": st.column_config.TextColumn("Largest", help="Of the finite values.", alignment="right"),
            "step": number("Last step", "The step of the last value.", whole=True),
            "points": number("Points", "How many were logged.", whole=True),
        },
    )


def _ends(values: NDArray[np.float64]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (math.nan, math.nan)


def _shown(key: str, value: float) -> str:
    return words.memory(value) if words.is_bytes(key) else words.number(value)


def _settings(run: Run) -> None:
    left, right = st.columns(2)
    with left:
        st.subheader("Parameters")
        _pairs(run.params, "run-params", "It logged none.")
    with right:
        st.subheader("Tags")
        _pairs({name: value for name, value in run.tags.items() if name != _NOTE}, "run-tags", "It has none.")
    if run.tags.get(_NOTE):
        st.subheader("Note")
        with st.container(border=True):
            st.text(run.tags[_NOTE][:_MOST_TEXT])


def _pairs(values: Mapping[str, str], key: str, nothing: str) -> None:
    if not values:
        st.caption(nothing)
        return
    table = pd.DataFrame(
        [(text.plain(name, 200), text.plain(value, 2000)) for name, value in sorted(values.items())], columns=["Name", "Value"]
    )
    st.dataframe(table, hide_index=True, key=key, height=table_height(len(table), 12))


def _ledger(scene: Scene, run: Run) -> None:
    if _LEDGER not in run.tags:
        return
    st.subheader(
        "Back to a step", help="The ledger has each step's seed and coefficients, so the weights of any step come back."
    )
    newest = max((step for step, _, _ in run.latest.values()), default=0)
    st.text(f"Ledger {text.plain(run.tags[_LEDGER], 300)}, logged up to step {newest:,}")
    step = st.number_input("Step", 0, max(newest, 1), newest, key=widget(f"replay-{run.id}"), width=200)
    command = [
        "zolightning",
        "replay",
        run.id,
        "--step",
        str(int(step)),
        "--out",
        f"step-{int(step)}",
        "--store",
        current().store,
    ]
    st.code(shlex.join(command), language=None, wrap_lines=True)


def _files(scene: Scene, run: Run) -> None:
    st.subheader("Files")
    try:
        found = scene.store.source.artifacts(run)
    except SourceError as error:
        st.caption(f"None to show: {text.code(str(error))}")
        return
    if not found:
        st.caption("It left none.")
        return
    sizes = {one.path: one.size or 0 for one in found}
    telling = [path for path in sizes if PurePosixPath(path).suffix.lower() in (*_PICTURES, *_TEXTS)]
    table = pd.DataFrame({"File": [text.plain(path, 300) for path in sizes], "Size": [_size(size) for size in sizes.values()]})
    left, right = st.columns([2, 3])
    with left:
        st.dataframe(table, hide_index=True, key="run-files", height=table_height(len(table), 12))
    with right:
        if not telling:
            st.caption("None of them is a text or a picture.")
            return
        samples = next((i for i, path in enumerate(telling) if "sample" in path.lower()), 0)
        path = st.selectbox(
            "Show", telling, samples, format_func=lambda one: text.plain(one, 100), key=widget(f"file-{run.id}")
        )
        _show(scene, run, path, sizes[path])


def _show(scene: Scene, run: Run, path: str, size: int) -> None:
    picture = PurePosixPath(path).suffix.lower() in _PICTURES
    most = _MOST_PICTURE if picture else _MOST_TEXT
    if picture and size > most:
        st.caption(f"It has {_size(size)}: too large to show here.")
        return
    try:
        data = scene.store.source.artifact(run, path, most)
    except SourceError as error:
        st.caption(text.code(str(error)))
        return
    if picture:
        try:
            st.image(data)
        except Exception:  # whatever a decoder thinks of bytes from outside
            st.caption("It is no picture, although its name says so.")
        return
    st.code(data.decode("utf-8", "replace"), language=None, wrap_lines=True, height=320)
    if size > most:
        st.caption(f"The first {_size(most)} of {_size(size)}.")


def _size(count: int) -> str:
    return words.memory(count) if count >= 2**20 else f"{count:,} bytes" if count < 2**12 else f"{count / 2**10:,.0f} KiB"
