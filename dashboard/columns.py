"""The table of runs: any parameter, tag, metric or fact as a column, a row for each run or for each group of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from . import text
from .query import number
from .scene import Scene
from .source import Run
from .transforms import differing, goal, summarise
from .words import GIB, is_bytes, is_share

FACTS = {"status": "Status", "step": "Step", "seconds": "Seconds", "started": "Started", "method": "Method"}
KINDS = {"params": "", "tags": "tag ", "last": "last ", "best": "best "}
"""The words by which a column names its kind."""
_MOST_PARAMS = 5
_SEVERAL = "…"

Value = str | float | None


class Column(NamedTuple):
    """The content of a column.

    Args:
        kind: a key of :data:`KINDS`; "": a key of :data:`FACTS`.
        name: of the parameter, tag, metric or fact.
    """

    kind: str
    name: str

    @property
    def id(self) -> str:
        return f"{self.kind}.{self.name}" if self.kind else self.name

    @property
    def label(self) -> str:
        """Its head, to show."""
        if not self.kind:
            return FACTS[self.name]
        unit = "" if self.kind in ("params", "tags") else " GiB" if is_bytes(self.name) else " %" if is_share(self.name) else ""
        return KINDS[self.kind] + text.plain(self.name, 50) + unit


class Cell(NamedTuple):
    """A row's value: of a group the mean, and one deviation where it is a number."""

    value: Value
    std: float = math.nan


def column(id_: str) -> Column | None:
    """The column of that id; None: there is no such kind."""
    kind, _, name = id_.partition(".")
    if id_ in FACTS:
        return Column("", id_)
    return Column(kind, name) if kind in KINDS and name else None


def available(runs: Sequence[Run]) -> list[Column]:
    """All columns that these runs can fill."""
    params = sorted({name for run in runs for name in run.params})
    keys = sorted({key for run in runs for key in run.keys})
    tags = sorted({name for run in runs for name in run.tags if not name.startswith("mlflow.")})
    return [
        *(Column("", name) for name in FACTS),
        *(Column("params", name) for name in params),
        *(Column(kind, key) for key in keys for kind in ("best", "last")),
        *(Column("tags", name) for name in tags),
    ]


def usual(runs: Sequence[Run], quality: str | None, loss: str | None) -> list[Column]:
    """The columns of somebody who has not chosen any: status, differing parameters, results."""
    found = [Column("", "status")]
    found += [Column("best", quality)] if quality else []
    found += [Column("last", loss)] if loss else []
    found += [Column("best", "memory/peak")] if any("memory/peak" in run.keys for run in runs) else []
    found.append(Column("", "seconds"))
    params = list(differing(runs)) if len(runs) > 1 else []
    return [*found, *(Column("params", name) for name in params[:_MOST_PARAMS])]


def read(scene: Scene, groups: Sequence[Sequence[Run]], columns: Sequence[Column]) -> dict[Column, list[Cell]]:
    """The cells of each column, in the order of the groups. A column is of numbers if all that it has are some.

    Args:
        scene: the store.
        groups: each has a run.
        columns: the shown ones.
    """
    runs = [run for group in groups for run in group]
    scene.read(runs, [one.name for one in columns if one.kind == "best"])
    found = {}
    for one in columns:
        values = {run.id: _value(scene, run, one) for run in runs}
        numbers = {run_id: None if value is None else number(value) for run_id, value in values.items()}
        numeric = all(numbers[run_id] is not None for run_id, value in values.items() if value is not None)
        cells: Mapping[str, Value] = numbers if numeric else values
        found[one] = [_together([cells[run.id] for run in group], numeric) for group in groups]
    return found


def _together(values: Sequence[Value], numeric: bool) -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return Cell(None)
    if not numeric:
        return Cell(known[0] if len(set(map(str, known))) == 1 else _SEVERAL)
    numbers = np.array(known, float)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return Cell(float(known[0]))
    return Cell(float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan)


def _value(scene: Scene, run: Run, one: Column) -> Value:
    if one.kind == "params":
        return run.params.get(one.name)
    if one.kind == "tags":
        return run.tags.get(one.name)
    if not one.kind:
        return _fact(scene, run, one.name)
    value = _best(scene, run, one.name) if one.kind == "best" else _last(run, one.name)
    scale = 1 / GIB if is_bytes(one.name) else 100.0 if is_share(one.name) else 1.0
    return None if value is None else value * scale


def _best(scene: Scene, run: Run, key: str) -> float | None:
    if key not in run.keys:
        return None
    # of a peak, the most that was needed; "best" would be the least
    return summarise(scene.store.source.series(run.id, key), "max" if is_bytes(key) else goal(key)).best


def _last(run: Run, key: str) -> float | None:
    return run.latest[key][2] if key in run.latest else None


def _fact(scene: Scene, run: Run, name: str) -> Value:
    if name == "status":
        return scene.states[run.id].kind
    if name == "method":
        return run.tags.get("zo.method")
    if name == "step":
        return max((float(step) for step, _, _ in run.latest.values()), default=None)
    value = run.started if name == "started" else run.ended - run.started
    return None if math.isnan(value) else value
