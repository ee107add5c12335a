"""The replay ledger of one fit: claimed when the fit starts, begun when its first step is about to change the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..ledger import Claim, Position, Recorder
from ._lightning import Callback, pl, rank_zero_warn
from .ledger_io import claim_ledger


class RunLedger(Callback):
    """Where a fit's steps are recorded; to be the first of the Trainer's callbacks.

    Args:
        trainer: of the fit.
        choice: as for :class:`~zolightning.ZOStrategy`.
        settings: the recipe, for information.
        keep_base: have the base's weights beside the ledger.
    """

    def __init__(self, trainer: pl.Trainer, choice: bool | str | Path, settings: Mapping[str, Any], keep_base: bool) -> None:
        self._choice, self._settings, self._keep_base = choice, settings, keep_base
        self._claim: Claim | None = claim_ledger(trainer, choice)
        self.recorder: Recorder | None = None
        """None before the first step, and when there is no ledger."""
        self.resumed: Position | None = None
        """Where the checkpoint stands that the run goes on from."""

    @property
    def path(self) -> Path | None:
        """None when the fit keeps no ledger."""
        return None if self._claim is None else self._claim.path

    def open(self, module: nn.Module, seed: int, step: int) -> Recorder | None:
        """The recorder, which begins with the weights of now if it has not begun yet."""
        if self.recorder is None and self._claim is not None:
            try:
                self.recorder = Recorder(
                    self._claim,
                    module,
                    seed=seed,
                    step=step,
                    settings=self._settings,
                    resumed=self.resumed,
                    keep_base=self._keep_base,
                )
            except OSError as error:
                if self._choice is not True:
                    raise
                rank_zero_warn(f"this run keeps no replay ledger: {error}")
                self.close()
        return self.recorder

    def restart(self, trainer: pl.Trainer) -> None:
        """Begin another one, if this one has begun: the weights go back to where they were."""
        if self.recorder is not None:
            self.close()
            self.recorder = None
            self._claim = claim_ledger(trainer, self._choice)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what training led to before other callbacks put other weights, an average of them, into the module."""
        if self.recorder is not None:
            self.recorder.end()

    def close(self) -> None:
        """End the ledger, or give back the right to write one."""
        if self.recorder is not None:
            self.recorder.close()
        elif self._claim is not None:
            self._claim.release()
        self._claim = None
