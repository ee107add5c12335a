"""Folders, warnings and callbacks that nobody thought of when the code was written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import PLAIN, PerExampleTask, Task, assert_same, batches, loader, mlp, per_example_mse, quiet_trainer, weights
from ledgers import parameters
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor

from zolightning import LedgerCheckpointIO, ZOMonitor, ZOStrategy, mlflow_logger
from zolightning.cli import main
from zolightning.ledger import read, replay


def test_a_path_that_is_not_ascii(tmp_path: Path) -> None:
    """Ledger, checkpoints, store, replay and resume."""
    folder = tmp_path / "Größe 模型 run"
    logger = mlflow_logger("läuft", store=f"sqlite:///{folder}/mlflow.db", folder=folder)
    checkpoints = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)
    common: dict[str, Any] = {"default_root_dir": folder, "plugins": [LedgerCheckpointIO()]}
    trainer = quiet_trainer(
        ZOStrategy(PLAIN), logger=logger, enable_checkpointing=True, callbacks=[ZOMonitor(), checkpoints], **common
    )
    module = Task(mlp())
    trainer.fit(module, loader(batches(4)))
    (ledger,) = folder.rglob("ledger.zo")
    main(["replay", str(ledger), "--out", str(folder / "öut")])
    assert (folder / "öut" / "model.safetensors").is_file()
    again = quiet_trainer(ZOStrategy(PLAIN), max_epochs=2, **common)
    resumed = Task(mlp())
    again.fit(resumed, loader(batches(4)), ckpt_path=checkpoints.best_model_path)
    assert again.global_step == 8
    assert not torch.equal(resumed.net[0].weight, module.net[0].weight)  # type: ignore[arg-type]


def test_no_warning_where_nothing_is_wrong(tmp_path: Path) -> None:
    """As under ``python -W error``, but for what Lightning says of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for own in ("LeafSpec", "does not have many workers", "smaller than the logging interval"):
            warnings.filterwarnings("ignore", f".*{own}.*")
        trainer = quiet_trainer(ZOStrategy(PLAIN, ledger=tmp_path / "ledger.zo"))
        trainer.fit(Task(mlp()), loader(batches(3)))
    assert trainer.global_step == 3


@pytest.mark.parametrize("strategy", ["auto", "zo"])
def test_weight_averaging_is_that_of_the_stock_strategy(strategy: str) -> None:
    """SWA's weights are the mean of those that its epochs began with."""
    seen: list[dict[str, Tensor]] = []

    class Note(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            seen.append(weights(module))

    average = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2, annealing_epochs=1)
    trainer = quiet_trainer("auto" if strategy == "auto" else ZOStrategy(PLAIN), max_epochs=4, callbacks=[Note(), average])
    module = Task(mlp())
    trainer.fit(module, loader(batches(4)))
    mean = {name: torch.stack([before[name] for before in seen[1:]]).mean(0) for name in seen[0]}
    assert_same(weights(module), mean, 1e-6)


def test_parameters_that_are_unfrozen_between_epochs_train_example_by_example(tmp_path: Path) -> None:
    class Unfreezes(PerExampleTask):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch > 0)  # type: ignore[operator]

        def on_train_epoch_end(self) -> None:
            between.append(weights(self))

    between: list[dict[str, Tensor]] = []
    module = Unfreezes(mlp(), per_example_mse)
    before = weights(module)
    each = PLAIN.override(estimator="per_example", structure="rank1")
    quiet_trainer(ZOStrategy(each, ledger=tmp_path / "ledger.zo"), max_epochs=2).fit(module, loader(batches(4)))
    moved = [[not torch.equal(a[name], b[name]) for name in a] for a, b in zip([before, *between], between, strict=False)]
    assert moved == [[False, False, True, True], [True] * 4]
    rebuilt = parameters(before)
    replay(read(tmp_path / "ledger.zo"), rebuilt)
    assert_same({name: p.detach() for name, p in rebuilt.items()}, weights(module))
