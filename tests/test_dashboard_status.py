from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from zolightning_dashboard.source import Run, Series
from zolightning_dashboard.status import status, watched

NOW = 1_795_000_000.0
NOTHING = Series(np.empty(0, np.int64), np.empty(0), np.empty(0))


def run(state: str = "RUNNING", started: float = NOW - 1000, ended: float = math.nan, **tags: str) -> Run:
    return Run("id", "name", "0", state, started, ended, tags={f"zo.{k}": v for k, v in tags.items()}, keys=("train/loss",))


def loss(values: Sequence[float] = (1.0,), last: float = NOW - 1, gap: float = 1.0) -> Series:
    """Points up to ``last``, ``gap`` seconds apart."""
    count = len(values)
    return Series(np.arange(count), last - gap * np.arange(count)[::-1], np.array(values, float))


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("state", "points", "kind", "text"),
    [
        ("RUNNING", loss(), "live", "It is running, and gave a sign of life just now."),
        ("FINISHED", loss(), "finished", "It ran to its end after 16 min 40 s."),
        ("FAILED", loss(), "failed", "It ended with an error."),
        ("KILLED", loss(), "killed", "It was stopped before its end."),
        ("FAILED", loss([1.0, math.nan]), "failed", "It ended with an error. Before that, its loss came to NaN at step 1."),
        ("FINISHED", loss([1.0, math.inf]), "diverged", "It ran to its end, but its loss came to ∞ at step 1."),
        ("RUNNING", loss([1.0, -math.inf]), "diverged", "It is running, but its loss came to −∞ at step 1."),
        ("RUNNING", loss([math.nan, 1.0]), "live", "It is running, and gave a sign of life just now."),
    ],
)
def test_what_mlflow_and_the_loss_say(state: str, points: Series, kind: str, text: str) -> None:
    ended = math.nan if state == "RUNNING" else NOW
    assert status(run(state, ended=ended), points, NOW, "here") == (kind, text)


def test_silence_is_measured_in_gaps_and_a_heartbeat_counts() -> None:
    def kind(silent: float, gap: float, **tags: str) -> str:
        return status(run(started=NOW - 1e5, **tags), loss([1.0] * 30, NOW - silent, gap), NOW, "here").kind

    assert kind(59, 1) == "live"
    assert kind(61, 1) == "stale"
    assert kind(290, 30) == "live"
    assert kind(310, 30) == "stale"
    assert kind(310, 30, heartbeat=str(NOW - 5)) == "live"
    assert kind(310, 30, heartbeat="not a number") == "stale"
    assert status(run(started=NOW - 30), NOTHING, NOW, "here").kind == "live", "it has only begun"
    silent = status(run(started=NOW - 90), NOTHING, NOW, "here")
    assert silent == ("stale", "It has logged nothing for 1 min 30 s, where 1 min would be long.")
    assert status(run(started=math.nan), NOTHING, NOW, "here").kind == "stale"
    assert status(run(), loss(last=NOW + 3600), NOW, "here").kind == "live", "its host's clock is ahead"


def test_a_run_is_killed_when_its_process_is_gone(process: subprocess.Popen[bytes]) -> None:
    begun = psutil.Process(process.pid).create_time()
    mine = run(started=begun + 1, host="here", pid=str(process.pid))
    now = begun + 2
    points = loss(last=now)
    assert status(mine, points, now, "here").kind == "live"
    stale = status(mine, points, now + 500, "here")
    assert stale.kind == "stale"
    assert f"its process {process.pid} is still there" in stale.text
    assert status(mine, points, now, "there").kind == "live", "another machine's processes are not seen"
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert status(mine, points, now, "here").kind == "killed", "dead, though its parent has not asked yet"
    process.wait()
    killed = status(mine, points, now, "here")
    assert killed == ("killed", f"Its process {process.pid} on this machine is gone, and it did not say that it ended.")
    assert status(mine, points, now + 500, "there").kind == "stale"


def test_another_process_with_the_same_number_is_not_taken_for_the_run() -> None:
    begun = psutil.Process(os.getpid()).create_time()
    old = run(started=begun - 3600, host="here", pid=str(os.getpid()))
    assert status(old, loss(last=NOW), NOW, "here").kind == "killed"
    unknown = run(started=math.nan, host="here", pid=str(os.getpid()), heartbeat=str(NOW))
    assert status(unknown, NOTHING, NOW, "here").kind == "live"


@pytest.mark.parametrize("pid", ["", "0", "-5", "x", "nan", "1e300", "<b>1</b>"])
def test_a_pid_that_is_none_says_nothing(pid: str) -> None:
    assert status(run(host="here", pid=pid), loss(), NOW, "here").kind == "live"


def test_a_loss_far_above_its_start_has_diverged() -> None:
    def kind(values: Sequence[float]) -> str:
        return status(run(), loss(values), NOW, "here").kind

    assert kind([1.0] * 10 + [3.1] * 10) == "diverged"
    assert kind([1.0] * 10 + [2.9] * 10) == "live"
    assert kind([1.0] * 9 + [3.0] + [8.9] * 10) == "live", "its start was that noisy"
    assert kind([1.0] * 5 + [99.0] * 14) == "live", "too few points to say"
    assert kind([1.0] * 10 + [99.0] * 4 + [1.0] * 6) == "live", "it came back"
    assert kind([-1.0] * 10 + [5.0] * 10) == "live", "no ratio for a loss below 0"
    text = status(run(), loss([1.0] * 10 + [40.0] * 10), NOW, "here").text
    assert text == "It is running, but its loss rose from 1 to 40."


def test_only_a_loss_can_diverge() -> None:
    other = Run("id", "name", "0", "RUNNING", NOW - 10, math.nan, keys=("memory/rss",))
    assert status(other, loss([1.0] * 10 + [99.0] * 10), NOW, "here").kind == "live"
    assert status(other, loss([math.nan]), NOW, "here").kind == "live"


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        (("epoch", "train/loss", "train/loss_ema", "val/loss"), "train/loss"),
        (("train_loss_epoch", "train_loss", "val_loss"), "train_loss"),
        (("accuracy", "loss", "val/loss"), "loss"),
        (("glossary", "a"), "a"),
        ((), None),
    ],
)
def test_the_metric_to_watch(keys: tuple[str, ...], key: str | None) -> None:
    assert watched(Run("id", "name", "0", "RUNNING", NOW, math.nan, keys=keys)) == key


numbers = st.floats(allow_nan=True, allow_infinity=True)


@given(
    st.sampled_from(["RUNNING", "FINISHED", "FAILED", "KILLED", "SCHEDULED", "?"]),
    numbers,
    numbers,
    st.lists(numbers, max_size=25),
    st.dictionaries(st.sampled_from(["host", "pid", "heartbeat"]), st.text(max_size=8)),
)
def test_every_run_has_a_status_in_one_line(
    state: str, started: float, ended: float, values: list[float], tags: dict[str, str]
) -> None:
    found = status(run(state, started, ended, **tags), loss(values), NOW, "here")
    assert found.kind in ("live", "finished", "failed", "stale", "killed", "diverged")
    assert found.text.endswith(".")
    assert "\n" not in found.text
