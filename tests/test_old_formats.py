"""Ledgers and checkpoints that an older version wrote are still read, and lead to the weights that it got.

``tests/fixtures/<commit>/<kind>/`` holds one run of eight steps in two epochs, made by that commit with the modules below::

    trainer = pl.Trainer(max_epochs=2, strategy=ZOStrategy(config, ledger=folder / "ledger.zo"), plugins=[LedgerCheckpointIO()],
                         callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1)], ...)
    torch.manual_seed(3)
    trainer.fit(module, DataLoader(batches(), batch_size=None))
    save_file({name: p.detach() for name, p in module.named_parameters()}, folder / "final.safetensors")

``position.ckpt`` is its checkpoint after four steps, ``whole.ckpt`` the same without ``LedgerCheckpointIO``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, quiet_trainer, weights
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from zolightning import LedgerCheckpointIO, ZOConfig, ZOMixin, ZOStrategy
from zolightning.ledger import base_path, load_base, read, replay

RUNS = sorted(path for commit in (Path(__file__).parent / "fixtures").iterdir() for path in commit.iterdir())
SAME_BITS = {"8aab0b2": ("AVX2", "2.13.0")}
"""The CPU capability and PyTorch with which a commit's runs were made: other products of matrices round otherwise."""


class Plain(pl.LightningModule):
    """Dropout, a schedule and an optimizer with a state: all of it has to go on where it was."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.net(F.dropout(x, 0.3)) - y).square().mean(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(batch).mean()

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": StepLR(optimizer, 3, 0.5), "interval": "step"}]


class PerExample(ZOMixin, Plain):
    def zo_objective(self, batch: Any) -> Tensor:
        return self.losses(batch)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=1e-2)


COMMON: dict[str, Any] = {"eps": 1e-3, "select": "all", "seed": 7}
KINDS = {
    "spsa": (Plain, ZOConfig(estimator="spsa", structure="dense", normalize=False, num_queries=2, **COMMON)),
    "per_example": (PerExample, ZOConfig(estimator="per_example", structure="rank1", normalize=True, **COMMON)),
}


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(5, 4, generator=generator), torch.randn(5, 3, generator=generator)) for _ in range(4)]


@pytest.mark.parametrize("run", RUNS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_old_ledger_is_replayed_to_the_same_bits(run: Path) -> None:
    ledger = read(run / "ledger.zo")
    assert (ledger.last, ledger.damage) == (8, "")
    rebuilt = load_base(base_path(run, ledger.header.base))
    assert replay(ledger, rebuilt).checked == 8
    assert_same({name: p.detach() for name, p in rebuilt.items()}, load_file(run / "final.safetensors"))


@pytest.mark.parametrize("checkpoint", ["whole.ckpt", "position.ckpt"])
@pytest.mark.parametrize("run", RUNS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_old_checkpoint_goes_on_to_the_same_bits(run: Path, checkpoint: str, tmp_path: Path) -> None:
    old = shutil.copytree(run, tmp_path / "old")
    kind, config = KINDS[run.name]
    module = kind()
    nn.init.zeros_(module.net[0].weight)  # the weights are to come from the checkpoint
    plugins = [LedgerCheckpointIO()] if checkpoint == "position.ckpt" else []
    trainer = quiet_trainer(ZOStrategy(config, ledger=tmp_path / "new.zo"), max_epochs=2, plugins=plugins)
    trainer.fit(module, DataLoader(batches(), batch_size=None), ckpt_path=old / checkpoint)  # type: ignore[arg-type]
    assert trainer.strategy.zo_step == 8  # type: ignore[attr-defined]
    capability, torch_version = SAME_BITS[run.parent.name]
    here = torch.backends.cpu.get_cpu_capability(), str(torch.__version__).split("+")[0]
    assert_same(weights(module), load_file(run / "final.safetensors"), None if here == (capability, torch_version) else 1e-4)
    final = load_base(base_path(old, read(tmp_path / "new.zo").header.base))
    replay(read(tmp_path / "new.zo"), final)  # the records of both halves
    assert_same({name: p.detach() for name, p in final.items()}, weights(module))
