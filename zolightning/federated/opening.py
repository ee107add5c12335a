"""The first bytes of a client: what it trains and how, as a ledger without steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..ledger.format import DIGEST, PROLOGUE, Header, LedgerError, Method, Options, Record, decode, intact, opening, scan
from ..ledger.format import encode as encoded
from ..ledger.reader import Ledger
from ..methods.config import ZOConfig
from ..methods.shaping import Shaping
from .messages import Refused

NAME = Path("the federation's ledger")
"""Stands for a file in messages."""


@dataclass(frozen=True)
class Opening:
    """The records that a federation's ledger begins with.

    Args:
        header: names the base weights, the seed and the settings, among them ``lrs``, the learning rates.
        method: how steps are applied.
        options: of the optimizer.
    """

    header: Header
    method: Method
    options: Options

    def pack(self) -> bytes:
        data = opening(self.header)
        for record in (self.method, self.options):
            data += encoded(record, data[-DIGEST:], self.header.seed)
        return data

    @classmethod
    def unpack(cls, data: bytes) -> Opening:
        """
        Raises:
            Refused: the bytes are no opening, or another version's.
        """
        if data[: len(PROLOGUE) - 1] != PROLOGUE[:-1]:
            raise Refused("damaged", f"an opening begins as a replay ledger does, got {data[: len(PROLOGUE)]!r}")
        if data[: len(PROLOGUE)] != PROLOGUE:
            raise Refused("foreign version", f"it writes ledgers of version {data[len(PROLOGUE) - 1]}, not {PROLOGUE[-1]}")
        spans = list(scan(data))
        if len(spans) != 3 or spans[-1][1] != len(data):
            raise Refused("damaged", "an opening is a header, a method and its options, with their checksums")
        try:
            header, method, options = (decode(data, start, end, 0) for start, end in spans)
        except LedgerError as error:
            raise Refused("damaged", str(error)) from error
        if not (isinstance(header, Header) and isinstance(method, Method) and isinstance(options, Options)):
            raise Refused("damaged", "an opening is a header, a method and its options, in this order")
        if method.unsupported:
            raise Refused("another method", f"its steps cannot be replayed: {method.unsupported}")
        return cls(header, method, options)

    def check(self, other: Opening) -> None:
        """Refuse a client whose opening is ``other``.

        Raises:
            Refused: it names the first thing that differs.
        """
        mine, its = self.header, other.header
        if (a := mine.versions.get("zolightning")) != (b := its.versions.get("zolightning")):
            raise Refused("foreign version", f"it runs zolightning {b}, the federation {a}")
        for name, (dtype, shape) in mine.parameters.items():
            if (found := its.parameters.get(name)) != (dtype, shape):
                shown = "missing" if found is None else f"{found[0]} {list(found[1])}"
                raise Refused("another model", f"{name!r} is {shown}, and {dtype} {list(shape)} in the federation")
        if extra := sorted(its.parameters.keys() - mine.parameters.keys()):
            raise Refused("another model", f"it has {extra[0]!r}, which the federation's has not")
        if mine.base != its.base:
            raise Refused("another model", f"its weights have the fingerprint {its.base}, the federation's base {mine.base}")
        if mine.device != its.device and self.method.distribution != "rademacher":
            raise Refused("another device", f"{self.method.distribution} noise may differ there; use noise='rademacher'")
        settings, method = {**mine.settings, **its.settings}, asdict(other.method)
        pairs: list[tuple[str, Any, Any]] = [("seed", mine.seed, its.seed)]
        pairs += [(name, mine.settings.get(name), its.settings.get(name)) for name in settings]
        pairs += [(name, value, method[name]) for name, value in asdict(self.method).items()]
        for name, wanted, got in [*pairs, ("options", self.options, other.options)]:
            if wanted != got:
                raise Refused("another method", f"its {name} is {got!r}, and {wanted!r} in the federation")

    def lrs(self) -> tuple[float, ...]:
        """The learning rate of each parameter group.

        Raises:
            Refused: they are not there.
        """
        try:
            return tuple(map(float, self.header.settings["lrs"]))
        except (KeyError, TypeError, ValueError) as error:
            raise Refused("another method", f"its settings lack the learning rates: {error!r}") from error

    def shaping(self) -> Shaping:
        """Of the projected gradients, once they are joined.

        Raises:
            Refused: the settings are none of ours.
        """
        names = ("normalize", "normalize_beta", "clip", "num_queries")
        try:
            return ZOConfig("spsa", **{name: self.header.settings[name] for name in names}).build_shaping()
        except (KeyError, TypeError, ValueError) as error:
            raise Refused("another method", f"its settings are not zolightning's: {error!r}") from error


def begun(data: bytes) -> tuple[Ledger, bytes]:
    """The header of a ledger's bytes, and the bytes behind it.

    Raises:
        LedgerError: there is none.
    """
    end = intact(data, len(PROLOGUE)) if data.startswith(PROLOGUE) else None
    header: Record | None = None if end is None else decode(data, len(PROLOGUE), end, 0)
    if not isinstance(header, Header):
        raise LedgerError("the server sent bytes that are no ledger")
    return Ledger(NAME, header, data[:end], ()), data[end:]


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they are after a way through JSON."""
    return dict(json.loads(json.dumps(settings)))
