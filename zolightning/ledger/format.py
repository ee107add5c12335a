"""The bytes of a ledger: records that carry a checksum chained to everything before them.

``prologue | record | record | …``, each record ``length u32 | kind u8 | payload | digest``, little-endian, where

    digest = blake2b(digest before | length | kind | payload), 8 bytes

so a record that is altered, dropped or moved breaks every digest after it. A step with one query and one parameter group
takes 53 bytes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, TypeAlias

from ..types import Key, Term

VERSION = 2  # the noise is part of the format: 2 has other Gaussian numbers than 1
PROLOGUE = b"\x89ZOL\r\n\x1a" + bytes([VERSION])  # as PNG's: a transfer as text damages it
DIGEST = 8
HEAD = struct.Struct("<IB")
_STEP = struct.Struct("<QBBHId")
_KEY = struct.Struct("<QQI")
_CHECK = struct.Struct("<Q16s")
_FOREIGN_KEYS = 1  # flag: the keys follow the coefficients
_UNREAD = 2  # flag: a bit for each leaf follows, set for those that get no update
_LONGEST = 1 << 28


class LedgerError(ValueError):
    """A ledger that cannot be used as asked; the message says why, and gives a way out."""


@dataclass(frozen=True)
class Header:
    """The start of a run."""

    seed: int
    """Seed of the perturbations."""

    start: int
    """Optimizer steps taken before the first record: the base holds the weights at that step."""

    base: str
    """Fingerprint of all parameters at the start."""

    parameters: dict[str, tuple[str, tuple[int, ...]]]
    """Name → (dtype, shape) of all parameters."""

    buffers: tuple[str, ...]
    """Names of the persistent buffers, of which a ledger holds nothing."""

    device: str
    """Device type that the run's updates were computed on."""

    versions: dict[str, str]
    """Of zolightning and torch."""

    settings: dict[str, Any]
    """The settings, for information."""

    pretrained: dict[str, Any] | None
    """The Hugging Face model inside: its ``prefix`` in the module, ``class``, ``source`` and ``config``."""

    def __post_init__(self) -> None:
        """A header that a file claims to be: names of files are made from it."""
        if not (type(self.seed) is type(self.start) is int and self.seed >= 0 and self.start >= 0):
            raise ValueError(f"seed {self.seed!r} and start {self.start!r} must be whole numbers")
        if not (isinstance(self.base, str) and re.fullmatch("[0-9a-f]{32}", self.base)):
            raise ValueError(f"base {self.base!r} must be 32 hexadecimal digits")
        if not (isinstance(self.parameters, dict) and all(map(_is_described, self.parameters.values()))):
            raise ValueError("parameters must be name → (dtype, shape)")
        if not isinstance(self.device, str) or not isinstance(self.pretrained, dict | None):
            raise ValueError("device must be a name, pretrained a table")


@dataclass(frozen=True)
class Method:
    """How an optimizer applies the steps that follow."""

    optimizer: int
    """Its place among the module's optimizers."""

    rule: str
    """Class in torch.optim or zolightning.methods.optimizers."""

    distribution: str
    """Name of the noise."""

    groups: tuple[tuple[str, ...], ...]
    """The trained leaves in each parameter group."""

    leaves: dict[str, tuple[str, int, int]]
    """Name → (kind, index in the noise, place among the optimizer's parameters)."""

    settings: dict[str, dict[str, float]] = field(default_factory=dict)
    """Leaf → its settings."""

    turns: dict[str, tuple[int, int, int, int, str]] = field(default_factory=dict)
    """Leaf → (block, number of blocks, blocks a step, steps before the next, order) where blocks take turns."""

    anchor: float = 0.0
    """Decay of the weights towards those before the first step that has one."""

    unsupported: str = ""
    """Why the steps that follow cannot be replayed; empty when they can."""


@dataclass(frozen=True)
class Options:
    """Settings of the parameter groups, except the learning rates, in the steps that follow."""

    optimizer: int
    groups: tuple[dict[str, object], ...]


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    step: int
    optimizer: int
    terms: tuple[Term, ...]
    """(key, coefficient) as handed to the optimizer."""
    lrs: tuple[float, ...]
    loss: float
    unread: tuple[int, ...] = ()
    """Places, among the method's leaves, of those that no probe read: they get no update."""


@dataclass(frozen=True)
class Check:
    """The fingerprint of all parameters after ``step`` optimizer steps."""

    step: int
    fingerprint: str


Record: TypeAlias = "Header | Method | Options | Step | Check"
_KINDS: dict[int, type[Any]] = {1: Header, 2: Method, 3: Options, 4: Step, 5: Check}
_CODES = {kind: code for code, kind in _KINDS.items()}


