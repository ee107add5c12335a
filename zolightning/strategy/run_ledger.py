"""The replay ledger of a Lightning fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..ledger import PendingLedger
from ._lightning import Callback, pl, rank_zero_info, rank_zero_warn
from .ledger_io import claim_ledger


class RunLedger(Callback):
    """Where a fit's steps are recorded; must be the first of the Trainer's callbacks.

    Args:
        trainer: of the fit.
        choice: as for :class:`~zolightning.ZOStrategy`.
        settings: the recipe, for information.
        keep_base: have the base's weights beside the ledger.
    """

    def __init__(self, trainer: pl.Trainer, choice: bool | str | Path, settings: Mapping[str, object], keep_base: bool) -> None:
        self._choice = choice
        claim = claim_ledger(trainer, choice)
        self.pending = PendingLedger(
            claim, settings, keep_base=keep_base, optional=choice is True, warn=rank_zero_warn, inform=rank_zero_info
        )

    @property
    def path(self) -> Path | None:
        """None when the fit keeps no ledger."""
        return None if self.pending.claim is None else self.pending.claim.path

    def restart(self, trainer: pl.Trainer) -> None:
        """Begin another one, if this one has begun: the weights go back to where they were."""
        if self.pending.recorder is not None:
            self.pending.close()
            self.pending.restart(claim_ledger(trainer, self._choice))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the trained weights before other callbacks put an average of them into the module."""
        self.pending.end()
