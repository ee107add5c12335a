"""Which parameters of a hybrid fit backprop trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..space import Select


@dataclass(frozen=True)
class Backprop:
    """Train these parameters by backprop, and the others by probes: hybrid ZO–FO of ZO-Bench, arXiv:2402.11592.

    A step's first forward is kept with the activations behind the first of these parameters, as their gradients need: at the
    end of a model that is a small part of backprop's memory. The module's own optimizer steps them.
    """

    select: Select
    """As :attr:`ZOConfig.select`: 'last:2' are the last two blocks."""

    lr: float | None = None
    """Their learning rate, > 0, with the module's schedule. None: the module's own."""

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"`Backprop(lr=...)` must be a finite number > 0, got {self.lr}")
