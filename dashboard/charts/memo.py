"""Results of a tick, kept for the next one while their inputs have not changed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Memo(Generic[T]):
    """The latest results by their inputs; the least recently used goes first. Safe to call from several threads.

    Args:
        size: how many results to keep, >= 1.
    """

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, threading.RLock()
        self._kept: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, origin: Hashable, make: Callable[[], T]) -> T:
        """The result for this origin, made now if it is not kept.

        Args:
            origin: everything the result depends on.
            make: computes it.
        """
        with self._lock:  # also while it is made: whoever asks for the same meanwhile waits for it
            if origin not in self._kept:
                self._kept[origin] = make()
                if len(self._kept) > self._size:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(origin)
            return self._kept[origin]
