"""A program that trains until it is ended: ``endless_training.py STORE EXPERIMENT RUN``. The browser tests watch it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from helpers import PLAIN, Task, batches, mlp
from torch.utils.data import DataLoader, IterableDataset

from zolightning import ZOMonitor, ZOStrategy, mlflow_logger
from zolightning.strategy._lightning import pl


class Slowly(IterableDataset[Any]):
    """Batches for ever, with a pause before each."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            for batch in batches():
                time.sleep(0.1)
                yield batch


def main(store: str, experiment: str, run: str) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=ZOStrategy(PLAIN),
        max_epochs=1,
        logger=mlflow_logger(run, experiment=experiment, store=store),
        callbacks=[ZOMonitor()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Task(mlp()), DataLoader(Slowly(), batch_size=None))


if __name__ == "__main__":
    main(*sys.argv[1:])
