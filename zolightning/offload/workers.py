"""The threads of a store: the lock and the failure that they share, and the work of the one that writes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

from .entry import Entry, Slot
from .files import OffloadError, raise_failure
from .memory import Memory
from .tiers import Tier


class Workers:
    """Threads around one condition; an error that ends one of them reaches all that wait."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        """Whoever reads or changes the shared state holds it, and notifies it of a change."""
        self.running = False
        """Whether it reads ahead and writes behind."""
        self.failure: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def start(self, *works: Callable[[], None]) -> None:
        """A thread for each piece of work, which ends when it sees that :attr:`running` is over."""
        self.running, self.failure = True, None
        for work in works:
            thread = threading.Thread(target=self._heard, args=(work,), name=f"zolightning_{work.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Let the threads end."""
        with self.changed:
            self.running = False
            self.changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def fail(self, error: BaseException) -> None:
        """The first error is the one that :meth:`check` raises."""
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def wait(self) -> None:
        """Until something changes; an OffloadError where nothing can any more. The caller holds the condition."""
        if not self.changed.wait(30.0) and self.running and not all(thread.is_alive() for thread in self._threads):
            raise OffloadError(
                "a thread that reads or writes offloaded weights has ended without an error; the ledger has all steps: "
                "resume from the last checkpoint"
            )

    def check(self) -> None:
        """Raise the failure, if there is one."""
        if self.failure is not None:
            raise_failure(self.failure)

    def _heard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # a weight that went had been written to, or a fault of ours
            self.fail(error)


class Writer:
    """Takes the entries that have got updates into the tier, one after another.

    Args:
        tier: where they go.
        memory: where they are.
        workers: the threads, of which one may run :meth:`write_behind`.
    """

    def __init__(self, tier: Tier, memory: Memory, workers: Workers) -> None:
        self._tier, self._memory, self._workers = tier, memory, workers
        self._entries: deque[Entry] = deque()

    @property
    def busy(self) -> bool:
        """Whether an entry is on its way. The caller holds the condition, as for :meth:`queue`."""
        return any(slot.writing for slot in self._memory.slots.values())

    def queue(self, entry: Entry, slot: Slot) -> None:
        """Have an entry written, if it has updates that the tier lacks."""
        if slot.applied and not slot.writing:
            slot.writing = True
            self._entries.append(entry)
            self._workers.changed.notify_all()

    def forget(self) -> None:
        """Drop the tensors that wait to be written."""
        self._entries.clear()
        for slot in self._memory.slots.values():
            slot.writing = False

    @torch.no_grad()
    def write_behind(self) -> None:
        """A thread's work, until the threads are stopped or one of them fails."""
        workers = self._workers
        while True:
            with workers.changed:
                while workers.running and (not self._entries or workers.failure is not None):
                    workers.changed.wait()
                if not self._entries or workers.failure is not None:
                    return
            self.write()

    def write(self) -> None:
        """Write the entries that wait for it."""
        while True:
            with self._workers.changed:
                if not self._entries or self._workers.failure is not None:
                    return
                entry = self._entries.popleft()
                slot = self._memory.slots[entry]
                count = slot.applied
            try:
                entry.write(self._tier, slot.tensor, slot.state)
            except BaseException as error:  # who interrupts a flush too
                with self._workers.changed:
                    slot.writing = False
                    self._workers.fail(error)
                if isinstance(error, Exception):
                    return
                raise
            with self._workers.changed:
                entry.mark = entry.log[count - 1].mark
                del entry.log[:count]
                slot.applied -= count
                slot.writing = False
                self._workers.changed.notify_all()
