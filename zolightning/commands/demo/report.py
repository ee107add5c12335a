"""The demo's table and picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean

from ..bench.machine import origin
from ..pictures import accuracy_at_memory, look, panels
from ..tables import NONE, aligned, by_method, markdown, spread, title_of
from .run import Result

COLUMNS: dict[str, Callable[[Sequence[Result]], str]] = {
    "method": title_of,
    "accuracy %": lambda runs: spread([100 * r.accuracy for r in runs], 1),
    "test loss": lambda runs: spread([r.loss for r in runs], 3),
    "peak memory GB": lambda runs: f"{max(r.peak_memory for r in runs) / 1e9:.2f}",
    "train s": lambda runs: spread([r.seconds for r in runs], 0),
    "CPU s": lambda runs: spread([r.cpu_seconds for r in runs], 0),
    "forward passes": lambda runs: f"{runs[0].forward_passes:,}",
    "examples": lambda runs: f"{runs[0].examples:,}",
    "perplexity": lambda runs: spread([r.perplexity for r in runs if r.perplexity is not None], 1),
}
"""The cells of the runs of one method, by the name of their column."""


def rows(results: Iterable[Result], columns: Iterable[str]) -> list[list[str]]:
    """The table's cells, one row a method."""
    return [[COLUMNS[column](runs) for column in columns] for runs in by_method(results)]


def measured(results: Sequence[Result]) -> tuple[str, ...]:
    """The columns in which some method has a value."""
    return tuple(name for name, cell in COLUMNS.items() if any(cell(runs) != NONE for runs in by_method(results)))


def text_table(results: Sequence[Result]) -> str:
    """The table for a terminal."""
    columns = measured(results)
    return aligned(columns, rows(results, columns))


def markdown_table(results: Sequence[Result]) -> str:
    """The same for a README."""
    columns = measured(results)
    return markdown(columns, rows(results, columns))


def write(results: Sequence[Result], folder: Path, settings: dict[str, object]) -> Path:
    """results.json, table.md and comparison.png in ``folder``; returns the picture's path."""
    from dataclasses import asdict

    folder.mkdir(parents=True, exist_ok=True)
    payload = {"origin": origin(), "settings": settings, "results": [asdict(r) for r in results]}
    (folder / "results.json").write_text(json.dumps(payload, indent=1))
    (folder / "table.md").write_text(markdown_table(results) + "\n")
    return picture(results, folder / "comparison.png")


def picture(results: Sequence[Result], path: Path) -> Path:
    """Validation loss against training time, and test accuracy against peak memory."""
    with panels(path, 2, size=(12, 5.2), legend_columns=3) as (left, right):
        for i, runs in enumerate(by_method(results)):
            (colour, marker), title = look(i), runs[0].title
            trained = [r for r in runs if r.history]
            for j, run in enumerate(trained):
                left.plot(
                    [h.get("cpu_seconds", h["seconds"]) for h in run.history],  # results of before have no CPU time
                    [h["loss"] for h in run.history],
                    color=colour,
                    marker=marker,
                    markersize=3,
                    alpha=1.0 if len(trained) == 1 else 0.7,
                    label=title if j == 0 else None,
                )
            if not trained:
                left.axhline(runs[0].loss, color=colour, linestyle=":", label=title)
            memory, accuracies = mean(r.peak_memory for r in runs), [r.accuracy for r in runs]
            accuracy_at_memory(right, title, memory, accuracies, i)
        left.set(xlabel="training time, CPU seconds", ylabel="validation loss", title="Loss against time")
        left.set_ylim(bottom=0)
        right.set_title("Memory against accuracy")
        right.set_xlim(left=0)
    return path
