"""Charts that stand still: options for ECharts, which draws them on a canvas. All names in them are text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

PARTS = {
    "weights": ("#3d78f6", "#4b8bff"),
    "gradients": ("#ae59a1", "#d28ba1"),
    "optimizer_state": ("#a09500", "#facc68"),
    "activations": ("#167c3f", "#23f5db"),
    "scratch": ("#742fb9", "#9d86d6"),
    "other": ("#8a8f98", "#7b808a"),
}
"""The uses of memory, and the colour of each on a light and on a dark page."""

_LABEL, _MOST_LABELS = 28, 12
_MANY, _COLUMNS, _LINES = 200, 160, 80  # thirds of a dot across and up a chart
_APART_X, _APART_Y = 0.35, 0.07  # of the chart, between two labels


class Dot(NamedTuple):
    """A run or a group on a chart of two quantities.

    Args:
        name: a label.
        x: one quantity.
        y: the other.
        color: of the page's theme.
        front: no other beats it.
        ended: else it is hollow.
        spread: of y, over the runs behind the dot; nan for one.
    """

    name: str
    x: float
    y: float
    color: str
    front: bool
    ended: bool = True
    spread: float = math.nan


def stacked_memory(
    names: Sequence[str], parts: Mapping[str, Sequence[float]], budget: float, unit: str, dark: bool
) -> dict[str, Any]:
    """Bars of the parts of each run's peak memory, and the budget across them.

    Args:
        names: a label for each bar, the first one on top.
        parts: memory by part, in the order of ``names``; parts that are not in :data:`PARTS` are grey.
        budget: in the same unit.
        unit: its name.
        dark: the page is.
    """
    series: list[dict[str, Any]] = [
        {
            "name": part.replace("_", " "),
            "type": "bar",
            "stack": "peak",
            "data": [float(f"{value:.4g}") for value in values],
            "itemStyle": {"color": PARTS.get(part, PARTS["other"])[dark]},
            "barMaxWidth": 26,
        }
        for part, values in parts.items()
    ]
    if series:
        series[0]["markLine"] = {
            "symbol": "none",
            "silent": True,
            "lineStyle": {"type": "dashed", "width": 1.5, "color": ink(dark)},
            "label": {"formatter": f"{budget:.4g} {unit}", "color": ink(dark), "position": "start"},
            "data": [{"xAxis": budget}],
        }
    most = max((sum(column) for column in zip(*parts.values(), strict=True)), default=0.0)
    return {
        **frame("Parts of the peak", dark),
        "legend": {"bottom": 0, "textStyle": {"color": ink(dark)}},
        "grid": {"left": 8, "right": 24, "top": 48, "bottom": 56, "containLabel": True},
        "xAxis": {"type": "value", "name": unit, "nameLocation": "middle", "nameGap": 26, "max": _above(max(most, budget))},
        "yAxis": {
            "type": "category",
            "inverse": True,
            "data": [literal(name) for name in names],
            "axisLabel": {"width": 190, "overflow": "truncate"},
        },
        "series": series,
    }


def trade_off(title: str, x_name: str, y_name: str, dots: Sequence[Dot], dark: bool, log_x: bool) -> dict[str, Any]:
    """Two quantities against each other, with the runs that no other beats in both joined by a line.

    Args:
        title: of the chart.
        x_name: the name of x, with its unit.
        y_name: the name of y.
        dots: the runs.
        dark: the page is.
        log_x: x spans orders of magnitude.
    """
    front = sorted((dot.x, dot.y) for dot in dots if dot.front)
    low, high = min(dot.x for dot in dots), max(dot.x for dot in dots)
    middle = math.sqrt(low * high) if log_x else (low + high) / 2
    labelled = {id(dot) for dot in _spaced([dot for dot in dots if dot.front], low, high, log_x)}
    seen = uncovered(dots, low, high, log_x)
    data = [_point(dot, dark, id(dot) in labelled, dot.x > middle) for dot in sorted(seen, key=lambda dot: dot.front)]
    line = {
        "name": "not beaten by any other",
        "type": "line",
        "data": [list(point) for point in front],
        "step": "end",
        "symbol": "none",
        "silent": True,
        "lineStyle": {"type": "dashed", "width": 1.2, "color": ink(dark), "opacity": 0.45},
    }
    return {
        **frame(title, dark),
        "grid": {"left": 30, "right": 40, "top": 44, "bottom": 30, "containLabel": True},
        "xAxis": {"type": "log" if log_x else "value", "name": x_name, "nameLocation": "middle", "nameGap": 28, "scale": True},
        "yAxis": {"type": "value", "name": y_name, "nameLocation": "middle", "nameRotate": 90, "nameGap": 38, "scale": True},
        "series": [line, {"type": "scatter", "data": data, "labelLayout": {"hideOverlap": True}, "cursor": "default"}],
    }


def uncovered(dots: Sequence[Dot], low: float, high: float, log_x: bool) -> list[Dot]:
    """The dots that can be told apart: where many are alike and a third of a dot from each other, one is drawn."""
    if len(dots) <= _MANY:
        return list(dots)
    places = zip(dots, _places(dots, low, high, log_x), strict=True)
    found = {(dot.color, dot.ended, round(x * _COLUMNS), round(y * _LINES)): dot for dot, (x, y) in places if not dot.front}
    return [*found.values(), *(dot for dot in dots if dot.front)]


def _point(dot: Dot, dark: bool, labelled: bool, on_the_right: bool) -> dict[str, Any]:
    name = literal(dot.name)
    spread = "" if math.isnan(dot.spread) else f" ± {dot.spread:.3g}"
    point: dict[str, Any] = {
        "name": f"{name}{spread}" + ("" if dot.ended else ", not ended"),
        "value": [dot.x, dot.y],
        "symbol": "circle",
        "symbolSize": 13 if dot.front else 9,
        "itemStyle": {"color": dot.color, "opacity": 1 if dot.front else 0.6},
    }
    if not dot.ended:
        point["itemStyle"] = {"color": paper(dark), "borderColor": dot.color, "borderWidth": 2}
    if labelled:
        point["label"] = {
            "show": True,
            "position": "left" if on_the_right else "right",  # where there is room
            "verticalAlign": "bottom",  # above the dashed line, which leaves to the right
            "formatter": name if len(name) <= _LABEL else name[: _LABEL - 1] + "…",
            "color": ink(dark),
            "fontSize": 11,
            "textBorderColor": paper(dark),
            "textBorderWidth": 3,
        }
    return point


def _spaced(dots: Sequence[Dot], low: float, high: float, log_x: bool) -> list[Dot]:
    """Dots far enough from each other for their labels; the others say their names to the pointer."""
    found: list[tuple[float, float, Dot]] = []
    for dot, (x, y) in zip(dots, _places(dots, low, high, log_x), strict=True):
        if all(abs(x - a) > _APART_X or abs(y - b) > _APART_Y for a, b, _ in found) and len(found) < _MOST_LABELS:
            found.append((x, y, dot))
    return [dot for _, _, dot in found]


def _places(dots: Sequence[Dot], low: float, high: float, log_x: bool) -> list[tuple[float, float]]:
    """Where the dots are: across and up, as shares of the chart."""
    least, most = min((dot.y for dot in dots), default=0.0), max((dot.y for dot in dots), default=0.0)

    def across(x: float) -> float:
        return math.log(x / low) / math.log(high / low) if log_x else (x - low) / ((high - low) or 1.0)

    return [(across(dot.x), (dot.y - least) / ((most - least) or 1.0)) for dot in dots]


def frame(title: str, dark: bool) -> dict[str, Any]:
    """The common parts of these charts: a title, values at the pointer, and a way to save the picture."""
    return {
        "title": {"text": title, "textStyle": {"fontSize": 14, "fontWeight": 600, "color": ink(dark)}, "left": 4, "top": 4},
        # rich text is painted, never parsed as HTML
        "tooltip": {"renderMode": "richText", "trigger": "item"},
        "toolbox": {
            "right": 8,
            "top": 2,
            "feature": {"saveAsImage": {"title": "PNG", "name": title.replace(" ", "_"), "backgroundColor": paper(dark)}},
        },
        "animation": False,
    }


def literal(name: str) -> str:
    """A name that ECharts takes for no template: it would put figures in the place of "{c}"."""
    return name.replace("{", "{\u200b")


def ink(dark: bool) -> str:
    """The colour of text."""
    return "#e8eaf0" if dark else "#31333f"


def paper(dark: bool) -> str:
    """The colour of the page behind it."""
    return "#16161a" if dark else "#ffffff"


def _above(value: float) -> float:
    """A round number a little above."""
    step = 10 ** math.floor(math.log10(value)) / 2 if value > 0 else 1
    return math.ceil(1.05 * value / step) * step
