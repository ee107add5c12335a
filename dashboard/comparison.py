"""What zeroth-order training saved against backprop, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from . import words
from .source.base import Run, Series
from .transforms import goal, seed_groups, summarise

Method = Literal["zo", "backprop"]
ReadSeries = Callable[[str, str], Series]

PEAKS = ("memory/peak", "summary/peak_memory")
SECONDS = ("speed/train_seconds", "summary/train_seconds")
QUALITIES = (
    "test/accuracy", "val/accuracy", "test_accuracy", "val_accuracy", "test_acc", "val_acc", "test/acc", "val/acc",
    "test/f1", "val/f1", "test/loss", "val/loss", "test_loss", "val_loss", "eval_loss",
)  # fmt: skip
"""How good a model is, by the first of these that both sides logged: the test's figure before one used to choose by."""

_TASK = ("model", "model_name", "data", "dataset", "task")


class Cost(NamedTuple):
    """What a method took and gave, as the mean over the runs that differ in their seed; nan where it was not logged.

    Args:
        runs: the seeds.
        name: of the method.
        peak: memory in bytes, the largest over the seeds.
        seconds: of training.
        quality: the quality metric's best value.
    """

    runs: tuple[Run, ...]
    name: str
    peak: float
    seconds: float
    quality: float


class Saving(NamedTuple):
    """A zeroth-order method beside the backprop baseline of the same task.

    Args:
        method: what is compared.
        baseline: with what.
        quality_key: the metric that says how good a model is; None when they have none in common.
        memory: peak over the baseline's, less 1: -0.74 saves 74 %.
        time: seconds of training over the baseline's.
        quality: the method's value less the baseline's.
        ended: all its runs have; else the figures are of what was logged so far.
    """

    method: Cost
    baseline: Cost
    quality_key: str | None
    memory: float
    time: float
    quality: float
    ended: bool

    @property
    def text(self) -> str:
        """One line: "−74 % memory, 2.1× the time, −1.8 points of val/accuracy"."""
        parts = []
        if not math.isnan(self.memory):
            parts.append(f"{_signed(f'{100 * self.memory:+.0f}')} % memory")
        if not math.isnan(self.time):
            parts.append(f"{self.time:.2g}× the time" if self.time < 10 else f"{self.time:.0f}× the time")
        if self.quality_key is not None and not math.isnan(self.quality):
            share = words.is_share(self.quality_key)
            change = f"{100 * self.quality:+.1f} points of" if share else f"{self.quality:+.3g}"
            parts.append(f"{_signed(change)} {self.quality_key}")
        return ", ".join(parts) + ("" if self.ended else ", so far")

    @property
    def detail(self) -> str:
        """The figures behind the line, in a sentence or two."""
        method, base = self.method, self.baseline
        found = [f"{_several(method)} against {_several(base)}."]
        if not math.isnan(self.memory):
            found.append(f"Peak memory {words.memory(method.peak)} instead of {words.memory(base.peak)}.")
        if not math.isnan(self.time):
            found.append(f"Training took {words.duration(method.seconds)} instead of {words.duration(base.seconds)}.")
        if self.quality_key is not None and not math.isnan(self.quality):
            ours, theirs = words.number(method.quality), words.number(base.quality)
            found.append(f"{self.quality_key} {ours} instead of {theirs}.")
        return " ".join(found)


def method_of(run: Run) -> Method | None:
    """Zeroth-order runs carry the tag ``zo.recipe``, backprop runs beside them only ``zo.method``; others are neither."""
    if "zo.recipe" in run.tags:
        return "zo"
    return "backprop" if "zo.method" in run.tags else None


