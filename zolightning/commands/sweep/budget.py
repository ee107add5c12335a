"""How much training a run gets, and a callback that hands it out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from ...probing.batches import batch_examples
from ...records.monitor import ZOMonitor
from ...strategy._lightning import Callback, pl
from ...strategy.strategy import ZOStrategy
from ...types import Batch, StepOutput
from ..clock import Clock, now
from ..demo.module import PromptClassifier, PromptData


@dataclass(frozen=True)
class Budget:
    """The budget of a run's training; validation and logging are not counted."""

    amount: float
    """How much, > 0."""

    unit: Literal["seconds", "forwards"] = "seconds"
    """Seconds of the clock, or forward passes."""

    clock: Clock = "wall"
    """Of the seconds."""

    def __post_init__(self) -> None:
        if not 0 < self.amount < math.inf:
            raise ValueError(f"a budget must be a finite number of {self.unit} > 0, got {self.amount}")

    def __str__(self) -> str:
        return f"{self.amount:g} " + ("forward passes" if self.unit == "forwards" else f"{self.clock} seconds")

    def now(self) -> float:
        return now(self.clock)


class Meter(Callback):
    """Spends a budget: sets the learning rate by the share that is used, validates at equal shares, stops when it is used up.

    Training stops where another step of the mean cost would not fit, so at least one step is taken and forward passes are
    never exceeded.

    Args:
        budget: The budget of the run.
        monitor: its count of forward passes is put right.
        data: the validation examples.
        validations: how often the validation examples are looked at after the start, >= 1; the last time is the end.
        decay: whether the learning rate falls to zero along a cosine of the used share.
        forwards: forward passes of a step that is not ZOStrategy's.
    """

    def __init__(
        self, budget: Budget, monitor: ZOMonitor, data: PromptData, validations: int, decay: bool, forwards: int = 1
    ) -> None:
        self.budget, self.monitor, self.data, self.validations = budget, monitor, data, validations
        self.decay, self.forwards = decay, forwards
        self.seconds = self.wall_seconds = 0.0
        self.forward_passes = self.examples = 0
        self.history: list[dict[str, float]] = []

    @property
    def used(self) -> float:
        """Share of the budget that is used, in units of it."""
        return (self.forward_passes if self.budget.unit == "forwards" else self.seconds) / self.budget.amount

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        self._validate(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        factor = (1 + math.cos(math.pi * min(1.0, self.used))) / 2 if self.decay else 1.0
        for optimizer, rates in zip(trainer.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        self._started, self._wall_started = self.budget.now(), time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        self.seconds += self.budget.now() - self._started
        self.wall_seconds += time.perf_counter() - self._wall_started
        self.examples += batch_examples(batch) or 0
        if isinstance(trainer.strategy, ZOStrategy):
            assert trainer.strategy.last_record is not None
            self.forward_passes += trainer.strategy.last_record.forwards
        else:
            self.forward_passes += self.forwards
            self.monitor.forward_passes += self.forwards - 1  # it counts one itself
        done = self.used * (1 + 1 / trainer.global_step) > 1 + 1e-9
        if done or self.used >= len(self.history) / self.validations:
            self._validate(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or done

    def _validate(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, PromptClassifier)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            scores = evaluate(module, self.data)
        row = {"step": trainer.global_step, "used": self.used, "seconds": self.seconds, "wall_seconds": self.wall_seconds}
        self.history.append(row | {"forward_passes": self.forward_passes, "examples": self.examples} | scores)
        logged = {f"val/{name}": value for name, value in scores.items()} | {"budget/used": self.used}
        for logger in trainer.loggers:
            logger.log_metrics(logged, trainer.global_step)


def evaluate(module: PromptClassifier, data: PromptData) -> dict[str, float]:
    """Accuracy and mean loss on the validation examples, in evaluation mode."""
    training, correct, loss, count = module.training, 0, 0.0, 0
    module.eval()
    for batch in data.val_dataloader():
        batch = module.transfer_batch_to_device(batch, module.device, 0)
        logits, labels = module(batch), batch["labels"]
        correct += int((logits.argmax(-1) == labels).sum())
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    module.train(training)
    return {"accuracy": correct / count, "loss": loss / count}
