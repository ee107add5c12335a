"""Forwards that log nothing: every forward of a step but the first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from ._lightning import _ResultCollection, pl


class _Muted(_ResultCollection):
    """Swallows ``self.log``."""

    def log(self, *args: object, **kwargs: object) -> None:
        pass


@contextmanager
def muted(trainer: pl.Trainer) -> Iterator[None]:
    """While it lasts, ``self.log`` in a training step does nothing."""
    loop = trainer.fit_loop.epoch_loop
    results = loop._results
    loop._results = _Muted(training=True)
    try:
        yield
    finally:
        loop._results = results


def steps_of_epoch(trainer: pl.Trainer) -> int:
    """Optimizer steps of an epoch.

    Raises:
        ValueError: the data has no end.
    """
    batches = trainer.num_training_batches
    if not math.isfinite(batches):
        raise ValueError("`Groups(redraw=Epochs(...))` needs data of a known length; give a number of steps")
    return max(1, math.ceil(batches / trainer.accumulate_grad_batches))
