"""Applying a step to weights of which some are not in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch.optim import Optimizer

from ..offload import Entry, OffloadError, Store, StoredParameter
from ..space import Leaf
from ..types import Key, Term
from .updates import Change, UpdateStats, apply_update, changes


class Deferred:
    """An :class:`~zolightning.engine.updates.Apply` for weights of a store: read next, they have the same bits.

    Args:
        store: of the weights that are not in memory.
        mark: names the last step that was recorded.
    """

    def __init__(self, store: Store, mark: Callable[[], bytes] = bytes) -> None:
        self._store, self._mark = store, mark
        self._last: Mapping[Entry, Leaf] = {}
        self._tried: set[type[Optimizer]] = set()

    def __call__(
        self, optimizer: Optimizer, leaves: Sequence[Leaf], terms: Sequence[Term], key: Key, *, measure: bool = False
    ) -> UpdateStats:
        """The statistics are those of the weights in memory."""
        away = [leaf for leaf in leaves if isinstance(leaf.parameter, StoredParameter)]
        here = [leaf for leaf in leaves if not isinstance(leaf.parameter, StoredParameter)]
        self._defer(optimizer, away, terms, key, self._mark())
        return apply_update(optimizer, here, terms, key, measure=measure and bool(here))

    def replayed(
        self, optimizer: Optimizer, leaves: Sequence[Leaf], terms: Sequence[Term], key: Key, mark: bytes
    ) -> UpdateStats:
        """The same with a step out of a ledger, see :func:`~zolightning.ledger.replay`."""
        self._defer(optimizer, [leaf for leaf in leaves if isinstance(leaf.parameter, StoredParameter)], terms, key, mark)
        here = [leaf for leaf in leaves if not isinstance(leaf.parameter, StoredParameter)]
        return apply_update(optimizer, here, terms, key)

    def _defer(self, optimizer: Optimizer, leaves: Sequence[Leaf], terms: Sequence[Term], key: Key, mark: bytes) -> None:
        for change, members in changes(optimizer, leaves, terms, key):
            self._refuse_parts(change, members)
            entries = _by_entry(members)
            self._last = self._last if self._last == entries else entries  # many steps share one
            self._store.defer(change, self._last, mark)

    def _refuse_parts(self, change: Change, leaves: Sequence[Leaf]) -> None:
        divided = [leaf for leaf in leaves if len(_parameter(leaf).entries) > 1]
        kind = type(change.optimizer)
        if divided and kind not in self._tried:
            if not change.by_elements(divided[0].parameter.device):
                raise OffloadError(
                    f"{kind.__name__} looks at a whole matrix to change a part of it, but {divided[0].name!r} is offloaded and "
                    "updated by rows; use another optimizer, such as SGD or AdamW, or train without offload"
                )
            self._tried.add(kind)


def _by_entry(leaves: Sequence[Leaf]) -> Mapping[Entry, Leaf]:
    return {entry: leaf for leaf in leaves for entry in _parameter(leaf).entries}


def _parameter(leaf: Leaf) -> StoredParameter:
    assert isinstance(leaf.parameter, StoredParameter)
    return leaf.parameter
