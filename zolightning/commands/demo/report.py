"""The demo's table and picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from ..._answers import needs
from .run import Result

COLOURS = (
    *("#7f7f7f", "#d62728", "#ff9896", "#1f77b4", "#17becf", "#2ca02c", "#9467bd", "#8c564b"),
    *("#bcbd22", "#e377c2", "#ff7f0e", "#98df8a", "#000000"),
)
MARKERS = "osD^"
HEADER = ("method", "accuracy %", "test loss", "peak memory GB", "train s", "CPU s", "forward passes", "examples")


def look(i: int) -> tuple[str, str]:
    """Colour and marker of the i-th method: the next marker where the colours begin again."""
    return COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]


def groups(results: Iterable[Result]) -> list[list[Result]]:
    """Results by method, in the order they first appear."""
    by_title: dict[str, list[Result]] = {}
    for result in results:
        by_title.setdefault(result.title, []).append(result)
    return list(by_title.values())


def spread(values: Sequence[float], digits: int) -> str:
    """'mean' of one value, 'mean ± sample standard deviation' of several."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def rows(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """The table's cells, one row a method."""
    table: list[tuple[str, ...]] = []
    for runs in groups(results):
        name = runs[0].title + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")
        table.append(
            (
                name,
                spread([100 * r.accuracy for r in runs], 1),
                spread([r.loss for r in runs], 3),
                f"{max(r.peak_memory for r in runs) / 1e9:.2f}",
                spread([r.seconds for r in runs], 0),
                spread([r.cpu_seconds for r in runs], 0),
                f"{runs[0].forward_passes:,}",
                f"{runs[0].examples:,}",
            )
        )
    return table


def text_table(results: Iterable[Result]) -> str:
    """The table for a terminal."""
    return aligned(HEADER, rows(results))


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns for a terminal, the first one flush left."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    out = []
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        out.append("  ".join(cells))
    out.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(out)


def markdown_table(results: Iterable[Result]) -> str:
    """The same for a README."""
    return markdown(HEADER, rows(results))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of a Markdown table, the first column flush left."""
    lines = [header, ("---", *("---:" for _ in header[1:])), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(results: Sequence[Result], folder: Path, settings: dict[str, object]) -> Path:
    """results.json, table.md and comparison.png in ``folder``; returns the picture's path."""
    from dataclasses import asdict

    folder.mkdir(parents=True, exist_ok=True)
    payload = {"settings": settings, "results": [asdict(r) for r in results]}
    (folder / "results.json").write_text(json.dumps(payload, indent=1))
    (folder / "table.md").write_text(markdown_table(results) + "\n")
    return picture(results, folder / "comparison.png")


def picture(results: Sequence[Result], path: Path) -> Path:
    """Validation loss against training time, and test accuracy against peak memory."""
    with needs("matplotlib", "drawing the comparison", "zolightning[demo]"):
        import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    for i, runs in enumerate(groups(results)):
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
        memory = [r.peak_memory / 1e9 for r in runs]
        accuracy = [100 * r.accuracy for r in runs]
        error = stdev(accuracy) if len(accuracy) > 1 else math.nan
        right.errorbar(
            mean(memory), mean(accuracy), yerr=error, color=colour, marker=marker, markersize=9, capsize=4, label=title
        )
    left.set(xlabel="training time, CPU seconds", ylabel="validation loss", title="Loss against time")
    left.set_ylim(bottom=0)
    right.set(xlabel="peak memory, GB (left is better)", ylabel="test accuracy, %", title="Memory against accuracy")
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
