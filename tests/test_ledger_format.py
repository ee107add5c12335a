"""The bytes of a ledger: every record comes back as it was, and no change to a file goes unnoticed."""

from __future__ import annotations

import json
import random
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zolightning.ledger import LedgerError, read
from zolightning.ledger.format import (
    DIGEST,
    HEAD,
    PROLOGUE,
    Check,
    Header,
    Method,
    Options,
    Record,
    Step,
    decode,
    encode,
    opening,
)
from zolightning.types import Key, Term

SEED = 2**64 - 5

names = st.text(max_size=12)
counts = st.integers(0, 2**63)
doubles = st.floats()
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | doubles | names,
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
hashes = st.binary(min_size=16, max_size=16).map(bytes.hex)
keys = st.builds(Key, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))

headers = st.builds(
    Header,
    seed=st.integers(0, 2**64 - 1),
    start=counts,
    base=hashes,
    parameters=st.dictionaries(names, st.tuples(names, st.lists(counts, max_size=4).map(tuple)), max_size=4),
    buffers=st.lists(names, max_size=3).map(tuple),
    device=names,
    versions=st.dictionaries(names, names, max_size=2),
    settings=st.dictionaries(names, plain, max_size=3),
    pretrained=st.none() | st.dictionaries(names, plain, max_size=3),
)
methods = st.builds(
    Method,
    optimizer=st.integers(0, 255),
    rule=names,
    distribution=names,
    groups=st.lists(st.lists(names, max_size=3).map(tuple), max_size=3).map(tuple),
    leaves=st.dictionaries(names, st.tuples(names, counts, counts), max_size=3),
    unsupported=names,
)
options = st.builds(
    Options, optimizer=st.integers(0, 255), groups=st.lists(st.dictionaries(names, plain, max_size=4), max_size=3).map(tuple)
)
checks = st.builds(Check, step=counts, fingerprint=hashes)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """With the keys that go without saying, with others, and with none."""
    number, coefficients = draw(counts), draw(st.lists(doubles, max_size=6))
    usual = draw(st.booleans())
    terms = [Term(Key(SEED, number, i) if usual else draw(keys), c) for i, c in enumerate(coefficients)]
    return Step(number, draw(st.integers(0, 255)), tuple(terms), tuple(draw(st.lists(doubles, max_size=3))), draw(doubles))


HEADER = Header(
    seed=SEED,
    start=0,
    base="0" * 32,
    parameters={"w": ("float32", (2, 3))},
    buffers=(),
    device="cpu",
    versions={"torch": "2"},
    settings={"eps": 1e-3},
    pretrained=None,
)


def a_step(number: int, directions: int = 1, groups: int = 1) -> Step:
    generator = random.Random(number)
    terms = tuple(Term(Key(SEED, number, q), generator.gauss(0, 1)) for q in range(directions))
    return Step(number, 0, terms, (1e-3,) * groups, generator.random())


RUN: list[Record] = [
    Method(0, "AdamW", "rademacher", (("w",),), {"w": ("dense", 0, 0)}),
    Options(0, ({"betas": (0.9, 0.999), "eps": 1e-8},)),
    a_step(0),
    a_step(1),
    Check(2, "ab" * 16),
    Options(0, ({"betas": (0.8, 0.999), "eps": 1e-8},)),
    a_step(2, directions=3),
    a_step(3),
]


def pieces(records: list[Record], header: Header = HEADER) -> list[bytes]:
    """The bytes of the opening and of each record."""
    parts = [opening(header)]
    for record in records:
        parts.append(encode(record, parts[-1][-DIGEST:], header.seed))
    return parts


def same(left: Record, right: Record) -> bool:
    """In every digit: NaN is NaN, −0 is not 0."""
    return repr(left) == repr(right)


def put(folder: Path, data: bytes) -> Path:
    path = folder / "ledger.zo"
    path.write_bytes(data)
    return path


@given(header=headers, records=st.lists(methods | options | checks | steps(), max_size=5))
def test_every_record_comes_back(header: Header, records: list[Record], tmp_path: Path) -> None:
    ledger = read(put(tmp_path, b"".join(pieces(records, header))))
    assert same(ledger.header, header)
    assert (ledger.torn, ledger.damage) == (0, "")
    found = list(ledger)
    assert len(found) == len(records) and all(map(same, found, records))


def test_bytes_a_step() -> None:
    """A step with one direction and one parameter group: 53; another direction or group: 8 more; a checkpoint: 37."""
    before = bytes(DIGEST)
    assert len(encode(a_step(7), before, SEED)) == 53 <= 64
    assert len(encode(a_step(7, directions=2, groups=3), before, SEED)) == 53 + 8 + 16
    assert len(encode(a_step(7, directions=32), before, SEED)) == 53 + 31 * 8
    assert len(encode(Check(7, "ab" * 16), before, SEED)) == 37


