"""The form of the place where a session writes its steps before it applies them: :mod:`zolightning.ledger` has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn
from torch.optim import Optimizer

from ..space import Leaf
from ..types import StepRecord


class StepWriter(Protocol):
    """Takes steps one after another."""

    def step(self, place: int, optimizer: Optimizer, leaves: Sequence[Leaf], record: StepRecord) -> None:
        """Write a step that the optimizer at this place is about to apply to the leaves."""

    def applied(self) -> None:
        """The step has been applied in full."""


class Recording(Protocol):
    """A writer that begins with the weights of the first step."""

    def open(self, module: nn.Module, seed: int, step: int) -> StepWriter | None:
        """The writer, which begins now if it has not begun yet; None where nothing is written."""

    def skipped(self, step: int) -> None:
        """This step left the weights as they are."""

    def close(self) -> None:
        """Nothing comes any more."""
