"""The server: it chooses clients, judges their replies, joins them, and keeps the ledger. It has no model and no data."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.step import finish
from ..ledger.format import DIGEST, Check, LedgerError, Record, Step, encode, scan
from ..ledger.reader import read
from ..ledger.writer import LedgerWriter, claim
from ..methods.shaping import State, state_from
from ..types import Estimate
from .joining import Share, union
from .judging import judged
from .messages import START, Refused, Reply, Task
from .opening import Opening
from .rules import Rules


class Round(NamedTuple):
    """What came of a round.

    Args:
        number: counted from 0.
        step: optimizer steps of the federation after it.
        loss: the mean over clients by their examples; nan where nobody replied.
        asked: clients.
        joined: those whose replies count.
        refused: client → why its reply does not.
        bytes_down: of all tasks.
        bytes_up: of all replies, refused ones included.
        sent: client → bytes of its replies.
        skipped: why nothing moved; "" where something did.
    """

    number: int
    step: int
    loss: float
    asked: tuple[str, ...]
    joined: tuple[str, ...]
    refused: Mapping[str, str]
    bytes_down: int
    bytes_up: int
    sent: Mapping[str, int]
    skipped: str = ""


class Server:
    """A relay of bytes and a ledger.

    ::

        server = Server(Rules(), "federation.zo")
        server.welcome("anna", anna.opening.pack())
        for name, task in server.begin(["anna"]).items():    # by whatever transport
            server.receive(name, anna.work(task).pack())
        server.close()

    Args:
        rules: its settings.
        path: of the ledger, which a server that starts again goes on with. None: it is kept in memory only.
        schedule: round → factor of the learning rates.

    Raises:
        LedgerError: the file at the path is no ledger of a federation, or it is damaged, or another server writes to it.
    """

    def __init__(
        self,
        rules: Rules | None = None,
        path: str | Path | None = None,
        schedule: Callable[[int], float] = lambda number: 1.0,
    ) -> None:
        self.rules, self._schedule = rules or Rules(), schedule
        self.opening: Opening | None = None
        """The first client's, which all others must have; None before."""
        self.refusals: dict[str, Counter[str]] = {}
        """Client → kind of reason → times."""
        self.rounds = self.step = 0
        self._data = bytearray()
        self._ends: dict[bytes, int] = {}  # digest → the byte behind its record
        self._stands: dict[str, bytes] = {}  # client → the last digest that it is known to have
        self._state: State = {}
        self._checked = -1
        self._asked: dict[str, int] = {}  # client → slot, of the round that is open
        self._shares: dict[str, tuple[list[Share], str]] = {}
        self._failed: dict[str, str] = {}
        self._sent: Counter[str] = Counter()
        self._down = 0
        self._claim = None if path is None else claim(Path(path))
        self._path = None if path is None else Path(path)
        self._writer: LedgerWriter | None = None
        if self._path is not None and self._path.exists():
            try:
                self._resume(self._path)
            except BaseException:
                self.end()
                raise

    # clients

    def welcome(self, client: str, opening: bytes, stands: bytes = START) -> None:
        """Take a client in, or one that comes back.

        Args:
            client: its name, by which the transport knows it.
            opening: of the client; the first one is the federation's.
            stands: digest of the last record that it has.

        Raises:
            Refused: it has another model, method or version.
        """
        try:
            its = Opening.unpack(opening)
            if self.opening is None:
                its.shaping()
                its.lrs()
                self._open(its)
            else:
                self.opening.check(its)
        except Refused as refused:
            self._count(client, refused.kind)
            raise
        self._stands[client] = stands if stands in self._ends else START

    def since(self, stands: bytes) -> bytes:
        """The ledger's bytes behind a record; all of them where it is not one of the ledger's."""
        return bytes(self._data[self._ends.get(stands, 0) :])

    @property
    def head(self) -> bytes:
        """Digest of the last record."""
        return bytes(self._data[-DIGEST:])

    # a round

    def choose(self, present: Sequence[str]) -> list[str]:
        """Those of the clients that a round asks, drawn by the rules' seed and the round's number."""
        known = sorted(name for name in present if name in self._stands)
        count = min(len(known), max(self.rules.fewest, round(self.rules.participation * len(known))))
        return sorted(random.Random(f"{self.rules.seed} {self.rounds}").sample(known, count))

    def begin(self, clients: Sequence[str]) -> dict[str, Task]:
        """Open a round with these clients, which were welcomed: the task of each."""
        assert self.opening is not None
        self._asked = {name: slot for slot, name in enumerate(clients)}
        self._shares, self._failed, self._sent, self._down = {}, {}, Counter(), 0
        lrs, tasks = self._lrs, {}
        check = self._checked < 0 or self.rounds - self._checked >= self.rules.check_every
        for name, slot in self._asked.items():
            tasks[name] = Task(
                head=self.head,
                since=self._stands[name],
                step=self.step,
                slot=slot,
                slots=len(clients),
                local_steps=self.rules.local_steps,
                own=self.rules.keys == "own",
                check=check,
                lrs=lrs,
                records=self.since(self._stands[name]),
            )
            self._down += len(tasks[name].pack())
        self._checked = self.rounds if check else self._checked
        return tasks

    def receive(self, client: str, data: bytes) -> None:
        """Take a client's reply to the task of the open round.

        Raises:
            Refused: it is no such reply; the client's part of the round is left out.
        """
        self._sent[client] += len(data)
        try:
            if client not in self._asked or client in self._shares:
                raise Refused("uninvited", "it was not asked in this round, or has replied already")
            reply = Reply.unpack(data)
            slot, seed = self._asked[client], self._seed
            self._shares[client] = judged(reply, slot, self.step, self.head, seed, self._ends, self.rules)
        except Refused as refused:
            self._count(client, refused.kind)
            self._failed[client] = str(refused)
            if refused.kind == "replayed":
                self._stands[client] = START
            raise
        self._stands[client] = self.head

    def lost(self, client: str, reason: str) -> None:
        """The client cannot be reached, or ended in an error; when it comes back it may have nothing."""
        self._failed[client] = reason
        self._stands[client] = START

    def close(self) -> Round:
        """Join the replies, write the step or steps, and end the round."""
        self._compare()
        shares = [share for share, _ in self._shares.values() if share]
        loss, skipped = math.nan, ""
        if len(shares) < self.rules.fewest or not shares:
            skipped = f"{len(shares)} of {len(self._asked)} clients replied, and {self.rules.fewest} are needed"
        else:
            losses = []
            for number in range(self.rules.local_steps):
                found, skipped = self._joined([each[number] for each in shares])
                losses.append(found)
            loss = sum(losses) / len(losses)
        absent = {name: "no reply" for name in self._asked if name not in self._shares}
        done = Round(
            number=self.rounds,
            step=self.step,
            loss=loss,
            asked=tuple(self._asked),
            joined=tuple(name for name, (share, _) in self._shares.items() if share),
            refused=absent | self._failed,
            bytes_down=self._down,
            bytes_up=self._sent.total(),
            sent=dict(self._sent),
            skipped=skipped,
        )
        self.rounds += 1
        self._asked = {}
        self._save()
        return done

    def end(self) -> None:
        """Close the ledger's file."""
        if self._writer is not None:
            self._writer.close()
        elif self._claim is not None:
            self._claim.release()

    # its parts

    def _joined(self, shares: Sequence[Share]) -> tuple[float, str]:
        """One step of all: its loss, and why nothing moved."""
        assert self.opening is not None
        lrs = self._lrs
        found = union(shares, len(self._asked), self.rules)
        step, self.step = self.step, self.step + 1
        if self.rules.local_steps > 1:
            terms, skipped = found.terms, "" if any(c for _, c in found.terms) else "all probes gave the same loss"
        else:
            estimate, shaping = Estimate(found.terms, (found.loss,), 0), self.opening.shaping()
            state = state_from(self._state, shaping) if self._state else shaping.init()
            record, self._state = finish(estimate, None, shaping, state, lrs, step)
            terms, skipped = record.terms, record.skipped
        if not skipped:
            self._append(Step(step, 0, terms, lrs, found.loss, found.unread))
        return found.loss, skipped

    def _compare(self) -> None:
        """The clients' fingerprints, where they were asked for: those of most clients count, and none where none has most."""
        found = {name: mark for name, (_, mark) in self._shares.items() if mark}
        if not found:
            return
        (usual, count), *others = Counter(found.values()).most_common(2)
        decided = not others or count > others[0][1]
        for name, mark in found.items():
            if mark != usual or not decided:
                self._count(name, "apart")
                those = (
                    f"those of most clients {usual}"
                    if decided
                    else f"as many others have {usual if mark != usual else others[0][0]}"
                )
                self._failed[name] = f"apart: its weights have the fingerprint {mark}, {those}"
                del self._shares[name], self._stands[name]  # until it is welcomed again
        if decided:
            self._append(Check(self.step, usual))

    @property
    def _lrs(self) -> tuple[float, ...]:
        """The learning rates of the round."""
        assert self.opening is not None
        factor = self._schedule(self.rounds)
        return tuple(lr * factor for lr in self.opening.lrs())

    @property
    def _seed(self) -> int:
        assert self.opening is not None
        return self.opening.header.seed

    def _count(self, client: str, kind: str) -> None:
        self.refusals.setdefault(client, Counter())[kind] += 1

    def _open(self, opening: Opening) -> None:
        self.opening = opening
        self._data = bytearray(opening.pack())
        self._ends = {self._data_digest(end): end for _, end in scan(bytes(self._data))}
        if self._claim is not None:
            self._writer = LedgerWriter(self._claim, self._seed, bytes(self._data))

    def _append(self, record: Record) -> None:
        self._data += encode(record, self.head, self._seed)
        self._ends[self.head] = len(self._data)
        if self._writer is not None:
            self._writer.append(record)

    def _data_digest(self, end: int) -> bytes:
        return bytes(self._data[end - DIGEST : end])

    def _resume(self, path: Path) -> None:
        ledger = read(path)
        if ledger.damage:
            raise LedgerError(ledger.damage)
        data = ledger.data[: ledger.end]
        try:
            self.opening = Opening.unpack(data[: [end for _, end in scan(data)][:3][-1]])
            self.opening.lrs()
        except Refused as refused:
            raise LedgerError(f"{path} is no federation's ledger, and a server would go on with it: {refused}") from refused
        self._data = bytearray(data)
        self._ends = {self._data_digest(end): end for _, end in scan(data)}
        self.step = ledger.last
        noted: dict[str, Any] = json.loads(_notes(path).read_text()) if _notes(path).exists() else {}
        if noted.get("head") == self.head.hex():  # else it ended between the ledger and the notes
            self.step, self.rounds, self._state = noted["step"], noted["rounds"], noted["shaping"]
            self.refusals = {name: Counter(kinds) for name, kinds in noted["refusals"].items()}
        assert self._claim is not None
        self._writer = LedgerWriter(self._claim, self._seed, data)

    def _save(self) -> None:
        """The numbers that the next round depends on in addition to the ledger."""
        if self._path is None:
            return
        notes = {"head": self.head.hex(), "step": self.step, "rounds": self.rounds}
        notes |= {"shaping": self._state, "refusals": self.refusals}
        spare = _notes(self._path).with_suffix(".new")
        spare.write_text(json.dumps(notes))
        spare.replace(_notes(self._path))


def _notes(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
