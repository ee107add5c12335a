"""The exchanges of ranks, over torch.distributed's default group: gather a few bytes, agree on a value, share tensors.

Numbers and texts travel as they are or as JSON, nothing is pickled: no rank runs code that another one sent.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..types import SkipStep

T = TypeVar("T")
_LENGTH = struct.Struct("<I")


class RanksError(RuntimeError):
    """The ranks of a run cannot go on together."""


@dataclass
class Traffic:
    """Of one rank.

    Args:
        sent: payload bytes that it gave to a gathering.
        calls: number of gatherings.
        seconds: that they took, waiting for the others included.
    """

    sent: int = 0
    calls: int = 0
    seconds: float = 0.0


class Exchange:
    """The processes of torch.distributed's default group, which must be there.

    Args:
        timeout: seconds that the group was made with, for messages.
    """

    def __init__(self, timeout: float) -> None:
        self.rank, self.size, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        self.traffic = Traffic()
        self.where: Callable[[], str] = str
        """Says where the run stands, for messages."""
        self.broken = ""
        """The reason why nothing goes through any more; "" while it does."""
        self._room = 0

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, in the order of the ranks.

        Messages have room for the longest one so far; a longer one is sent once more. So a step takes one gathering.

        Raises:
            RanksError: a rank has ended, or says nothing.
        """
        framed = _LENGTH.pack(len(data)) + data
        self._room = max(self._room, _LENGTH.size)
        while True:
            parts = self._gathered(framed[: self._room].ljust(self._room, b"\0"))
            longest = max(_LENGTH.unpack_from(part)[0] for part in parts) + _LENGTH.size
            if longest <= self._room:
                return [part[_LENGTH.size : _LENGTH.size + _LENGTH.unpack_from(part)[0]] for part in parts]
            self._room = longest

    def values(self, value: object) -> list[Any]:
        """Every rank's value, in the order of the ranks.

        Args:
            value: of JSON's types; tuples and sets arrive as lists, other types as their text.
        """
        data = _text(value)
        sizes = [_LENGTH.unpack(part)[0] for part in self._gathered(_LENGTH.pack(len(data)))]
        parts = self._gathered(data.ljust(max(sizes), b" "))
        return [json.loads(part) for part in parts]

    def decide(self, make: Callable[[], T]) -> T:
        """The result, of JSON's types, or the error of ``make`` on rank 0; no other rank calls it.

        Raises:
            SkipStep: there is no loss.
            RanksError: it failed there; on rank 0 the error itself.
        """
        made: tuple[object, bool, str] = None, False, ""
        failed: Exception | None = None
        if self.rank == 0:
            try:
                made = make(), False, ""
            except Exception as error:
                failed, made = error, (None, isinstance(error, SkipStep), f"rank 0: {type(error).__name__}: {error}")
        value, skipped, reason = self._from_first(made)
        if failed is not None:
            raise failed
        if reason:
            raise SkipStep if skipped else RanksError(reason)
        found: T = value
        return found

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every tensor the bits that it has on rank 0, whatever its dtype and layout."""
        for tensor in tensors:
            whole = tensor.contiguous()
            data = whole.reshape(-1).view(torch.uint8)
            with self._together():
                dist.broadcast(data, src=0)
            if data.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)

    def _gathered(self, data: bytes) -> list[bytes]:
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        every = torch.empty(self.size * len(data), dtype=torch.uint8)
        began = time.perf_counter()
        with self._together():
            dist.all_to_all_single(every, mine.repeat(self.size))  # straight to each: a ring would wait for each hop
        self.traffic.seconds += time.perf_counter() - began
        self.traffic.sent += len(data)
        self.traffic.calls += 1
        whole = every.numpy().tobytes()
        return [whole[at : at + len(data)] for at in range(0, len(whole), len(data))]

    def _from_first(self, value: object) -> Any:
        data = _text(value)
        size = torch.tensor([len(data)])
        with self._together():
            dist.broadcast(size, src=0)
            sent = torch.empty(int(size), dtype=torch.uint8)
            if self.rank == 0:
                sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(sent, src=0)
        return json.loads(sent.numpy().tobytes())

    @contextmanager
    def _together(self) -> Iterator[None]:
        if self.broken:
            raise RanksError(self.broken)
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are of it
            self.broken = (
                f"rank {self.rank} of {self.size} is alone: another rank has ended, or did not answer within "
                f"{self.timeout:g} s. {self.where()} ({str(error).strip().splitlines()[0]})"
            )
            raise RanksError(self.broken) from error


def _text(value: object) -> bytes:
    def other(value: object) -> object:
        return sorted(value) if isinstance(value, frozenset) else repr(value)

    return json.dumps(value, default=other).encode()
