"""Learning rate schedules, overrides of the learning rate and of the optimizer, and the LR finder."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import PLAIN, Task, assert_same, batches, fit, loader, mlp, mse, quiet_trainer, weights
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from zolightning import ZOStrategy

STEPS = 12


class Lrs(Callback):
    """The learning rates that the steps were made with."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(list(trainer.strategy.last_record.lrs))  # type: ignore[attr-defined]


class StockLrs(Lrs):
    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Optimizer) -> None:
        self.seen.append([float(g["lr"]) for g in optimizer.param_groups])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        pass


def warm_up(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: min(1.0, step / 4))


def sequential(optimizer: Optimizer) -> SequentialLR:
    return SequentialLR(optimizer, [ConstantLR(optimizer, 0.1, 3), ExponentialLR(optimizer, 0.8)], [3])


def chained(optimizer: Optimizer) -> ChainedScheduler:
    return ChainedScheduler([ConstantLR(optimizer, 0.1, 3), ExponentialLR(optimizer, 0.8)])


def one_cycle(optimizer: Optimizer) -> OneCycleLR:
    """With a momentum cycle, which writes to the optimizer's momentum or betas."""
    return OneCycleLR(optimizer, max_lr=[0.02 * g["lr"] / 0.01 for g in optimizer.param_groups], total_steps=STEPS)


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "warm-up": warm_up,
    "cosine": lambda o: CosineAnnealingLR(o, STEPS, eta_min=1e-3),
    "step": lambda o: StepLR(o, 3, 0.5),
    "one cycle": one_cycle,
    "cyclic": lambda o: CyclicLR(o, 1e-3, 1e-2, step_size_up=3, cycle_momentum=False),
    "sequential": sequential,
    "chained": chained,
}


def two_groups(kind: type[Optimizer], **settings: Any) -> Callable[[list[Any]], Optimizer]:
    return lambda p: kind([{"params": p[:2]}, {"params": p[2:], "lr": 3e-2}], lr=1e-2, **settings)


def lrs_of(strategy: Any, schedule: str, make: Callable[[list[Any]], Optimizer]) -> tuple[list[list[float]], Task]:
    callback = Lrs() if isinstance(strategy, ZOStrategy) else StockLrs()
    module = Task(mlp(), optimizer=make, scheduler=SCHEDULES[schedule])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*optimizer.step.*")  # the schedulers' complaints about call order
        fit(module, batches(STEPS), strategy, callbacks=[callback])
    return callback.seen, module


