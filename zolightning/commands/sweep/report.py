"""A sweep's table and pictures: quality against forward passes, seconds and memory."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from ..pictures import accuracy_at_memory, look, panels
from ..tables import aligned, by_method, markdown, spread, title_of
from .run import Outcome


def ranking(outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
    """Outcomes by method, best mean test accuracy first."""
    return sorted(by_method(outcomes), key=lambda runs: -mean(_tests(runs, "accuracy")))


def _tests(runs: Sequence[Outcome], name: str) -> list[float]:
    return [run.test[name] for run in runs if run.test is not None]


def check_target(target: str, names: Collection[str]) -> None:
    """Before anything runs.

    Raises:
        ValueError: neither a number in (0, 1] nor one of the entries' names.
    """
    if target not in names and not 0 < _number(target) <= 1:
        raise ValueError(f"`target` must be an accuracy in (0, 1] or the name of an entry ({', '.join(names)}), got {target!r}")


def target_accuracy(outcomes: Sequence[Outcome], target: str) -> float | None:
    """A number, or the mean over seeds of an entry's last validation accuracy; None where it has no finished run."""
    named = [run.history[-1]["accuracy"] for run in outcomes if run.settings["method"]["name"] == target]
    value = mean(named) if named else _number(target)
    return None if math.isnan(value) else value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def reached(run: Outcome, accuracy: float) -> dict[str, float] | None:
    """The first validation of a run at that accuracy; None when there is none."""
    return next((row for row in run.history if row["accuracy"] >= accuracy), None)


def header(outcomes: Sequence[Outcome], goal: float | None) -> tuple[str, ...]:
    """The table's column names."""
    clocks = {run.settings["budget"]["clock"] for run in outcomes}
    seconds = f"{'/'.join(sorted(clocks))} s"
    columns = (
        "method",
        "lr",
        "batch",
        "precision",
        "accuracy %",
        "test loss",
        seconds,
        "forward passes",
        "examples",
        "peak GB",
    )
    if goal is None:
        return columns
    return (*columns, f"{seconds} to {100 * goal:.1f} %", f"forwards to {100 * goal:.1f} %")


def rows(outcomes: Sequence[Outcome], goal: float | None) -> list[tuple[str, ...]]:
    """The table's cells, one row a method."""
    table = []
    for runs in ranking(outcomes):
        settings = runs[0].settings
        cells: tuple[str, ...] = (
            title_of(runs),
            f"{runs[0].lr:g}",
            str(settings["method"]["batch_size"]),
            settings["task"]["precision"],
            spread([100 * a for a in _tests(runs, "accuracy")], 1),
            spread(_tests(runs, "loss"), 3),
            f"{mean(run.seconds for run in runs):,.0f}",
            f"{mean(run.forward_passes for run in runs):,.0f}",
            f"{mean(run.examples for run in runs):,.0f}",
            f"{max(run.peak_memory for run in runs) / 1e9:.2f}",
        )
        if goal is not None:
            cells += tuple(_to_target(runs, goal, name) for name in ("seconds", "forward_passes"))
        table.append(cells)
    return table


def _to_target(runs: Sequence[Outcome], accuracy: float, name: str) -> str:
    found = [row[name] for run in runs if (row := reached(run, accuracy)) is not None]
    if not found:
        return "–"
    return spread(found, 0) + (f" ({len(found)} of {len(runs)})" if len(found) < len(runs) else "")


def text(outcomes: Sequence[Outcome], goal: float | None = None) -> str:
    """The ranking for a terminal, with the cost of an accuracy of ``goal``."""
    return aligned(header(outcomes, goal), rows(outcomes, goal))


def write(outcomes: Sequence[Outcome], folder: Path, goal: float | None = None) -> Path:
    """results.json, table.md and sweep.png in ``folder``; returns the picture's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps([asdict(run) for run in outcomes], indent=1) + "\n")
    (folder / "table.md").write_text(markdown(header(outcomes, goal), rows(outcomes, goal)) + "\n")
    return picture(outcomes, folder / "sweep.png")


def picture(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Validation accuracy against forward passes and seconds, mean and range over seeds; test accuracy against memory."""
    with panels(path, 3, size=(15, 5.6), legend_columns=4) as (left, middle, right):
        for i, runs in enumerate(ranking(outcomes), start=1):  # the first colour is grey
            colour, marker = look(i)
            for axes, name in ((left, "forward_passes"), (middle, "seconds")):
                validations = list(zip(*(run.history for run in runs), strict=False))
                x = [mean(row[name] for row in rows) for rows in validations]
                accuracy = [[100 * row["accuracy"] for row in rows] for rows in validations]
                axes.plot(x, [mean(a) for a in accuracy], color=colour, marker=marker, markersize=3)
                axes.fill_between(x, [min(a) for a in accuracy], [max(a) for a in accuracy], color=colour, alpha=0.15, lw=0)
            memory = max(run.peak_memory for run in runs)
            accuracy_at_memory(right, runs[0].title, memory, _tests(runs, "accuracy"), i)
        clock, ylabel = outcomes[0].settings["budget"]["clock"], "validation accuracy, %"
        left.set(xlabel="forward passes", ylabel=ylabel, xscale="symlog", title="Accuracy against forward passes")
        middle.set(xlabel=f"training time, {clock} seconds", ylabel=ylabel, title="Accuracy against time")
        right.set_title("Accuracy against memory")
        right.set_xlim(0, 1.05 * right.get_xlim()[1])
    return path
