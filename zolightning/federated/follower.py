"""Weights that follow a federation's ledger."""

from __future__ import annotations

from torch import nn

from ..ledger.format import DIGEST, LedgerError, Step
from ..ledger.replay import Replay, check_base
from ..space.fingerprint import fingerprint
from .messages import START, chained
from .opening import begun


class Follower:
    """A module that replays the federation's ledger, and stands at the bits of all who have read as much of it.

    Args:
        module: with the federation's base weights; they are moved in place.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.head = START
        """Digest of the last record that it has applied; zeros before the first."""
        self._parameters = dict(module.named_parameters())
        self._replay: Replay | None = None
        self._seed = 0

    @property
    def step(self) -> int:
        """Optimizer steps of the federation that it has applied."""
        return 0 if self._replay is None else self._replay.state.step

    def fingerprint(self) -> str:
        """Of its weights."""
        return fingerprint(self._parameters.items())

    def catch_up(self, data: bytes, since: bytes) -> None:
        """Apply those records of the federation's ledger that it has not applied yet.

        Args:
            data: bytes of the ledger.
            since: digest of the record that they follow; zeros: they are all of the ledger.

        Raises:
            LedgerError: they do not continue what it has, or its weights are not those of the federation.
        """
        if since == START:
            ledger, data = begun(data)
            since = ledger.data[-DIGEST:]
            if self._replay is None:
                check_base(ledger, self._parameters)
                self._replay, self.head, self._seed = Replay(ledger, self._parameters, None), since, ledger.header.seed
        fits = since == self.head
        for record, digest in chained(since, data, self._seed):
            if fits and self._replay is not None:
                self._replay.take(record)
                self.head = digest
                if isinstance(record, Step):
                    self._heard(record)
            fits = fits or digest == self.head
        if not fits:
            stands = self.head.hex() if self.head else "the start"
            raise LedgerError(f"these weights stand at {stands}, from where the server's records do not go on")

    def _heard(self, step: Step) -> None:
        """Of a step that was applied."""
