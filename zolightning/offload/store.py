"""The weights that live elsewhere: one matrix at a time comes into memory, gets the updates that it lacks, and is used.

An update is noted for every weight and applied to a weight when it next comes into memory. So a step reads and writes each
weight once, in the pass of the next step, and a weight that no step reads costs nothing until it is asked for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..space import Leaf
from .entry import Change, Entry, Slot, State, Written
from .schedule import Forecast
from .tiers import OffloadError, Tier


class Store:
    """Entries in a tier, of which as many are in memory as a pool holds.

    Args:
        tier: where the others are.
        pool: bytes of weights in memory; None: twice the largest entry, so that the next can come while one is used.
        prefetch: entries that are read ahead; 0: none, and no thread is started for it.
        write_every: updates that an entry collects before it is written; more spare a disk, and cost their replay.
    """

    def __init__(self, tier: Tier, *, pool: int | None = None, prefetch: int = 2, write_every: int = 1) -> None:
        self.tier, self.prefetch, self.write_every = tier, prefetch, write_every
        self._pool = pool
        self.entries: list[Entry] = []
        self.on_written: Callable[[Entry, Tensor, State], None] | None = None
        """Told of each entry that the tier holds anew."""
        self.misses = 0
        """Reads that nobody had foreseen."""
        self._slots: dict[Entry, Slot] = {}
        self._loading: set[Entry] = set()
        self._held: dict[int, tuple[Entry, ...]] = {}
        self._writes: deque[Entry] = deque()
        self._cv = threading.Condition()
        self._forecast = Forecast([])
        self._threads: list[threading.Thread] = []
        self._running = False
        self._failure: BaseException | None = None
        self.in_memory = self.most_in_memory = 0
        """Bytes of weights and state in memory now, and at most."""

    def add(self, entry: Entry) -> None:
        """One more; the tier has its bytes."""
        self.entries.append(entry)
        self._forecast = Forecast(self.entries)

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
        self._check()
        me, wanted = threading.get_ident(), tuple(entries)
        if self._held.get(me) != wanted:
            self.let_go()
            for count, entry in enumerate(wanted, 1):
                self._take(entry)
                self._held[me] = wanted[:count]
        slots = [self._slots[entry] for entry in wanted]
        for entry, slot in zip(wanted, slots, strict=True):
            self._bring_up_to_date(entry, slot)
        if not self._running:
            self._write_now()
        return [slot.tensor for slot in slots]

    def let_go(self) -> None:
        """This thread needs nothing that it held."""
        held = self._held.pop(threading.get_ident(), ())
        with self._cv:
            for entry in held:
                slot = self._slots[entry]
                slot.users -= 1
                self._refuse_written(entry, slot)
            self._cv.notify_all()

    def defer(self, changes: Iterable[tuple[Entry, Leaf, Change]], mark: bytes = b"") -> None:
        """Note an update of these entries, which their next reads apply.

        Args:
            changes: entry, its leaf, and what to do with it.
            mark: names the update in the ledger.
        """
        self._check()
        with self._cv:
            for entry, leaf, change in changes:
                entry.log.append((leaf, change, mark))

    def flush(self) -> None:
        """Bring every entry in the tier up to date.

        Raises:
            OffloadError, OSError: the tier does not take it.
        """
        self.let_go()
        for entry in self.entries:
            if entry.log:
                self.hold([entry])
                with self._cv:
                    self._queue(entry, self._slots[entry])
        self.let_go()
        self._write_now()
        with self._cv:
            while self._failure is None and any(slot.writing for slot in self._slots.values()):
                self._cv.wait()
        self._check()
        self.tier.sync()

    # ------------------------------------------------------------------ threads

    def start(self) -> None:
        """Read ahead and write behind from now on."""
        if self._running:
            return
        self._running, self._failure = True, None
        work = [self._write_behind, *([self._read_ahead] if self.prefetch else [])]
        self._threads = [threading.Thread(target=w, name=f"zolightning{w.__name__}", daemon=True) for w in work]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the threads end, and what is in memory go. Reads still work, one at a time."""
        with self._cv:
            self._running = False
            self._cv.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads = []
        self.let_go()
        with self._cv:
            for entry in [e for e, slot in self._slots.items() if not slot.users]:
                self._slots[entry].writing = False
                self._drop(entry)
            self._writes.clear()

    @torch.no_grad()
    def _read_ahead(self) -> None:
        while True:
            with self._cv:
                entry = self._next_ahead() if self._running else None
                while self._running and entry is None:
                    self._cv.wait()
                    entry = self._next_ahead() if self._running else None
                if entry is None:
                    return
                self._loading.add(entry)
            try:
                self._load(entry, ahead=True)
            except Exception:  # whoever needs it will meet the same, and be told
                with self._cv:
                    self._forecast.wasted(entry)

    def _next_ahead(self) -> Entry | None:
        """What to read now, with room made for it: the nearest that is missing, if it fits beside those before it."""
        ahead = list(self._forecast.ahead(self.prefetch))
        for entry in ahead:
            assert isinstance(entry, Entry)
            if entry in self._loading:
                return None  # in turn
            if entry not in self._slots:
                while self.in_memory + entry.nbytes > self.pool:
                    if not self._evict(keep=ahead):
                        return None
                self._grow(entry.nbytes)
                return entry
        return None

    @torch.no_grad()
    def _write_behind(self) -> None:
        while True:
            with self._cv:
                while self._running and not self._writes:
                    self._cv.wait()
                if not self._writes:
                    return
            self._write_now()

    def _write_now(self) -> None:
        """Write what waits to be written."""
        while True:
            with self._cv:
                if not self._writes or self._failure is not None:
                    return
                entry = self._writes.popleft()
                slot = self._slots[entry]
                count = slot.applied
                after = Written(entry.written.updates + count, entry.log[count - 1][2])
            try:
                self._write(entry, slot, after)
            except Exception as error:
                with self._cv:
                    self._failure = error
                    slot.writing = False
                    self._cv.notify_all()
                return
            with self._cv:
                del entry.log[:count]
                slot.applied -= count
                slot.writing = False
                self._cv.notify_all()

    # ------------------------------------------------------------------ one entry

    def _take(self, entry: Entry) -> Slot:
        with self._cv:
            self._forecast.note(entry)
            self._cv.notify_all()  # the reader goes on
            while True:
                slot = self._slots.get(entry)
                if slot is not None:
                    slot.users += 1
                    if slot.ahead:
                        slot.ahead = False
                        self._forecast.used(entry)
                    return slot
                if entry not in self._loading:
                    break
                self._cv.wait()
            self.misses += 1
            while self.in_memory + entry.nbytes > self.pool and self._evict(keep=()):
                pass
            while self.in_memory + entry.nbytes > self.pool and self._will_shrink():
                self._cv.wait()
                while self.in_memory + entry.nbytes > self.pool and self._evict(keep=()):
                    pass
            self._grow(entry.nbytes)
            self._loading.add(entry)
        return self._load(entry, ahead=False)

    def _load(self, entry: Entry, *, ahead: bool) -> Slot:
        """Read it into the room made for it, bring it up to date, and let others see it."""
        size = entry.nbytes
        try:
            tensor = self.tier.read(entry.name)
            state = {key: self.tier.read(name) for key, name in entry.state.items()} | entry.plain
            slot = Slot(tensor, state, size, users=0 if ahead else 1, ahead=ahead)
            self._bring_up_to_date(entry, slot)
        except BaseException:
            with self._cv:
                self._loading.discard(entry)
                self.in_memory -= size
                self._cv.notify_all()
            raise
        with self._cv:
            self._loading.discard(entry)
            self._slots[entry] = slot
            if slot.applied >= self.write_every:
                self._queue(entry, slot)
            self._cv.notify_all()
        return slot

    def _bring_up_to_date(self, entry: Entry, slot: Slot) -> None:
        if slot.applied == len(entry.log):
            return
        with entry.lock, torch.no_grad():
            with self._cv:
                while slot.writing and self._failure is None and self._running:
                    self._cv.wait()
                todo = entry.log[slot.applied :]
            self._check()
            if not todo:
                return
            weight = nn.Parameter(slot.tensor.data)  # another Parameter: nobody else sees it half-way
            for leaf, change, _ in todo:
                slot.state = change(leaf.on(weight), slot.state)
            with self._cv:
                slot.applied += len(todo)
                more = sum(v.nbytes for v in slot.state.values() if isinstance(v, Tensor))
                if more != entry.state_bytes:  # made by the first update
                    self._grow(more - entry.state_bytes)
                    slot.size += more - entry.state_bytes
                    entry.state_bytes = more
                if self._slots.get(entry) is slot and slot.applied >= self.write_every:
                    self._queue(entry, slot)

    def _queue(self, entry: Entry, slot: Slot) -> None:
        if slot.applied and not slot.writing:
            slot.writing = True
            self._writes.append(entry)
            self._cv.notify_all()

    def _write(self, entry: Entry, slot: Slot, after: Written) -> None:
        for key, value in slot.state.items():
            if isinstance(value, Tensor):
                entry.state[key] = f"{entry.name}#{key}"
                self.tier.write(entry.state[key], value)
            else:
                entry.plain[key] = value
        self.tier.write(entry.name, slot.tensor)
        entry.written = after
        if self.on_written is not None:
            self.on_written(entry, slot.tensor, slot.state)

    # ------------------------------------------------------------------ memory

    def _grow(self, size: int) -> None:
        self.in_memory += size
        self.most_in_memory = max(self.most_in_memory, self.in_memory)

    def _evict(self, keep: Iterable[Any]) -> bool:
        """Make room: let an entry go that nobody uses, last those that come next."""
        kept = set(keep)
        idle = [e for e, slot in self._slots.items() if not slot.users and not slot.writing and e not in kept]
        if not idle:
            return False
        self._drop(min(idle, key=lambda e: self._slots[e].ahead))
        return True

    def _will_shrink(self) -> bool:
        writes = self._failure is None and self._running and any(slot.writing for slot in self._slots.values())
        return writes or bool(self._loading)

    def _drop(self, entry: Entry) -> None:
        slot = self._slots.pop(entry)
        self._refuse_written(entry, slot)
        if slot.ahead:
            self._forecast.wasted(entry)
        self.in_memory -= slot.size
        self._cv.notify_all()

    def _refuse_written(self, entry: Entry, slot: Slot) -> None:
        if slot.tensor._version != slot.seen:
            slot.seen = slot.tensor._version
            raise OffloadError(
                f"{entry.name!r} was written to by something else than the optimizer while its weights are offloaded; the "
                "change would be lost. Change weights before `fit` begins, or train without offload"
            )

    def _check(self) -> None:
        if self._failure is not None:
            raise OffloadError(
                f"updated weights could not be written ({self._failure}); the ledger has all steps up to this one: make room "
                "or repair the folder, and resume from the last checkpoint"
            ) from self._failure
