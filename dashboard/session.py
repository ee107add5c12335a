"""The view in Streamlit's session: one value, kept in the page's address.

The session owns the view. An address is read where a session begins and where the browser goes back or forward in its history,
and never else: the browser sends each click with the address that it knows, which may be an older one than was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import streamlit as st
from streamlit.navigation.page import StreamlitPage
from streamlit.runtime.scriptrunner import get_script_run_ctx

from .view import View, read, write

_KEPT, _PAGES = "zo.kept", "zo.pages"
FIRST_BOARD = "board0-1"
"""The answer of :func:`board` in a session that has just begun."""


@dataclass(frozen=True)
class _Kept:
    """One value, since a newer click may end the script between any two writes.

    Args:
        view: the runs, metrics and axes that are looked at.
        edition: counts how often something other than the widgets has changed it.
        board: counts the sets of charts.
    """

    view: View
    edition: int = 1
    board: int = 0


def open_view() -> View:
    """The view of this run of the script: the address's, when the user came by it, else the session's."""
    state, query = st.session_state, _address()
    if _KEPT not in state:
        state[_KEPT] = _Kept(read(query))
    elif query and _went_back():
        state[_KEPT] = replace(_kept(), view=read(query), edition=_kept().edition + 1)
    return current()


def current() -> View:
    """The view as the widgets have left it so far."""
    return _kept().view


def change(**fields: Any) -> View:
    """Replace fields of the view, as a widget has it that shows them."""
    st.session_state[_KEPT] = replace(_kept(), view=replace(current(), **fields))
    return current()


def settle(**fields: Any) -> None:
    """Replace fields of the view from elsewhere than the widgets that show them: all of these begin anew."""
    st.session_state[_KEPT] = replace(_kept(), view=replace(current(), **fields), edition=_kept().edition + 1)


def keep() -> None:
    """Write the view into the address, if that says something else."""
    query = {name: [value] if isinstance(value, str) else value for name, value in write(current()).items()}
    if query != _address():
        st.query_params.from_dict(query)


def board() -> str:
    """The name of the set of charts: all pages share it, and with it the zoom and the hidden lines."""
    return widget(f"board{_kept().board}")


def new_board() -> None:
    """Begin with charts that are not zoomed: the x axis has changed."""
    st.session_state[_KEPT] = replace(_kept(), view=replace(current(), zoom=None), board=_kept().board + 1)


def widget(name: str) -> str:
    """A widget's key: a new one after the view came from elsewhere, so that the widget begins with it."""
    return f"{name}-{_kept().edition}"


def edition() -> int:
    """Grows with each change that all widgets must begin anew from."""
    return _kept().edition


def keep_pages(pages: Mapping[str, StreamlitPage]) -> None:
    """Remember the pages of this run of the script, for :func:`go_to`."""
    st.session_state[_PAGES] = pages


def go_to(page: str) -> None:
    """Show another page; the view stays.

    Args:
        page: its name in the address.
    """
    st.switch_page(st.session_state[_PAGES][page])


def _kept() -> _Kept:
    kept: _Kept = st.session_state[_KEPT]
    return kept


def _address() -> dict[str, list[str]]:
    return {name: st.query_params.get_all(name) for name in st.query_params}


def _went_back() -> bool:
    context = get_script_run_ctx()
    return context is not None and context.is_history_navigation
