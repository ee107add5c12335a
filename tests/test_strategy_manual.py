"""Manual optimisation: the optimizer gets the loss as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import PLAIN, Task, assert_same, batches, fit, mlp, mse, weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD

from zolightning import ZOStrategy
from zolightning.types import Key


class Manual(Task):
    """One training step, given as a function of the module and the batch."""

    def __init__(self, step: Callable[[Any, Any], Any], **settings: Any) -> None:
        super().__init__(mlp(), **settings)
        self.automatic_optimization = False
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)


def returning(module: Manual, batch: Any) -> None:
    module.optimizers().step(closure=lambda: mse(module.net, batch))


def logging(module: Manual, batch: Any) -> None:
    def closure() -> Tensor:
        loss = mse(module.net, batch)
        module.log("loss", loss, on_step=False, on_epoch=True, reduce_fx="sum")
        module.log("count", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    module.optimizers().step(closure=closure)


def backward(module: Manual, batch: Any) -> None:
    """What the documentation of Lightning shows for LBFGS."""
    optimizer = module.optimizers()

    def closure() -> None:
        optimizer.zero_grad()
        module.manual_backward(mse(module.net, batch))

    optimizer.step(closure=closure)


def toggled(module: Manual, batch: Any) -> None:
    optimizer = module.optimizers()

    def closure() -> Tensor:
        with optimizer.toggle_model():
            return mse(module.net, batch)

    optimizer.step(closure=closure)


@pytest.mark.parametrize("step", [returning, logging, backward, toggled])
def test_equals_automatic_optimisation(step: Any) -> None:
    module, automatic = Manual(step), Task(mlp())
    trainer = fit(module, batches(6))
    fit(automatic, batches(6))
    assert_same(weights(module), weights(automatic))
    assert trainer.global_step == 6
    if step is logging:
        assert trainer.callback_metrics["count"] == 6.0


def test_no_graph_outside_the_closure() -> None:
    def step(module: Manual, batch: Any) -> None:
        assert not mse(module.net, batch).requires_grad
        returning(module, batch)

    assert fit(Manual(step), batches(2)).global_step == 2


class Two(Manual):
    def configure_optimizers(self) -> Any:
        return SGD(self.net[0].parameters(), lr=1e-2), SGD(self.net[2].parameters(), lr=1e-2)


def test_two_optimizers_move_their_own_weights() -> None:
    def step(module: Two, batch: Any) -> None:
        first, second = module.optimizers()
        before = weights(module.net)
        first.step(closure=lambda: mse(module.net, batch))
        after = weights(module.net)
        assert torch.equal(after["2.weight"], before["2.weight"])
        assert not torch.equal(after["0.weight"], before["0.weight"])
        second.step(closure=lambda: mse(module.net, batch))
        assert torch.equal(module.net[0].weight, after["0.weight"])
        assert not torch.equal(module.net[2].weight, after["2.weight"])
        keys.append(module.trainer.strategy.last_record.terms[0].key)  # type: ignore[union-attr]

    keys: list[Key] = []
    strategy = ZOStrategy(PLAIN)
    fit(Two(step), batches(3), strategy)
    assert strategy.zo_step == 6
    assert [key.step for key in keys] == [1, 3, 5]


def test_autocast_reaches_the_closure() -> None:
    dtypes: list[torch.dtype] = []

    def step(module: Manual, batch: Any) -> None:
        def closure() -> Tensor:
            out = module.net(batch[0])
            dtypes.append(out.dtype)
            return out.double().square().mean()

        module.optimizers().step(closure=closure)

    fit(Manual(step), batches(1), precision="bf16-mixed")
    assert dtypes == [torch.bfloat16] * 3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_compiled_submodule_is_perturbed(precision: str) -> None:
    """Under autocast the cast weights are cached by Parameter, across probes."""

    def step(module: Manual, batch: Any) -> None:
        module.optimizers().step(closure=lambda: module.net(batch[0]).double().square().mean())

    module = Manual(step)
    module.net[0] = torch.compile(module.net[0], backend="eager")  # type: ignore[assignment]
    module.net[2].requires_grad_(False)
    trainer = fit(module, batches(2), ZOStrategy(PLAIN, eps=1e-1), precision=precision)
    assert abs(trainer.strategy.last_record.raw[0]) > 1e-4  # type: ignore[attr-defined]


def test_backward_then_step() -> None:
    def step(module: Manual, batch: Any) -> None:
        module.manual_backward(mse(module.net, batch))
        module.optimizers().step()

    with pytest.raises(MisconfigurationException, match=r"opt.step\(closure="):
        fit(Manual(step), batches(1))


@pytest.mark.parametrize("closure", [None, lambda: None])
def test_step_without_a_loss(closure: Any) -> None:
    with pytest.raises(MisconfigurationException, match="needs the loss as a function"):
        fit(Manual(lambda module, batch: module.optimizers().step(closure=closure)), batches(1))


def test_exception_in_a_closure() -> None:
    def step(module: Manual, batch: Any) -> None:
        calls: list[int] = []

        def closure() -> Tensor:
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("stop")
            return mse(module.net, batch)

        module.optimizers().step(closure=closure)

    module = Manual(step)
    before = weights(module)
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, batches(1))
    assert_same(weights(module), before)
    assert isinstance(module.net, nn.Module)
