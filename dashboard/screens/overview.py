"""Overview: the runs, how far they are, whether they learn, their cost, and the savings against backprop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import pandas as pd
import pyarrow as pa
import streamlit as st

from .. import text, words
from ..charts.live import Card, Figure, cards
from ..comparison import Saving
from ..facts import Facts, quality_key
from ..scene import Scene
from ..session import current
from ..source import Run
from ..spent import EQUAL
from .parts import choose_comparison, follow
from .tables import number, table_height, with_nan

_MOST_CARDS = 6
_GOING = ("live", "diverged", "stale")
_AGAINST_BACKPROP = (
    "Zeroth-order (ZO) training learns only from the losses of forward passes. It keeps no gradients, no activations and no "
    "optimizer state, so it needs little more memory than inference. It costs time, and often quality. Each method is "
    "compared with the backprop run of the same task that reached the best quality, at the length of the shorter of the two."
)
_EXPLAINED = {
    "memory": "Peak memory of training against the baseline's.",
    "the time": "Seconds of training against the baseline's, validation not counted.",
}


def render(scene: Scene) -> None:
    """The page."""
    if len(scene.runs) > 1:
        choose_comparison(scene)
    follow(scene, _draw)


def _draw(scene: Scene) -> None:
    view = current()
    shown = scene.shown(view)
    key = scene.once(("quality", view.quality), lambda: quality_key(scene.runs, view.quality))
    going = [run for run in scene.runs if scene.states[run.id].kind in _GOING and run.status == "RUNNING"]
    _running(scene, going, key)
    savings = scene.savings(view)
    _savings(savings, scene.baseline(view))
    if shown:
        st.subheader("Runs")
        _table(scene, shown, key)
    else:
        st.info("Select runs in the sidebar.")


def _running(scene: Scene, going: Sequence[Run], key: str | None) -> None:
    silent = sum(scene.states[run.id].kind == "stale" for run in going)
    running = f"Running now: {len(going) - silent}" if len(going) > silent else "Nothing is running"
    st.subheader(running + (f", {silent} silent" if silent else ""))
    if not going:
        last = max(scene.runs, key=lambda run: run.ended if not math.isnan(run.ended) else 0.0)
        if not math.isnan(last.ended):
            st.text(f"{scene.names[last.id]} ended {words.ago(max(0.0, time.time() - last.ended))}.")
        return
    first = sorted(going, key=lambda run: scene.states[run.id].kind == "stale")[:_MOST_CARDS]
    found = scene.facts(first, key)
    cards("running", [_run_card(scene, run, found[run.id], key) for run in first])
    if len(going) > _MOST_CARDS:
        st.caption(f"and {len(going) - _MOST_CARDS:,} more, in the table below")


def _run_card(scene: Scene, run: Run, fact: Facts, key: str | None) -> Card:
    state, look = scene.states[run.id], scene.styles(current())[run.id]
    figures = []
    if fact.loss_key is not None:
        figures.append(Figure(words.number(fact.loss), text.plain(fact.loss_key, 30), "Its last value. It should fall."))
    if not math.isnan(fact.quality):
        figures.append(Figure(_quality(fact.quality, key), "best quality", "The best value of the quality metric so far."))
    if not math.isnan(fact.peak):
        figures.append(
            Figure(words.memory(fact.peak), "peak memory", "The most memory training has needed at any moment so far.")
        )
    if not math.isnan(fact.pace):
        figures.append(Figure(words.number(fact.pace), "steps/s", "Over the last half of its points."))
    return Card(
        scene.names[run.id],
        text.plain(run.name, 500),
        figures,
        look.light,
        look.dark,
        (state.kind, text.plain(state.text, 300)),
        _progress(fact),
        fact.spark,
    )


def _quality(value: float, key: str | None) -> str:
    return words.percent(value) if key is not None and words.is_share(key) else words.number(value)


def _progress(fact: Facts) -> tuple[float | None, str]:
    if fact.step is None:
        return None, "no point yet"
    if fact.total is None:
        return None, f"step {fact.step:,}"
    share = min(1.0, fact.step / fact.total)
    left = "" if math.isnan(fact.left) else f", {words.duration(max(0.0, fact.left))} left"
    return share, f"{100 * share:.0f} %{left}"


def _savings(savings: Sequence[Saving], baseline: Run | None) -> None:
    if not savings:
        return
    if baseline is None:
        st.subheader("Zeroth-order training against backprop", help=_AGAINST_BACKPROP)
    else:
        st.subheader(f"Against {text.code(baseline.name, 60)}")
    by_method: dict[str, list[Saving]] = {}
    for saving in savings:
        by_method.setdefault(saving.method.name, []).append(saving)
    cards("savings", [_saving_card(*some) for some in list(by_method.values())[:_MOST_CARDS]])
    if len(by_method) > _MOST_CARDS:
        st.caption(f"and {len(by_method) - _MOST_CARDS:,} more methods, in the table below")


def _saving_card(best: Saving, *others: Saving) -> Card:
    """A method by the best of its settings."""
    figures = [
        Figure(one.value, text.plain(one.of, 24), _EXPLAINED.get(one.of, "The best value less the baseline's."), one.tone)
        for one in best.differences
    ]
    notes = [
        f"{len(best.method.runs)} seeds" if len(best.method.runs) > 1 else "",
        f"best of {len(others) + 1:,} settings" if others else "",
        "" if best.ended else "so far",
    ]
    note = ", ".join(filter(None, notes))
    return Card(
        text.plain(best.method.name, 50) + (f" ({note})" if note else ""),
        text.plain(best.detail, 600),
        figures,
        progress=(None, f"against {text.plain(best.baseline.name, 50)}, {best.at}"),
    )


def _table(scene: Scene, shown: Sequence[Run], key: str | None) -> None:
    view = current()
    table, unit = scene.once(("overview", view.selection, view.equal, view.baseline, key), lambda: _columns(scene, shown, key))
    share = key is not None and words.is_share(key)
    against = "the pinned run" if scene.baseline(view) is not None else "the best backprop run of the same task"
    st.dataframe(
        table,
        hide_index=True,
        key="runs",
        height=table_height(table.num_rows, 16),
        placeholder="–",
        column_config={
            "run": st.column_config.TextColumn("Run", width="medium"),
            "status": st.column_config.TextColumn(
                "Status",
                help="live: it logs. stale: silent for too long. killed: its process is gone. diverged: its loss came to NaN "
                "or far above its start.",
            ),
            "done": st.column_config.ProgressColumn(
                "Done", help="Share of its steps.", format="percent", min_value=0, max_value=1, width="small"
            ),
            "shape": st.column_config.LineChartColumn(
                "Learning", help="Its training loss from first to last. It should fall.", width="small"
            ),
            "loss": number("Loss", "The last value of that loss."),
            "quality": number(
                (text.plain(key, 30) if key else "Quality") + (" %" if share else ""),
                "How good the model is: the best value. Another metric can be chosen on the page Trade-offs.",
            ),
            "peak": number(f"Peak {unit}", "The most memory that training needed at any moment."),
            "saved": st.column_config.NumberColumn(
                "Δ memory", help=f"Peak memory against {against}; seeds count together.", format="%+.0f %%"
            ),
            "change": st.column_config.NumberColumn(
                "Δ quality", help=f"Against {against}, {EQUAL[view.equal]}; seeds count together.", format="%+.3g"
            ),
            "times": st.column_config.NumberColumn(
                "× time", help=f"Seconds of training against {against}, {EQUAL[view.equal]}.", format="%.3g"
            ),
            "seconds": number("Train s", "Seconds of training; validation not counted where the run logged that."),
            "forwards": number("Forwards", "Forward passes of training. A backprop step counts as one.", whole=True),
            "started": st.column_config.DatetimeColumn("Started", format="distance"),
        },
    )


def _columns(scene: Scene, shown: Sequence[Run], key: str | None) -> tuple[pa.Table, str]:
    """The table, and the unit of its memory."""
    found = scene.facts(shown, key)
    saved = {run.id: saving for saving in scene.savings(current()) for run in saving.method.runs}
    share = key is not None and words.is_share(key)
    names = scene.names
    unit, unit_name = words.byte_unit([found[run.id].peak for run in shown])

    def compared(figure: Callable[[Saving], float]) -> list[float]:
        return [figure(saved[run.id]) if run.id in saved else math.nan for run in shown]

    table = pd.DataFrame(
        {
            "run": [names[run.id] for run in shown],
            "status": [scene.states[run.id].kind for run in shown],
            "done": [_share_done(found[run.id]) for run in shown],
            "shape": [list(found[run.id].spark) or None for run in shown],
            "loss": [found[run.id].loss for run in shown],
            "quality": [found[run.id].quality * (100 if share else 1) for run in shown],
            "peak": [found[run.id].peak / unit for run in shown],
            "saved": compared(lambda saving: 100 * saving.memory),
            "change": compared(lambda saving: saving.quality * (100 if share else 1)),
            "times": compared(lambda saving: saving.time if saving.axis != "elapsed" else math.nan),
            "seconds": [found[run.id].seconds for run in shown],
            "forwards": [found[run.id].forwards for run in shown],
            "started": pd.to_datetime([run.started for run in shown], unit="s", utc=True),
        }
    )
    empty = [name for name in ("done", "quality", "peak", "saved", "change", "times", "forwards") if table[name].isna().all()]
    return with_nan(table.drop(columns=empty), {"loss": [found[run.id].step is not None for run in shown]}), unit_name


def _share_done(fact: Facts) -> float:
    if fact.step is None or fact.total is None:
        return math.nan
    return min(1.0, fact.step / fact.total)
