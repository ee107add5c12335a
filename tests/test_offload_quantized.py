"""Codes of 4-bit layers stream from a disk, where they are only read, while their scales are trained as in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import PLAIN, Task
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zolightning import ZOStrategy, quantize
from zolightning.offload import StoredParameter

pytest.importorskip("bitsandbytes", reason="pip install 'bitsandbytes>=0.50' 'accelerate>=1.0'")

WIDTH = 512


def task(kind: str, double: bool) -> Task:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    return Task(quantize(net, kind, double=double))  # type: ignore[arg-type]


def fitted(offload: Any, strategy: ZOStrategy, kind: str, double: bool) -> tuple[list[float], dict[str, Tensor], Task]:
    module = task(kind, double)
    generator = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)) for _ in range(6)]
    losses: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    fit = pl.Trainer(
        strategy=strategy,
        max_epochs=2,
        logger=False,
        callbacks=[Losses()],
        enable_checkpointing=False,
        accelerator="cpu",
        default_root_dir="run",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    fit.fit(module, DataLoader(pairs, batch_size=2))  # type: ignore[arg-type]
    return losses, {name: p.detach().clone() for name, p in module.named_parameters()}, module


@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("recipe", ["qzo", PLAIN])
def test_codes_are_read_only_and_give_the_bits_of_memory(recipe: Any, kind: str, double: bool) -> None:
    losses, weights, _ = fitted(None, ZOStrategy(recipe), kind, double)
    found, streamed, module = fitted("disk", ZOStrategy(recipe, offload="disk"), kind, double)
    assert found == losses
    assert weights.keys() == streamed.keys()
    assert all(torch.equal(value, streamed[name]) for name, value in weights.items())
    codes = [p for p in module.parameters() if isinstance(p, StoredParameter)]
    assert len(codes) == 2
    assert all(p.dtype == torch.uint8 for p in codes)
    assert not list(Path("run").rglob("weights-*.bin"))  # no code was written
    assert losses[0] != losses[-1]
