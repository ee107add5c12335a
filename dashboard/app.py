"""The dashboard: ``streamlit run dashboard/app.py -- --store URI``, or ``zolightning dash``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import streamlit as st

_HERE = Path(__file__).resolve().parent
# Streamlit puts this folder first; its parent must come first, or a `dashboard.py` in the working folder is imported instead
sys.path[:] = [str(_HERE.parent), *(entry for entry in sys.path if entry not in (str(_HERE), str(_HERE.parent)))]

from zolightning_dashboard import session  # noqa: E402
from zolightning_dashboard.addresses import shown_address  # noqa: E402
from zolightning_dashboard.charts import live  # noqa: E402
from zolightning_dashboard.launch import DEFAULT_STORE  # noqa: E402
from zolightning_dashboard.scene import Scene, look, open_store  # noqa: E402
from zolightning_dashboard.screens import curves, diff, empty, memory, overview, tradeoffs  # noqa: E402
from zolightning_dashboard.sidebar import sidebar  # noqa: E402
from zolightning_dashboard.source import NoStoreYet, SourceError  # noqa: E402

SCREENS: dict[str, tuple[str, str, Callable[[Scene], None]]] = {
    "overview": ("Overview", ":material/dashboard:", overview.render),
    "curves": ("Curves", ":material/show_chart:", curves.render),
    "memory": ("Memory", ":material/memory:", memory.render),
    "tradeoffs": ("Trade-offs", ":material/balance:", tradeoffs.render),
    "diff": ("Run diff", ":material/difference:", diff.render),
}


def main(store: str) -> None:
    """One run of the script.

    Args:
        store: MLflow tracking URI.
    """
    st.set_page_config(page_title="zolightning", page_icon=str(_HERE / "icon.svg"), layout="wide")
    st.html(_HERE / "page.css")
    scene: Scene

    def drawing(render: Callable[[Scene], None]) -> Callable[[], None]:
        return lambda: render(scene)

    pages = {
        name: st.Page(drawing(render), title=title, icon=icon, url_path=name, default=name == "overview")
        for name, (title, icon, render) in SCREENS.items()
    }
    chosen = st.navigation(list(pages.values()), position="top")
    view = session.open_view(next(name for name, page in pages.items() if page is chosen))
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
        empty.unreadable(str(error))
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
    return


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("dashboard/app.py")
    parser.add_argument("--store", default=DEFAULT_STORE, help="MLflow tracking URI (default: %(default)s)")
    return parser.parse_args()


main(_arguments().store)
