"""The notes of a commit on each entry, and a later process that goes on from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .entry import Entry
from .tiers import Tier


def note(entry: Entry) -> dict[str, Any]:
    """Names the last update in its bytes; an optimizer's state that is no tensor has no place there, and none is named."""
    return {"mark": "" if entry.plain else entry.mark.hex(), "state": entry.state, "bytes": entry.state_bytes}


def resume(tier: Tier, entries: Iterable[Entry]) -> int:
    """Take over the work files of an earlier process, as far as the updates that the entries lack led to it.

    None of the entries may be in memory.

    Returns:
        How many entries it had; the others come from the base.
    """
    for place, notes in enumerate(tier.committed()):
        found = {entry: _contained(entry, notes.get(entry.name)) for entry in entries}
        mine = {entry: count for entry, count in found.items() if count}
        if mine:
            names: dict[str, bool] = {}
            for entry, count in mine.items():
                entry.mark = entry.log[count - 1].mark
                entry.state, entry.state_bytes = dict(notes[entry.name]["state"]), notes[entry.name]["bytes"]
                del entry.log[:count]
                names |= dict.fromkeys((entry.name, *entry.state.values()), True)
            tier.adopt(place, names)
            return len(mine)
    return 0


def _contained(entry: Entry, found: Mapping[str, Any] | None) -> int:
    """How many of the updates the bytes of a note have; 0: none, or they come from another run."""
    mark = bytes.fromhex(found["mark"]) if found else b""
    return next((i for i, update in enumerate(entry.log, 1) if mark and update.mark == mark), 0)
