"""One run of Streamlit's script: the store, the sidebar and the chosen page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import streamlit as st

from . import session
from .addresses import shown_address
from .charts import live
from .scene import Scene, look, open_store
from .screens import curves, diff, empty, health, memory, overview, run, runs, sweep, tradeoffs
from .serve import DEFAULT_STORE
from .sidebar import sidebar
from .source import NoStoreYet, SourceError

_HERE = Path(__file__).resolve().parent
SCREENS: dict[str, tuple[str, str, Callable[[Scene], None]]] = {
    "overview": ("Overview", ":material/dashboard:", overview.render),
    "runs": ("Runs", ":material/table_rows:", runs.render),
    "curves": ("Curves", ":material/show_chart:", curves.render),
    "memory": ("Memory", ":material/memory:", memory.render),
    "tradeoffs": ("Trade-offs", ":material/balance:", tradeoffs.render),
    "sweep": ("Sweep", ":material/tune:", sweep.render),
    "health": ("Health", ":material/monitor_heart:", health.render),
    "diff": ("Run diff", ":material/difference:", diff.render),
    "run": ("Run", ":material/article:", run.render),
}


def main() -> None:
    """One run of the script, over the store that the command line names."""
    store = _arguments().store
    st.set_page_config(page_title="zolightning", page_icon=str(_HERE / "icon.svg"), layout="wide")
    st.html(_HERE / "page.css")
    scene: Scene

    def drawing(render: Callable[[Scene], None]) -> Callable[[], None]:
        return lambda: render(scene)

    pages = {
        name: st.Page(drawing(render), title=title, icon=icon, url_path=name, default=name == "overview")
        for name, (title, icon, render) in SCREENS.items()
    }
    session.keep_pages(pages)
    chosen = st.navigation(list(pages.values()), position="top")
    view = session.open_view()
    address = shown_address(store)
    if view.store not in ("", address):
        empty.other_store(view.store, address)
    session.change(store=address)
    try:
        scene = look(open_store(store), view.experiments)
    except NoStoreYet:
        empty.no_runs(store)
        return
    except SourceError as error:
        empty.unreadable(str(error), store)
        return
    if not scene.runs and not view.experiments:
        empty.no_runs(store)
        return
    live.engine()
    sidebar(scene, address)
    if scene.runs:
        chosen.run()
    else:
        st.info("The chosen experiments have no runs yet.")
    session.keep()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("dashboard/app.py")
    parser.add_argument("--store", default=DEFAULT_STORE, help="The MLflow tracking URI of the store. Default: %(default)s.")
    return parser.parse_args()
