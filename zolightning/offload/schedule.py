"""Which weight comes next: the one that came next last time."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

_DOUBT = 3  # times that reading ahead was in vain before an item is left to be asked for


class Forecast:
    """Predicts a sequence from the followers of each pair of items before, or each item where the pair is new.

    A model that reads a tied weight at both ends, or all its layers twice, needs the pair. Items that come by chance, as
    experts do, are not predicted after a few tries.

    Args:
        order: the first guess, a circle.
    """

    def __init__(self, order: Sequence[Hashable]) -> None:
        self._after: dict[Hashable, Hashable] = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        self._recent: tuple[Hashable, Hashable] = (None, order[-1] if order else None)
        self._vain: dict[Hashable, int] = {}

    def note(self, item: Hashable) -> None:
        """It is asked for now."""
        before, last = self._recent
        if item != last:
            self._after[before, last] = self._after[last] = item
            self._recent = (last, item)

    def ahead(self, count: int) -> Iterator[Hashable]:
        """The next items, nearest first."""
        before, last = self._recent
        for _ in range(count):
            following = self._after.get((before, last), self._after.get(last))
            if following is None or following == self._recent[1]:
                return
            if self._vain.get(following, 0) < _DOUBT:
                yield following
            before, last = last, following

    def used(self, item: Hashable) -> None:
        """Reading it ahead paid."""
        self._vain.pop(item, None)

    def wasted(self, item: Hashable) -> None:
        """It was read ahead and made room for another before it was asked for."""
        self._vain[item] = self._vain.get(item, 0) + 1
