"""Blocks that take turns: which leaves a step perturbs and trains, as a function of its key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..noise import permutation
from ..types import Key


@dataclass(frozen=True)
class Cycle:
    """Train some blocks of the selection in each step, and all of them in turn.

    Weights that a step leaves out cost it nothing: no noise, no update, no weight decay, no optimizer state. A block
    is one of the module's stack; the selected parameters outside the stack make one more, the last. Block-wise ZO,
    arXiv:2402.11592; MeZO-BCD, arXiv:2501.19099.
    """

    blocks: int = 1
    """Blocks in each step, >= 1."""

    every: int = 1
    """Steps before the next ones take over, >= 1."""

    order: Literal["cyclic", "shuffled"] = "cyclic"
    """'cyclic': first to last. 'shuffled': each round in an order of its own, drawn from the run's seed."""

    def __post_init__(self) -> None:
        for name in ("blocks", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"`Cycle({name}=...)` must be >= 1, got {getattr(self, name)}")
        if self.order not in ("cyclic", "shuffled"):
            raise ValueError(f"`Cycle(order=...)` must be 'cyclic' or 'shuffled', got {self.order!r}")


class Turn(NamedTuple):
    """A leaf's place in a cycle.

    Args:
        block: which of the selection's blocks it belongs to.
        of: how many there are.
        cycle: how they take turns.
    """

    block: int
    of: int
    cycle: Cycle

    def now(self, key: Key) -> bool:
        """Whether it is this leaf's turn in the key's step."""
        size = self.cycle.blocks
        lap, place = divmod(key.step // self.cycle.every, -(-self.of // size))
        at = permutation(Key(key.seed, lap), self.of)[self.block] if self.cycle.order == "shuffled" else self.block
        return at // size == place
