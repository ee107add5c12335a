"""The server's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..methods.config import one_of


@dataclass(frozen=True)
class Rules:
    """How the clients' steps become the federation's.

    Raises:
        ValueError: a value is out of range, or two do not go together.
    """

    local_steps: int = 1
    """Steps of a client in a round, 1 to 65,535. 1: the projected gradients are joined, then shaped and applied once by any
    optimizer, as one process on the union would. More: each client moves by plain SGD, and the server takes the mean of
    their moves, which is the union of their terms, as FedAvg does with weights (arXiv:1602.05629)."""

    keys: Literal["shared", "own"] = "shared"
    """'shared': all clients probe the same directions, whose projected gradients are averaged. 'own': each probes others."""

    average: Literal["mean", "median", "trimmed"] = "mean"
    """Of a direction's projected gradients over clients. 'mean': weighted by examples. 'median', 'trimmed' (the mean without
    the largest and smallest): unweighted, one strange client moves them little; for shared keys."""

    trim: float = 0.2
    """Share, in [0, 0.5), that 'trimmed' leaves out at each end, rounded up."""

    largest: float = 1e6
    """A coefficient of a larger absolute value, > 0, is refused, with all that its client sent in the round."""

    most_terms: int = 65536
    """Coefficients that a client may send for a step, >= 1."""

    most_examples: int = 1 << 31
    """Examples that a client may claim, >= 1: they are its weight in the mean."""

    fewest: int = 1
    """Clients, >= 1, without whose replies a round moves nothing."""

    participation: float = 1.0
    """Share of the clients, in (0, 1], that are asked in a round; at least ``fewest``."""

    check_every: int = 64
    """Rounds, >= 1, between comparisons of the clients' weights."""

    seed: int = 0
    """Of the choice of clients."""

    def __post_init__(self) -> None:
        one_of("keys", self.keys, ("shared", "own"))
        one_of("average", self.average, ("mean", "median", "trimmed"))
        ranges = {
            "local_steps": (1, 65535),
            "most_terms": (1, 1 << 24),
            "most_examples": (1, (1 << 32) - 1),
            "fewest": (1, 65535),
            "check_every": (1, math.inf),
        }
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"`Rules({name}=...)` must be {least} to {most}, got {value}")
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"`Rules(trim=...)` must be in [0, 0.5), got {self.trim}")
        if not 0 < self.participation <= 1:
            raise ValueError(f"`Rules(participation=...)` must be in (0, 1], got {self.participation}")
        if not 0 < self.largest < math.inf:
            raise ValueError(f"`Rules(largest=...)` must be a finite number > 0, got {self.largest}")
        if self.average != "mean" and self.keys == "own":
            raise ValueError(f"`average={self.average!r}` compares clients along one direction and needs keys='shared'")
