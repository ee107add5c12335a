"""Savings of zeroth-order training against backprop, or of any method against a pinned run, and their cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from . import words
from .source.base import Reads, Run
from .spent import UNITS, Keep, Spent
from .transforms import TASK, goal, seed_groups

Method = Literal["zo", "backprop"]

QUALITIES = (
    "test/accuracy", "val/accuracy", "test_accuracy", "val_accuracy", "test_acc", "val_acc", "test/acc", "val/acc",
    "test/f1", "val/f1", "test/loss", "val/loss", "test_loss", "val_loss", "eval_loss",
)  # fmt: skip
"""How good a model is, by the first of these that both sides logged: the test's figure before one used to choose by."""


class Cost(NamedTuple):
    """Cost and quality of a method by some point, as the mean over the runs that differ in their seed; nan where not logged.

    Args:
        runs: the seeds that count: those that ended, or all when none has.
        going: how many more have not ended, and do not count.
        name: of the method.
        peak: memory in bytes, the largest over the seeds and their whole length.
        seconds: of training.
        quality: the quality metric's best value.
    """

    runs: tuple[Run, ...]
    going: int
    name: str
    peak: float
    seconds: float
    quality: float


class Difference(NamedTuple):
    """One of a saving's figures: "−74 %", "memory", and whether that is ``good``, ``bad`` or ``plain``."""

    value: str
    of: str
    tone: str


class Saving(NamedTuple):
    """A method beside the baseline of the same task, both as they were when they had done the same.

    Args:
        method: the side that is compared.
        baseline: the side that it is compared with.
        quality_key: the metric that says how good a model is; None when they have none in common.
        memory: peak over the baseline's, less 1: -0.74 saves 74 %.
        time: seconds of training over the baseline's.
        quality: the method's value less the baseline's.
        ended: all its runs have; else the figures are those logged so far.
        axis: the amount of work that was equal, a key of :data:`dashboard.spent.EQUAL`.
        limit: how much of it; infinity for whole runs.
    """

    method: Cost
    baseline: Cost
    quality_key: str | None
    memory: float
    time: float
    quality: float
    ended: bool
    axis: str
    limit: float

    @property
    def at(self) -> str:
        """The work that both had done: "at 6,400 examples"."""
        if self.axis == "whole":
            return "over the whole runs"
        if self.axis == "step":
            return f"at step {self.limit:,.0f}"
        done = words.duration(self.limit) if self.axis == "elapsed" else f"{self.limit:,.0f}"
        return f"at {done} {UNITS[self.axis]}"

    @property
    def differences(self) -> list[Difference]:
        """The figures that are known."""
        found = []
        if not math.isnan(self.memory):
            found.append(Difference(words.change_in_percent(self.memory), "memory", _tone(-self.memory)))
        if not math.isnan(self.time) and self.axis != "elapsed":
            found.append(Difference(words.times(self.time), "the time", "plain"))
        key = self.quality_key
        if key is not None and not math.isnan(self.quality):
            better = self.quality if goal(key) == "max" else -self.quality
            value = words.change(self.quality, key)
            found.append(Difference(value, key, _tone(better) if value.strip("+−±0. pts") else "plain"))
        return found

    @property
    def text(self) -> str:
        """One line: "−74 % memory, 2.1× the time, −1.8 points of val/accuracy at 6,400 examples"."""
        parts = [f"{one.value.replace('pts', 'points of')} {one.of}" for one in self.differences]
        at = "" if [one.of for one in self.differences] == ["memory"] else f" {self.at}"  # the peak is of the whole run
        return ", ".join(parts) + at + ("" if self.ended else ", so far")

    @property
    def detail(self) -> str:
        """The figures behind the line, in a few sentences."""
        method, base = self.method, self.baseline
        found = [f"{_several(method)} against {_several(base)}, {self.at}."]
        if not math.isnan(self.memory):
            found.append(f"Peak memory {words.memory(method.peak)} instead of {words.memory(base.peak)}.")
        if not math.isnan(self.time) and self.axis != "elapsed":
            found.append(f"Training took {words.duration(method.seconds)} instead of {words.duration(base.seconds)}.")
        if self.quality_key is not None and not math.isnan(self.quality):
            ours, theirs = words.number(method.quality), words.number(base.quality)
            found.append(f"{self.quality_key} {ours} instead of {theirs}.")
        if method.going:
            found.append(f"{words.several(method.going, 'more seed')} not ended: not counted.")
        return " ".join(found)


def method_of(run: Run) -> Method | None:
    """Zeroth-order runs carry the tag ``zo.recipe``, backprop runs beside them only ``zo.method``; others are neither."""
    if "zo.recipe" in run.tags:
        return "zo"
    return "backprop" if "zo.method" in run.tags else None


def method_name(run: Run) -> str:
    """The run's method as people call it."""
    return run.tags.get("zo.method") or run.name


