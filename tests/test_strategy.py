"""What a LightningModule sees under ZOStrategy is what it sees under the stock strategy, apart from gradients."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
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
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from zolightning import ZOConfig, ZOMixin, ZOStrategy
from zolightning.ledger import LedgerError
from zolightning.methods import recipes

SPIED = [
    name
    for name in dir(Callback)
    if (name.startswith("on_") or name in ("setup", "teardown")) and name not in ("on_exception",)
]


class Recorder(Callback):
    """Every callback hook, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []


def _record(name: str) -> Any:
    def hook(self: Recorder, *_: Any, **__: Any) -> None:
        self.calls.append(name)

    return hook


for _name in SPIED:
    setattr(Recorder, _name, _record(_name))

MODULE_HOOKS = """
    on_fit_start on_train_start on_train_epoch_start on_train_batch_start on_before_zero_grad on_before_backward
    on_after_backward on_before_optimizer_step on_train_batch_end on_train_epoch_end on_validation_start on_fit_end
"""


class Spied(Task):
    """Records its hooks and what it logs, and validates."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(mlp(), **settings)
        self.calls: list[str] = []
        for name in str.split(MODULE_HOOKS):
            setattr(self, name, lambda *_, name=name: self.calls.append(name))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=5)
        self.log_dict({"one": 1.0, "index": float(batch_idx)}, on_step=False, on_epoch=True, reduce_fx="sum", batch_size=5)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", mse(self.net, batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", mse(self.net, batch))

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return self.net(batch[0])


def run(strategy: Any, **settings: Any) -> tuple[Spied, Recorder, pl.Trainer]:
    torch.manual_seed(0)
    module, recorder = Spied(), Recorder()
    trainer = quiet_trainer(strategy, callbacks=[recorder], **{"max_epochs": 2, **settings})
    trainer.fit(module, loader(batches(5)), loader(batches(2)))
    return module, recorder, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("queries", [1, 3])
def test_hooks_and_logs_are_those_of_the_stock_strategy(accumulate: int, queries: int) -> None:
    stock, stock_callback, stock_trainer = run("auto", accumulate_grad_batches=accumulate)
    module, callback, trainer = run(ZOStrategy(PLAIN, num_queries=queries), accumulate_grad_batches=accumulate)
    assert module.calls == stock.calls
    assert callback.calls == stock_callback.calls
    assert trainer.global_step == stock_trainer.global_step == 2 * -(-5 // accumulate)
    assert trainer.callback_metrics.keys() == stock_trainer.callback_metrics.keys()
    assert trainer.callback_metrics["one"] == 5.0  # summed over 5 batches: once each
    assert trainer.callback_metrics["index"] == 10.0


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_is_the_stock_one(stage: str) -> None:
    module = Spied()
    results = []
    for strategy in ("auto", ZOStrategy(PLAIN)):
        trainer = quiet_trainer(strategy)
        results.append(getattr(trainer, stage)(module, loader(batches(3))))
    if stage == "predict":
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    else:
        assert results[0] == results[1]


def test_evaluation_inside_and_after_fit_sees_the_unperturbed_weights() -> None:
    module, _, trainer = run(ZOStrategy(PLAIN))
    (result,) = trainer.validate(module, loader(batches(2)), verbose=False)
    expected = torch.stack([mse(module.net, b) for b in batches(2)]).mean().item()
    assert result["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.fit_loop.epoch_loop.val_loop.trainer.callback_metrics["val_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_fast_dev_run() -> None:
    _, callback, trainer = run(ZOStrategy(PLAIN), fast_dev_run=True)
    assert trainer.global_step == 1
    assert callback.calls.count("on_train_batch_end") == 1


def test_progress_bar_shows_the_loss() -> None:
    module = Spied()
    trainer = quiet_trainer(ZOStrategy(PLAIN), enable_progress_bar=True)
    trainer.fit(module, loader(batches(3)))
    shown = trainer.progress_bar_callback.get_metrics(trainer, module)  # type: ignore[union-attr]
    assert shown["loss_step"] > 0


def test_early_stopping() -> None:
    module = Spied(optimizer=lambda p: SGD(p, lr=0.0))
    stopper = EarlyStopping("val_loss", patience=2)
    trainer = quiet_trainer(ZOStrategy(PLAIN), max_epochs=10, callbacks=[stopper])
    trainer.fit(module, loader(batches(2)), loader(batches(1)))
    assert trainer.current_epoch == 3


def test_by_name() -> None:
    trainer = fit(PerExampleTask(mlp(), per_example_mse, lambda p: SGD(p, lr=1e-3)), batches(2), "zo")
    assert isinstance(trainer.strategy, ZOStrategy)
    assert trainer.strategy.config == recipes.DEFAULT


# ---- one forward's side effects ----------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Dropout, BatchNorm and a counting buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.layers(x)


@pytest.mark.parametrize("queries", [1, 3])
def test_side_effects_are_those_of_one_forward(queries: int) -> None:
    """All probes draw the same randoms; buffers and generator are as after the stock strategy's forward."""
    ends, tasks, draws = [], [], []

    def drawing(net: nn.Module, batch: Any) -> Tensor:
        draws[-1].append(torch.rand(()).item())
        return mse(net, batch)

    for strategy in ("auto", ZOStrategy(PLAIN, num_queries=queries, eps=1e-30)):  # the probes are at θ to the last bit
        draws.append([])
        module = Task(Noisy(), drawing, optimizer=lambda p: SGD(p, lr=0.0))
        torch.manual_seed(9)
        fit(module, batches(2), strategy)
        ends.append(torch.rand(3))
        tasks.append(module)
    stock, ours = (task.net for task in tasks)
    assert torch.equal(*ends)
    assert draws[1] == [draws[0][0]] + [draw for draw in draws[0] for _ in range(2 * queries)]  # the first is a rehearsal
    assert_same(dict(ours.named_buffers()), dict(stock.named_buffers()))
    assert ours.seen == 10
    assert ours.layers[1].num_batches_tracked == 2


