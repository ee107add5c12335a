"""The view in Streamlit's session: one value, kept in the page's address."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import streamlit as st
from streamlit.navigation.page import StreamlitPage

from .view import View, read, write

_VIEW, _WRITTEN, _PAGE, _EDITION = "zo.view", "zo.written", "zo.page", "zo.edition"
_BOARD, _REPLACED, _PAGES = "zo.board", "zo.replaced", "zo.pages"
_LAG_SECONDS = 3.0
FIRST_BOARD = "board0-1"
"""What :func:`board` says in a session that has just begun."""


def open_view(page: str) -> View:
    """The view of this run of the script: the address's, when the user came by it, else the session's.

    Args:
        page: the page that is shown. Going to another one empties the address but keeps the view.
    """
    state, query = st.session_state, {name: st.query_params.get_all(name) for name in st.query_params}
    came = _VIEW not in state or (state.get(_PAGE) == page and query != state.get(_WRITTEN) and not _lags(query))
    if came:
        state[_VIEW] = read(query)
        new_edition()
    state[_PAGE], state[_WRITTEN] = page, query
    return current()


def current() -> View:
    """The view as the widgets have left it so far."""
    view: View = st.session_state[_VIEW]
    return view


def change(**fields: Any) -> View:
    """Replace fields of the view."""
    st.session_state[_VIEW] = replace(current(), **fields)
    return current()


def keep() -> None:
    """Write the view into the address, if it changed."""
    query = {name: [value] if isinstance(value, str) else value for name, value in write(current()).items()}
    state = st.session_state
    if query != state[_WRITTEN]:
        state[_REPLACED] = [*_lately_replaced(), (time.monotonic(), state[_WRITTEN])]
        state[_WRITTEN] = query
        st.query_params.from_dict(query)


def _lags(query: dict[str, list[str]]) -> bool:
    """The browser spoke before it had the address that we wrote last: nobody asked for this older one."""
    return any(query == old for _, old in _lately_replaced())


def _lately_replaced() -> list[tuple[float, dict[str, list[str]]]]:
    return [one for one in st.session_state.get(_REPLACED, ()) if time.monotonic() - one[0] < _LAG_SECONDS]


def board() -> str:
    """The name of the set of charts: all pages share it, and with it the zoom and the hidden lines."""
    return widget(f"board{st.session_state.get(_BOARD, 0)}")


def new_board() -> None:
    """Begin with charts that are not zoomed: what x counts has changed."""
    st.session_state[_BOARD] = st.session_state.get(_BOARD, 0) + 1
    change(zoom=None)


def widget(name: str) -> str:
    """A widget's key: a new one after the view came from an address, so that the widget begins with it."""
    return f"{name}-{st.session_state[_EDITION]}"


def new_edition() -> None:
    """Have all widgets begin anew from the view, which something other than they has changed."""
    st.session_state[_EDITION] = st.session_state.get(_EDITION, 0) + 1


def keep_pages(pages: Mapping[str, StreamlitPage]) -> None:
    """Remember the pages of this run of the script, for :func:`go_to`."""
    st.session_state[_PAGES] = pages


def go_to(page: str) -> None:
    """Show another page; the view stays.

    Args:
        page: its name in the address.
    """
    st.switch_page(st.session_state[_PAGES][page])
