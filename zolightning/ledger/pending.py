"""The ledger of one fit: claimed when the fit is set up, begun when its first step is about to change the weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .recorder import Position, Recorder
from .writer import Claim

_log = logging.getLogger("zolightning")


class PendingLedger:
    """A place for a ledger, and from the first step on the ledger.

    Args:
        claim: the right to write it. None: the fit keeps none.
        settings: the recipe, for information.
        keep_base: have the base's weights beside the ledger.
        optional: go on without a ledger, with a warning, where it cannot be written.
        warn: gets that warning.
        inform: gets a line on files that a replay will need and that are not in the ledger's folder.
    """

    def __init__(
        self,
        claim: Claim | None,
        settings: Mapping[str, Any],
        *,
        keep_base: bool = False,
        optional: bool = False,
        warn: Callable[[str], None] = warnings.warn,
        inform: Callable[[str], None] = _log.info,
    ) -> None:
        self.claim, self._inform = claim, inform
        self._settings, self._keep_base, self._optional, self._warn = settings, keep_base, optional, warn
        self.recorder: Recorder | None = None
        """None before the first step, and when there is no ledger."""
        self.resumed: Position | None = None
        """The place, in the ledger of the checkpoint, that the run goes on from."""
        self.checkpoint = Path()
        """The file of that checkpoint."""

    def open(self, module: nn.Module, seed: int, step: int) -> Recorder | None:
        """The recorder, which begins with the weights of now if it has not begun yet."""
        if self.recorder is None and self.claim is not None:
            try:
                self.recorder = Recorder(
                    self.claim,
                    module,
                    seed=seed,
                    step=step,
                    settings=self._settings,
                    resumed=self.resumed,
                    checkpoint=self.checkpoint,
                    keep_base=self._keep_base,
                )
            except OSError as error:
                if not self._optional:
                    raise
                self._warn(f"this run keeps no replay ledger: {error}")
                self.close()
            else:
                if not self.recorder.base_at_hand:
                    self._inform(
                        f"{self.recorder.path} records the updates of this run, not the weights that it starts from. "
                        "`zolightning replay` will need those as --base: save them before training, or let "
                        "LedgerCheckpointIO (a plugin of the Trainer) keep them beside the ledger."
                    )
        return self.recorder

    @property
    def mark(self) -> bytes:
        """Names the last record; b"" without a ledger."""
        return b"" if self.recorder is None else self.recorder.mark

    def skipped(self, step: int) -> None:
        """This step left the weights as they are."""
        if self.recorder is not None:
            self.recorder.skipped(step)

    def end(self) -> None:
        """Note the weights that the last step led to."""
        if self.recorder is not None:
            self.recorder.end()

    def restart(self, claim: Claim | None) -> None:
        """After :meth:`close`, begin another one: the weights go back to where they were."""
        self.recorder, self.claim = None, claim

    def close(self) -> None:
        """End the ledger, or give back the right to write one."""
        claim, self.claim = self.claim, None
        if self.recorder is not None:
            self.recorder.close()
        elif claim is not None:
            claim.release()
