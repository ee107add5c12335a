"""Trains a small picture by a person's rankings, for test_ranking_page.py: ``ranked_training.py FOLDER``.

Started again, it goes on from its last checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zolightning import ZOMixin, ZOStrategy
from zolightning.blackbox.person import Person
from zolightning.methods.ranking import EndOfRanking, Oracle, Ranking

STEPS, CANDIDATES, SCRIPT = 50, 3, "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'>"


class Painter(ZOMixin, pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((4, 4), 0.5))

    def zo_candidate(self, batch: Any) -> Tensor:
        return self.x * 1.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def train(oracle: Oracle, folder: Path) -> Painter:
    module = Painter()
    kept = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    trainer = pl.Trainer(
        strategy=ZOStrategy("spsa", estimator=Ranking(oracle, CANDIDATES, 2, 0.2), seed=3, ledger=folder / "ledger.zo"),
        max_steps=STEPS, accelerator="cpu", logger=False, callbacks=[kept], enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    last = folder / "last.ckpt"
    data = DataLoader([torch.zeros(1)] * STEPS, None)
    try:
        trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    except EndOfRanking as end:
        print(end, flush=True)
    return module


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    person = Person(folder, words=SCRIPT)
    module = train(person, folder)
    better = person.prefers(Painter().zo_candidate(None), module.zo_candidate(None))
    torch.save({"x": module.x.detach(), "better": better}, folder / "result.pt")
    person.close("Thank you.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
