"""How a run is doing, from its metrics and whether its process is still there."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import psutil

from . import words
from .source.base import Run, Series

Kind = Literal["live", "finished", "failed", "stale", "killed", "diverged"]

SILENT_SECONDS = 60.0
SILENT_GAPS = 10
_EDGE = 10  # points that stand for the start and the end of a loss
_FAR = 3.0
_CLOCKS_SECONDS = 5.0

_LOSS = re.compile(r"(?<![a-z])(loss|nll|perplexity|ppl)(?![a-z])", re.IGNORECASE)
_TRAIN = re.compile(r"(?<![a-z])(train|training)(?![a-z])", re.IGNORECASE)


class Status(NamedTuple):
    """How a run is doing: one word, and one sentence that says why."""

    kind: Kind
    text: str


def watched(run: Run) -> str | None:
    """The metric whose points tell how the run is doing: its training loss, else another loss, else any; None: it has none."""
    return _watched(run.keys)


@lru_cache(1024)  # the runs of a sweep have the same
def _watched(keys: tuple[str, ...]) -> str | None:
    def rank(key: str) -> tuple[bool, bool, int]:
        return _LOSS.search(key) is None, _TRAIN.search(key) is None, len(key)

    return min(keys, key=rank, default=None)


def status(run: Run, points: Series, now: float, host: str) -> Status:
    """Judge a run.

    MLflow says whether it finished, failed or was killed. One that MLflow believes to be running is **killed** if it ran on
    this host and its process (tags ``zo.host``, ``zo.pid``) is gone, **stale** if neither a point nor a heartbeat (tag
    ``zo.heartbeat``) came for 60 s and for 10 times the usual gap between points, and else **live**. A live or finished run
    is **diverged** if its loss came to nan or infinity, or far above its start: the median of the last 10 values above 3
    times the largest of the first 10, of 20 or more, for a loss that began above 0.

    Args:
        run: as the source describes it.
        points: of its :func:`watched` metric; empty when it has none.
        now: seconds since the epoch.
        host: this machine's name, as ``socket.gethostname()`` gives it.
    """
    diverged = _diverged(run, points)
    if run.status == "FAILED":
        return Status("failed", "It ended with an error." + (f" Before that, {diverged}." if diverged else ""))
    if run.status == "KILLED":
        return Status("killed", "It was stopped before its end.")
    if run.status == "FINISHED":
        if diverged:
            return Status("diverged", f"It ran to its end, but {diverged}.")
        took = f" after {words.duration(run.ended - run.started)}" if run.ended >= run.started else ""
        return Status("finished", f"It ran to its end{took}.")

    pid = _pid(run) if run.tags.get("zo.host") == host else None
    there = pid is not None and _is_running(pid, run.started)
    silent = max(0.0, now - _last_sign(run, points))
    if pid is not None and not there:
        return Status("killed", f"Its process {pid} on this machine is gone, and it did not say that it ended.")
    if silent > (limit := _patience(points)):
        process = f"; its process {pid} is still there" if there else ""
        return Status(
            "stale",
            f"It has logged nothing for {words.duration(silent)}, where {words.duration(limit)} would be long{process}.",
        )
    if diverged:
        return Status("diverged", f"It is running, but {diverged}.")
    return Status("live", f"It is running, and gave a sign of life {words.ago(silent)}.")


def _last_sign(run: Run, points: Series) -> float:
    """When the run was last heard of; -inf when it never was."""
    signs = [_number(run.tags.get("zo.heartbeat")), run.started, *points.time[-1:].tolist()]
    if len(points.time):
        signs.append(float(points.time.max()))
    return max((sign for sign in signs if math.isfinite(sign)), default=-math.inf)


def _patience(points: Series) -> float:
    """Seconds of silence that are nothing to worry about."""
    gaps = np.diff(np.sort(points.time))
    return max(SILENT_SECONDS, SILENT_GAPS * float(np.median(gaps)) if len(gaps) else 0.0)


def _diverged(run: Run, points: Series) -> str:
    """Why the run is no good, to follow "but"; "" when nothing says so."""
    key = watched(run)
    if key is None or _LOSS.search(key) is None or not len(points.value):
        return ""
    last = float(points.value[-1])
    if not math.isfinite(last):
        return f"its loss came to {words.number(last)} at step {points.step[-1]}"
    values = points.value[np.isfinite(points.value)]
    if len(values) < 2 * _EDGE:
        return ""
    start, end = float(values[:_EDGE].max()), float(np.median(values[-_EDGE:]))
    if start > 0 and end > _FAR * start:
        return f"its loss rose from {words.number(start)} to {words.number(end)}"
    return ""


def _pid(run: Run) -> int | None:
    pid = _number(run.tags.get("zo.pid"))
    return int(pid) if 0 < pid < 2**31 else None


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _is_running(pid: int, started: float) -> bool:
    """The process that logged the run lives: it began before the run did, else another one has its number now."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return math.isnan(started) or process.create_time() <= started + _CLOCKS_SECONDS
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # someone else's, but there
        return True
