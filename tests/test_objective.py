from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import PLAIN, PerExampleTask, assert_same, batches, fit, mlp, per_example_mse, weights
from torch import nn

from zolightning.noise import Rademacher
from zolightning.probing.inspection import Examples, inspect_step
from zolightning.probing.isolation import Isolation
from zolightning.probing.loss_splitter import LossSplitter
from zolightning.probing.objective import example_losses, loss_value
from zolightning.probing.runner import Runner
from zolightning.space import build_view
from zolightning.types import Shared, SkipStep

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "out",
    [
        0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]]),
        torch.tensor([0.25, 0.75]), torch.tensor(0.5).bfloat16(), {"loss": torch.tensor(0.5), "x": 1}, {"loss": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_losses(out: Any) -> None:
    value = loss_value(out)
    assert value == 0.5
    assert type(value) is float


def test_integers_and_truth_values() -> None:
    assert loss_value(3) == 3.0
    assert loss_value(torch.tensor([True, False])) == 0.5
    assert loss_value(torch.tensor(7)) == 7.0


@pytest.mark.parametrize(
    "out",
    [
        [1, 2.0, True],
        (torch.tensor(1.0), torch.tensor([2.0]), np.float32(1.0)),
        np.array([1, 2, 1], dtype=np.uint16),
        np.array([1.0, 2.0, 1.0], dtype=np.float16)[::-1],
    ],
    ids=["list", "tuple", "integers", "reversed"],
)
def test_lists_and_arrays_are_losses_of_examples(out: Any) -> None:
    assert loss_value(out, 3) == loss_value({"loss": out}) == 4 / 3
    losses = example_losses(out, 3, LossSplitter(3))
    assert losses is not None
    assert (losses.dtype, losses.tolist()) == (torch.float64, [1.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="3 losses for a batch of 4 examples"):
        loss_value(out, 4)


def test_one_number_in_an_array() -> None:
    assert loss_value(np.array(0.25)) == loss_value(np.array([0.25])) == loss_value(np.float32(0.25)) == 0.25


@pytest.mark.parametrize("make", [lambda t: t.tolist(), lambda t: t.numpy(), list], ids=["list", "array", "tensors"])
def test_per_example_training_is_the_same_on_a_list(make: Any) -> None:
    def trained(convert: Any) -> Any:
        module = PerExampleTask(mlp(), lambda net, batch: convert(per_example_mse(net, batch)))
        fit(module, batches(3), PLAIN.override(estimator="per_example", structure="rank1"))
        return weights(module)

    assert_same(trained(make), trained(lambda losses: losses))


def test_doubles_are_kept() -> None:
    assert loss_value(torch.tensor(1.0 + 1e-12, dtype=torch.float64)) == 1.0 + 1e-12


def test_mean_of_a_half_precision_vector_is_taken_in_double() -> None:
    values = torch.full((3000,), 0.1).bfloat16()
    assert loss_value(values) == pytest.approx(float(values[0]), rel=1e-12)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ("0.5", TypeError, "must be a number.*got str"),
        ([0.5, "1"], TypeError, "got list"),
        ([[0.5], [0.5]], TypeError, "got list"),
        (np.array(["a"]), TypeError, "got ndarray"),
        (np.ones((2, 2)), ValueError, r"got torch.float64 of shape \(2, 2\)"),
        (np.array([1j]), ValueError, "real tensor.*complex128"),
        (object(), TypeError, "got object"),
        (1j, TypeError, "got complex"),
        (torch.ones(2, 2), ValueError, r"got torch.float32 of shape \(2, 2\)"),
        (torch.empty(0), ValueError, r"shape \(0,\)"),
        (torch.tensor(1j), ValueError, "real tensor.*complex64"),
        ({"Loss": 1.0, "acc": 2.0}, ValueError, r"without 'loss'; its keys are \['Loss', 'acc'\]"),
        ({"loss": "x"}, TypeError, "got str"),
    ],
    ids=lambda value: type(value).__name__ if type(value) is object else str(value),  # without an address
)
def test_bad_losses(out: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss_value(out)


@pytest.mark.parametrize("out", [None, {"loss": None}])
def test_none_skips(out: Any) -> None:
    with pytest.raises(SkipStep):
        loss_value(out)


def test_first_output_is_kept_and_later_forwards_run_in_the_extra_context() -> None:
    entered = []

    @contextmanager
    def extra() -> Any:
        entered.append(len(outputs))
        yield

    outputs: list[int] = []

    def forward(batch: Any) -> Any:
        outputs.append(batch)
        return {"loss": torch.tensor(float(len(outputs))), "n": len(outputs)}

    net = nn.Linear(2, 2)
    view = build_view(net, net.parameters(), Rademacher())
    runner = Runner(view, Isolation(net, CPU), Examples(losses=False, repeats=False), muted=extra)
    ran = runner.run(forward, 7, lambda examples: [Shared()] * 3)
    assert [answer.loss for answer in ran.answers] == [1.0, 2.0, 3.0]
    assert ran.output["n"] == 1
    assert entered == [1, 2]


def inspected(step: Callable[[Any], Any], batch: Any, net: nn.Module | None = None, repeatable: bool = True) -> Examples:
    net = net or nn.Linear(2, 4, bias=False)
    view = build_view(net, net.parameters(), Rademacher(), structure="rank1")
    with torch.no_grad():
        return inspect_step(lambda b: step(net(b["x"])), batch, view, Isolation(net, CPU), repeatable)


BATCH = {"x": torch.randn(3, 2)}


@pytest.mark.parametrize(
    ("step", "losses"),
    [
        (lambda y: y.square().sum(-1), True),
        (lambda y: {"loss": y.square().sum(-1)}, True),
        (lambda y: F.mse_loss(y, torch.ones_like(y)), True),
        (lambda y: y.square().mean(), False),
        (lambda y: y, False),
        (lambda y: 1.0, False),
    ],
)
def test_a_step_is_asked_for_its_examples(step: Callable[[Any], Any], losses: bool) -> None:
    assert inspected(step, BATCH) == Examples(losses, losses)
    assert inspected(step, BATCH, repeatable=False) == Examples(losses, False)


def test_a_skipped_batch_settles_nothing() -> None:
    with pytest.raises(SkipStep):
        inspected(lambda y: None, BATCH)


def test_dropout_would_differ_between_copies() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 4, bias=False))
    state = torch.get_rng_state()
    assert inspected(lambda y: y.square().sum(-1), BATCH, net) == Examples(True, False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_that_mixes_examples_is_noticed() -> None:
    net = nn.Linear(2, 4, bias=False)
    view = build_view(net, net.parameters(), Rademacher(), structure="rank1")
    with torch.no_grad():
        found = inspect_step(lambda b: net(b["x"].repeat(2, 1)).sum(-1), BATCH, view, Isolation(net, CPU), True)
    assert found == Examples(False, False)