def encode(record: Record, before: bytes, seed: int) -> bytes:
    """The record's bytes.

    Args:
        record: the step or the check to write.
        before: digest of the record before it, or the prologue.
        seed: the header's; keys (seed, step, 0 … n − 1) go without saying.
    """
    if isinstance(record, Step):
        payload = _pack(record, seed)
    elif isinstance(record, Check):
        payload = _CHECK.pack(record.step, bytes.fromhex(record.fingerprint))
    else:
        payload = json.dumps(asdict(record), default=str).encode()
    body = HEAD.pack(len(payload), _CODES[type(record)]) + payload
    return body + digest(before, body)


def opening(header: Header) -> bytes:
    """The bytes that a ledger begins with."""
    return PROLOGUE + encode(header, PROLOGUE, header.seed)


def digest(before: bytes, body: bytes) -> bytes:
    """Of a record whose bytes, all but the digest, are ``body``."""
    return blake2b(before + body, digest_size=DIGEST).digest()


def scan(data: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of each intact record, up to the first that is not."""
    at = len(PROLOGUE)
    while (end := intact(data, at)) is not None:
        yield at, end
        at = end


def intact(data: bytes, at: int) -> int | None:
    """Where the record that starts at ``at`` ends; None if there is no intact record."""
    if at + HEAD.size + DIGEST > len(data):
        return None
    length, kind = HEAD.unpack_from(data, at)
    end = at + HEAD.size + length + DIGEST
    if kind not in _KINDS or length > _LONGEST or end > len(data):
        return None
    return end if digest(data[at - DIGEST : at], data[at : end - DIGEST]) == data[end - DIGEST : end] else None


def decode(data: bytes, start: int, end: int, seed: int) -> Record:
    """The intact record in ``data[start:end]``.

    Raises:
        LedgerError: the bytes that the checksum covers are no such record.
    """
    _, code = HEAD.unpack_from(data, start)
    payload, kind = data[start + HEAD.size : end - DIGEST], _KINDS[code]
    try:
        if kind is Step:
            return _unpack(payload, seed)
        if kind is Check:
            step, found = _CHECK.unpack(payload)
            return Check(step, found.hex())
        return kind(**{k: _frozen(v) for k, v in json.loads(payload).items()})  # type: ignore[no-any-return]
    except (AttributeError, RecursionError, TypeError, ValueError, struct.error) as error:
        raise LedgerError(f"the {kind.__name__} record at byte {start} is not one that zolightning writes: {error}") from error


def _is_described(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], tuple)


def _frozen(value: Any) -> Any:
    """JSON's lists as tuples."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return {k: _frozen(v) for k, v in value.items()} if isinstance(value, dict) else value


def _pack(step: Step, seed: int) -> bytes:
    count = len(step.terms)
    foreign = [t.key for t in step.terms] != [Key(seed, step.step, query) for query in range(count)]
    flags = _FOREIGN_KEYS * foreign | _UNREAD * bool(step.unread)
    head = _STEP.pack(step.step, step.optimizer, flags, len(step.lrs), count, step.loss)
    numbers = struct.pack(f"<{len(step.lrs) + count}d", *step.lrs, *(t.coefficient for t in step.terms))
    bits = sum(1 << place for place in step.unread)
    unread = bits.to_bytes(max(step.unread) // 8 + 1, "little") if step.unread else b""
    return head + numbers + b"".join(_KEY.pack(*t.key) for t in step.terms if foreign) + unread


def _unpack(payload: bytes, seed: int) -> Step:
    number, optimizer, flags, groups, count, loss = _STEP.unpack_from(payload)
    numbers = struct.unpack_from(f"<{groups + count}d", payload, _STEP.size)
    rest = payload[_STEP.size + 8 * len(numbers) :]
    if flags & _FOREIGN_KEYS:
        keys = [Key(*words) for words in _KEY.iter_unpack(rest[: count * _KEY.size])]
        rest = rest[count * _KEY.size :]
    else:
        keys = [Key(seed, number, query) for query in range(count)]
    if bool(rest) != bool(flags & _UNREAD):
        raise ValueError(f"{len(rest)} bytes behind the coefficients")
    bits = int.from_bytes(rest, "little")
    unread = tuple(place for place in range(8 * len(rest)) if bits >> place & 1)
    terms = tuple(Term(*pair) for pair in zip(keys, numbers[groups:], strict=True))
    return Step(number, optimizer, terms, numbers[:groups], loss, unread)


def resumes(data: bytes, after: int) -> bool:
    """Whether an intact record starts anywhere behind ``after``: the bytes between are damaged, not merely torn off."""
    return any(intact(data, at) is not None for at in range(after + 1, len(data) - DIGEST))
