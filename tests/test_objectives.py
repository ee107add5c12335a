"""Each score against a plain twin, and whole trainings on scores that have no gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import PLAIN, PerExampleTask, assert_same, fit, mlp, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD
from torchmetrics import Accuracy, MeanSquaredError, SumMetric
from torchmetrics.classification import MulticlassF1Score
from torchmetrics.functional.text.rouge import rouge_score
from torchmetrics.text import BLEUScore

from zolightning import ZOConfig, ZOStrategy
from zolightning.engine.notices import TieWatch
from zolightning.objectives import (
    MetricLoss,
    chrf,
    exact_match,
    f1_error,
    hinge,
    margins,
    normalize_answer,
    rouge_l,
    soft_zero_one,
    text_errors,
    token_f1,
    zero_one,
)

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.5, 0.0, 0.25]])
LABELS = torch.tensor([0, 2, 0])


def test_zero_one_margins_and_their_soft_forms() -> None:
    assert zero_one(LOGITS, LABELS).tolist() == [0.0, 1.0, 0.0]
    assert margins(LOGITS, LABELS).tolist() == [1.0, -2.0, 0.25]
    assert hinge(LOGITS, LABELS).tolist() == [0.0, 3.0, 0.75]
    twin = 1 / (1 + torch.exp(torch.tensor([1.0, -2.0, 0.25]) / 0.5))
    torch.testing.assert_close(soft_zero_one(LOGITS, LABELS, 0.5), twin)


@given(st.integers(0, 2**31))
def test_soft_errors_tend_to_the_error(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(16, 4, generator=generator), torch.randint(0, 4, (16,), generator=generator)
    clear = margins(logits, labels).abs() > 1e-2
    soft, hard = soft_zero_one(logits, labels, 1e-4), zero_one(logits, labels)
    torch.testing.assert_close(soft[clear], hard[clear], rtol=0, atol=1e-6)
    two = logits[:, :2], labels % 2
    # with two classes and temperature 1 it is the probability of the wrong one
    torch.testing.assert_close(soft_zero_one(*two), 1 - torch.exp(-F.cross_entropy(*two, reduction="none")))


def test_equal_logits_are_no_answer() -> None:
    assert zero_one(torch.zeros(2, 3), torch.tensor([0, 1])).tolist() == [0.0, 1.0]


def test_what_is_not_a_number_has_no_error() -> None:
    logits = LOGITS.clone()
    logits[1, 0] = torch.nan
    torch.testing.assert_close(zero_one(logits, LABELS), torch.tensor([0.0, torch.nan, 0.0]), equal_nan=True)
    assert math.isnan(f1_error(logits, LABELS))


def test_a_step_without_numbers_is_skipped() -> None:
    def broken(net: nn.Module, batch: Any) -> Tensor:
        return zero_one(net(batch[0]) * torch.nan, batch[1])

    with pytest.warns(UserWarning, match="step 0 skipped: non-finite projected gradient"):
        fit(PerExampleTask(mlp(outputs=2), broken), classes(3), PLAIN)


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_f1_error(average: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(30, 3, generator=generator), torch.randint(0, 3, (30,), generator=generator)
    predicted = logits.argmax(-1)
    counts = [
        [int(((predicted == c) & (labels == c)).sum()), int(((predicted == c) ^ (labels == c)).sum())] for c in range(3)
    ]  # true positives; false ones of both kinds
    if average == "micro":
        counts = [[sum(c[0] for c in counts), sum(c[1] for c in counts)]]
    twin = sum(2 * right / (2 * right + wrong) for right, wrong in counts) / len(counts)
    assert f1_error(logits, labels, average) == pytest.approx(1 - twin, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_zero_one(LOGITS, LABELS, 0.0), r"soft_zero_one\(temperature=...\)` must be > 0, got 0.0"),
        (lambda: hinge(LOGITS, LABELS, -1.0), r"hinge\(margin=...\)` must be > 0, got -1.0"),
        (lambda: f1_error(LOGITS, LABELS, "mean"), "'macro' or 'micro', got 'mean'"),  # type: ignore[arg-type]
        (lambda: margins(LOGITS[:, :1], LABELS), r"at least 2 classes, got \(3, 1\)"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- text --------------------------------------------------------------------------------------------------------------


def test_squad_normal_form() -> None:
    assert normalize_answer("  The Cat's, a  DOG! ") == "cats dog"
    assert exact_match("the Eiffel Tower.", ["x", "Eiffel tower"]) == 1.0
    assert exact_match("Eiffel", ["Eiffel tower"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "references", "f1"),
    [
        ("a b c", ["b c d"], 4 / 5),  # 'a' is an article: {b, c} against {b, c, d}
        ("x x y", ["x y y"], 2 / 3),
        ("x", ["y", "x z", "q"], 2 / 3),
        ("", ["x"], 0.0),
        ("the", ["an"], 1.0),
        ("x", [], 0.0),
    ],
)
def test_token_f1(prediction: str, references: list[str], f1: float) -> None:
    assert token_f1(prediction, references) == pytest.approx(f1)


def test_chrf_and_rouge() -> None:
    assert chrf("the cat sat", ["a dog", "the cat sat"]) == pytest.approx(1.0)
    assert 0.5 < chrf("the cats sit", ["the cat sat"]) < 1
    assert chrf("", ["x"]) == 0.0
    assert rouge_l("police killed the gunman", ["police kill the gunman"]) == pytest.approx(0.75)  # 3 of 4 in order


@pytest.mark.parametrize("text", ["привет мир", "γειά σου κόσμε", "café crème", "你好 世界"])
def test_rouge_takes_words_of_any_script(text: str) -> None:
    assert rouge_l(text.upper(), [text]) == pytest.approx(1.0)
    assert rouge_l(text.split()[0], [text]) < 1


@pytest.mark.parametrize(("prediction", "reference"), [("It's a_b: 3.5 (x)!", "its a b 3 5 y"), ("...", "x"), ("", "")])
def test_rouge_of_ascii_is_torchmetrics_own(prediction: str, reference: str) -> None:
    own = rouge_score([prediction], [[reference]], rouge_keys="rougeL")["rougeL_fmeasure"]
    assert rouge_l(prediction, [reference]) == own


def test_references_must_be_lists() -> None:
    with pytest.raises(TypeError, match="takes a list of accepted texts for each prediction, got one text"):
        text_errors(["the cat", "Paris"], ["the cat", "Paris"])


def test_text_errors_are_float32_in_half_precision_runs_too() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        errors = text_errors(["x", "y z"], [["x"], ["y"]])
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(errors, torch.tensor([0.0, 1 / 3]))


# ---- metrics -----------------------------------------------------------------------------------------------------------


def test_metric_loss_is_of_this_batch_alone() -> None:
    accuracy = MetricLoss(Accuracy(task="multiclass", num_classes=3))
    assert accuracy(LOGITS, LABELS) == accuracy(LOGITS, LABELS) == pytest.approx(1 / 3)
    assert accuracy(LOGITS[:1], LABELS[:1]) == 0.0
    error = MetricLoss(MeanSquaredError())
    assert error(torch.tensor([1.0]), torch.tensor([3.0])) == 4.0  # lower is better as it is
    bleu = MetricLoss(BLEUScore())
    assert bleu(["a b c d e", "x"], [["a b c d e"], ["y"]]) == pytest.approx(1 - (5 / 6) ** (1 / 4), abs=1e-6)


def test_metric_loss_goes_to_the_inputs_device() -> None:
    loss, meta = MetricLoss(MeanSquaredError()), torch.empty(2, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):  # a meta tensor has no value
        loss(meta, meta)
    assert loss.metric.device.type == "meta"


def test_metric_loss_refuses_what_it_cannot_minimise() -> None:
    each = MetricLoss(MulticlassF1Score(3, average=None))
    with pytest.raises(TypeError, match=r"MulticlassF1Score computes .*average='macro'"):
        each(LOGITS, LABELS)
    with pytest.raises(ValueError, match="SumMetric does not say whether higher is better"):
        MetricLoss(SumMetric())


# ---- training ----------------------------------------------------------------------------------------------------------


def classes(count: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Two classes apart along a fixed direction."""
    generator = torch.Generator().manual_seed(4)
    xs = [torch.randn(size, 4, generator=generator) for _ in range(count)]
    return [(x, (x[:, 0] + x[:, 1] > 0).long()) for x in xs]


