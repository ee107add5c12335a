"""Which hyperparameters tell runs apart, and legends made of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from ..source.base import Run

_SEEDS = frozenset({"seed", "zo/seed", "random_seed", "seed_everything"})
TASK = ("model", "model_name", "data", "dataset", "task")
"""Parameters or tags that name the task."""
_TOTALS = ("max_steps", "trainer/max_steps", "total_steps", "num_steps", "steps", "num_training_steps", "zo.max_steps")
_GROUPED_BY = ("zo.method", "zo.recipe", *TASK, "budget", *_TOTALS)
_SAME_LENGTH = 1.1
_SHORT = 24


def same_value(text: str | None) -> float | str | None:
    """The value of a parameter's text: two spellings of a number are equal ("1e-3" and "0.001")."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        return text
    return value if value == value else "nan"


def differing(runs: Sequence[Run]) -> dict[str, tuple[str | None, ...]]:
    """Parameters whose values differ among the runs, and each run's value as it was logged; None where it has none.

    Args:
        runs: those that are compared; the values come in their order.
    """
    names = sorted({name for run in runs for name in run.params})
    values = {name: tuple(run.params.get(name) for run in runs) for name in names}
    return {name: texts for name, texts in values.items() if len({same_value(text) for text in texts}) > 1}


def legends(runs: Sequence[Run]) -> dict[str, str]:
    """A short label for each run: the fewest differing parameters that tell all runs apart, else their names.

    Args:
        runs: those that are compared.

    Returns:
        Labels by run id, each its own; where names repeat, part of the id follows. The text comes from outside.
    """
    chosen = _telling(differing(runs))
    labels = [", ".join(f"{name}={_cut(run.params[name])}" for name in chosen if name in run.params) for run in runs]
    if "" in labels or len(set(labels)) < len(runs):
        labels = [run.name for run in runs]
    return {
        run.id: label if labels.count(label) == 1 else f"{label} ({run.id[:6]})"
        for run, label in zip(runs, labels, strict=True)
    }  # fmt: skip


def _telling(values: Mapping[str, tuple[str | None, ...]]) -> list[str]:
    """Names, each chosen because it splits the runs into the most kinds beyond those before it."""
    chosen: list[str] = []
    kinds = 1

    def split(name: str) -> int:
        return len(set(zip(*([same_value(t) for t in values[n]] for n in (*chosen, name)), strict=True)))

    while rest := [name for name in values if name not in chosen]:
        best = max(rest, key=lambda name: (split(name), name not in _SEEDS))
        if split(best) == kinds:
            break
        kinds = split(best)
        chosen.append(best)
    return chosen


def _cut(text: str) -> str:
    return text if len(text) <= _SHORT else text[: _SHORT - 1] + "…"


def seed_groups(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs, those together that differ in nothing but the seed: the same experiment, method, data, length and parameters.

    Where the runs do not say how many steps they are to take, those are of one length that ended within 10 % of each other; one
    that has not ended belongs to the shortest of these that it may still come to.

    Args:
        runs: in the order in which the groups come. A run that logged no parameters is a group of its own.
    """
    groups: dict[object, list[Run]] = {}
    for run in runs:
        same = {(name, same_value(text)) for name, text in run.params.items() if name not in _SEEDS}
        tags = tuple(run.tags.get(name) for name in _GROUPED_BY)
        key = (run.experiment_id, tags, frozenset(same)) if run.params else run.id
        groups.setdefault(key, []).append(run)
    split = [[group] if total_steps(group[0]) is not None else _by_length(group) for group in groups.values()]
    place = {run.id: i for i, run in enumerate(runs)}
    return sorted((group for some in split for group in some), key=lambda group: place[group[0].id])


def total_steps(run: Run) -> int | None:
    """How many steps the run is to take, if it said so in its parameters or tags."""
    for name in _TOTALS:
        text = run.params.get(name) or run.tags.get(name) or ""
        if text.isascii() and text.isdigit() and 0 < int(text) < 10**15:
            return int(text)
    return None


def reached(run: Run) -> int | None:
    """The last step at which the run logged anything; None while it logged nothing. MLflow counts its own metrics otherwise."""
    return max((step for key, (step, _, _) in run.latest.items() if not key.startswith("system/")), default=None)


def _by_length(group: list[Run]) -> list[list[Run]]:
    if len(group) == 1:
        return [group]
    length = {run.id: reached(run) or 0 for run in group}
    limits: list[float] = []  # the longest run of each group may be so long
    for run in sorted((run for run in group if run.status == "FINISHED"), key=lambda run: length[run.id]):
        if not limits or length[run.id] > limits[-1]:
            limits.append(length[run.id] * _SAME_LENGTH)
    found: list[list[Run]] = [[] for _ in (*limits, None)]
    for run in group:
        found[bisect_left(limits, length[run.id])].append(run)
    return [some for some in found if some]
