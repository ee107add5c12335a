"""Which runs a filter leaves, for the list of runs between two keystrokes: Streamlit would take longer than a keystroke."""

from __future__ import annotations

from .query import QueryError, pick
from .scene import look, open_store
from .view import View

SHORT = 10
"""Characters of a run's id that tell it from others."""


def match(store: str, view: View) -> dict[str, object]:
    """The entries of the list while the user types.

    Args:
        store: MLflow tracking URI.
        view: its filter and its experiments count.

    Returns:
        ``ids``: how the ids of the runs begin, newest first; None where the filter makes no sense. ``trouble``: why.

    Raises:
        SourceError: the store cannot be read.
    """
    scene = look(open_store(store), view.experiments)
    try:
        found = pick(view.filter, scene.runs, {run_id: one.kind for run_id, one in scene.states.items()})
    except QueryError as error:
        return {"ids": None, "trouble": str(error)}
    return {"ids": [run.id[:SHORT] for run in found], "trouble": ""}
