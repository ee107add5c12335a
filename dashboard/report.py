"""One HTML file about the selected runs: no server, no network, no script; all text from outside is escaped."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

import numpy as np

from . import text, words
from .facts import quality_key
from .palette import Style
from .scene import Scene
from .screens.curves import first_keys
from .source import Run
from .transforms import Curve, Grid, differing, log_axis, smooth, thin
from .view import AXES, View

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #24262d; max-width: 1060px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; } .faint { color: #6b7080; }
table { border-collapse: collapse; font-size: 13px; } .wide { overflow-x: auto; }
td, th { padding: 4px 10px; border-bottom: 1px solid #e3e5ea; text-align: left; unicode-bidi: isolate; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } th { color: #6b7080; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 14px; } svg { width: 100%; height: auto; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
li { margin: 2px 0; }
"""
_PIXELS = 600
_MOST_COMPARED = 30


def report(scene: Scene, view: View, store: str) -> str:
    """The file.

    Args:
        scene: the store.
        view: which runs, which metrics, over which axis.
        store: its address as it may be shown.
    """
    runs = scene.shown(view)
    keys = list(view.keys) or first_keys(runs)
    drawn = [run for member in scene.members(view) for run in member.runs]
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = [
        "<h1>Comparison of training runs</h1>",
        f'<p class="faint">{_text(store, 300)}, {when}, {len(runs)} runs</p>',
        _savings(scene, view),
        "<h2>Runs</h2>",
        _runs(scene, view, runs),
        "<h2>Curves</h2>",
        f'<div class="charts">{"".join(_chart(scene, view, drawn, key) for key in keys)}</div>',
        "<h2>Parameters that differ</h2>",
        _parameters(scene, runs),
    ]
    # the policy keeps even a mistake of ours from running or loading anything
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{policy}"><title>Comparison of training runs</title><style>{_STYLE}</style></head>\n<body>'
        + "\n".join(body)
        + "</body></html>\n"
    )


def _savings(scene: Scene, view: View) -> str:
    pinned = scene.baseline(view)
    title = "Zeroth-order training against backprop" if pinned is None else f"Against {_text(scene.names[pinned.id])}"
    items = "".join(
        f"<li><b>{_text(one.method.name)}</b> against {_text(one.baseline.name)}: {_text(one.text, 240)}.<br>"
        f'<span class="faint">{_text(one.detail, 600)}</span></li>'
        for one in scene.savings(view)
    )
    return f"<h2>{title}</h2><ul>{items}</ul>" if items else ""


def _runs(scene: Scene, view: View, runs: Sequence[Run]) -> str:
    looks = scene.styles(view)
    key = quality_key(runs, view.quality)
    share = key is not None and words.is_share(key)
    rows = []
    found = scene.facts(runs, key)
    for run in runs:
        fact = found[run.id]
        numbers = [
            words.known(fact.loss) if fact.step is None else words.number(fact.loss),
            words.percent(fact.quality) if share else words.known(fact.quality),
            words.memory(fact.peak),
            words.duration(fact.seconds),
            "–" if math.isnan(fact.forwards) else words.count(fact.forwards),
            "" if fact.step is None else f"{fact.step:,}",
        ]
        rows.append(
            f'<tr><td><span class="dot" style="background:{looks[run.id].light}"></span>{_text(scene.names[run.id], 200)}</td>'
            f"<td>{scene.states[run.id].kind}</td>" + "".join(f'<td class="n">{escape(one)}</td>' for one in numbers) + "</tr>"
        )
    heads = ["run", "status", "last loss", f"best {key or 'quality'}", "peak memory", "time", "forward passes", "last step"]
    return _table(heads, rows)


def _parameters(scene: Scene, runs: Sequence[Run]) -> str:
    left_out = f"<p>Of the newest {_MOST_COMPARED} runs.</p>" if len(runs) > _MOST_COMPARED else ""
    runs = runs[:_MOST_COMPARED]
    rows = [
        f"<tr><th>{_text(name, 200)}</th>" + "".join(f"<td>{_text(value or '–', 300)}</td>" for value in values) + "</tr>"
        for name, values in differing(runs).items()
    ]
    return left_out + (_table(["", *(scene.names[run.id] for run in runs)], rows) if rows else "<p>None.</p>")


def _chart(scene: Scene, view: View, runs: Sequence[Run], key: str) -> str:
    from matplotlib.figure import Figure  # slow to import, and few pages make a report

    looks = scene.styles(view)
    raw = {run.id: scene.store.plotter.curve(run, key, view.axis) for run in runs}
    raw = {run_id: log_axis(curve)[0] if view.log else curve for run_id, curve in raw.items() if len(curve.x)}
    if not raw:
        return ""
    lost = sum(int((~np.isfinite(curve.y)).sum()) for curve in raw.values())
    curves = {run_id: smooth(curve, view.smoothing) for run_id, curve in raw.items()}
    low, high = view.zoom or (min(c.x[0] for c in curves.values()), max(c.x[-1] for c in curves.values()))
    drawn = thin(list(curves.values()), Grid(float(low), float(max(high, np.nextafter(low, np.inf) + 1e-9)), _PIXELS))
    figure = Figure(figsize=(6.2, 3.3), layout="constrained")
    axes = figure.subplots()
    for run_id, curve in zip(curves, drawn, strict=True):
        _line(axes, curve, looks[run_id])
    axes.set_xlabel(AXES[view.axis] + (" in seconds" if view.axis == "elapsed" else ""))
    axes.set_yscale("log" if view.log else "linear")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    unit = " (GiB)" if words.is_bytes(key) else ""
    left_out = (
        f'<p class="faint">{lost:,} values are not finite{" or not positive" if view.log else ""}: not drawn.</p>'
        if lost
        else ""
    )
    return f"<figure><figcaption>{_text(key, 200)}{unit}</figcaption>{svg[svg.index('<svg') :]}{left_out}</figure>"


def _line(axes: Any, curve: Curve, look: Style) -> None:
    dash = (0, tuple(part / 2 for part in look.dash)) if look.dash else "-"
    dots = "o" if len(curve.x) < 20 else None
    axes.plot(curve.x, curve.y, color=look.light, linestyle=dash, linewidth=1.3, marker=dots, markersize=3)


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{_text(one, 120)}</th>" for one in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _text(value: str, limit: int = 80) -> str:
    return escape(text.plain(value, limit))
