"""One run of the ranking page's script: the question of now, or a line that there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import streamlit as st

from .. import text
from .rounds import Round, RoundError, answer, answered, count, question, runs, stop, stopping

_HERE = Path(__file__).resolve().parent
_NOTE, _BY = "zo.rank.note", "zo.rank.by"
_SECONDS = 0.5
_ELSEWHERE = "This round had been ranked on another page already. That ranking counts; yours was not sent."


def main(folder: Path) -> None:
    """One run of the script.

    Args:
        folder: in which the training asks.
    """
    st.set_page_config(page_title="zolightning: ranking", page_icon=str(_HERE.parent / "icon.svg"), layout="wide")
    st.html(_HERE.parent / "page.css")
    shown = _state(folder)
    if note := st.session_state.pop(_NOTE, ""):
        st.warning(note)
    _draw(folder, *shown)
    _follow(folder, shown)


def _state(folder: Path) -> tuple[str, Round | None, bool]:
    """The contents of the page: (a line in place of a question, the question, whether a training runs)."""
    try:
        asked = question(folder)
    except RoundError as error:
        return str(error), None, False
    alive = runs(folder) if folder.is_dir() else False
    if asked is None:
        where = text.plain(str(folder), 200)
        return f"Nothing is asked in {where} yet. A training asks there with `Person(folder)`.", None, alive
    if asked.kind == "end":
        return "", asked, alive
    if stopping(folder):
        return "You have stopped. The training ends when it comes to its next question.", None, alive
    if answered(folder, asked):
        return f"Ranked: {count(folder)}. The next round comes by itself.", None, alive
    return "", asked, alive


def _draw(folder: Path, words: str, asked: Round | None, alive: bool) -> None:
    if asked is not None and asked.kind == "end":
        st.title("The end")
        st.text(text.plain(asked.words, 1000))
        return
    if asked is None:
        st.title("Nothing to rank now")
        st.text(words)
    else:
        blind = asked.kind == "blind"
        title = "Which is better?" if blind else f"Round {asked.round}"
        st.title(title)
        st.text(text.plain(asked.words, 1000))
        data = {"id": asked.id, "cards": list(asked.cards), "top": asked.top, "blind": blind, "title": title}
        key = f"zo-rank-{asked.id}"
        _component()(key=key, data=data, on_said_change=lambda: _said(folder, asked, key))
    if not alive:
        st.info("The training does not run now. Your rankings are kept; start it again, and it goes on from there.")


def _said(folder: Path, asked: Round, key: str) -> None:
    """The person has ranked, or has had enough."""
    state = st.session_state.get(key)
    said = state.get("said") if isinstance(state, Mapping) else None
    if not isinstance(said, Mapping):
        return
    if said.get("stop"):
        stop(folder)
        return
    by = st.session_state.setdefault(_BY, uuid4().hex[:8])
    try:
        groups = [[int(number) for number in group] for group in said["groups"]]
        if not answer(folder, asked, groups, by):
            st.session_state[_NOTE] = _ELSEWHERE
    except (RoundError, OSError, KeyError, TypeError, ValueError) as error:
        st.session_state[_NOTE] = f"The ranking was not kept: {text.plain(str(error), 500)}"


def _follow(folder: Path, shown: tuple[str, Round | None, bool]) -> None:
    """Build the page anew when something else is asked."""

    @st.fragment(run_every=_SECONDS)
    def look() -> None:
        if _state(folder) != shown:
            st.rerun()

    look()


@cache
def _component() -> Callable[..., Any]:
    js, css = ((_HERE / name).read_text("utf-8") for name in ("cards.js", "cards.css"))
    return st.components.v2.component("zolightning.rank", js=js, css=css, isolate_styles=False)
