"""The messages of a run while it works."""

from __future__ import annotations

import time
from typing import Any

from ...strategy._lightning import Callback, pl
from ...types import Batch, StepOutput
from ..console import say


class Progress(Callback):
    """A line every few seconds: the step, the loss and the minutes of training left; which batch is validated or tested.

    Args:
        seconds: between two lines, >= 0.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self._said = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        step, steps = trainer.global_step, trainer.max_steps
        loss = float(outputs["loss"]) if outputs else float("nan")  # a skipped step has none
        line = f"step {step} of {steps}, loss {loss:.3f}"
        if step <= 1:  # it also looks at the module, compiles and calibrates
            self._started = time.monotonic()
        else:
            left = (time.monotonic() - self._started) / (step - 1) * (steps - step) / 60
            line += f", {left:.1f} minutes of training left"
        self._say(line)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int, *_: object
    ) -> None:
        self._say(f"validation, batch {batch_idx + 1} of {_all(trainer.num_val_batches)}")

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int, *_: object
    ) -> None:
        self._say(f"test, batch {batch_idx + 1} of {_all(trainer.num_test_batches)}")

    def _say(self, line: str) -> None:
        if time.monotonic() - self._said >= self.seconds:
            self._said = time.monotonic()
            say(f"      {line}")


def _all(batches: Any) -> int:
    """Of every data loader."""
    return int(sum(batches))