def compare(runs: Sequence[Run], series: ReadSeries, quality: str | None = None) -> list[Saving]:
    """Each zeroth-order method beside the backprop baseline of its task, best quality first.

    A task is an experiment, and within it the same model and data where the runs logged them. The baseline is the backprop
    method that came to the best quality there, so the one that somebody with memory enough would take; of equal ones, the
    one that needs least memory. Only runs that ended are baselines; failed and killed runs are left out on both sides, and
    so is a method of which there is no figure yet.

    Args:
        runs: of any kind; those that are neither zeroth-order nor backprop are passed over.
        series: the points of a run's metric: a source's ``series``.
        quality: the metric that says how good a model is; None: the first of :data:`QUALITIES` that both sides logged.
    """
    ours = [run for run in runs if method_of(run) == "zo" and run.status in ("RUNNING", "FINISHED")]
    theirs = [run for run in runs if method_of(run) == "backprop" and run.status == "FINISHED"]
    found = []
    for group in seed_groups(ours):
        rivals = seed_groups([run for run in theirs if _same_task(run, group[0])])
        key = _common_quality(group, [run for rival in rivals for run in rival]) if quality is None else quality
        costs = [cost(rival, series, key) for rival in rivals]
        if costs:
            found.append(_saving(cost(group, series, key), min(costs, key=lambda c: (_loss(c, key), c.peak)), key))
    telling = [one for one in found if not all(map(math.isnan, (one.memory, one.time, one.quality)))]
    return sorted(telling, key=lambda saving: _loss(saving.method, saving.quality_key))


def cost(runs: Sequence[Run], series: ReadSeries, quality: str | None) -> Cost:
    """What runs that differ in their seed took and gave.

    Args:
        runs: at least one.
        series: the points of a run's metric.
        quality: the metric that says how good a model is; None: unknown.
    """

    def best(run: Run, key: str | None) -> float:
        return summarise(series(run.id, key), goal(key)).best if key is not None else math.nan

    def largest(run: Run, keys: Iterable[str]) -> float:
        key = next((key for key in keys if key in run.keys), None)
        return summarise(series(run.id, key), "max").best if key is not None else math.nan

    return Cost(
        tuple(runs),
        runs[0].tags.get("zo.method") or runs[0].name,
        max((largest(run, PEAKS) for run in runs), key=lambda peak: (not math.isnan(peak), peak)),
        _mean(last(run, SECONDS, series) for run in runs),
        _mean(best(run, quality) for run in runs),
    )


def last(run: Run, keys: Sequence[str], series: ReadSeries) -> float:
    """What a counter has come to: the last value of the first of these metrics that the run has; nan when it has none.

    Args:
        run: says the last value, or else the points do.
        keys: metrics that only grow.
        series: the points of a run's metric.
    """
    key = next((key for key in keys if key in run.keys), None)
    if key is None:
        return math.nan
    return run.latest[key][2] if key in run.latest else summarise(series(run.id, key), "max").last


def _saving(method: Cost, baseline: Cost, key: str | None) -> Saving:
    return Saving(
        method,
        baseline,
        key,
        method.peak / baseline.peak - 1 if baseline.peak > 0 else math.nan,
        method.seconds / baseline.seconds if baseline.seconds > 0 else math.nan,
        method.quality - baseline.quality,
        all(run.status == "FINISHED" for run in method.runs),
    )


def _same_task(a: Run, b: Run) -> bool:
    both = (name for name in _TASK if name in a.params and name in b.params)
    return a.experiment_id == b.experiment_id and all(a.params[name] == b.params[name] for name in both)


def _common_quality(ours: Sequence[Run], theirs: Sequence[Run]) -> str | None:
    return next((key for key in QUALITIES if all(key in r.keys for r in ours) and any(key in r.keys for r in theirs)), None)


def _loss(cost: Cost, key: str | None) -> float:
    """The quality as something to make small; unknown is worst."""
    if key is None or math.isnan(cost.quality):
        return math.inf
    return cost.quality if goal(key) == "min" else -cost.quality


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _several(cost: Cost) -> str:
    return cost.name if len(cost.runs) == 1 else f"{cost.name}, {len(cost.runs)} seeds,"


def _signed(text: str) -> str:
    return text.replace("-", "−")
