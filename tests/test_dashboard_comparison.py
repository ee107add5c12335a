from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from zolightning_dashboard.comparison import Saving, compare, method_of
from zolightning_dashboard.source import Run, Series
from zolightning_dashboard.source.base import Extremes, extremes

GIB = 2.0**30
ADAMW = {"zo.method": "backprop AdamW"}
ZO = {"zo.method": "ZO (default recipe)", "zo.recipe": "default"}


class Runs:
    """Runs and their points in memory."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self._points: dict[tuple[str, str], list[float]] = {}

    def add(
        self,
        tags: Mapping[str, str],
        metrics: Mapping[str, Sequence[float]],
        status: str = "FINISHED",
        experiment: str = "1",
        **params: str,
    ) -> str:
        id_ = f"run{len(self.runs)}"
        self.runs.append(Run(id_, id_, experiment, status, 0.0, math.nan, params, tags, tuple(sorted(metrics))))
        self._points |= {(id_, key): list(values) for key, values in metrics.items()}
        return id_

    def series(self, run_id: str, key: str) -> Series:
        values = np.array(self._points.get((run_id, key), []), float)
        return Series(np.arange(len(values)), np.arange(len(values), dtype=float), values)

    def extremes(self, run_id: str, key: str) -> Extremes:
        return extremes(self.series(run_id, key))

    def compare(self, quality: str | None = None, equal: str = "", baseline: str | None = None) -> list[Saving]:
        pinned = next((run for run in self.runs if run.id == baseline), None)
        return compare(self.runs, self, quality, equal, pinned)


def costs(peak: float, seconds: float, accuracy: float) -> dict[str, list[float]]:
    return {
        "memory/peak": [peak * GIB / 2, peak * GIB],
        "speed/train_seconds": [seconds / 2, seconds],
        "val/accuracy": [0.5, accuracy, 0.1],
    }


def test_what_was_saved_and_what_it_cost() -> None:
    runs = Runs()
    runs.add({}, {"val/accuracy": [0.5]})  # zero-shot: neither
    zo = runs.add(ZO, costs(2.6, 210, 0.85))
    base = runs.add(ADAMW, costs(10.0, 100, 0.868))
    (saving,) = runs.compare()
    assert ([run.id for run in saving.method.runs], [run.id for run in saving.baseline.runs]) == ([zo], [base])
    assert saving.quality_key == "val/accuracy"
    assert saving.memory == pytest.approx(-0.74)
    assert saving.time == pytest.approx(2.1)
    assert saving.quality == pytest.approx(-0.018)
    assert saving.text == "−74 % memory, 2.1× the time, −1.8 points of val/accuracy at step 2"
    assert saving.detail == (
        "ZO (default recipe) against backprop AdamW, at step 2. Peak memory 2.60 GiB instead of 10.00 GiB. "
        "Training took 3 min 30 s instead of 1 min 40 s. val/accuracy 0.85 instead of 0.868."
    )


def test_seeds_count_as_one_method_and_the_best_methods_face_each_other() -> None:
    runs = Runs()
    for seed, accuracy in enumerate((0.80, 0.84)):
        runs.add(ZO, costs(1.0 + seed, 200 + 20 * seed, accuracy), seed=str(seed), lr="1e-3")
    worse = runs.add({"zo.method": "ZO (MeZO)", "zo.recipe": "mezo"}, costs(1.0, 100, 0.6))
    best = runs.add({"zo.method": "backprop, checkpointed"}, costs(4.0, 140, 0.9))
    runs.add(ADAMW, costs(9.0, 100, 0.9))
    runs.add({"zo.method": "backprop on LoRA"}, costs(3.0, 80, 0.7))
    first, second = runs.compare()
    assert [run.id for run in first.method.runs] == ["run0", "run1"]
    assert first.method.peak == 2 * GIB
    assert first.method.seconds == pytest.approx(210)
    assert first.method.quality == pytest.approx(0.82)
    assert first.detail.startswith("ZO (default recipe) (2 seeds) against backprop, checkpointed, at step 2.")
    assert [run.id for run in second.method.runs] == [worse]
    for saving in (first, second):
        assert [run.id for run in saving.baseline.runs] == [best], "of equal quality the one with less memory"


def test_only_the_same_task_is_compared() -> None:
    runs = Runs()
    runs.add(ZO, costs(1, 1, 0.8), model="small", data="films")
    runs.add(ADAMW, costs(2, 1, 0.8), experiment="2", model="small")
    runs.add(ADAMW, costs(3, 1, 0.9), model="large")
    runs.add(ADAMW, costs(5, 1, 0.9), model="small", data="news")
    assert runs.compare() == []
    runs.add(ADAMW, costs(4, 1, 0.8), model="small")  # it did not log its data
    (saving,) = runs.compare()
    assert saving.memory == pytest.approx(-0.75)


def test_runs_that_did_not_end_well_are_no_baseline_and_a_running_one_says_so_far() -> None:
    runs = Runs()
    runs.add(ZO, costs(1, 30, 0.8), status="RUNNING")
    runs.add(ZO | {"zo.method": "begins"}, {}, status="RUNNING")  # nothing to say of it yet
    runs.add(ZO | {"zo.method": "broken"}, costs(1, 30, 0.8), status="FAILED")
    for status in ("RUNNING", "FAILED", "KILLED"):
        runs.add(ADAMW, costs(3, 1, 0.9), status=status)
    assert runs.compare() == []
    runs.add(ADAMW, costs(4, 2, 0.8))
    (saving,) = runs.compare()
    assert saving.text == "−75 % memory, 15× the time, 0.0 points of val/accuracy at step 2, so far"


def test_the_quality_is_one_that_both_sides_logged() -> None:
    runs = Runs()
    runs.add(ZO, {"val/accuracy": [0.7, 0.6], "test/accuracy": [0.6], "val/loss": [0.5, 0.4]})
    runs.add(ADAMW, {"val/accuracy": [0.9, 0.5], "val/loss": [0.3, 0.6]})
    (saving,) = runs.compare()
    assert (saving.quality_key, saving.text) == ("val/accuracy", "−20.0 points of val/accuracy at step 1")
    (saving,) = runs.compare("val/loss")
    assert saving.text == "+0.1 val/loss at step 1"
    assert saving.quality == pytest.approx(0.1)
    assert runs.compare("test/accuracy") == []  # there is no figure to compare


def test_what_was_not_logged_is_left_out() -> None:
    runs = Runs()
    runs.add(ZO, {"summary/peak_memory": [GIB], "train/loss": [1.0]})
    runs.add(ADAMW, {"memory/peak": [2 * GIB], "speed/train_seconds": [0.0]})
    (saving,) = runs.compare()
    assert saving.quality_key is None
    assert saving.text == "−50 % memory"
    assert saving.detail == "ZO (default recipe) against backprop AdamW, at step 0. Peak memory 1.00 GiB instead of 2.00 GiB."
    assert compare([], runs) == []


def course(steps: int, seconds: float, batch: int, gain: float) -> dict[str, list[float]]:
    """A run whose accuracy rises by ``gain`` a step, with all that counts its work; step 0 has none behind it."""
    at = np.arange(steps + 1)
    return {
        "speed/train_seconds": (seconds * at).tolist(),
        "examples_seen": (batch * at).tolist(),
        "forward_passes": (at * (2.0 if gain < 0.01 else 1.0)).tolist(),
        "val/accuracy": (0.5 + gain * at).tolist(),
        "memory/peak": [GIB] * (steps + 1),
    }


@pytest.mark.parametrize(("steps", "base"), [(20, 20), (20, 5), (10, 5), (5, 20)])
@pytest.mark.parametrize("equal", ["", "examples", "step", "forwards", "elapsed", "whole"])
def test_methods_are_compared_at_equal_work_whatever_their_length(equal: str, steps: int, base: int) -> None:
    ours, theirs = (2.0, 16, 0.005), (1.0, 8, 0.02)  # seconds and examples a step, and gain
    runs = Runs()
    runs.add(ZO, course(steps, *ours))
    runs.add(ADAMW, course(base, *theirs))
    (saving,) = runs.compare(equal=equal)
    if equal == "whole":
        a, b = steps, base
    else:  # both have done as much as the one that did less
        per = {"": (16, 8), "examples": (16, 8), "step": (1, 1), "forwards": (2, 1), "elapsed": (2.0, 1.0)}[equal]
        limit = min(steps * per[0], base * per[1])
        a, b = limit / per[0], limit / per[1]
        assert saving.limit == pytest.approx(limit)
    assert saving.axis == (equal or "examples")
    assert saving.time == pytest.approx(2.0 * a / b)
    assert saving.quality == pytest.approx(0.005 * math.floor(a + 1e-9) - 0.02 * math.floor(b + 1e-9))
    assert ("the time" in saving.text) == (equal != "elapsed")
    named = {"whole": "over the whole runs", "step": "at step", "elapsed": "of training", "forwards": "forward passes"}
    assert named.get(equal, "examples") in saving.text


def test_seeds_that_are_going_on_do_not_count_beside_those_that_ended() -> None:
    runs = Runs()
    for seed in range(2):
        runs.add(ZO, course(10, 2.0, 16, 0.005), seed=str(seed), lr="1", max_steps="10")
    runs.add(ZO, course(1, 2.0, 16, 0.005), status="RUNNING", seed="2", lr="1", max_steps="10")
    runs.add(ADAMW, course(10, 1.0, 16, 0.02))
    (saving,) = runs.compare()
    assert (len(saving.method.runs), saving.method.going, saving.limit) == (2, 1, 160)
    assert saving.quality == pytest.approx(-0.15)
    assert "1 more seed has not ended: not counted." in saving.detail
    assert "so far" not in saving.text


def test_a_pinned_run_is_what_all_others_are_compared_with() -> None:
    runs = Runs()
    zo = runs.add(ZO, course(10, 2.0, 16, 0.005))
    base = runs.add(ADAMW, course(10, 1.0, 16, 0.02))
    runs.add({}, course(10, 4.0, 16, 0.01))
    found = {saving.method.runs[0].id: saving for saving in runs.compare(baseline=zo)}
    assert set(found) == {base, "run2"}
    assert {saving.baseline.runs[0].id for saving in found.values()} == {zo}
    assert (found[base].time, found["run2"].time) == pytest.approx((0.5, 2.0))


def test_what_measures_nothing_is_not_compared() -> None:
    runs = Runs()
    runs.add(ZO, course(4, -2.0, 16, 0.005))  # an imported log whose clock went backwards
    runs.add(ADAMW, course(4, 1.0, 16, 0.02))
    assert all(math.isnan(saving.time) for saving in runs.compare(equal="whole"))
    assert [one.of for one in runs.compare()[0].differences] == ["memory", "val/accuracy"]


@pytest.mark.parametrize(
    ("difference", "shown", "tone"),
    [(0.0004, "0.0 pts", "plain"), (-0.0004, "0.0 pts", "plain"), (0.02, "+2.0 pts", "good"), (-0.02, "−2.0 pts", "bad")],
)
def test_a_difference_that_rounds_to_nothing_has_no_sign_and_no_colour(difference: float, shown: str, tone: str) -> None:
    runs = Runs()
    runs.add(ZO, {"val_acc": [0.5 + difference]})
    runs.add(ADAMW, {"val_acc": [0.5]})
    ((found,),) = (saving.differences for saving in runs.compare())
    assert found == (shown, "val_acc", tone)


def test_comparing_takes_time_in_proportion_to_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for size in (50, 200):
        runs = Runs()
        for i in range(size):
            metrics = {"val/accuracy": [0.5, 0.6 + i / 1e4], "memory/peak": [GIB]}
            runs.add(ADAMW if i % 2 else ZO, metrics, lr=str(i))
        read, looks = runs.series, list[str]()
        monkeypatch.setattr(
            runs, "series", lambda run_id, key, read=read, looks=looks: (looks.append(run_id), read(run_id, key))[1]
        )
        assert len(runs.compare()) == size // 2
        counts.append(len(looks))
    assert counts[1] <= 4.2 * counts[0]


@pytest.mark.parametrize(("tags", "method"), [(ZO, "zo"), (ADAMW, "backprop"), ({}, None), ({"zo.recipe": "x"}, "zo")])
def test_what_a_run_is_told_by_its_tags(tags: dict[str, str], method: str | None) -> None:
    assert method_of(Run("id", "name", "0", "FINISHED", 0.0, 0.0, tags=tags)) == method
