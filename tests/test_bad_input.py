"""Mistakes end in an error that says what to do, or in a counted skip with the weights as they were."""

from __future__ import annotations

import math
import warnings
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
    token_batches,
    weights,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW

from zolightning import ZOMixin, ZOStrategy


def run(module: Task, count: int = 2, **settings: Any) -> ZOStrategy:
    strategy = ZOStrategy(PLAIN, **settings)
    fit(module, batches(count), strategy)
    return strategy


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ("text", TypeError, "the loss must be a number"),
        (torch.ones(2, 2), ValueError, r"shape \(2, 2\)"),
        (torch.tensor(1j), ValueError, "real tensor"),
        ({"accuracy": 1.0}, ValueError, r"without 'loss'; its keys are \['accuracy'\]"),
    ],
    ids=str,
)
def test_bad_loss(out: Any, error: type[Exception], message: str) -> None:
    module = Task(mlp(), lambda net, batch: out)
    before = weights(module)
    with pytest.raises(error, match=message):
        run(module)
    assert_same(weights(module), before)


def test_no_trainable_parameters() -> None:
    with pytest.raises(ValueError, match="nothing to train: the optimizer holds no parameter with requires_grad=True"):
        run(Task(mlp().requires_grad_(False)))


def test_optimizer_of_another_module() -> None:
    other = mlp()
    with pytest.raises(ValueError, match="not one of the LightningModule's"):
        run(Task(mlp(), optimizer=lambda _: SGD(other.parameters(), lr=1e-2)))


@pytest.mark.parametrize("settings", [{}, {"optimizer": LBFGS}, {"optimizer": "sgd"}], ids=["module", "setting", "replaced"])
def test_optimizer_that_looks_at_the_loss_again(settings: dict[str, Any]) -> None:
    """Refused before anything was trained, unless another one takes its place."""
    module = Task(mlp(), optimizer=lambda p: LBFGS(p) if settings.get("optimizer") is not LBFGS else SGD(p, lr=1e-2))
    if settings.get("optimizer") == "sgd":
        assert run(module, **settings).zo_step == 2
        return
    with pytest.raises(ValueError, match=r"LBFGS evaluates the loss again .* use an optimizer whose step\(\)"):
        run(module, **settings)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd"}, {"lr": 1e-3}], ids=str)
def test_no_optimizer(settings: dict[str, Any]) -> None:
    class Without(Task):
        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(MisconfigurationException, match="configure_optimizers returned None"):
        run(Without(mlp()), **settings)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_non_finite_losses_skip_the_step(optimizer: Any, value: float) -> None:
    """Steps 2 and 3 are bad: the weights stay, the run goes on, one warning."""
    calls = 0

    def loss(net: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return mse(net, batch) * (value if calls in (4, 6, 7) else 1.0)

    snapshots: list[dict[str, Tensor]] = []
    skips: list[str] = []
    module = Task(mlp(), loss, lambda p: optimizer(p, lr=1e-2))
    strategy = ZOStrategy(PLAIN)

    def note(*_: Any) -> None:
        snapshots.append(weights(module))
        skips.append(strategy.last_record.skipped)  # type: ignore[union-attr]

    module.on_train_batch_end = note  # type: ignore[assignment]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, batches(5), strategy)
    assert [bool(s) for s in skips] == [False, True, True, False, False]
    assert "non-finite projected gradient" in skips[1]
    assert_same(snapshots[1], snapshots[0])
    assert_same(snapshots[2], snapshots[0])
    assert not torch.equal(snapshots[3]["net.0.weight"], snapshots[2]["net.0.weight"])
    assert sum("skipped: non-finite" in str(w.message) for w in caught) == 1


def test_only_non_finite_losses_stop_the_run() -> None:
    module = Task(mlp(), lambda net, batch: torch.tensor(math.nan))
    before = weights(module)
    strategy = ZOStrategy(PLAIN, max_skips=3)
    with pytest.raises(RuntimeError, match=r"3 steps in a row had no finite projected gradient.*max_skips"):
        fit(module, batches(5), strategy)
    assert strategy.zo_step == 2
    assert_same(weights(module), before)


def test_one_bad_example_skips_a_per_example_step() -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        losses = per_example_mse(net, batch)
        losses[0] = math.nan
        return losses

    module = PerExampleTask(nn.Sequential(nn.Linear(4, 3, bias=False)), loss)
    before = weights(module)
    strategy = ZOStrategy(select="all", eps=1e-2)
    fit(module, batches(2), strategy)
    assert "non-finite" in strategy.last_record.skipped  # type: ignore[union-attr]
    assert_same(weights(module), before)


def test_clipping_does_not_hide_a_nan() -> None:
    module = Task(mlp(), lambda net, batch: mse(net, batch) * math.nan)
    before = weights(module)
    fit(module, batches(2), PLAIN, gradient_clip_val=1.0)
    assert_same(weights(module), before)


def test_parameter_replaced_between_steps() -> None:
    module = Task(mlp())

    def replace(out: Any, batch: Any, index: int) -> None:
        module.net[0].weight = nn.Parameter(torch.zeros(8, 4))

    module.on_train_batch_end = replace  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"'net\.0\.weight' was replaced"):
        run(module)


@pytest.mark.parametrize("every", [2, 0])
def test_model_that_rescales_its_weights_for_evaluation(every: int) -> None:
    """RWKV divides weights on eval() and multiplies them back in its next training forward; the refusal says how to go on."""
    from transformers import RwkvConfig, RwkvForCausalLM

    class Validated(Task):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(self.net, batch))

    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=4, rescale_every=every)
    module = Validated(RwkvForCausalLM(config).train(), lambda net, ids: net(input_ids=ids, labels=ids, use_cache=False).loss)
    trainer = quiet_trainer(ZOStrategy(PLAIN))
    before = weights(module)
    if every:
        with pytest.raises(RuntimeError, match=r"rescales its weights .*RWKV: config\.rescale_every = 0"):
            trainer.fit(module, loader(token_batches(2)), loader(token_batches(1)))
        return
    trainer.fit(module, loader(token_batches(2)), loader(token_batches(1)))
    assert not torch.equal(before["net.head.weight"], weights(module)["net.head.weight"])


def test_weight_written_in_training_step() -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        net[0].weight.clamp_(-1, 1)  # type: ignore[index]
        return mse(net, batch)

    with pytest.raises(RuntimeError, match=r"`clamp_` writes to the trained parameter 'net.0.weight'"):
        run(Task(mlp(), loss))


def test_selection_errors_reach_the_user() -> None:
    with pytest.raises(ValueError, match="is unknown; allowed"):
        run(Task(mlp()), select="middel")
    with pytest.raises(ValueError, match=r"takes none of the 1 parameters .* takes the weight matrices of"):
        run(Task(nn.Sequential(nn.Conv1d(5, 5, 1, bias=False), nn.Linear(4, 3).requires_grad_(False))), structure="rank1")


def test_mixin_without_objective() -> None:
    class Empty(ZOMixin, Task):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty inherits ZOMixin, so it must define zo_objective"):
        run(Empty(mlp()))


def test_step_that_draws_its_own_batches() -> None:
    class Drawing(Task):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            return mse(self.net, next(dataloader_iter)[0])

    with pytest.raises(MisconfigurationException, match="draws its own batches"):
        run(Drawing(mlp()))
