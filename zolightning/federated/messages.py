"""The bytes between server and clients: ledger records, chained to the ledger's last one, behind a short head.

Down, a :class:`Task`: the records that the client lacks, and its work. Up, a :class:`Reply`: how many examples its numbers
stand for, and a record for each of its local steps. The checksum of the first record continues the server's ledger, so that
a record of another round, or of another federation, fits nowhere.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..ledger.format import DIGEST, LedgerError, Record, decode, encode, intact

_TASK = struct.Struct("<8s8sQHHHBB")
_EXAMPLES = struct.Struct("<I")
_CHECK, _OWN = 1, 2
START = bytes(DIGEST)
"""In place of a digest: before the first record."""


class Refused(Exception):  # it is an answer to a client, and no error of the server's
    """A message that the server does not take.

    Args:
        kind: of the reason, in a word or two, under which the client's refusals are counted.
        reason: in words.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind, self.reason = kind, reason


class Task(NamedTuple):
    """The work of a client in a round.

    Args:
        head: digest of the ledger's last record.
        since: digest of the record that ``records`` follow; zeros: they are all of the ledger.
        step: optimizer steps of the federation so far: the step of the first keys.
        slot: the client's place among those of the round; with own keys its query number i is i·slots + slot in the run.
        slots: clients of the round.
        local_steps: to take.
        own: whether its directions are its own.
        check: whether the fingerprint of its weights is wanted.
        lrs: learning rate of each parameter group.
        records: bytes of the ledger from where the client stands.
    """

    head: bytes
    since: bytes
    step: int
    slot: int
    slots: int
    local_steps: int
    own: bool
    check: bool
    lrs: tuple[float, ...]
    records: bytes

    def pack(self) -> bytes:
        flags = _CHECK * self.check | _OWN * self.own
        head = _TASK.pack(self.head, self.since, self.step, self.slot, self.slots, self.local_steps, flags, len(self.lrs))
        return head + struct.pack(f"<{len(self.lrs)}d", *self.lrs) + self.records

    @classmethod
    def unpack(cls, data: bytes) -> Task:
        head, since, step, slot, slots, local_steps, flags, groups = _TASK.unpack_from(data)
        lrs = struct.unpack_from(f"<{groups}d", data, _TASK.size)
        records = data[_TASK.size + 8 * groups :]
        own, check = bool(flags & _OWN), bool(flags & _CHECK)
        return cls(head, since, step, slot, slots, local_steps, own, check, lrs, records)


class Reply(NamedTuple):
    """The outcome of a client's work.

    Args:
        examples: that its numbers stand for.
        records: bytes of a step for each local step, after a check where one was wanted.
    """

    examples: int
    records: bytes

    @classmethod
    def of(cls, examples: int, records: Iterable[Record], head: bytes, seed: int) -> Reply:
        """With the records chained to the ledger's head."""
        data = b""
        for record in records:
            data += encode(record, (head + data)[-DIGEST:], seed)
        return cls(examples, data)

    def pack(self) -> bytes:
        return _EXAMPLES.pack(self.examples) + self.records

    @classmethod
    def unpack(cls, data: bytes) -> Reply:
        """
        Raises:
            Refused: it is too short.
        """
        if len(data) < _EXAMPLES.size:
            raise Refused("damaged", f"a reply has at least {_EXAMPLES.size} bytes, got {len(data)}")
        return cls(_EXAMPLES.unpack_from(data)[0], data[_EXAMPLES.size :])


def chained(before: bytes, data: bytes, seed: int) -> Iterator[tuple[Record, bytes]]:
    """The records that follow the one of digest ``before``, each with its own digest.

    Raises:
        LedgerError: the bytes do not continue it.
    """
    whole, at = before + data, DIGEST
    while at < len(whole):
        end = intact(whole, at)
        if end is None:
            raise LedgerError(f"the records do not continue the one of digest {before.hex()}, from byte {at - DIGEST} on")
        yield decode(whole, at, end, seed), whole[end - DIGEST : end]
        at = end
