"""Loaders that give every rank as many batches: where one has fewer, its last batch comes again and counts for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..parallel import RanksError, Team


class Evened:
    """A rank's loader, as long as the longest of all ranks.

    Args:
        loader: this rank's.
        team: the ranks.
        lengths: of all ranks' loaders; a None among them has the ranks agree before each batch on whether one of them has more.
    """

    def __init__(self, loader: Any, team: Team, lengths: list[int | None]) -> None:
        self._loader, self._team = loader, team
        self._length = None if None in lengths else max(n for n in lengths if n is not None)
        self.real: int | None = None
        """Batches of this epoch that are the loader's own, once they have run out."""

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("a loader without a length")
        return self._length

    def __iter__(self) -> Iterator[Any]:
        self.real, batch, given = None, None, 0
        own = iter(self._loader)
        while self._length is None or given < self._length:
            more = self.real is None
            if more:
                try:
                    batch = next(own)
                except StopIteration:
                    more, self.real = False, given
            if self._length is None and not any(map(bool, self._team.exchange.gather(b"1" if more else b""))):
                return
            if batch is None:
                raise RanksError(
                    f"rank {self._team.rank} has no batch at all, and other ranks have; give each rank one or more"
                )
            given += 1
            yield batch

    def __getattr__(self, name: str) -> Any:
        """Samplers, states and the rest are the loader's."""
        return getattr(self._loader, name)


def evened(loader: Any, team: Team) -> Any:
    """The loader as it is, where all ranks have as many batches."""
    try:
        length: int | None = len(loader)
    except (TypeError, NotImplementedError):
        length = None
    lengths = team.exchange.values(length)
    return loader if length is not None and len(set(lengths)) == 1 else Evened(loader, team, lengths)
