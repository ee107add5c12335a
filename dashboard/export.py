"""The shown data, as a table for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .scene import Scene
from .transforms import smooth
from .view import AXES, View

_STARTS_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def curves_csv(scene: Scene, view: View, keys: Sequence[str]) -> str:
    """Every point of the selected runs, within the zoom, one a line; memory in GiB, as the charts have it.

    Args:
        scene: the store.
        view: which runs, which x, which smoothing.
        keys: the metrics.
    """
    low, high = view.zoom or (-np.inf, np.inf)

    def points() -> Iterator[Sequence[object]]:
        for run in scene.shown(view):
            for key in keys:
                curve = scene.store.plotter.curve(run, key, view.axis)
                smoothed = smooth(curve, view.smoothing).y
                inside = (curve.x >= low) & (curve.x <= high)
                for x, value, mean in zip(curve.x[inside], curve.y[inside], smoothed[inside], strict=True):
                    yield run.id, run.name, key, float(x), float(value), float(mean)

    return as_csv(["run_id", "run", "metric", AXES[view.axis].replace(" ", "_"), "value", "smoothed"], points())


def as_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV; text that a spreadsheet would take for a formula gets an apostrophe before it.

    Args:
        header: names of the columns.
        rows: values; floats are written so that they read back as they were.
    """
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return out.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, str) and value.startswith(_STARTS_FORMULA):
        return f"'{value}"
    return value
