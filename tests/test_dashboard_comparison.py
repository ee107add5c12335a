from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from zolightning_dashboard.comparison import Saving, compare, method_of
from zolightning_dashboard.source import Run, Series

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

    def compare(self, quality: str | None = None) -> list[Saving]:
        return compare(self.runs, self.series, quality)


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
    assert saving.text == "−74 % memory, 2.1× the time, −1.8 points of val/accuracy"
    assert saving.detail == (
        "ZO (default recipe) against backprop AdamW. Peak memory 2.60 GiB instead of 10.00 GiB. "
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
    assert first.detail.startswith("ZO (default recipe), 2 seeds, against backprop, checkpointed.")
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
    assert saving.text == "−75 % memory, 15× the time, +0.0 points of val/accuracy, so far"


def test_the_quality_is_one_that_both_sides_logged() -> None:
    runs = Runs()
    runs.add(ZO, {"val/accuracy": [0.7], "test/accuracy": [0.6], "val/loss": [0.5, 0.4]})
    runs.add(ADAMW, {"val/accuracy": [0.9], "val/loss": [0.3, 0.6]})
    (saving,) = runs.compare()
    assert (saving.quality_key, saving.text) == ("val/accuracy", "−20.0 points of val/accuracy")
    (saving,) = runs.compare("val/loss")
    assert saving.text == "+0.1 val/loss"
    assert saving.quality == pytest.approx(0.1)
    assert runs.compare("test/accuracy") == []  # there is no figure to compare


def test_what_was_not_logged_is_left_out() -> None:
    runs = Runs()
    runs.add(ZO, {"summary/peak_memory": [GIB], "train/loss": [1.0]})
    runs.add(ADAMW, {"memory/peak": [2 * GIB], "speed/train_seconds": [0.0]})
    (saving,) = runs.compare()
    assert saving.quality_key is None
    assert saving.text == "−50 % memory"
    assert saving.detail == "ZO (default recipe) against backprop AdamW. Peak memory 1.00 GiB instead of 2.00 GiB."
    assert compare([], runs.series) == []


@pytest.mark.parametrize(("tags", "method"), [(ZO, "zo"), (ADAMW, "backprop"), ({}, None), ({"zo.recipe": "x"}, "zo")])
def test_what_a_run_is_told_by_its_tags(tags: dict[str, str], method: str | None) -> None:
    assert method_of(Run("id", "name", "0", "FINISHED", 0.0, 0.0, tags=tags)) == method
