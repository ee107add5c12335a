"""Whether zeroth-order training is well: the verdict of its own metrics, in plain words, and the cure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import words
from .source.base import Run, Series
from .status import watched

ReadSeries = Callable[[str, str], Series]
Verdict = Literal["good", "watch", "bad", "unknown"]
ORDER: tuple[Verdict, ...] = ("bad", "watch", "good", "unknown")
"""Worst first."""

GRAD, TIES, CLIPS = "zo/projected_grad", "zo/tie_rate", "zo/clip_rate"
SKIPPED, LOST, MOVED = "zo/skipped_steps", "zo/lost_update_share", "zo/update_rms"
NEGATIVE, SATURATED = "zo/negative_scales", "zo/saturated_scales"
PERPLEXITY = "forgetting/perplexity"
KEYS = (GRAD, TIES, CLIPS, SKIPPED, LOST, MOVED, NEGATIVE, SATURATED, PERPLEXITY)
"""Metrics that :func:`examine` looks at, in addition to the loss."""

_FEW = 8  # points from which nothing is concluded
_GROWN = 3.0  # times


class Finding(NamedTuple):
    """One thing that was looked at.

    Args:
        what: its name.
        verdict: how it is.
        seen: the observation, in a sentence.
        todo: the cure; "" where all is well.
    """

    what: str
    verdict: Verdict
    seen: str
    todo: str = ""


class Limits(NamedTuple):
    """Where a share begins to be worth a look, and where it spoils the run."""

    watch: float
    bad: float

    def judge(self, share: float) -> Verdict:
        return "bad" if share >= self.bad else "watch" if share >= self.watch else "good"


_SHARES = (
    (
        "Ties",
        TIES,
        Limits(0.02, 0.2),
        "{} of the probes had two equal losses, so the step learned nothing from them.",
        "Compute the loss in fp32, raise eps, or take larger batches: two losses must differ by more than rounding.",
    ),
    (
        "Clipping",
        CLIPS,
        Limits(0.3, 0.7),
        "{} of the projected gradients were cut because they were too large.",
        "If nearly all are cut, only the sign is left and the clip sets the step: lower the learning rate, or raise the clip.",
    ),
    (
        "Lost updates",
        LOST,
        Limits(0.3, 0.8),
        "{} of the weights did not change although the update was not zero: it was smaller than their rounding.",
        "Use fp32 masters or stochastic rounding, or a larger learning rate.",
    ),
)


class _Wait(NamedTuple):
    """Seconds that a step does not compute.

    Args:
        what: its name.
        key: the metric that counts them.
        nbytes: metrics that count the bytes moved meanwhile, and words for each.
        seen: the observation, with places for the share of the time and for the bytes of a step.
        todo: the cure where it is much.
    """

    what: str
    key: str
    nbytes: Mapping[str, str]
    seen: str
    todo: str


READ_BYTES, WRITE_BYTES, RANK_BYTES = "zo/offload/read_bytes", "zo/offload/write_bytes", "zo/ranks/bytes"
_WAITS = (
    _Wait(
        "Waiting for weights",
        "zo/offload/wait_seconds",
        {READ_BYTES: "read", WRITE_BYTES: "written"},
        "{} of the time of a step goes by until offloaded weights are there; a step has {}.",
        "Take more examples a step, so that each read serves more work; raise Offload(pool=..., prefetch=...); or give "
        "Offload(folder=...) a faster disk.",
    ),
    _Wait(
        "Waiting for ranks",
        "zo/ranks/exchange_seconds",
        {RANK_BYTES: "sent"},
        "{} of the time of a step goes by in the exchange, waiting for the slowest rank included; a step has {}.",
        "The bytes are few, so it is the waiting: give all ranks equal batches and machines, take more work between two "
        "exchanges (larger batches, accumulate_grad_batches), and look at the network's delay.",
    ),
)
_WAITING, _SECONDS = Limits(0.1, 0.3), "speed/train_seconds"
WAIT_KEYS = (_SECONDS, READ_BYTES, WRITE_BYTES, RANK_BYTES, *(one.key for one in _WAITS))
"""More metrics that :func:`examine` looks at, of runs that are offloaded or on several ranks."""


def is_zeroth_order(run: Run) -> bool:
    """The run logs metrics that only zeroth-order training has."""
    return "zo.recipe" in run.tags or any(key in run.keys for key in (GRAD, TIES))


def examine(run: Run, series: ReadSeries) -> list[Finding]:
    """Look at a run's second half, since a run that was ill and has recovered is well.

    Args:
        run: a zeroth-order one.
        series: a source's ``series``.

    Returns:
        Findings, worst first.
    """
    found = [_loss(run, series), _gradient(run, series), _skipped(run, series)]
    for what, key, limits, seen, todo in _SHARES:
        share = _mean(_late(run, key, series))
        if math.isnan(share):
            found.append(Finding(what, "unknown", f"{key} was not logged."))
        else:
            verdict = limits.judge(share)
            found.append(Finding(what, verdict, seen.format(_percent(share)), "" if verdict == "good" else todo))
    found += _scales(run, series)
    found += _forgetting(run, series)
    found += [_waiting(one, run, series) for one in _WAITS if one.key in run.keys]
    return sorted(found, key=lambda one: ORDER.index(one.verdict))


def overall(findings: Sequence[Finding]) -> Verdict:
    """The worst that was found; unknown where nothing was."""
    return min((one.verdict for one in findings), key=ORDER.index, default="unknown")


def drift(values: NDArray[np.float64]) -> float:
    r"""How many times larger the values are in the last quarter than in the first: the ratio of the medians of \|v\|."""
    values = np.abs(values[np.isfinite(values)])
    if len(values) < _FEW:
        return math.nan
    quarter = len(values) // 4
    before, after = float(np.median(values[:quarter])), float(np.median(values[-quarter:]))
    return after / before if before > 0 else math.nan


def _gradient(run: Run, series: ReadSeries) -> Finding:
    what, values = "Projected gradient", series(run.id, GRAD).value if GRAD in run.keys else np.empty(0)
    finite = values[np.isfinite(values)]
    if len(finite) < _FEW:
        return Finding(what, "unknown", f"{GRAD} has {len(finite)} finite points: too few to say anything.")
    half = finite[len(finite) // 2 :]
    if not half.any():
        return Finding(
            what, "bad", "It is exactly 0 all the time: no step moves the weights.", "Raise eps, or compute losses in fp32."
        )
    size = f"Its usual size is {words.number(float(np.median(np.abs(half))))}"
    # the signs of a fair coin stray by 1 / sqrt(n); a slope that always points one way is no random slope
    lean, chance = abs(float(np.sign(half).mean())), 3 / math.sqrt(len(half))
    if lean > max(0.5, chance):
        return Finding(
            what,
            "watch",
            f"{size}, and {_percent((1 + lean) / 2)} have one sign, where about half should.",
            "The direction may not be random, or two steps share it: check that the seed differs from step to step.",
        )
    if (grown := drift(finite)) > _GROWN:
        return Finding(
            what,
            "bad" if grown > 10 * _GROWN else "watch",
            f"{size}, {words.number(grown)} times what it was in the beginning: the weights drift to where the loss is steep.",
            "Lower the learning rate or let it decay; look at the loss.",
        )
    return Finding(what, "good", f"{size}, it swings around 0 and does not grow.")


def _loss(run: Run, series: ReadSeries) -> Finding:
    key = watched(run)
    values = series(run.id, key).value if key is not None else np.empty(0)
    finite = values[np.isfinite(values)]
    if len(values) and not math.isfinite(values[-1]):
        return Finding(
            "Loss", "bad", "It came to NaN or infinity.", "Lower the learning rate or eps, and begin again from a step before."
        )
    if len(finite) < _FEW:
        return Finding("Loss", "unknown", "Too few points to say whether it falls.")
    tenth = max(2, len(finite) // 10)
    begin, end = float(finite[:tenth].mean()), float(finite[-tenth:].mean())
    noise = float(finite[:tenth].std() + finite[-tenth:].std()) / math.sqrt(tenth)
    seen = f"It changed from {words.number(begin)} to {words.number(end)}"
    if end < begin - noise:
        return Finding("Loss", "good", f"{seen}: it falls.")
    if end > begin + max(2 * noise, 0.05 * abs(begin)):
        return Finding("Loss", "bad", f"{seen}: it rises.", "Lower the learning rate.")
    return Finding(
        "Loss",
        "watch",
        f"{seen}: no more than its noise.",
        "Give it more steps, more queries a step, or a larger learning rate.",
    )


def _skipped(run: Run, series: ReadSeries) -> Finding:
    points = series(run.id, SKIPPED) if SKIPPED in run.keys else None
    if points is None or not len(points.value) or not math.isfinite(points.value[-1]):
        return Finding("Skipped steps", "unknown", f"{SKIPPED} was not logged.")
    count, steps = float(points.value[-1]), max(1, int(points.step[-1]))
    if count == 0:
        return Finding("Skipped steps", "good", "None: every step had finite losses.")
    return Finding(
        "Skipped steps",
        Limits(0.0, 0.01).judge(count / steps),
        f"{count:,.0f} of {steps:,} steps changed nothing because a loss was not finite.",
        "Lower the learning rate or eps; in fp16, compute the loss in fp32.",
    )


def _scales(run: Run, series: ReadSeries) -> list[Finding]:
    """Of runs that train the scales of quantised layers."""
    found = []
    for what, key, todo in (
        (
            "Negative scales",
            NEGATIVE,
            "An update made them zero or negative, and they were set to the smallest scale: lower the learning rate.",
        ),
        ("Saturated scales", SATURATED, "They are at the smallest scale and can only grow: lower the learning rate."),
    ):
        late = _late(run, key, series)
        if len(late):
            count = float(late[-1])
            found.append(
                Finding(what, "watch" if count > 0 else "good", f"{words.number(count)} at the end.", todo * (count > 0))
            )
    return found


def _forgetting(run: Run, series: ReadSeries) -> list[Finding]:
    """Of runs that look at text of other kinds, from their first look on."""
    values = series(run.id, PERPLEXITY).value if PERPLEXITY in run.keys else np.empty(0)
    if len(values) < 2:
        return []
    rise = float(values[-1] / values[0]) - 1
    verdict = Limits(0.02, 0.1).judge(rise) if math.isfinite(rise) else "bad"
    seen = f"Perplexity on other text went from {words.number(float(values[0]))} to {words.number(float(values[-1]))}"
    todo = "The model forgets: take fewer steps or a smaller learning rate, or train fewer weights."
    return [Finding("Forgetting", verdict, f"{seen}, {100 * rise:+.1f} %.", "" if verdict == "good" else todo)]


def _waiting(wait: _Wait, run: Run, series: ReadSeries) -> Finding:
    """The counters start again where a fit is resumed, so it is their growth that is looked at."""
    seconds, steps = _increase(run, _SECONDS, series)
    if not seconds > 0:
        return Finding(wait.what, "unknown", f"{wait.key} was logged, but no {_SECONDS} to compare it with.")
    share = min(1.0, _increase(run, wait.key, series)[0] / seconds)
    moved = [
        f"{words.memory(_increase(run, key, series)[0] / max(1.0, steps))} {done}"
        for key, done in wait.nbytes.items()
        if key in run.keys
    ]
    verdict = _WAITING.judge(share)
    seen = wait.seen.format(_percent(share), " and ".join(moved) or "no bytes logged")
    return Finding(wait.what, verdict, seen, "" if verdict == "good" else wait.todo)


def _increase(run: Run, key: str, series: ReadSeries) -> tuple[float, float]:
    """By how much a counter grew in the second half, and in how many steps."""
    if key not in run.keys:
        return math.nan, math.nan
    points = series(run.id, key)
    half = len(points.value) // 2
    value, step = points.value[half:], points.step[half:]
    return float(np.maximum(np.diff(value), 0).sum()), float(step[-1] - step[0]) if len(step) else math.nan


def _late(run: Run, key: str, series: ReadSeries) -> NDArray[np.float64]:
    """The finite values of the second half."""
    values = series(run.id, key).value if key in run.keys else np.empty(0)
    half = values[len(values) // 2 :]
    return np.asarray(half[np.isfinite(half)])


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