def test_steps_last_and_end(tmp_path: Path) -> None:
    parts = pieces(RUN)
    ledger = read(put(tmp_path, b"".join(parts)))
    assert (ledger.steps, ledger.last, ledger.end) == (4, 4, sum(map(len, parts)))
    empty = read(put(tmp_path, opening(HEADER)))
    assert (empty.steps, empty.last, empty.end, list(empty)) == (0, 0, len(opening(HEADER)), [])
    skipped = read(put(tmp_path, b"".join(pieces([*RUN, Check(6, "cd" * 16)]))))
    assert (skipped.steps, skipped.last) == (4, 6)  # steps 4 and 5 left the weights as they were


def test_cut_anywhere_leaves_the_whole_records_before(tmp_path: Path) -> None:
    parts = pieces(RUN)
    data = b"".join(parts)
    ends = [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
    for cut in range(len(parts[0]), len(data) + 1):
        whole = sum(end <= cut for end in ends) - 1
        ledger = read(put(tmp_path, data[:cut]))
        assert list(ledger) == RUN[:whole]
        assert (ledger.torn, ledger.damage, ledger.end) == (cut - ends[whole], "", ends[whole])
    for cut in range(len(parts[0])):
        with pytest.raises(LedgerError, match=r"not a replay ledger|format version|header .* is incomplete or altered"):
            read(put(tmp_path, data[:cut]))


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_no_altered_byte_goes_unnoticed(flip: int, tmp_path: Path) -> None:
    parts = pieces(RUN)
    data = b"".join(parts)
    for at in range(len(data)):
        path = put(tmp_path, data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        if at < len(parts[0]):
            with pytest.raises(LedgerError, match=r"not a replay ledger|format version|header .* is incomplete or altered"):
                read(path)
            continue
        altered = next(i for i in range(len(parts)) if at < sum(map(len, parts[: i + 1]))) - 1
        ledger = read(path)
        assert list(ledger) == RUN[:altered]
        assert ledger.torn or ledger.damage
        if altered < len(RUN) - 2:  # a later record is whole, so this is no torn tail
            assert f"the record at byte {ledger.end} of {path} was altered or overwritten" in ledger.damage


@given(data=st.data())
def test_dropped_repeated_and_moved_records_are_noticed(data: st.DataObject, tmp_path: Path) -> None:
    parts = pieces(RUN)
    order = data.draw(st.lists(st.integers(1, len(RUN)), max_size=len(RUN) + 2))
    whole = next((i for i, place in enumerate(order) if place != i + 1), len(order))
    ledger = read(put(tmp_path, b"".join([parts[0], *(parts[i] for i in order)])))
    assert list(ledger) == RUN[:whole]
    assert bool(ledger.torn or ledger.damage) == (whole < len(order))


@given(junk=st.binary(min_size=1, max_size=300))
def test_junk_at_the_end_is_torn(junk: bytes, tmp_path: Path) -> None:
    for tail in (junk, bytes(len(junk))):  # file systems fill with zeros what they could not write
        ledger = read(put(tmp_path, b"".join(pieces(RUN)) + tail))
        assert list(ledger) == RUN
        assert (ledger.torn, ledger.damage) == (len(tail), "")


def test_hole_in_the_middle_is_damage(tmp_path: Path) -> None:
    parts = pieces(RUN)
    ledger = read(put(tmp_path, b"".join([*parts[:4], bytes(len(parts[4])), *parts[5:]])))
    assert list(ledger) == RUN[:3]
    assert "ask for step 1 or less" in ledger.damage


def test_records_of_another_run_are_not_taken(tmp_path: Path) -> None:
    mine, other = pieces(RUN), pieces(RUN, Header(**{**vars(HEADER), "start": 1}))
    joined = read(put(tmp_path, b"".join(mine + other)))
    assert list(joined) == RUN and "altered or overwritten" in joined.damage
    spliced = read(put(tmp_path, b"".join(mine[:4] + other[4:])))
    assert list(spliced) == RUN[:3] and "altered or overwritten" in spliced.damage


@pytest.mark.parametrize("version", [0, 1, 3, 255])
def test_another_version_is_refused(version: int, tmp_path: Path) -> None:
    data = b"".join(pieces(RUN))
    path = put(tmp_path, data[:7] + bytes([version]) + data[8:])
    with pytest.raises(LedgerError, match=f"{path} is a ledger of format version {version}, this zolightning reads version 2"):
        read(path)


@pytest.mark.parametrize(
    "data", [b"", b"\x89", b"\x89PNG\r\n\x1a\n" + bytes(40), b"PK\x03\x04" + bytes(40), b"step,loss\n1,0.5\n", bytes(100)]
)
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    path = put(tmp_path, data)
    with pytest.raises(LedgerError, match=f"{path} is not a replay ledger: it begins with"):
        read(path)


def test_a_transfer_as_text_is_noticed(tmp_path: Path) -> None:
    """As PNG's signature: carriage returns added or removed, the eighth bit lost."""
    data = b"".join(pieces(RUN))
    for damaged in (data.replace(b"\r\n", b"\n"), data.replace(b"\n", b"\r\n"), bytes(b & 0x7F for b in data)):
        with pytest.raises(LedgerError, match="not a replay ledger"):
            read(put(tmp_path, damaged))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing.zo")
    with pytest.raises(OSError, match="directory"):
        read(tmp_path)


def test_upto(tmp_path: Path) -> None:
    parts = pieces(RUN)
    ledger = read(put(tmp_path, b"".join(parts)))
    for count in range(len(parts)):
        part = ledger.upto(parts[count][-DIGEST:])
        assert list(part) == RUN[:count]
        assert part.end == len(part.data) == sum(map(len, parts[: count + 1]))
    with pytest.raises(LedgerError, match="does not hold the record 0000000000000000: it is another run's ledger, or an older"):
        ledger.upto(bytes(DIGEST))
    hurt = read(put(tmp_path, b"".join([*parts[:4], bytes(len(parts[4])), *parts[5:]])))
    with pytest.raises(LedgerError, match=r"does not hold the record [0-9a-f]+: the record at byte \d+ of .* was altered"):
        hurt.upto(parts[-1][-DIGEST:])


# ---- files that somebody forged, checksums and all


def forged(code: int, payload: bytes, before: bytes) -> bytes:
    body = HEAD.pack(len(payload), code) + payload
    return body + blake2b(before + body, digest_size=DIGEST).digest()


VALID = json.loads(opening(HEADER)[len(PROLOGUE) + HEAD.size : -DIGEST])
BAD_HEADERS: dict[str, Any] = {
    "list": [],
    "number": 3,
    "nothing": {},
    "a field more": {**VALID, "more": 1},
    "seed": {**VALID, "seed": "1"},
    "negative seed": {**VALID, "seed": -1},
    "start": {**VALID, "start": True},
    "base with a path": {**VALID, "base": "/../../../etc/passwd"},
    "base too short": {**VALID, "base": "ab"},
    "base not text": {**VALID, "base": 7},
    "parameters": {**VALID, "parameters": ["w"]},
    "a parameter": {**VALID, "parameters": {"w": 3}},
    "a shape": {**VALID, "parameters": {"w": ["float32", 3]}},
    "device": {**VALID, "device": None},
    "pretrained": {**VALID, "pretrained": "gpt2"},
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_forged_headers_are_refused(name: str, tmp_path: Path) -> None:
    data = PROLOGUE + forged(1, json.dumps(BAD_HEADERS[name]).encode(), PROLOGUE)
    with pytest.raises(LedgerError, match="the Header record at byte 8 is not one that zolightning writes"):
        read(put(tmp_path, data))


def test_a_ledger_without_header_is_refused(tmp_path: Path) -> None:
    record = encode(RUN[0], PROLOGUE, SEED)
    with pytest.raises(LedgerError, match=r"the header of .* is incomplete or altered"):
        read(put(tmp_path, PROLOGUE + record))


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[1]",
        b"{}",
        b'{"optimizer": 0}',
        b"[" * 100_000,
        bytes(23),
        bytes(24) + b"\xff",
        b"\xff" * 25,
    ],
    ids=lambda payload: repr(payload[:12]),
)
def test_forged_records_are_refused(code: int, payload: bytes, tmp_path: Path) -> None:
    data = opening(HEADER)
    ledger = read(put(tmp_path, data + forged(code, payload, data[-DIGEST:])))
    assert ledger.torn == 0
    with pytest.raises(LedgerError, match=f"record at byte {len(data)} is not one that zolightning writes"):
        list(ledger)


def test_kinds_of_a_later_version_are_not_skipped(tmp_path: Path) -> None:
    data = opening(HEADER)
    unknown = forged(6, b"{}", data[-DIGEST:])
    ledger = read(put(tmp_path, data + unknown))
    assert (list(ledger), ledger.torn) == ([], len(unknown))
    followed = read(put(tmp_path, data + unknown + encode(RUN[0], unknown[-DIGEST:], SEED)))
    assert list(followed) == [] and "altered or overwritten" in followed.damage


@given(code=st.integers(1, 5), payload=st.binary(max_size=60))
def test_decoding_anything_raises_nothing_else(code: int, payload: bytes) -> None:
    record = forged(code, payload, PROLOGUE)
    try:
        found = decode(PROLOGUE + record, len(PROLOGUE), len(PROLOGUE) + len(record), SEED)
    except LedgerError:
        return
    assert isinstance(found, (Header, Method, Options, Step, Check))
