"""Forwards that log nothing: every forward of a step but the first."""

from __future__ import annotations

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
