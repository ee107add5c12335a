"""Reading a ledger: its content, its end, and its damage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

from .format import DIGEST, PROLOGUE, VERSION, Check, Header, LedgerError, Record, Step, decode, intact, resumes, scan


@dataclass(frozen=True)
class Ledger:
    """The intact part of a ledger file, up to a position.

    Args:
        path: the file.
        header: of the file: the start of the run.
        data: the file's bytes.
        spans: (start, end) of each intact record after the header.
        torn: bytes at the end that hold no whole record, as a power cut leaves them.
        damage: a description of damage in the middle of the file; "" when there is none.
    """

    path: Path
    header: Header
    data: bytes = field(repr=False)
    spans: tuple[tuple[int, int], ...] = field(repr=False)
    torn: int = 0
    damage: str = ""

    def __iter__(self) -> Iterator[Record]:
        return (_decoded(self.path, self.data, start, end, self.header.seed) for start, end in self.spans)

    @property
    def steps(self) -> int:
        """Optimizer steps recorded."""
        return sum(isinstance(record, Step) for record in self)

    @property
    def last(self) -> int:
        """The weights after this many optimizer steps are the last that can be had."""
        ends = [r.step + 1 if isinstance(r, Step) else r.step for r in self if isinstance(r, (Step, Check))]
        return max(ends, default=self.header.start)

    @property
    def end(self) -> int:
        """Bytes that are intact."""
        return self.spans[-1][1] if self.spans else self._header_end

    @property
    def _header_end(self) -> int:
        return next(scan(self.data))[1]

    def upto(self, digest: bytes) -> Ledger:
        """The part that ends with the record of this digest.

        Raises:
            LedgerError: no such record.
        """
        for count in range(len(self.spans), -1, -1):
            end = self.spans[count - 1][1] if count else self._header_end
            if self.data[end - DIGEST : end] == digest:
                return Ledger(self.path, self.header, self.data[:end], self.spans[:count])
        reason = self.damage or "it is another run's ledger, or an older copy of this one"
        raise LedgerError(f"{self.path} does not hold the record {digest.hex()}: {reason}")


def read(path: str | Path) -> Ledger:
    """The ledger in a file.

    A tail that is no whole record is left out and counted in ``torn``. Damage in the middle is told in ``damage``; what
    comes before it can be used.

    Raises:
        LedgerError: not a ledger, of another version, or without an intact header.
        OSError: the file cannot be read.
    """
    path = Path(path)
    data = path.read_bytes()
    header = _header(path, data)
    spans = tuple(scan(data))
    ledger = Ledger(path, header, data, spans[1:], torn=len(data) - spans[-1][1])
    if ledger.torn and resumes(data, ledger.end):
        damage = (
            f"the record at byte {ledger.end} of {path} was altered or overwritten; the records before it are intact: ask "
            f"for step {ledger.last} or less"
        )
        return Ledger(path, header, data, spans[1:], damage=damage)
    return ledger


def locate(written: Path, digest: bytes, checkpoint: Path) -> Ledger:
    """The ledger up to the record of this digest, from the first folder that has it.

    Args:
        written: the file when the checkpoint was made. It may have made room for a newer one and be ``NAME.1``, ``NAME.2``, …
            now.
        digest: of the last record wanted.
        checkpoint: beside which, and in whose folder's folder, it is looked for too: the run's folder may have been moved.

    Raises:
        LedgerError: none has it; the message lists the content of each.
    """
    problems = []
    folders = (written.parent, checkpoint.parent, checkpoint.parent.parent)
    for folder in dict.fromkeys(folder.absolute() for folder in folders):
        for candidate in [folder / written.name, *sorted(folder.glob(f"{escape(written.name)}.[0-9]*"))]:
            try:
                return read(candidate).upto(digest)
            except (OSError, LedgerError) as error:
                problems.append(str(error))
    raise LedgerError("; ".join(problems))


def _header(path: Path, data: bytes) -> Header:
    if data[: len(PROLOGUE) - 1] != PROLOGUE[:-1]:
        raise LedgerError(f"{path} is not a replay ledger: it begins with {data[: len(PROLOGUE)]!r}")
    if data[len(PROLOGUE) - 1 : len(PROLOGUE)] != PROLOGUE[-1:]:
        found = data[len(PROLOGUE) - 1] if len(data) >= len(PROLOGUE) else "none"
        raise LedgerError(
            f"{path} is a ledger of format version {found}, this zolightning reads version {VERSION}; replay it with the "
            "zolightning that wrote it"
        )
    end = intact(data, len(PROLOGUE))
    header = _decoded(path, data, len(PROLOGUE), end, seed=0) if end is not None else None
    if not isinstance(header, Header):
        raise LedgerError(f"the header of {path} is incomplete or altered; nothing can be replayed from it")
    return header


def _decoded(path: Path, data: bytes, start: int, end: int, seed: int) -> Record:
    try:
        return decode(data, start, end, seed)
    except LedgerError as error:
        raise LedgerError(f"{path}: {error}") from error