def test_same_dropout_mask_in_both_probes() -> None:
    """A loss that is the mask itself does not change between the probes, so g is exactly 0."""

    def masked(net: nn.Module, batch: Any) -> Tensor:
        return F.dropout(torch.ones(100), 0.5).mul(torch.arange(100.0)).sum() + 0 * net(batch[0]).sum()

    trainer = fit(Task(mlp(), masked), batches(3))
    assert trainer.strategy.last_record.raw == (0.0,)  # type: ignore[attr-defined]


class Metered(Task):
    """Metrics of all kinds of state: tensors summed in place, lists, a collection with compute groups."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.mean, self.cat = MeanMetric(), CatMetric()
        scores = {"accuracy": MulticlassAccuracy(3, average="micro"), "f1": MulticlassF1Score(3, average="micro")}
        self.scores = MetricCollection(scores)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self.net(x)
        self.mean(torch.tensor(float(batch_idx)))
        self.cat.update(x[:, 0])
        self.scores.update(y, y.argmax(-1))  # right answers: what is counted does not depend on the weights
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict(self.scores, on_step=False, on_epoch=True)
        return F.mse_loss(out, y)

    def on_train_epoch_end(self) -> None:
        self.gathered = self.cat.compute()
        self.counts = (self.mean.update_count, self.mean.weight.item(), self.scores["f1"].tp.sum().item())


def test_metrics_count_each_batch_once() -> None:
    results = []
    for strategy in ("auto", ZOStrategy(PLAIN, num_queries=2)):
        module = Metered()
        trainer = quiet_trainer(strategy)
        trainer.fit(module, loader(batches(4)))
        results.append((module.counts, module.gathered.tolist(), {k: v.item() for k, v in trainer.callback_metrics.items()}))
    assert results[1] == results[0]
    assert results[1][0] == (4, 4.0, 20)


# ---- what training_step may return -------------------------------------------------------------------------------------

RETURNS = {
    "tensor": lambda loss: loss,
    "vector": lambda loss: loss.expand(5),
    "matrix of one": lambda loss: loss.view(1, 1),
    "number": lambda loss: loss.item(),
    "no graph": lambda loss: loss.detach(),
    "dict": lambda loss: {"loss": loss, "extra": torch.ones(2), "text": "kept"},
}


@pytest.mark.parametrize("kind", RETURNS)
def test_returns(kind: str) -> None:
    """All of them train alike."""
    outputs: list[Any] = []
    module, plain = Task(mlp(), lambda net, b: RETURNS[kind](mse(net, b))), Task(mlp())
    module.on_train_batch_end = lambda out, *_: outputs.append(out)  # type: ignore[assignment]
    fit(module, batches(3))
    fit(plain, batches(3))
    assert_same(weights(module), weights(plain), 1e-7)
    assert all(torch.is_tensor(out["loss"]) and out["loss"].dim() == 0 for out in outputs)
    assert len(outputs) == 3
    if kind == "dict":
        assert all(out["text"] == "kept" and out["extra"].sum() == 2 for out in outputs)


def test_none_skips_the_micro_batch() -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor | None:
        return None if batch[0].sum() > 0 else mse(net, batch)

    items = batches(8)
    kept = [b for b in items if not b[0].sum() > 0]
    assert 0 < len(kept) < 8
    module = Task(mlp(), loss)
    trainer = fit(module, items)
    records = trainer.strategy.zo_step  # type: ignore[attr-defined]
    assert records == 8
    assert all(torch.isfinite(p).all() for p in module.parameters())
    silent = Task(mlp(), lambda net, batch: None)
    before = weights(silent)
    assert fit(silent, items).strategy.last_record.skipped == "training_step returned None"  # type: ignore[attr-defined]
    assert_same(weights(silent), before)


class Scored(ZOMixin, Task):
    """Trains on 0/1 errors, as a number without a graph."""

    def zo_objective(self, batch: Any) -> float:
        x, y = batch
        return float((self.net(x).argmax(-1) != y.argmax(-1)).float().mean())


def test_a_metric_without_gradient_is_trained_on() -> None:
    torch.manual_seed(0)
    batch = batches(1, size=64)[0]
    module = Scored(mlp(), optimizer=lambda p: SGD(p, lr=0.05))
    before = module.zo_objective(batch)
    fit(module, [batch] * 150, ZOStrategy("spsa", eps=0.3, num_queries=4, seed=0))
    assert module.zo_objective(batch) < before - 0.1


def test_mixin_under_backprop() -> None:
    module = PerExampleTask(mlp(), per_example_mse)
    before = weights(module)
    fit(module, batches(2), "auto")
    assert not torch.equal(weights(module)["net.0.weight"], before["net.0.weight"])
    with pytest.raises(TypeError, match="without a graph"):
        fit(Scored(mlp()), batches(2), "auto")


def test_no_graph_is_built() -> None:
    seen: list[bool] = []

    def loss(net: nn.Module, batch: Any) -> Tensor:
        out = mse(net, batch)
        seen.append(out.requires_grad)
        return out

    fit(Task(mlp(), loss), batches(2))
    assert seen == [False] * 5


# ---- one object, many fits ---------------------------------------------------------------------------------------------


def test_fit_twice_continues() -> None:
    """2 + 3 epochs are 5 epochs: the second fit does not start the directions again."""
    once, twice = Task(mlp()), Task(mlp())
    fit(once, batches(4), PLAIN, max_epochs=5)
    trainer = quiet_trainer(ZOStrategy(PLAIN), max_epochs=2)
    trainer.fit(twice, loader(batches(4)))
    trainer.fit_loop.max_epochs = 5
    trainer.fit(twice, loader(batches(4)))
    assert_same(weights(twice), weights(once))


def test_one_strategy_object_in_two_trainers() -> None:
    strategy = ZOStrategy(PLAIN)
    first, second = Task(mlp()), Task(nn.Sequential(nn.Linear(4, 3)))
    fit(first, batches(2), strategy)
    before = weights(second)
    fit(second, batches(2), strategy, accelerator="auto")  # any strategy object keeps the accelerator it was given
    assert strategy.zo_step == 4
    assert not torch.equal(weights(second)["net.0.weight"], before["net.0.weight"])


def test_seed_is_taken_when_a_fit_starts() -> None:
    """A validation run before ``seed_everything`` does not fix the seed of the directions."""
    results = []
    for validate_first in (True, False):
        strategy, module = ZOStrategy(PLAIN, seed=None), Spied()
        trainer = quiet_trainer(strategy)
        torch.manual_seed(1)
        if validate_first:
            trainer.validate(module, loader(batches(1)), verbose=False)
        torch.manual_seed(2)
        trainer.fit(module, loader(batches(2)))
        results.append(weights(module))
    assert_same(*results)


def test_a_run_can_be_repeated() -> None:
    results = []
    for _ in range(2):
        pl.seed_everything(5)
        module = Task(mlp(), optimizer=lambda p: AdamW(p, lr=1e-2))
        fit(module, batches(4), ZOStrategy("mezo", optimizer="module", lr=None))
        results.append(weights(module))
    assert_same(*results)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_copies(copied: Any) -> None:
    strategy = copied(ZOStrategy("mezo", lr=1e-2, seed=3))
    module, twin = Task(mlp()), Task(mlp())
    fit(module, batches(2), strategy)
    fit(twin, batches(2), ZOStrategy("mezo", lr=1e-2, seed=3))
    assert_same(weights(module), weights(twin))


class Copier(Callback):
    """Copies the strategy in a hook of a fit."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda trainer, *_: copy.deepcopy(trainer.strategy))


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_end"])
def test_a_copy_after_a_fit_and_none_during_it(hook: str, tmp_path: Path) -> None:
    module = Task(mlp())
    strategy = ZOStrategy(PLAIN, ledger=tmp_path / "ledger.zo")
    trainer = fit(module, batches(2), strategy)
    written = (tmp_path / "ledger.zo").read_bytes()
    again = copy.deepcopy(trainer)
    assert_same(weights(again.lightning_module), weights(module))
    fit(Task(mlp()), batches(2), again.strategy, accelerator="auto")
    assert again.strategy.zo_step == 4  # type: ignore[attr-defined]
    assert strategy.zo_step == 2
    assert (tmp_path / "ledger.zo.1").read_bytes() == written
    with pytest.raises(LedgerError, match=r"ledger\.zo has one writer: copy a strategy before its fit or after it"):
        fit(Task(mlp()), batches(2), ZOStrategy(PLAIN, ledger=tmp_path / "ledger.zo"), callbacks=[Copier(hook)])


def test_config_survives_pickle() -> None:
    assert pickle.loads(pickle.dumps(recipes.MEZO)) == recipes.MEZO
    assert isinstance(recipes.MEZO, ZOConfig)
