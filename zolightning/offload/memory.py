"""The entries that are in memory, and who has to go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .entry import Entry, Slot
from .files import OffloadError
from .schedule import Forecast


class Memory:
    """Slots by entry. Whoever calls holds the store's lock.

    Args:
        forecast: told of entries that were read ahead in vain.
    """

    def __init__(self, forecast: Forecast) -> None:
        self.forecast = forecast
        self.slots: dict[Entry, Slot] = {}
        self.awaited: list[Entry] = []
        """Being read, and wanted as soon as they are there."""
        self.taken = self.most_taken = 0
        """Bytes of weights and state in memory now, and at most."""

    def grow(self, size: int) -> None:
        self.taken += size
        self.most_taken = max(self.most_taken, self.taken)

    def resize(self, entry: Entry, slot: Slot) -> None:
        """Count the state that an optimizer makes with its first update."""
        more = sum(value.nbytes for value in slot.state.values() if isinstance(value, Tensor))
        self.grow(more - entry.state_bytes)
        slot.size += more - entry.state_bytes
        entry.state_bytes = more

    def evict(self, keep: Iterable[Any]) -> bool:
        """Make room: let an entry go that nobody uses, last those that come next."""
        kept = {*keep, *self.awaited}
        idle = [e for e, slot in self.slots.items() if not slot.users and not slot.writing and e not in kept]
        if not idle:
            return False
        self.drop(min(idle, key=lambda e: self.slots[e].ahead))
        return True

    def drop(self, entry: Entry) -> None:
        slot = self.slots.pop(entry)
        if slot.ahead:
            self.forecast.wasted(entry)
        self.taken -= slot.size
        self.refuse_written(entry, slot)

    def refuse_written(self, entry: Entry, slot: Slot) -> None:
        if slot.tensor._version != slot.seen:
            slot.seen = slot.tensor._version
            raise OffloadError(
                f"{entry.parameter!r} was written to by something else than the optimizer while its weights are offloaded; the "
                "change would be lost. Change weights before `fit` begins, or train without offload"
            )

    def discard(self, entry: Entry, slot: Slot) -> None:
        """Let go of a slot that is of no use, if it is the entry's."""
        if self.slots.get(entry) is slot:
            del self.slots[entry]
            self.taken -= slot.size
