"""What a run's own metrics say of zeroth-order training, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import ArrayLike
from zolightning_dashboard.health import Finding, drift, examine, is_zeroth_order, overall
from zolightning_dashboard.source import Run, Series

STEPS = np.arange(1, 201)
RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=200)
WELL: dict[str, ArrayLike] = {
    "train/loss": 0.4 + np.exp(-STEPS / 50) + 0.01 * NOISE,
    "zo/projected_grad": 3 * NOISE,
    "zo/tie_rate": np.zeros(200),
    "zo/clip_rate": np.full(200, 0.1),
    "zo/skipped_steps": np.zeros(200),
    "zo/lost_update_share": np.full(200, 0.05),
}


def look(metrics: Mapping[str, ArrayLike]) -> list[Finding]:
    values = {key: np.asarray(one, float) for key, one in metrics.items()}
    run = Run("a", "a", "1", "FINISHED", 0.0, 1.0, {}, {"zo.recipe": "default"}, tuple(sorted(values)))
    nothing = np.empty(0)

    def series(_: str, key: str) -> Series:
        found = values.get(key, nothing)
        return Series(STEPS[: len(found)], STEPS[: len(found)].astype(float), found)

    return examine(run, series)


def test_a_run_that_is_well() -> None:
    found = look(WELL)
    assert {one.what: one.verdict for one in found} == dict.fromkeys(
        ("Loss", "Projected gradient", "Skipped steps", "Ties", "Clipping", "Lost updates"), "good"
    )
    assert overall(found) == "good"
    assert not any(one.todo for one in found)


@pytest.mark.parametrize(
    ("key", "values", "what", "verdict", "seen", "todo"),
    [
        ("train/loss", 0.5 + STEPS / 100, "Loss", "bad", "it rises", "Lower the learning rate"),
        ("train/loss", 0.7 + 0.1 * NOISE, "Loss", "watch", "no more than its noise", "more steps"),
        ("train/loss", [1.0, np.nan], "Loss", "bad", "NaN", "Lower the learning rate"),
        ("zo/projected_grad", np.zeros(200), "Projected gradient", "bad", "exactly 0", "Raise eps"),
        ("zo/projected_grad", np.abs(NOISE), "Projected gradient", "watch", "100 % have one sign", "seed"),
        ("zo/projected_grad", NOISE * STEPS, "Projected gradient", "watch", "drift", "learning rate"),
        ("zo/projected_grad", NOISE * STEPS**3, "Projected gradient", "bad", "drift", "learning rate"),
        ("zo/tie_rate", np.full(200, 0.5), "Ties", "bad", "50 % of the probes", "fp32"),
        ("zo/tie_rate", np.full(200, 0.03), "Ties", "watch", "3 % of the probes", "fp32"),
        ("forgetting/perplexity", [20.0, 20.2], "Forgetting", "good", "20 to 20.2, +1.0 %", ""),
        ("forgetting/perplexity", [20.0, 19.0, 21.0], "Forgetting", "watch", "20 to 21, +5.0 %", "fewer steps"),
        ("forgetting/perplexity", [20.0, np.inf], "Forgetting", "bad", "inf", "fewer steps"),
        ("zo/clip_rate", np.full(200, 0.9), "Clipping", "bad", "90 % of the projected", "clip"),
        ("zo/skipped_steps", STEPS // 10, "Skipped steps", "bad", "20 of 200 steps", "learning rate"),
        ("zo/skipped_steps", STEPS // 200, "Skipped steps", "watch", "1 of 200 steps", "learning rate"),
        ("zo/lost_update_share", np.full(200, 0.95), "Lost updates", "bad", "95 % of the weights", "fp32 masters"),
        ("zo/negative_scales", np.full(200, 3.0), "Negative scales", "watch", "3 at the end", "learning rate"),
        ("zo/saturated_scales", np.zeros(200), "Saturated scales", "good", "0 at the end", ""),
    ],
)
def test_what_is_wrong_and_what_to_do(key: str, values: ArrayLike, what: str, verdict: str, seen: str, todo: str) -> None:
    found = look({**WELL, key: values})
    one = next(one for one in found if one.what == what)
    assert one.verdict == verdict
    assert seen in one.seen
    assert todo in one.todo and bool(one.todo) == (verdict != "good")
    assert overall(found) == verdict == found[0].verdict


@pytest.mark.parametrize(
    ("share", "verdict", "seen"), [(0.02, "good", "2 % of the time"), (0.2, "watch", "20 %"), (0.6, "bad", "60 %")]
)
def test_waiting_for_weights_and_ranks(share: float, verdict: str, seen: str) -> None:
    seconds = np.where(STEPS < 150, STEPS, STEPS - 149)  # resumed: counters of the process begin again
    waiting = {
        "speed/train_seconds": STEPS,
        "zo/offload/wait_seconds": share * seconds,
        "zo/offload/read_bytes": 2.0**30 * seconds,
        "zo/ranks/exchange_seconds": share * STEPS,
        "zo/ranks/bytes": 48 * STEPS,
    }
    found = {one.what: one for one in look({**WELL, **waiting})}
    weights, ranks = found["Waiting for weights"], found["Waiting for ranks"]
    assert (weights.verdict, ranks.verdict) == (verdict, verdict)
    assert "0.99 GiB read" in weights.seen
    assert seen in ranks.seen and "48 B sent" in ranks.seen
    assert ("faster disk" in weights.todo) == ("equal batches" in ranks.todo) == (verdict != "good")
    assert look({**WELL, "zo/offload/wait_seconds": STEPS})[-1].verdict == "unknown"  # seconds of training were not logged
    assert not {"Waiting for weights", "Waiting for ranks"} & {one.what for one in look(WELL)}


def test_a_run_that_has_recovered_is_well() -> None:
    ties = np.where(STEPS < 80, 1.0, 0.0)
    assert overall(look({**WELL, "zo/tie_rate": ties})) == "good"


def test_nothing_is_concluded_from_nothing() -> None:
    assert overall(look({})) == overall([]) == "unknown"
    assert {one.verdict for one in look({key: [1.0, np.nan, np.inf] for key in ("zo/projected_grad", "zo/tie_rate")})} == {
        "bad", "unknown",
    }  # fmt: skip


def test_drift_is_a_ratio_of_sizes() -> None:
    assert drift(np.concatenate([np.full(50, -2.0), np.full(50, 1.0), np.full(50, 6.0)])) == pytest.approx(3)
    assert np.isnan(drift(np.zeros(50))) and np.isnan(drift(np.ones(3)))


def test_which_runs_are_looked_at() -> None:
    assert is_zeroth_order(Run("a", "a", "1", "FINISHED", 0, 1, {}, {"zo.recipe": "x"}))
    assert is_zeroth_order(Run("a", "a", "1", "FINISHED", 0, 1, keys=("zo/tie_rate",)))
    assert not is_zeroth_order(Run("a", "a", "1", "FINISHED", 0, 1, tags={"zo.method": "AdamW"}))
