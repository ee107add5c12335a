"""Pictures that compare methods: panels side by side, over one legend."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from .._answers import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    *("#7f7f7f", "#d62728", "#ff9896", "#1f77b4", "#17becf", "#2ca02c", "#9467bd", "#8c564b"),
    *("#bcbd22", "#e377c2", "#ff7f0e", "#98df8a", "#000000"),
)
MARKERS = "osD^"


def look(i: int) -> tuple[str, str]:
    """Colour and marker of the i-th method: the next marker where the colours begin again."""
    return COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]


@contextmanager
def panels(path: Path, count: int, size: tuple[float, float], legend_columns: int) -> Iterator[Sequence[Axes]]:
    """``count`` axes to draw on; afterwards the last one's labels are the legend, and the picture is saved at ``path``."""
    with needs("matplotlib", "drawing the comparison", "zolightning[demo]"):
        import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, drawn = plt.subplots(1, count, figsize=size, layout="constrained")
    try:
        yield drawn
        for axes in drawn:
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        handles, labels = drawn[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns, frameon=False)
        figure.savefig(path, dpi=130)
    finally:
        plt.close(figure)


def accuracy_at_memory(axes: Axes, title: str, peak_bytes: float, accuracies: Sequence[float], i: int) -> None:
    """The dot of the i-th method: mean accuracy in percent, with the sample standard deviation, at its memory in GB."""
    (colour, marker), percent = look(i), [100 * a for a in accuracies]
    error = stdev(percent) if len(percent) > 1 else math.nan
    memory = peak_bytes / 1e9
    axes.errorbar(memory, mean(percent), yerr=error, color=colour, marker=marker, markersize=9, capsize=4, label=title)
    axes.set(xlabel="peak memory, GB (left is better)", ylabel="test accuracy, %")