def compare(
    runs: Sequence[Run],
    source: Reads,
    quality: str | None = None,
    equal: str = "",
    baseline: Run | None = None,
    keep: Keep[float] | None = None,
) -> list[Saving]:
    """Each zeroth-order method beside the backprop baseline of its task, best quality first.

    A task is an experiment, and within it the same model and data where the runs logged them. The baseline is the backprop
    method that came to the best quality there, so the one that somebody with memory enough would take; of equal ones, the
    one that needs least memory. Both count up to where the shorter of them came, in examples, steps, forward passes or
    seconds. Only runs that ended are baselines; failed and killed runs are left out on both sides, and so is a method of
    which there is no figure yet.

    Args:
        runs: of any kind; those that are neither zeroth-order nor backprop are passed over.
        source: the points of their metrics.
        quality: the metric that says how good a model is; None: the first of :data:`QUALITIES` that both sides logged.
        equal: the amount of work at which both sides are compared, a key of :data:`dashboard.spent.EQUAL`.
        baseline: a run to compare all other methods with, whatever they are; its seeds count with it.
        keep: remembers a run's figures.
    """
    pairs = _Pairs(Spent(source, keep), quality, equal)
    sound = [run for run in runs if run.status in ("RUNNING", "FINISHED")]
    if baseline is not None:
        groups = seed_groups([*(run for run in sound if run.id != baseline.id), baseline])
        pinned = next(group for group in groups if baseline in group)
        found = [pairs.saving(group, [pinned]) for group in groups if group is not pinned]
    else:
        rivals = _Rivals([run for run in sound if method_of(run) == "backprop" and run.status == "FINISHED"])
        ours = seed_groups([run for run in sound if method_of(run) == "zo"])
        found = [pairs.saving(group, rivals.of(group[0])) for group in ours]
    telling = [one for one in found if one is not None and one.differences]
    return sorted(telling, key=lambda saving: _loss(saving.method.quality, saving.quality_key))


class _Rivals:
    """Groups of backprop runs, found by their task: looked through once for each task, and not for each run."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._by_task: dict[tuple[str | None, ...], list[Run]] = {}
        self._groups: dict[tuple[str | None, ...], list[list[Run]]] = {}
        for run in runs:
            self._by_task.setdefault(_task(run), []).append(run)

    def of(self, run: Run) -> list[list[Run]]:
        task = _task(run)
        if task not in self._groups:
            some = [run for other, runs in self._by_task.items() if _same(task, other) for run in runs]
            self._groups[task] = seed_groups(some)
        return self._groups[task]


class _Pairs:
    """Puts groups of runs beside their rivals; of the same rivals it chooses the best once."""

    def __init__(self, spent: Spent, quality: str | None, equal: str) -> None:
        self._spent, self._quality, self._equal = spent, quality, equal
        self._best: dict[tuple[int, str | None], list[Run]] = {}
        self._keys: dict[int, set[str]] = {}

    def saving(self, group: list[Run], rivals: list[list[Run]]) -> Saving | None:
        """The group beside the best of the rivals; None when there is none, or nothing that both have done."""
        if not rivals:
            return None
        for key in [self._quality] if self._quality is not None else self._common(counted(group), rivals):
            found = self._beside(group, self._strongest(rivals, key), key)
            if found is not None and not math.isnan(found.quality):
                return found
        return self._beside(group, self._strongest(rivals, None), None)

    def _beside(self, group: list[Run], baseline: list[Run], key: str | None) -> Saving | None:
        ours, theirs = counted(group), counted(baseline)
        axis = self._equal or ("examples" if all("examples_seen" in run.keys for run in (*ours, *theirs)) else "step")
        ends = [self._spent.reach(run, axis) for run in (*ours, *theirs)]
        if math.isnan(sum(ends)):
            return None
        limit = min(ends)
        method, base = self._cost(group, key, axis, limit), self._cost(baseline, key, axis, limit)
        return Saving(
            method,
            base,
            key,
            method.peak / base.peak - 1 if base.peak > 0 else math.nan,
            method.seconds / base.seconds if base.seconds > 0 else math.nan,
            method.quality - base.quality,
            all(run.status == "FINISHED" for run in ours),
            axis,
            limit,
        )

    def _common(self, ours: Sequence[Run], rivals: list[list[Run]]) -> list[str]:
        """How good a model is, by a metric that both sides logged."""
        if id(rivals) not in self._keys:
            self._keys[id(rivals)] = {key for rival in rivals for run in rival for key in run.keys}
        return [key for key in QUALITIES if key in self._keys[id(rivals)] and all(key in run.keys for run in ours)]

    def _strongest(self, rivals: list[list[Run]], key: str | None) -> list[Run]:
        name = (id(rivals), key)
        if name not in self._best:
            costs = [self._cost(rival, key, "whole", math.inf) for rival in rivals]
            best = min(range(len(rivals)), key=lambda i: (_loss(costs[i].quality, key), costs[i].peak))
            self._best[name] = rivals[best]
        return self._best[name]

    def _cost(self, group: list[Run], key: str | None, axis: str, limit: float) -> Cost:
        runs, spent = counted(group), self._spent
        return Cost(
            tuple(runs),
            len(group) - len(runs),
            method_name(group[0]),
            max((spent.peak(run) for run in runs), key=lambda peak: (not math.isnan(peak), peak)),
            mean(spent.seconds(run, axis, limit) for run in runs),
            mean(spent.quality(run, key, axis, limit) for run in runs) if key is not None else math.nan,
        )


def counted(group: Sequence[Run]) -> list[Run]:
    """The runs that ended; all while none has. One that is going on is never averaged with those that ended."""
    return [run for run in group if run.status == "FINISHED"] or list(group)


def _task(run: Run) -> tuple[str | None, ...]:
    return (run.experiment_id, *(run.params.get(name, run.tags.get(name)) for name in TASK))


def _same(a: tuple[str | None, ...], b: tuple[str | None, ...]) -> bool:
    return all(one is None or other is None or one == other for one, other in zip(a, b, strict=True))


def _loss(quality: float, key: str | None) -> float:
    """The quality as something to make small; unknown is worst."""
    if key is None or math.isnan(quality):
        return math.inf
    return quality if goal(key) == "min" else -quality


def mean(values: Iterable[float]) -> float:
    """Of the values that are known; nan when none is."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if len(known) > 1 else known[0] if known else math.nan


def _several(cost: Cost) -> str:
    return cost.name if len(cost.runs) == 1 else f"{cost.name} ({len(cost.runs)} seeds)"


def _tone(better: float) -> str:
    return "good" if better > 0 else "bad" if better < 0 else "plain"
