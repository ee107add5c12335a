"""The micro-batches since the last update, which make one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..parallel import Part, Ranks
from ..types import Term
from .step_size import Loss


@dataclass
class Window:
    """What counts in the next update.

    Args:
        parts: this rank's share of each micro-batch.
        looks: losses after steps of a few sizes, on the first micro-batch.
        trials: the loss of each micro-batch after a step, for methods that keep the best of some steps.
    """

    parts: list[Part] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)
    trials: list[Loss] = field(default_factory=list)

    def tried(self, ranks: Ranks, steps: Sequence[Sequence[Term]]) -> list[float]:
        """The loss after each of a few steps, over all micro-batches of all ranks."""
        here = [sum(trial(terms) for trial in self.trials) / len(self.trials) if self.trials else 0.0 for terms in steps]
        return ranks.means(here, sum(part.examples for part in self.parts))
