"""The weights that live elsewhere: one matrix at a time comes into memory, gets the updates that it lacks, and is used.

An update is noted for every weight and applied to a weight when it next comes into memory. So a step reads and writes each
weight once, in the pass of the next step, and a weight that no step reads costs nothing until it is asked for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..space import Leaf
from .entry import Change, Entry, Slot, Update
from .memory import Memory
from .notes import note
from .schedule import Forecast
from .tiers import Tier
from .walk import walking
from .workers import Workers, Writer


class Store:
    """Entries in a tier, of which as many are in memory as a pool holds.

    Args:
        tier: where the others are.
        pool: bytes of weights in memory; None: twice the largest entry, so that the next can come while one is used.
        prefetch: entries that are read ahead; 0: none, and no thread is started for it.
        write_every: updates that an entry collects before it is written; more spare a disk, and cost their replay.
        lockstep: forwards that may go through the entries together.
    """

    def __init__(
        self, tier: Tier, *, pool: int | None = None, prefetch: int = 2, write_every: int = 1, lockstep: int = 2
    ) -> None:
        self.tier, self.prefetch, self.write_every, self.lockstep = tier, prefetch, write_every, lockstep
        self._pool = pool
        self.entries: list[Entry] = []
        self.places: dict[Entry, int] = {}
        """Of the entries, in the order of the module."""
        self.vectors: dict[str, Tensor] = {}
        """The parameters that are always in memory, as they were before training."""
        self.waited = 0.0
        """Seconds in which whoever reads had to wait."""
        self.misses = 0
        """Reads that nobody had foreseen."""
        self._memory = Memory(Forecast([]))
        self._loading: set[Entry] = set()
        self._held: dict[Hashable, tuple[Entry, ...]] = {}  # by who reads: a thread, or a walk of several
        self._lent: dict[Entry, Slot] = {}
        self._urgent = 0
        self._workers = Workers()
        self._changed = self._workers.changed
        self._writer = Writer(tier, self._memory, self._workers)

    def add(self, entry: Entry) -> None:
        """One more; the tier has its bytes."""
        self.places[entry] = len(self.entries)
        self.entries.append(entry)
        self._memory.forecast = Forecast(self.entries)

    @property
    def most_in_memory(self) -> int:
        """Bytes of weights and state that were in memory at once, at most."""
        return self._memory.most_taken

    def configure(self, *, pool: int | None, prefetch: int, write_every: int, lockstep: int) -> None:
        """Set the options anew, before :meth:`start`."""
        self._pool, self.prefetch, self.write_every, self.lockstep = pool, prefetch, write_every, lockstep

    @property
    def running(self) -> bool:
        """Whether it reads ahead and writes behind."""
        return self._workers.running

    @property
    def pool(self) -> int:
        """Bytes that entries in memory may take."""
        return 2 * max((entry.nbytes for entry in self.entries), default=0) if self._pool is None else self._pool

    # ------------------------------------------------------------------ whoever reads

    def hold(self, entries: Sequence[Entry]) -> list[Tensor]:
        """The weights as of the last step; they may go when this thread asks for others.

        Raises:
            OffloadError, OSError: they cannot be had, or were written into.
        """
        self._workers.check()
        self._refuse_written()
        walk, wanted = walking(), tuple(entries)
        if walk is not None:
            walk.ask(wanted)
        me = walk or threading.get_ident()
        if self._held.get(me) != wanted:
            self.let_go(me)
            began = time.perf_counter()
            for count, entry in enumerate(wanted, 1):
                self._take(entry)
                self._held[me] = wanted[:count]
            self.waited += time.perf_counter() - began
        slots = [self._memory.slots[entry] for entry in wanted]
        for entry, slot in zip(wanted, slots, strict=True):
            self._bring_up_to_date(entry, slot)
        return [slot.tensor for slot in slots]

    def let_go(self, reader: Hashable = None) -> None:
        """The reader needs nothing that it held. None: this thread."""
        held = self._held.pop(reader or threading.get_ident(), ())
        with self._changed:
            for entry in held:
                slot = self._memory.slots[entry]
                slot.users -= 1
                self._memory.refuse_written(entry, slot)
            self._changed.notify_all()

    def lend(self, entry: Entry, copy: Tensor) -> Tensor:
        """Notice if somebody writes into this copy of a weight: the change would be lost. It is kept by nobody here.

        Args:
            entry: the first of the weight's.
            copy: of all of it.
        """
        self._refuse_written()
        watched = copy.detach()  # has the version of the copy
        watched.data = copy.new_empty(0)
        self._lent[entry] = Slot(watched, {}, 0)
        return copy

    def _refuse_written(self) -> None:
        for entry, slot in list(self._lent.items()):
            self._memory.refuse_written(entry, slot)

    def defer(self, change: Change, leaves: Mapping[Entry, Leaf], mark: bytes = b"") -> None:
        """Note an update, which the next read of an entry applies.

        Args:
            change: called with each leaf.
            leaves: of the entries that are updated.
            mark: names the update in the ledger.
        """
        self._workers.check()
        update = Update(change, leaves, mark)
        with self._changed:
            for entry in leaves:
                entry.log.append(update)

    def flush(self) -> None:
        """Bring every entry in the tier up to date.

        Raises:
            OffloadError, OSError: the tier does not take it.
        """
        self.let_go()
        self._refuse_written()
        for entry in self.entries:
            if entry.log:
                self.hold([entry])
                with self._changed:
                    self._writer.queue(entry, self._memory.slots[entry])
        self.let_go()
        self._writer.write()
        with self._changed:
            while self._workers.failure is None and self._writer.busy:
                self._workers.wait()
        self._workers.check()
        self.tier.commit({entry.name: note(entry) for entry in self.entries})

    def rewind(self) -> None:
        """Go back to the weights from before training, if there was any; nothing is in memory then.

        Raises:
            OffloadError: the tier does not have them any more.
        """
        self.empty()
        if any(entry.log or entry.mark for entry in self.entries):
            self.tier.rewind()
            for entry in self.entries:
                entry.forget()

    # ------------------------------------------------------------------ threads

    def start(self) -> None:
        """Read ahead and write behind from now on."""
        if not self.running:
            self._workers.start(self._writer.write_behind, *([self._read_ahead] if self.prefetch else []))

    def stop(self) -> None:
        """Let the threads end, and the entries in memory go. Reads still work, one at a time; nothing is written any more."""
        self._workers.stop()
        self._writer.forget()
        self.empty()

    def empty(self) -> None:
        """Let everything go that is in memory and not on its way into the tier."""
        self.let_go()
        with self._changed:
            while self._memory.evict(keep=()):
                pass

    @torch.no_grad()
    def _read_ahead(self) -> None:
        while True:
            with self._changed:
                while self.running and (entry := self._next_ahead()) is None:
                    self._changed.wait()
                if not self.running or entry is None:
                    return
                self._loading.add(entry)
            try:
                self._load(entry, ahead=True)
            except Exception:  # whoever needs it will meet the same, and be told
                with self._changed:
                    self._memory.forecast.wasted(entry)

    def _next_ahead(self) -> Entry | None:
        """The entry to read now, with room made for it: the nearest that is missing, if it fits with those before it."""
        if self._urgent:
            return None
        ahead = list(self._memory.forecast.ahead(self.prefetch))
        for entry in ahead:
            assert isinstance(entry, Entry)
            if entry in self._loading:
                return None  # in turn
            if entry not in self._memory.slots:
                while self._memory.taken + entry.nbytes > self.pool:
                    if not self._memory.evict(keep=ahead):
                        return None
                self._memory.grow(entry.nbytes)
                return entry
        return None

    # ------------------------------------------------------------------ one entry

    def _take(self, entry: Entry) -> Slot:
        with self._changed:
            self._memory.forecast.note(entry)
            self._changed.notify_all()  # the reader goes on
            while True:
                slot = self._memory.slots.get(entry)
                if slot is not None:
                    slot.users += 1
                    if slot.ahead:
                        slot.ahead = False
                        self._memory.forecast.used(entry)
                    return slot
                if entry not in self._loading:
                    break
                self._memory.awaited.append(entry)
                try:
                    self._workers.wait()
                finally:
                    self._memory.awaited.remove(entry)
            self.misses += 1
            self._urgent += 1  # nothing is read ahead into the room that is waited for
            try:
                while self._memory.taken + entry.nbytes > self.pool and (self._memory.evict(keep=()) or self._wait_for_room()):
                    pass
            finally:
                self._urgent -= 1
            self._memory.grow(entry.nbytes)
            self._loading.add(entry)
        return self._load(entry, ahead=False)

    def _load(self, entry: Entry, *, ahead: bool) -> Slot:
        """Read it into the room made for it, bring it up to date, and let others see it."""
        size = entry.nbytes
        try:
            with torch.inference_mode(False):  # a validation's tensors outlive it
                return self._loaded(entry, size, ahead)
        except BaseException:
            with self._changed:
                self._loading.discard(entry)
                self._memory.taken -= size
                self._changed.notify_all()
            raise

    def _loaded(self, entry: Entry, size: int, ahead: bool) -> Slot:
        slot = Slot(*entry.read(self.tier), size, users=0 if ahead else 1, ahead=ahead)
        self._bring_up_to_date(entry, slot)
        with self._changed:
            self._loading.discard(entry)
            self._memory.slots[entry] = slot
            if self.running and slot.applied >= self.write_every:
                self._writer.queue(entry, slot)
            self._changed.notify_all()
        return slot

    def _bring_up_to_date(self, entry: Entry, slot: Slot) -> None:
        if slot.applied == len(entry.log):
            return
        with entry.lock, torch.inference_mode(False), torch.no_grad():
            with self._changed:
                while slot.writing and self._workers.failure is None and self.running:
                    self._workers.wait()
                todo = entry.log[slot.applied :]
            self._workers.check()
            if not todo:
                return
            weight = nn.Parameter(slot.tensor.data)  # another Parameter: nobody else sees it half-way
            try:
                for update in todo:
                    slot.state = update.change(update.leaves[entry].on(weight, entry.first), slot.state)
            except BaseException:
                with self._changed:  # the tier's bytes and the noted updates make the entry anew
                    self._memory.discard(entry, slot)
                    self._held = {me: tuple(e for e in held if e is not entry) for me, held in self._held.items()}
                    self._changed.notify_all()
                raise
            with self._changed:
                slot.applied += len(todo)
                self._memory.resize(entry, slot)
                if self.running and self._memory.slots.get(entry) is slot and slot.applied >= self.write_every:
                    self._writer.queue(entry, slot)

    def _wait_for_room(self) -> bool:
        """Wait until a write or a read has ended; False when there is none to wait for."""
        writes = self._workers.failure is None and self.running and self._writer.busy
        busy = writes or bool(self._loading)
        if busy:
            self._workers.wait()
        return busy
