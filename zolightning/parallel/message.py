"""A rank's message about a step: 36 bytes and its numbers, as doubles, so that no digit is lost."""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import NamedTuple

_HEAD = struct.Struct("<IIBBHIQQ")


class Flag(IntFlag):
    """Further facts about a message."""

    OWN = 1
    """The coefficients are of directions that examples have for themselves."""
    ANEW = 2
    """The subspace is to be found anew."""


class Message(NamedTuple):
    """One rank's part of one optimizer step.

    Args:
        step: optimizer steps taken before this one.
        examples: of the window's micro-batches; 0 when the rank has nothing to say.
        forwards: that were spent on it.
        digest: of all that must be equal on all ranks.
        batch: digest of the batches, equal on the members of a group.
        flags: see :class:`Flag`.
        sizes: examples with directions of their own in each micro-batch, where its points were spread; 0: none.
        loss: mean over the window.
        looks: losses along the way over the last steps, or none.
        values: coefficients; or the answers, where the points were spread.
    """

    step: int
    examples: int
    forwards: int
    digest: int
    batch: int
    flags: Flag
    sizes: tuple[int, ...]
    loss: float
    looks: tuple[float, ...]
    values: tuple[float, ...]

    def pack(self) -> bytes:
        spread = bool(self.sizes)
        last = self.batch if spread else struct.unpack("<Q", struct.pack("<d", self.loss))[0]
        head = _HEAD.pack(
            self.step, self.examples, self.flags, len(self.looks), len(self.sizes), self.forwards, self.digest, last
        )
        numbers = (*self.looks, *self.values)
        return head + struct.pack(f"<{len(self.sizes)}I{len(numbers)}d", *self.sizes, *numbers)

    @classmethod
    def unpack(cls, data: bytes) -> Message:
        step, examples, flags, looks, micro, forwards, digest, last = _HEAD.unpack_from(data)
        at = _HEAD.size + 4 * micro
        sizes = struct.unpack_from(f"<{micro}I", data, _HEAD.size)
        numbers = struct.unpack_from(f"<{(len(data) - at) // 8}d", data, at)
        loss = float("nan") if micro else struct.unpack("<d", struct.pack("<Q", last))[0]
        batch = last if micro else 0
        return cls(step, examples, forwards, digest, batch, Flag(flags), sizes, loss, numbers[:looks], numbers[looks:])
