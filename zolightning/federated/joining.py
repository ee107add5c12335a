"""The steps of several clients as one: of equal keys the mean, of different ones the union."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from ..ledger.format import Step
from ..parallel.merging import mean
from ..types import Key, Term
from .rules import Rules


class Share(NamedTuple):
    """A client's step.

    Args:
        slot: the client's place in the round.
        examples: that it stands for, >= 1.
        step: with the client's own numbers of queries.
    """

    slot: int
    examples: int
    step: Step


class Union(NamedTuple):
    """The step of all.

    Args:
        terms: in the order of their keys.
        loss: the mean over clients by their examples.
        unread: places of the leaves that no client read.
    """

    terms: tuple[Term, ...]
    loss: float
    unread: tuple[int, ...]


def union(shares: Sequence[Share], slots: int, rules: Rules) -> Union:
    """Join a step of the clients, in the order of their slots, whatever the order in which they came.

    With one local step the coefficients are projected gradients, of whose mean the step will be made; with more they are
    the clients' moves c, and their mean is Σ_clients n_i·c_i / Σn.
    """
    shares = sorted(shares)
    terms = _own(shares, slots, rules) if rules.keys == "own" else _shared(shares, rules)
    speaking = [share for share in shares if math.isfinite(share.step.loss)]
    loss = mean([(float(share.examples), share.step.loss) for share in speaking]) if speaking else math.nan
    unread = set(shares[0].step.unread).intersection(*(share.step.unread for share in shares))
    return Union(tuple(terms), loss, tuple(sorted(unread)))


def _shared(shares: Sequence[Share], rules: Rules) -> list[Term]:
    weights = [1.0] * len(shares) if len({share.examples for share in shares}) == 1 else [float(s.examples) for s in shares]
    parts: dict[Key, list[tuple[float, float]]] = {}
    for share, weight in zip(shares, weights, strict=True):
        for key, g in share.step.terms:
            parts.setdefault(key, []).append((weight, g))
    if rules.local_steps > 1 and rules.average == "mean":  # who did not move counts, with 0
        return [Term(key, sum(w * g for w, g in parts[key]) / sum(weights)) for key in sorted(parts)]
    return [Term(key, _average(parts[key], rules)) for key in sorted(parts)]


def _average(parts: Sequence[tuple[float, float]], rules: Rules) -> float:
    if rules.average == "mean":
        return mean(parts)
    values = sorted(g for _, g in parts)
    if rules.average == "median":
        return median(values)
    cut = min(math.ceil(rules.trim * len(values)), (len(values) - 1) // 2)
    kept = values[cut : len(values) - cut]
    return sum(kept) / len(kept)


def _own(shares: Sequence[Share], slots: int, rules: Rules) -> list[Term]:
    """Under the numbers that the directions have in the run."""
    total = sum(share.examples for share in shares)
    count = sum(len(share.step.terms) for share in shares)
    found: Mapping[Key, float] = {
        key._replace(query=key.query * slots + share.slot): g * _factor(share, total, count, rules)
        for share in shares
        for key, g in share.step.terms
    }
    return [Term(key, found[key]) for key in sorted(found)]


def _factor(share: Share, total: int, count: int, rules: Rules) -> float:
    """The weight by examples; exactly 1 where all projected gradients stand for as many."""
    if rules.local_steps > 1:
        return share.examples / total
    return share.examples * count / (total * len(share.step.terms))
