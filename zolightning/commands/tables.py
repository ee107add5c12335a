"""Tables of results, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Protocol, TypeVar


class Titled(Protocol):
    """The result of a run, which has the title of its method."""

    @property
    def title(self) -> str: ...


T = TypeVar("T", bound=Titled)

NONE = "–"
"""The cell of a method that has no value."""


def by_method(results: Iterable[T]) -> list[list[T]]:
    """Results by method, in the order in which the methods first appear."""
    by_title: dict[str, list[T]] = {}
    for result in results:
        by_title.setdefault(result.title, []).append(result)
    return list(by_title.values())


def title_of(runs: Sequence[Titled]) -> str:
    """The title of a method's row, with the number of runs where there are several."""
    return runs[0].title + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")


def spread(values: Sequence[float], digits: int) -> str:
    """'mean' of one value, 'mean ± sample standard deviation' of several, a dash for none."""
    if not values:
        return NONE
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


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


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of a Markdown table, the first column flush left."""
    lines = [header, ("---", *("---:" for _ in header[1:])), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