@pytest.mark.parametrize("optimizer", ["module", "sgd"])
@pytest.mark.parametrize("kind", [two_groups(SGD, momentum=0.9), two_groups(AdamW)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_run_as_under_the_stock_strategy(schedule: str, kind: Any, optimizer: Any) -> None:
    stock, _ = lrs_of("auto", schedule, kind)
    ours, module = lrs_of(ZOStrategy(PLAIN, optimizer=optimizer), schedule, kind)
    assert ours == stock
    assert len(ours) == STEPS
    state = module.trainer.optimizers[0].state  # type: ignore[union-attr]
    assert bool(state) == (optimizer == "module")


@pytest.mark.parametrize("optimizer", ["module", "sgd"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lr_override_keeps_the_shape(schedule: str, optimizer: Any) -> None:
    """All groups and schedules are scaled alike; lr is the first group's, at the height of a one-cycle schedule."""
    kind = two_groups(AdamW)
    stock, _ = lrs_of("auto", schedule, kind)
    ours, _ = lrs_of(ZOStrategy(PLAIN, optimizer=optimizer, lr=5e-4), schedule, kind)
    top = {"one cycle": 0.02, "cyclic": 1e-3}.get(schedule, 1e-2)
    assert ours == [[pytest.approx(value * 5e-4 / top) for value in lrs] for lrs in stock]


def test_sgd_override_trains_as_plain_sgd() -> None:
    """Weight decay and direction are the module's; momentum and moments are not used."""
    settings = {"lr": 1e-2, "weight_decay": 0.2, "maximize": True}
    module, twin = Task(mlp(), optimizer=lambda p: AdamW(p, **settings)), Task(mlp(), optimizer=lambda p: SGD(p, **settings))
    fit(module, batches(4), ZOStrategy(PLAIN, optimizer="sgd"))
    fit(twin, batches(4), PLAIN)
    assert_same(weights(module), weights(twin))


def test_lr_override_without_schedule() -> None:
    module, twin = Task(mlp(), optimizer=lambda p: SGD(p, lr=0.7)), Task(mlp(), optimizer=lambda p: SGD(p, lr=2e-3))
    fit(module, batches(4), ZOStrategy(PLAIN, lr=2e-3))
    fit(twin, batches(4), PLAIN)
    assert_same(weights(module), weights(twin))


def test_lr_override_of_a_tensor() -> None:
    module = Task(mlp(), optimizer=lambda p: SGD(p, lr=torch.tensor(0.5)))
    trainer = fit(module, batches(1), ZOStrategy(PLAIN, lr=2e-3))
    assert trainer.strategy.last_record.lrs == (pytest.approx(2e-3),)  # type: ignore[attr-defined]


def test_lr_override_of_nothing() -> None:
    with pytest.raises(ValueError, match="first group's, which is 0"):
        fit(Task(mlp(), optimizer=lambda p: SGD(p, lr=0.0)), batches(1), ZOStrategy(PLAIN, lr=2e-3))


def test_reduce_on_plateau() -> None:
    class Plateau(Task):
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=1e-3)
            scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=0, min_lr=1e-5, eps=0.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", mse(self.net, batch))

    callback = Lrs()
    trainer = quiet_trainer(ZOStrategy(PLAIN, lr=1e-6), max_epochs=5, callbacks=[callback])
    trainer.fit(Plateau(mlp()), loader(batches(1)), loader([(torch.ones(1, 4), torch.full((1, 3), math.inf))]))
    assert callback.seen == [[pytest.approx(lr)] for lr in (1e-6, 1e-7, 1e-8, 1e-8, 1e-8)]


class Tunable(Task):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.lr = 1e-3

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.lr)


def test_lr_finder(tmp_path: Any) -> None:
    """It restores the weights, and the run after it uses the rate that it found."""
    module, callback = Tunable(), Lrs()
    before = weights(module)
    trainer = quiet_trainer(ZOStrategy("spsa", eps=1e-2, seed=0), callbacks=[callback], default_root_dir=tmp_path)
    data = loader(batches(40))
    finder = Tuner(trainer).lr_find(module, data, min_lr=1e-5, max_lr=1.0, num_training=30, early_stop_threshold=None)
    assert finder is not None
    assert len(finder.results["lr"]) == 30
    assert finder.results["lr"][0] < 1e-4 < 0.5 < finder.results["lr"][-1]
    assert all(map(math.isfinite, finder.results["loss"]))
    assert_same(weights(module), before)
    suggested = finder.suggestion()
    assert module.lr == suggested
    callback.seen.clear()
    trainer.fit(module, data)
    assert callback.seen[-1] == [pytest.approx(suggested)]


def test_optimizer_advice() -> None:
    with pytest.warns(UserWarning, match=r"AdamW, which keeps state .* ZOStrategy\(optimizer='sgd'\)"):
        fit(Task(mlp(), optimizer=lambda p: AdamW(p)), batches(1))
    with pytest.warns(UserWarning, match=r"lr=0.5 is far from the rates"):
        fit(Task(mlp(), optimizer=lambda p: SGD(p, lr=0.5)), batches(1), ZOStrategy("spsa"))


class Started(Callback):
    """The weights with which each epoch starts."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights.append(weights(pl_module))


@pytest.mark.parametrize(
    "strategy", ["auto", ZOStrategy(PLAIN), ZOStrategy("default", seed=1)], ids=["stock", "spsa", "default"]
)
def test_weight_averaging_is_the_mean_over_epochs(strategy: Any) -> None:
    """As under the stock strategy: the module ends with the mean of the weights at the starts of epochs 1 to 4."""
    module, started = Task(mlp()), Started()
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2, annealing_epochs=1)
    fit(module, batches(4), strategy, max_epochs=5, callbacks=[started, averaging])
    assert module.trainer.global_step == 20
    assert not torch.equal(started.weights[1]["net.0.weight"], started.weights[4]["net.0.weight"])
    mean = {name: torch.stack([w[name] for w in started.weights[1:5]]).mean(0) for name in weights(module)}
    assert_same(weights(module), mean, tolerance=1e-6)
