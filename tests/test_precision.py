"""Every precision: exact restore at lr 0, also when a probe raises, and updates that arrive."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from helpers import (
    PLAIN,
    PerExampleTask,
    Task,
    assert_same,
    batches,
    fit,
    loader,
    mlp,
    mse,
    per_example_mse,
    quiet_trainer,
    weights,
)
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from zolightning import ZOStrategy

TRUE = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


def normed() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def items(count: int, precision: str) -> list[Any]:
    dtype = TRUE.get(precision, torch.float32)
    return [(x.to(dtype), y.to(dtype)) for x, y in batches(count)]


@pytest.mark.parametrize("precision", TRUE)
def test_nothing_moves_at_lr_0(precision: str) -> None:
    module = Task(normed().to(TRUE[precision]), optimizer=lambda p: SGD(p, lr=0.0))
    before = weights(module)
    trainer = fit(module, items(200, precision), PLAIN, precision=precision)
    assert trainer.global_step == 200
    assert_same(weights(module), before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true", "64-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("optimizer", [lambda p: SGD(p, lr=0.05), lambda p: AdamW(p, lr=0.05)], ids=["sgd", "adamw"])
def test_learns(precision: str, optimizer: Any) -> None:
    """One batch, 60 steps: the loss falls by a third at least."""
    module = Task(normed(), optimizer=optimizer)
    losses: list[float] = []
    batch = items(1, precision)[0]
    strategy = ZOStrategy(PLAIN, eps=1e-2, num_queries=2)
    trainer = quiet_trainer(strategy, precision=precision)
    module.on_train_batch_end = lambda *_: losses.append(strategy.last_record.loss)  # type: ignore[assignment, union-attr]
    trainer.fit(module, loader([batch] * 60))
    assert sum(losses[-5:]) / 5 < 2 / 3 * losses[0]
    assert next(module.parameters()).dtype == TRUE.get(precision, torch.float32)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("failing", [1, 2, 5])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_after_an_exception_in_a_probe(precision: str, failing: int, error: type[BaseException]) -> None:
    """In the first and second probe of the first step, and in a later step."""
    calls = 0
    before: list[dict[str, Tensor]] = []

    def loss(net: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        out = mse(net, batch)
        if calls == failing:
            raise error("stop")
        return out

    module = Task(normed().to(TRUE[precision]), loss)
    module.on_train_batch_start = lambda *_: before.append(weights(module))  # type: ignore[assignment]
    with pytest.raises((error, SystemExit)):
        fit(module, items(4, precision), PLAIN, precision=precision)
    assert_same(weights(module), before[-1])  # the last step's update is there, and nothing of this step's probes
    assert len(before) == max(1, failing // 2)  # the first call is a rehearsal


@pytest.mark.parametrize("hook", ["on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"])
def test_weights_after_an_exception_in_a_hook(hook: str) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    module = Task(normed())
    before = weights(module)
    setattr(module, hook, fail)
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, batches(2), PLAIN)
    assert_same(weights(module), before)


def test_per_example_probe_leaves_weights_alone() -> None:
    calls = count()

    def loss(net: nn.Module, batch: Any) -> Tensor:
        out = per_example_mse(net, batch)
        if next(calls) >= 3:  # in the first step, of the doubled batch and of the batch alone; the looks before it may fail
            raise RuntimeError("stop")
        return out

    module = PerExampleTask(nn.Sequential(nn.Linear(4, 3, bias=False)), loss)
    before = weights(module)
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, batches(2), ZOStrategy(select="all", eps=1e-2))
    assert_same(weights(module), before)


@pytest.mark.parametrize(
    ("precision", "eps"), [("32-true", 1e-3), ("64-true", 1e-3), ("bf16-true", 3e-3), ("16-true", 3e-3), ("bf16-mixed", 3e-3)]
)
def test_eps_follows_the_dtype_of_the_forward(precision: str, eps: float) -> None:
    strategy = ZOStrategy(PLAIN, eps=None)
    fit(Task(mlp()), items(1, precision), strategy, precision=precision)
    assert strategy.estimator.eps == eps


def test_low_precision_loss_warns() -> None:
    def coarse(net: nn.Module, batch: Any) -> Tensor:
        return mse(net, batch).bfloat16()

    with pytest.warns(UserWarning, match="loss is torch.bfloat16"):
        fit(Task(mlp(), coarse), batches(2))


def test_ties_are_counted_and_warn() -> None:
    def constant(net: nn.Module, batch: Any) -> Tensor:
        return torch.tensor(1.0)

    module = Task(mlp(), constant)
    before = weights(module)
    with pytest.warns(UserWarning, match=r"in 20 of 20 steps both probes .* exactly the same loss \(100% of all pairs tied\)"):
        trainer = fit(module, batches(20))
    assert trainer.strategy.last_record.ties == 1  # type: ignore[attr-defined]
    assert_same(weights(module), before)
