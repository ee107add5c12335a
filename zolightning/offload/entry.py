"""A stored weight, or some rows of one: the facts about it wherever its bytes are, and its tensors while it is in memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..space import Leaf
from .tiers import Tier

State = dict[str, Any]


class Change(Protocol):
    """One step."""

    def __call__(self, leaf: Leaf, state: State, /) -> State:
        """Apply it to a leaf, given the optimizer's state of it; returns the state after it."""


class Update(NamedTuple):
    """One step of one parameter group, as the entries that lack it hold it.

    Args:
        change: the change.
        leaves: of which entries.
        mark: names the step in the ledger; b"" where there is none.
    """

    change: Change
    leaves: Mapping[Entry, Leaf]
    mark: bytes


@dataclass(eq=False)
class Entry:
    """A stored weight, or some rows of one.

    Args:
        name: the parameter's, in its module, with the rows' numbers where there are others.
        shape: of the weight, or of these rows.
        dtype: that it has in memory.
        device: where operations read it.
        first: place of its first element in the parameter.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    first: int = 0
    mark: bytes = b""
    """Names the last update that the tier's bytes have."""
    log: list[Update] = field(default_factory=list)
    """The updates that the tier's bytes lack, oldest first."""
    state: dict[str, str] = field(default_factory=dict)
    """The optimizer's state: its name → its name in the tier."""
    plain: State = field(default_factory=dict)
    """Entries of it that are no tensors."""
    state_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def parameter(self) -> str:
        """The parameter's name."""
        return self.name.partition("[")[0]

    @property
    def nbytes(self) -> int:
        """In memory, the optimizer's state included."""
        return self.shape.numel() * self.dtype.itemsize + self.state_bytes

    def read(self, tier: Tier) -> tuple[Tensor, State]:
        """The weight and the optimizer's state, as the tier has them."""
        state = {key: tier.read(name).to(self.device) for key, name in self.state.items()}
        return tier.read(self.name).to(self.device), state | self.plain

    def write(self, tier: Tier, tensor: Tensor, state: State) -> None:
        """Have the tier keep both."""
        for key, value in state.items():
            if isinstance(value, Tensor):
                self.state[key] = f"{self.name}#{key}"
                tier.write(self.state[key], value)
            else:
                self.plain[key] = value
        tier.write(self.name, tensor)

    def forget(self) -> None:
        """All updates and the optimizer's state."""
        self.mark, self.log, self.state, self.plain, self.state_bytes = b"", [], {}, {}, 0


@dataclass(eq=False)
class Slot:
    """An entry that is in memory."""

    tensor: Tensor
    state: State
    size: int
    users: int = 0
    applied: int = 0  # of the entry's log
    writing: bool = False
    ahead: bool = False  # read before anybody asked
    seen: int = 0  # version of the tensor: who writes into it shows

    def __post_init__(self) -> None:
        self.seen = self.tensor._version
