"""How far one training step travels through the package: who reads the code along a step changes files this often."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers import Task, mlp, quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

import zolightning
from zolightning import ZOStrategy

ROOT = str(Path(zolightning.__file__).parent)
LIMITS = {"spsa": 110, "default": 165}
"""Recipe → switches from file to file in the sixth step of a small MLP with a ledger, at a given step size; the
first ones also look for state."""


class Sixth(pl.Callback):
    """The files of the calls within the package during the sixth step, in order."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(ROOT):
            self.files.append(file[len(ROOT) + 1 :])

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            sys.setprofile(self._profile)

    def on_train_batch_end(self, *_: Any) -> None:
        sys.setprofile(None)


@pytest.mark.parametrize("recipe", LIMITS)
def test_a_step_stays_in_few_files(recipe: str, tmp_path: Path) -> None:
    sixth = Sixth()
    trainer = quiet_trainer(
        ZOStrategy(recipe, select="all", lr=1e-3, ledger=tmp_path / "ledger.zo"), max_steps=7, callbacks=[sixth]
    )
    data = TensorDataset(torch.randn(64, 8), torch.randint(4, (64,)))
    before = sys.getprofile()
    try:
        trainer.fit(
            Task(mlp(8, 16, 4), lambda net, batch: F.cross_entropy(net(batch[0]), batch[1])), DataLoader(data, batch_size=8)
        )
    finally:
        sys.setprofile(before)
    switches = sum(a != b for a, b in zip(sixth.files, sixth.files[1:], strict=False))
    print(f"{recipe}: {len(sixth.files)} calls in {len(set(sixth.files))} files, {switches} switches")
    assert trainer.global_step == 7
    assert 0 < switches <= LIMITS[recipe]
