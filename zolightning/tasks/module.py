"""One LightningModule and one data module for all tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from .._answers import did_you_mean
from ..data import SimilarLengths
from ..mixin import ZOMixin
from ..strategy._lightning import pl
from ..types import Batch
from .item import Item
from .reader import Objective, Reader
from .rows import TaskSplits


class TaskModule(ZOMixin, pl.LightningModule):
    """A language model trained on any objective of a task, by forward passes or, where it has a gradient, by backprop.

    Args:
        model: A model of the reader's kind: a causal or a masked language model.
        reader: Reads the answers off the model.
        objective: a name of ``reader.objectives()``, as 'cross_entropy', 'accuracy', 'likelihood' or 'f1'; or a function
            (model, batch) → losses (B,) or a number. None: the reader's first.
        make_optimizer: trainable parameters → optimizer; None: plain SGD for ``ZOStrategy(lr=...)``.
        decay_steps: steps in which the learning rate falls to zero along a cosine; 0: it stays.

    Raises:
        ValueError: an objective that the reader does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        reader: Reader,
        objective: str | Objective | None = None,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        decay_steps: int = 0,
    ) -> None:
        super().__init__()
        known = reader.objectives()
        if isinstance(objective, str) and objective not in known:
            raise ValueError(
                f"`objective={objective!r}` is unknown for a {type(reader).__name__}; allowed: {', '.join(known)}"
                f"{did_you_mean(objective, known)}"
            )
        chosen = objective or next(iter(known))
        self.model, self.reader = model, reader
        self.objective: Objective = known[chosen] if isinstance(chosen, str) else chosen
        self.make_optimizer, self.decay_steps = make_optimizer or _sgd, decay_steps

    def zo_objective(self, batch: dict[str, object]) -> Tensor | float:
        return self.objective(self.model, batch)

    def validation_step(self, batch: dict[str, object], batch_idx: int) -> None:
        self._score(batch, "val")

    def test_step(self, batch: dict[str, object], batch_idx: int) -> None:
        self._score(batch, "test")

    def _score(self, batch: Batch, stage: str) -> None:
        values = {f"{stage}/{name}": value.mean() for name, value in self.reader.evaluate(self.model, batch).items()}
        self.log_dict(values, batch_size=len(batch["input_ids"]), on_epoch=True, prog_bar=stage == "val")

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if not self.decay_steps:
            return optimizer
        schedule = CosineAnnealingLR(optimizer, self.decay_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _sgd(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


class TaskData(pl.LightningDataModule):
    """A task's questions: shuffled into batches of similar length for training, sorted by length for evaluation.

    ``Trainer.fit`` sees training and validation questions only, ``Trainer.test`` the test questions only.

    Args:
        splits: the questions.
        reader: makes batches of them.
        batch_size: examples a training step.
        seed: The seed of the shuffling.
        evaluation_batch_size: examples a forward in evaluation.
    """

    def __init__(
        self, splits: TaskSplits, reader: Reader, batch_size: int = 16, seed: int = 0, evaluation_batch_size: int = 32
    ) -> None:
        super().__init__()
        self.splits, self.reader = splits, reader
        self.batch_size, self.seed, self.evaluation_batch_size = batch_size, seed, evaluation_batch_size

    def train_dataloader(self) -> DataLoader[object]:
        train, collate = self.splits.train, self.reader.collate
        batches = SimilarLengths([len(i.prompt) for i in train], self.batch_size, torch.Generator().manual_seed(self.seed))
        return DataLoader(train, batch_sampler=batches, collate_fn=collate)  # type: ignore[arg-type]

    def _evaluation(self, items: Sequence[Item]) -> DataLoader[object]:
        by_length = sorted(items, key=lambda item: len(item.prompt))
        return DataLoader(by_length, self.evaluation_batch_size, collate_fn=self.reader.collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[object]:
        return self._evaluation(self.splits.validation)

    def test_dataloader(self) -> DataLoader[object]:
        return self._evaluation(self.splits.test)
