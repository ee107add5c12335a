"""Several forwards that go through the weights of a store together, so that each weight is read once for all of them.

Each runs in a thread of its own, one at a time: where it asks for another weight it waits until all others have come to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

from .entry import Entry
from .files import OffloadError

T = TypeVar("T")

_LOOKS = 10

_here = threading.local()


class _Abandoned(BaseException):
    """Another side has failed; user code that catches exceptions does not catch this."""


class Walk:
    """Calls that take turns, each in its own thread. To the store they are one reader.

    A call that reads other weights than the rest, as a mixture's experts, comes first where its weight has the earlier place.

    Args:
        places: of the entries, in the order of the module.
        stretch: makes a context that is entered whenever a call goes on, and left when it waits, by the call's number.
        patience: seconds for which a call may run between two weights while others wait. One that holds a lock where it waits
            would otherwise wait for ever for one that wants the lock.
    """

    def __init__(
        self,
        places: Mapping[Entry, int],
        stretch: Callable[[int], AbstractContextManager[None]],
        patience: float = threading.TIMEOUT_MAX,
    ) -> None:
        self._places, self._stretch, self._patience = places, stretch, patience
        self._cv = threading.Condition()
        self._wants: list[tuple[Entry, ...] | None] = []  # (): has not begun; None: has ended
        self._turn = 0
        self._entered: list[ExitStack] = []
        self._failure: BaseException | None = None
        self.at: tuple[Entry, ...] = ()
        """The weights that they share now."""

    def run(self, calls: Sequence[Callable[[], T]], threads: Executor) -> list[T]:
        """Their results, in order.

        Args:
            calls: the first runs in this thread.
            threads: for all others, as many as there are.

        Raises:
            OffloadError: a call did not come to its next weight.
            BaseException: that of the first call that failed; the others are abandoned where they wait.
        """
        results: list[Any] = [None] * len(calls)
        self._wants, self._entered = [()] * len(calls), [ExitStack() for _ in calls]

        def side(me: int) -> None:
            _here.walk, _here.side = self, me
            try:
                self._wait(me)
                results[me] = calls[me]()
            except _Abandoned:
                pass
            except BaseException as error:
                self._failure = self._failure or error
            finally:
                _here.walk = None
                self._wants[me] = None
                self._give_turn(me)

        others = [threads.submit(side, me) for me in range(1, len(calls))]
        try:
            side(0)
        finally:
            for other in others:
                try:
                    other.result(self._patience)
                except TimeoutError:  # its thread cannot be ended
                    self._failure = self._failure or self._stuck()
        if self._failure is not None:
            raise self._failure
        return results

    def ask(self, wanted: tuple[Entry, ...]) -> None:
        """Wait until this call may have these weights."""
        if wanted != self.at:
            me = _here.side
            self._wants[me] = wanted
            self._give_turn(me)
            self._wait(me)

    def _wait(self, me: int) -> None:
        with self._cv:
            left = _LOOKS
            while self._turn != me and self._failure is None:  # whoever has the turn gives it on, however it ends
                left = _LOOKS if self._cv.wait(self._patience / _LOOKS) else left - 1  # a process that was stopped uses up one
                if not left:
                    self._failure = self._stuck()
                    self._cv.notify_all()
            if self._failure is not None:
                raise _Abandoned
        self._entered[me].enter_context(self._stretch(me))

    def _stuck(self) -> OffloadError:
        return OffloadError(
            f"a forward in lockstep did not come to its next weight within {self._patience:.0f} s: it may wait for a lock that "
            "another forward holds, or for another thread. Use Offload(lockstep=1), which runs forwards one after another"
        )

    def _give_turn(self, me: int) -> None:
        try:
            self._entered[me].close()
        except BaseException as error:
            self._failure = self._failure or error
        with self._cv:
            if self._turn == me:
                self._turn = self._next(me)
            self._cv.notify_all()

    def _next(self, me: int) -> int:
        waiting = [side for side, wanted in enumerate(self._wants) if wanted is not None]
        if not waiting:
            return -1

        def rank(side: int) -> tuple[int, int, bool]:
            wanted = self._wants[side]
            if not wanted:
                return 0, side, False
            return (1, side, False) if wanted == self.at else (2, self._places[wanted[0]], side != me)

        chosen = min(waiting, key=rank)
        self.at = self._wants[chosen] or self.at
        return chosen


def walking() -> Walk | None:
    """The walk that this thread is a side of."""
    return getattr(_here, "walk", None)
