"""Charts of a sweep: a metric against a parameter by method, and parallel coordinates. Options for ECharts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .still import frame, ink, literal, paper

_WIDE = 8.0  # times from the smallest to the largest: then a scale is logarithmic
_DECADES = 300.0
_MARGIN = 1.6
_FEW_TEXTS = 30


class Trial(NamedTuple):
    """One run of a sweep.

    Args:
        name: of the run.
        method: runs of one method have one colour, and a line through their means.
        x: the parameter.
        y: the metric.
        color: of the method.
    """

    name: str
    method: str
    x: float
    y: float
    color: str


class Axis(NamedTuple):
    """One upright of the parallel coordinates.

    Args:
        name: of the parameter or metric.
        values: of each run in turn; None: it has none.
        best: ``min`` or ``max`` where one end is better; "": neither.
    """

    name: str
    values: Sequence[str | float | None]
    best: str = ""


def spans(values: Sequence[float]) -> bool:
    """The values are positive and span so much that only a logarithmic scale shows them all."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) >= _WIDE * min(finite)


def against(x_name: str, y_name: str, trials: Sequence[Trial], dark: bool) -> dict[str, Any]:
    """The metric against the parameter: a dot for each run, a line through each method's means.

    Args:
        x_name: the parameter.
        y_name: the metric.
        trials: the runs, all finite.
        dark: the page is.
    """
    methods: dict[str, list[Trial]] = {}
    for one in trials:
        methods.setdefault(one.method, []).append(one)
    series: list[dict[str, Any]] = []
    for method, several in methods.items():
        color, name = several[0].color, literal(method)
        dots = [{"name": literal(one.name), "value": [one.x, one.y]} for one in several]
        series.append(
            {"name": name, "type": "scatter", "data": dots, "symbolSize": 9, "itemStyle": {"color": color, "opacity": 0.8}}
        )
        line = {"color": color, "width": 1.5, "opacity": 0.7}
        series.append(
            {"name": name, "type": "line", "data": means(several), "symbol": "none", "silent": True, "lineStyle": line}
        )
    return {
        **frame(f"{y_name} against {x_name}", dark),
        "legend": {
            "type": "scroll",
            "bottom": 0,
            "textStyle": {"color": ink(dark)},
            "data": [literal(method) for method in methods],
        },
        "grid": {"left": 44, "right": 40, "top": 44, "bottom": 56, "containLabel": True},
        "xAxis": {"name": literal(x_name), "nameLocation": "middle", "nameGap": 28, **_scale([one.x for one in trials])},
        "yAxis": {
            "name": literal(y_name),
            "nameLocation": "middle",
            "nameRotate": 90,
            "nameGap": 46,
            **_scale([one.y for one in trials]),
        },
        "series": series,
    }


def means(trials: Sequence[Trial]) -> list[list[float]]:
    """The mean over the runs of each x, by x."""
    by_x: dict[float, list[float]] = {}
    for one in trials:
        by_x.setdefault(one.x, []).append(one.y)
    return [[x, sum(ys) / len(ys)] for x, ys in sorted(by_x.items())]


def parallel(axes: Sequence[Axis], names: Sequence[str], colors: Sequence[str], dark: bool) -> dict[str, Any]:
    """A line for each run across an upright for each parameter; drag along an upright to keep the runs of that range.

    Args:
        axes: the last one is the metric.
        names: of the runs.
        colors: of their lines.
        dark: the page is.
    """
    uprights: list[dict[str, Any]] = []
    columns: list[list[Any]] = []
    for place, axis in enumerate(axes):
        numbers = [value for value in axis.values if isinstance(value, float)]
        upright: dict[str, Any] = {"dim": place, "name": literal(axis.name), "nameLocation": "end"}
        if len(numbers) == sum(value is not None for value in axis.values):
            kind = "log" if spans(numbers) else "value"
            uprights.append({**upright, "type": kind, "scale": True, "inverse": axis.best == "min"})
            columns.append([_known(value) for value in axis.values])
        else:
            texts = list(dict.fromkeys("–" if value is None else str(value) for value in axis.values))[:_FEW_TEXTS]
            uprights.append({**upright, "type": "category", "data": [literal(one) for one in texts]})
            columns.append([literal("–" if value is None else str(value)) for value in axis.values])
    rows = [
        {"name": literal(name), "value": list(values), "lineStyle": {"color": color}}
        for name, color, *values in zip(names, colors, *columns, strict=True)
    ]
    label = {"color": ink(dark), "textBorderColor": paper(dark), "textBorderWidth": 4}  # lines pass behind it
    return {
        **frame("Each run across its parameters", dark),
        "parallel": {"left": 60, "right": 90, "top": 84, "bottom": 24},
        "parallelAxis": [{**one, "nameTextStyle": {"color": ink(dark)}, "axisLabel": label} for one in uprights],
        "series": [
            {
                "type": "parallel",
                "data": rows,
                "lineStyle": {"width": 1.5, "opacity": 0.55},
                "emphasis": {"lineStyle": {"width": 3, "opacity": 1}},
                "smooth": False,
                "progressive": 0,
            }
        ],
    }


def _known(value: str | float | None) -> str | float:
    return value if isinstance(value, float) and math.isfinite(value) else "-"  # ECharts's sign for no value


def _scale(values: Sequence[float]) -> Mapping[str, Any]:
    finite = [value for value in values if math.isfinite(value)]
    if not spans(finite):
        return {"type": "value", "scale": True}
    low, high = min(finite), max(finite)
    if high < _DECADES * low:  # few powers of ten: the scale begins and ends at one
        return {"type": "log"}
    return {"type": "log", "min": low / _MARGIN, "max": high * _MARGIN}
