"""Runs taken together by their settings."""

from __future__ import annotations

from collections.abc import Sequence

from . import text
from .source.base import Run
from .transforms import same_value

METHOD = "zo.method"


def setting(run: Run, name: str) -> str | None:
    """The run's parameter of that name, else its tag; None: it has neither."""
    return run.params.get(name, run.tags.get(name))


def groups_by(runs: Sequence[Run], names: Sequence[str]) -> list[list[Run]]:
    """The runs, those together that are set alike.

    Args:
        runs: in the order in which the groups come.
        names: of parameters or tags; two spellings of a number are equal.
    """
    groups: dict[object, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(same_value(setting(run, name)) for name in names), []).append(run)
    return list(groups.values())


def group_label(run: Run, names: Sequence[str]) -> str:
    """How the run's group is set, to show: "ZO (reft), lr=1e-3"."""
    return ", ".join(_said(name, text.plain(setting(run, name) or "–", 40)) for name in names)


def _said(name: str, value: str) -> str:
    """A method says that it is one; of other names the last part is enough."""
    return value if name == METHOD and value != "–" else f"{text.plain(name.split('/')[-1], 40)}={value}"
