"""A run saved in its middle and resumed is the uninterrupted run, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    PLAIN,
    PerExampleTask,
    Resumable,
    Task,
    assert_same,
    batches,
    dropped,
    exact_epochs,
    fit,
    loader,
    mlp,
    mse,
    per_example_mse,
    quiet_trainer,
    weights,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from zolightning import ZOStrategy

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=1e-2),
    "momentum": lambda p: SGD(p, lr=1e-2, momentum=0.9),
    "adamw": lambda p: AdamW(p, lr=1e-2),
}
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


def make(optimizer: str) -> Task:
    return Task(mlp(), dropped, OPTIMIZERS[optimizer], lambda o: CosineAnnealingLR(o, 20))


def data(precision: str, epochs_of: int = 6) -> Resumable:
    return Resumable([(x.to(DTYPES[precision]), y.to(DTYPES[precision])) for x, y in batches(epochs_of)])


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("settings", [{"normalize": False}, {"normalize": True, "num_queries": 2}], ids=["plain", "normalized"])
@pytest.mark.parametrize(
    "at", [pytest.param(6, marks=exact_epochs, id="between epochs"), pytest.param(9, id="inside an epoch")]
)
def test_resume(at: int, settings: dict[str, Any], optimizer: str, precision: str, tmp_path: Path) -> None:
    def strategy() -> ZOStrategy:
        return ZOStrategy(PLAIN, seed=None, **settings)

    torch.manual_seed(3)
    whole = make(optimizer)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=at, save_top_k=-1)
    quiet_trainer(strategy(), precision=precision, max_epochs=3, enable_checkpointing=True, callbacks=[saver]).fit(
        whole, data(precision)
    )
    torch.manual_seed(99)
    resumed, again = make(optimizer), strategy()
    trainer = quiet_trainer(again, precision=precision, max_epochs=3)
    trainer.fit(resumed, data(precision), ckpt_path=tmp_path / f"step={at}.ckpt")
    assert again.zo_step == trainer.global_step == 18
    assert_same(weights(resumed), weights(whole))


@exact_epochs
def test_resume_a_shuffled_run(tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole, resumed = make("sgd"), make("sgd")
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    quiet_trainer(ZOStrategy(PLAIN), max_epochs=3, enable_checkpointing=True, callbacks=[saver]).fit(
        whole, loader(batches(6), shuffle=True)
    )
    torch.manual_seed(99)
    quiet_trainer(ZOStrategy(PLAIN), max_epochs=3).fit(
        resumed, loader(batches(6), shuffle=True), ckpt_path=tmp_path / "epoch=0.ckpt"
    )
    assert_same(weights(resumed), weights(whole))


def test_file_loads_without_pickled_code_and_describes_the_run(tmp_path: Path) -> None:
    trainer = quiet_trainer(ZOStrategy("spsa", eps=1e-2, seed=4, select=lambda name, parameter: True))
    trainer.fit(PerExampleTask(mlp(), per_example_mse), loader(batches(3)))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["zolightning"]
    assert (state["seed"], state["zo_step"]) == (4, 3)
    assert {place: set(values) for place, values in state["shaping"].items()} == {0: {"0.second_moment", "0.decay"}}
    assert state["config"]["eps"] == 1e-2
    assert {"torch", "numpy", "python"} <= set(state["rng"])


def test_weights_alone(tmp_path: Path) -> None:
    module = Task(mlp())
    trainer = quiet_trainer(ZOStrategy(PLAIN))
    trainer.fit(module, loader(batches(3)))
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert "zolightning" not in saved
    assert_same(saved["state_dict"], dict(module.state_dict()))


def test_checkpoint_goes_to_the_stock_strategy_and_comes_from_it(tmp_path: Path) -> None:
    first = quiet_trainer(ZOStrategy(PLAIN))
    first.fit(Task(mlp()), loader(batches(3)))
    first.save_checkpoint(tmp_path / "zo.ckpt")
    stock = quiet_trainer("auto", max_epochs=2)
    stock.fit(Task(mlp()), loader(batches(3)), ckpt_path=tmp_path / "zo.ckpt")
    assert stock.global_step == 6
    stock.save_checkpoint(tmp_path / "stock.ckpt")
    last = ZOStrategy(PLAIN)
    with pytest.warns(UserWarning, match="not written under ZOStrategy"):
        quiet_trainer(last, max_epochs=3).fit(Task(mlp()), loader(batches(3)), ckpt_path=tmp_path / "stock.ckpt")
    assert last.zo_step == 3


def test_best_checkpoint_holds_unperturbed_weights(tmp_path: Path) -> None:
    class Validated(Task):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", mse(self.net, batch))

    module, saver = Validated(mlp()), ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
    trainer = quiet_trainer(ZOStrategy(PLAIN), max_epochs=3, callbacks=[saver], enable_checkpointing=True)
    held = batches(1, seed=8)
    trainer.fit(module, loader(batches(4)), loader(held))
    best = Validated(mlp())
    best.load_state_dict(torch.load(saver.best_model_path, weights_only=True)["state_dict"])
    assert mse(best.net, held[0]).item() == pytest.approx(float(saver.best_model_score), rel=1e-6)  # type: ignore[arg-type]


def test_state_of_another_shaping_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(ZOStrategy(PLAIN))
    trainer.fit(Task(mlp()), loader(batches(3)))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="resume with the recipe that wrote it"):
        quiet_trainer(ZOStrategy(PLAIN, normalize=True), max_epochs=2).fit(
            Task(mlp()), loader(batches(3)), ckpt_path=tmp_path / "x.ckpt"
        )


def test_a_checkpoint_after_a_test_is_that_of_the_fit(tmp_path: Path) -> None:
    class Tested(Task):
        def test_step(self, batch: Any) -> None:
            pass

    task = Tested(mlp())
    trainer = fit(task, batches(3), PLAIN.override(optimizer="adam", structure="sparse"))
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    trainer.test(task, loader(batches(1)), verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    before, after = (torch.load(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("before", "after"))
    assert_same(after["optimizer_states"][0]["state"][0], before["optimizer_states"][0]["state"][0])
    assert after["zolightning"]["calibration"] == before["zolightning"]["calibration"]
    assert before["zolightning"]["calibration"]["leaves"]
