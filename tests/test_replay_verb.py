"""``zolightning replay``: a model that can be used, from a ledger and what is beside it."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers import PLAIN, Task, assert_same, batches, loader, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from zolightning import LedgerCheckpointIO, ZOStrategy
from zolightning.cli import main


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def train(folder: Path, checkpoints: bool = True, keep_base: bool = True) -> dict[str, Tensor]:
    """Four steps, a checkpoint after the second and the fourth; returns the module's state."""
    module = Task(net())
    trainer: pl.Trainer = quiet_trainer(
        ZOStrategy(PLAIN, ledger=folder / "ledger.zo"),
        enable_checkpointing=checkpoints,
        callbacks=[ModelCheckpoint(folder / "kept", every_n_train_steps=2, save_top_k=-1)] if checkpoints else [],
        plugins=[LedgerCheckpointIO()] if keep_base else [],
    )
    trainer.fit(module, loader(batches(4)))
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_weights_with_the_buffers_of_the_last_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = train(tmp_path)
    main(["replay", str(tmp_path), "--out", str(tmp_path / "model")])
    assert "3 buffers of step 4, from " in capsys.readouterr().out
    assert_same(load_file(tmp_path / "model" / "model.safetensors"), state)
    main(["replay", str(tmp_path), "--step", "3", "--out", str(tmp_path / "earlier")])
    assert "3 buffers of step 2, from " in capsys.readouterr().out
    assert int(load_file(tmp_path / "earlier" / "model.safetensors")["net.1.num_batches_tracked"]) == 2


def test_no_checkpoint_no_buffers_and_the_way_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = train(tmp_path, checkpoints=False)
    main(["replay", str(tmp_path), "--out", str(tmp_path / "model")])
    out = capsys.readouterr().out
    assert "not written: 3 buffers (net.1.running_mean" in out
    assert "--buffers" in out
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert_same(weights, {name: value for name, value in state.items() if name in weights})
    assert len(weights) == 6
    with pytest.raises(SystemExit, match="is no checkpoint of the run of"):
        main(["replay", str(tmp_path), "--out", str(tmp_path / "other"), "--buffers", str(tmp_path / "ledger.zo")])


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_run_says_at_its_start_that_a_replay_will_need_its_base(
    keep_base: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        train(tmp_path, keep_base=keep_base)
    assert ("replay` will need those as --base" in caplog.text) is not keep_base


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.zo"], r"there is no ledger missing\.zo"),
        (["missing/run"], r"there is no ledger missing/run"),
        (["{run}"], "give `--out FOLDER` for the weights, or `--verify`"),
    ],
)
def test_what_is_missing_is_said_first(args: list[str], message: str, tmp_path: Path) -> None:
    train(tmp_path, checkpoints=False)
    with pytest.raises(SystemExit, match=message):
        main(["replay", *(arg.format(run=tmp_path) for arg in args)])
