"""Whether a reply is one to the task that was given: all that a server can see without the model."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..ledger.format import DIGEST, Check, LedgerError, Step, digest
from ..types import Key
from .joining import Share
from .messages import Refused, Reply, chained
from .rules import Rules


def judged(
    reply: Reply, slot: int, first: int, head: bytes, seed: int, known: Iterable[bytes], rules: Rules
) -> tuple[list[Share], str]:
    """The client's steps, none where its data gave no loss, and the fingerprint of its weights where it was asked for.

    Args:
        reply: to judge.
        slot: of the client.
        first: step of the task.
        head: digest of the record that the reply must follow.
        seed: of the keys.
        known: digests of the ledger.
        rules: the limits.

    Raises:
        Refused: says why.
    """
    if not 1 <= reply.examples <= rules.most_examples:
        raise Refused("examples", f"it claims {reply.examples} examples; allowed: 1 to {rules.most_examples}")
    try:
        records = [record for record, _ in chained(head, reply.records, seed)]
    except LedgerError as error:
        raise _misfit(reply.records, (each for each in known if each != head), error) from error
    mark = ""
    if records and isinstance(records[0], Check):
        mark, records = records[0].fingerprint, records[1:]
    steps = [record for record in records if isinstance(record, Step)]
    if len(steps) != len(records) or len(steps) != rules.local_steps:
        raise Refused("forged", f"a reply has {rules.local_steps} steps and nothing else, got {len(records)} records")
    for number, step in enumerate(steps):
        _check(step, Key(seed, first + number), rules)
    if not any(step.terms for step in steps):
        return [], mark
    return [Share(slot, reply.examples, step) for step in steps], mark


def _check(step: Step, key: Key, rules: Rules) -> None:
    if len(step.terms) > rules.most_terms:
        raise Refused("huge", f"it has {len(step.terms)} coefficients in a step; allowed: {rules.most_terms}")
    if step.step != key.step or step.optimizer or step.lrs:
        raise Refused("forged", f"it has step {step.step} of optimizer {step.optimizer}, and was asked for step {key.step}")
    for query, (found, c) in enumerate(step.terms):
        if found != key._replace(query=query):
            raise Refused("foreign keys", f"its coefficient {query} is of {tuple(found)}, not of {tuple(key)[:2]}")
        if not math.isfinite(c):
            raise Refused("non-finite", f"its coefficient {query} is {c}")
        if abs(c) > rules.largest:
            raise Refused("huge", f"its coefficient {query} is {c:g}; allowed: {rules.largest:g}")
    if math.isinf(step.loss):  # nan: it does not tell
        raise Refused("non-finite", f"its loss is {step.loss}")


def _misfit(data: bytes, known: Iterable[bytes], error: LedgerError) -> Refused:
    """Its first record has the right checksum behind an older record, or behind none."""
    length = int.from_bytes(data[:4], "little")
    body, found = data[: 5 + length], data[5 + length : 5 + length + DIGEST]
    if any(digest(before, body) == found for before in known):
        return Refused("replayed", "its records continue an older state of the ledger")
    return Refused("forged", f"its checksum does not continue the federation's ledger ({error})")
