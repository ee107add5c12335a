"""One name for a run on all pages, in legends, tooltips and the report: it does not depend on the other selected runs."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from . import text
from .source.base import Run
from .transforms import legends

_LIMIT = 80
_SEED_TAIL = re.compile(r"[\s_\-./:,(#=]*(?:(?:seed|run|s|try)[\s_\-=]*)?$", re.IGNORECASE)
_SHORTEST = 3  # characters of a common beginning that passes for a name


def run_names(runs: Sequence[Run]) -> dict[str, str]:
    """A name for each run, each its own and safe to show.

    It is the run's own; runs of the same name are told apart by the parameters that differ among them, else by their ids.

    Args:
        runs: all that may stand side by side.
    """
    names = {run.id: text.plain(run.name, _LIMIT) for run in runs}
    alike: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        alike[names[run.id]].append(run)
    for name, several in alike.items():
        if len(several) > 1:
            for run_id, label in legends(several).items():
                names[run_id] = f"{name} {_behind(label, several[0].name)}"
    return names


def _behind(label: str, name: str) -> str:
    """The part that tells a run from others of its name; where that is an id, the name itself is not said again."""
    return text.plain(label.removeprefix(name).strip() if label.startswith(name) else f"({label})", _LIMIT)


def group_names(groups: Sequence[Sequence[Run]], names: Mapping[str, str]) -> list[str]:
    """A name for each group of runs: the run's own where it is one, else how all its runs' names begin, else their method.

    Groups that come to the same name are told apart by the parameters that differ among them.

    Args:
        groups: each has a run.
        names: of :func:`run_names`.
    """
    found = [names[group[0].id] if len(group) == 1 else _common(group) for group in groups]
    times = Counter(found)
    told = {name: legends([group[-1] for group, one in zip(groups, found, strict=True) if one == name]) for name in times}
    return [
        name if times[name] == 1 else f"{name} {_behind(told[name][group[-1].id], group[-1].name)}"
        for group, name in zip(groups, found, strict=True)
    ]


def _common(group: Sequence[Run]) -> str:
    """The common beginning of all names, without the seed's number; the method where that is next to nothing."""
    first, last = min(run.name for run in group), max(run.name for run in group)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    begin = _SEED_TAIL.sub("", re.sub(r"\d+$", "", first[:same]))  # "seed1" is common to "seed10" and "seed11" by chance
    return text.plain(begin if len(begin) >= _SHORTEST else group[-1].tags.get("zo.method") or group[-1].name, _LIMIT)
