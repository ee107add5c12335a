"""Pages for when there is nothing to show yet."""

from __future__ import annotations

import contextlib

import streamlit as st

from .. import text
from ..addresses import shown_address
from ..scene import look, open_store
from ..source import SourceError

_PLAIN = """\
import mlflow

mlflow.set_tracking_uri({store!r})
with mlflow.start_run(run_name="my first run"):
    for step in range(1000):
        mlflow.log_metric("train/loss", 1 / (step + 1), step=step)
"""
_LIGHTNING = """\
import lightning as L
from zolightning import ZOMonitor, ZOStrategy, mlflow_logger

trainer = L.Trainer(
    strategy=ZOStrategy(),
    logger=mlflow_logger("my first run", store={store!r}),
    callbacks=[ZOMonitor()],
)
trainer.fit(module, datamodule)
"""


def no_runs(store: str) -> None:
    """How to log a first run; opens the dashboard by itself when there is one.

    Args:
        store: MLflow tracking URI.
    """
    shown = shown_address(store)
    st.title("No runs here yet")
    st.text(f"Store: {text.plain(shown, 300)}")
    st.markdown("Log one, and this page turns into the dashboard. With Lightning and zolightning:")
    st.code(_LIGHTNING.format(store=shown), language=None, wrap_lines=True)
    st.markdown("Any other MLflow run will do too:")
    st.code(_PLAIN.format(store=shown), language=None, wrap_lines=True)
    st.markdown("Or watch six ways to fine-tune one model: `zolightning demo`.")
    st.markdown("Is the store elsewhere? Start the dashboard with `zolightning dash --store sqlite:///path/to/mlflow.db`.")
    _wait(store)


def unreadable(reason: str, store: str) -> None:
    """The store is there but cannot be read; opens the dashboard by itself when it can.

    Args:
        reason: the fault and its cure.
        store: MLflow tracking URI.
    """
    st.title("This store cannot be read")
    st.text(text.plain(reason, 1000))
    if st.button("Try again", type="primary"):
        st.rerun()
    _try_again(store)


def other_store(wanted: str, opened: str) -> None:
    """A shared link was made over another store; only the command line says which store is opened.

    Args:
        wanted: the link's store.
        opened: this dashboard's.
    """
    st.info(
        f"This link was made for the store {text.code(wanted)}, but this dashboard shows {text.code(opened)}. "
        f"Start it with `zolightning dash --store …` for the other one."
    )


@st.fragment(run_every=2)
def _try_again(store: str) -> None:
    st.caption("Trying again every two seconds …")
    with contextlib.suppress(SourceError):
        look(open_store(store), ())
        st.rerun()


@st.fragment(run_every=2)
def _wait(store: str) -> None:
    st.caption("Looking for a first run every two seconds …")
    try:
        if look(open_store(store), ()).runs:
            st.rerun()
    except SourceError:
        pass