def errors(net: nn.Module, batch: Any) -> Tensor:
    return zero_one(net(batch[0]), batch[1])


def batch_error(net: nn.Module, batch: Any) -> float:
    return MetricLoss(MulticlassF1Score(2, average="macro"))(net(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("loss", "config"),
    [
        (errors, ZOConfig(eps=0.1, select="all", structure="rank1")),
        (batch_error, ZOConfig(estimator="spsa", eps=0.1, select="all", structure="dense", num_queries=4)),
    ],
    ids=["0/1 error, a direction for each example", "1 - macro F1, a direction for the batch"],
)
def test_training_on_a_metric_alone(loss: Any, config: ZOConfig) -> None:
    module = PerExampleTask(mlp(outputs=2), loss, lambda ps: SGD(ps, lr=2e-2))
    held_out = classes(1, 500)[0]
    before = float(errors(module.net, held_out).mean())
    trainer = fit(module, classes(80), config)
    assert float(errors(module.net, held_out).mean()) < min(0.2, before - 0.2)
    assert trainer.strategy.last_record.ties > 0 or loss is batch_error  # type: ignore[attr-defined]


def test_lr_0_restores_every_bit_under_a_metric() -> None:
    module = PerExampleTask(mlp(outputs=2), batch_error, lambda ps: SGD(ps, lr=0.0))
    before = weights(module)
    fit(module, classes(3), PLAIN)
    assert_same(weights(module), before)


# ---- ties --------------------------------------------------------------------------------------------------------------


def test_tie_watch_speaks_after_a_coarse_window_only() -> None:
    watch = TieWatch(steps=4)
    assert [watch(t, 8, 1e-3) for t in (8, 8, 7, 7)] == [""] * 4  # half of the steps wasted: still fine
    *silent, advice = [watch(t, 8, 1e-3) for t in (8, 8, 8, 6)]
    assert silent == [""] * 3
    assert advice.startswith("in 3 of 4 steps both probes")
    assert "94% of all pairs tied" in advice
    assert "eps=0.001" in advice


def test_a_fine_objective_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    fit(PerExampleTask(mlp(outputs=2), errors), classes(25), ZOStrategy(eps=0.3, select="all"))
    assert not [w for w in recwarn if "exactly the same loss" in str(w.message)]
