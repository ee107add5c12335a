"""Which runs somebody means: words, regular expressions and conditions, as one line of text.

``lr<1e-3 recipe=reft -killed`` are the runs of recipe reft with a smaller rate that were not killed. The grammar:

========================  ====================================================================================
``word``, ``"two words"``  in the name, the status, the method, the recipe, or at the beginning of the id
``/regex/``               likewise, as a regular expression
``lr<1e-3``               a parameter, a tag, the last value of a metric, or a fact of the run; ``< <= > >= = !=``
``optimizer~adam.*``      its text matches a regular expression; ``!~``: does not
``-term``                 not that
``a b or c``              (a and b) or c
========================  ====================================================================================

A name may be the last part of a longer one (``lr`` finds ``optimizer/lr``), or name its kind (``params.lr``, ``metrics.lr``,
``tags.lr``). Upper and lower case are the same. Numbers may end in ``%``, ``k``, ``M``, ``GiB``, ``min``, ``h`` and their like.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from .source.base import Run

States = Mapping[str, str]
"""How each run is doing, by its id: ``live``, ``finished``, ``killed``, …"""

FACTS = ("name", "id", "status", "method", "seconds", "started", "step")
"""Properties of every run that a filter can name, in addition to its parameters, tags and metrics."""

_TERM = re.compile(
    r"""(?P<no>-)?(?:
        /(?P<regex>(?:\\.|[^/\\])+)/(?=\s|$)
      | "(?P<quoted>[^"]*)"(?=\s|$)
      | (?P<key>"[^"]*"|[^\s"<>=!~]+)(?P<op><=|>=|!=|!~|=|<|>|~)(?P<value>"[^"]*"|\S*)
      | (?P<word>\S+)
    )""",
    re.VERBOSE,
)
_KINDS = ("params", "metrics", "tags")
_UNITS = {
    "%": 0.01, "k": 1e3, "m": 1e6, "b": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40,
    "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0,
}  # fmt: skip
_NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)([a-z%]*)", re.IGNORECASE)
_EXPLODES = re.compile(r"\((?:\\.|[^()\\])*[*+{|](?:\\.|[^()\\])*\)+[*+{]")
_LONGEST = 300  # characters of a text that a regular expression looks at
_ORDER: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge
}  # fmt: skip

Test = Callable[[Run], bool]
Read = Callable[[Run], "str | float | None"]


class QueryError(ValueError):
    """The text makes no sense: says which part, and gives a form that works."""


@dataclass(frozen=True)
class Term:
    """One part of a query.

    Args:
        no: the runs that it does not fit.
        key: the name; "": the words of a run.
        op: how it is compared; "": the words contain it, ``~``: they match it.
        value: the other side of the comparison.
    """

    no: bool
    key: str
    op: str
    value: str


def pick(text: str, runs: Sequence[Run], states: States) -> list[Run]:
    """The runs that the text means, in their order.

    Args:
        text: as described above; "": all.
        runs: out of which.
        states: how each is doing.

    Raises:
        QueryError: the text makes no sense.
    """
    anyone = [[_test(term, runs, states) for term in terms] for terms in parse(text)]
    return [run for run in runs if any(all(test(run) for test in tests) for tests in anyone)]


@lru_cache(64)
def parse(text: str) -> tuple[tuple[Term, ...], ...]:
    """The query's terms: one of the outer ones must hold, and all that are in it.

    Raises:
        QueryError: a regular expression that is none.
    """
    groups: list[list[Term]] = [[]]
    for found in _TERM.finditer(text):
        if found["word"] and found["word"].lower() == "or" and not found["no"]:
            groups.append([])
        elif found["word"] == "-":  # still being typed
            continue
        else:
            groups[-1].append(_term(found))
    # while somebody types "a or", the second half is not there yet: it must not mean everything
    return tuple(tuple(terms) for terms in groups if terms) or ((),)


def _term(found: re.Match[str]) -> Term:
    no = found["no"] is not None
    if found["key"]:
        op = found["op"]
        if op.endswith("~"):
            _compiled(found["value"].strip('"'))
        return Term(no, found["key"].strip('"'), op, found["value"].strip('"'))
    if found["regex"]:
        _compiled(found["regex"])
        return Term(no, "", "~", found["regex"])
    return Term(no, "", "", found["quoted"] if found["quoted"] is not None else found["word"])


def _test(term: Term, runs: Sequence[Run], states: States) -> Test:
    if not term.key:
        test = _words(term, states)
    elif term.value == "":  # still being typed
        return lambda run: True
    else:
        test = _condition(term, _readers(term.key, runs, states))
    return (lambda run: not test(run)) if term.no else test


def _words(term: Term, states: States) -> Test:
    if term.op == "~":
        pattern = _compiled(term.value)
        return lambda run: pattern.search(words(run, states)[:_LONGEST]) is not None
    wanted = term.value.lower()
    return lambda run: wanted in words(run, states).lower() or run.id.startswith(wanted)


def words(run: Run, states: States) -> str:
    """Where a plain word is looked for."""
    return "\n".join((run.name, states.get(run.id, ""), run.tags.get("zo.method", ""), run.tags.get("zo.recipe", "")))


def _condition(term: Term, readers: Sequence[Read]) -> Test:
    """The first of the readers that knows the run decides; a run that none knows fits no condition."""
    holds = _comparison(term.op, term.value)

    def test(run: Run) -> bool:
        value = next((found for read in readers if (found := read(run)) is not None), None)
        return value is not None and holds(value)

    return test


def _comparison(op: str, value: str) -> Callable[[str | float], bool]:
    if op in ("~", "!~"):
        pattern = _compiled(value)
        return lambda found: (pattern.search(_text(found)[:_LONGEST]) is not None) == (op == "~")
    wanted = number(value)
    if op in ("=", "!="):
        lower = value.lower()
        return lambda found: _equal(found, lower, wanted) == (op == "=")
    compare = _ORDER[op]
    return lambda found: wanted is not None and (n := number(found)) is not None and compare(n, wanted)


def _equal(found: str | float, lower: str, wanted: float | None) -> bool:
    if wanted is not None and (n := number(found)) is not None:
        return n == wanted or math.isclose(n, wanted, rel_tol=1e-12)
    return _text(found).lower() == lower


def _readers(key: str, runs: Sequence[Run], states: States) -> list[Read]:
    """How the key is read off a run: facts, then parameters, tags and metrics of that very name, then of that last part."""
    kind, _, rest = key.partition(".")
    kinds, name = ((kind.lower(),), rest) if kind.lower() in _KINDS and rest else (_KINDS, key)
    found: list[Read] = []
    if kinds is _KINDS and name.lower() in FACTS:
        found.append(partial(_fact, name=name.lower(), states=states))
    for names in (_exactly, _ending):
        found += [partial(_read, kind=one, name=full) for one in kinds for full in names(name, _names(one, runs))]
    return found


def _names(kind: str, runs: Sequence[Run]) -> set[str]:
    if kind == "metrics":
        return {key for run in runs for key in run.latest}
    return {key for run in runs for key in (run.params if kind == "params" else run.tags)}


def _exactly(name: str, names: set[str]) -> list[str]:
    return [name] if name in names else []


def _ending(name: str, names: set[str]) -> list[str]:
    """Longer names whose last part it is, shortest first."""
    lower = name.lower()
    ends = tuple(f"{sign}{lower}" for sign in "/.")
    return sorted(
        (n for n in names if n != name and (n.lower() == lower or n.lower().endswith(ends))), key=lambda n: (len(n), n)
    )


def _read(run: Run, kind: str, name: str) -> str | float | None:
    if kind == "metrics":
        return run.latest[name][2] if name in run.latest else None
    return (run.params if kind == "params" else run.tags).get(name)


def _fact(run: Run, name: str, states: States) -> str | float | None:
    if name == "seconds":
        return run.ended - run.started
    if name == "step":
        return max((step for step, _, _ in run.latest.values()), default=None)
    if name == "method":
        return run.tags.get("zo.method")
    facts = {"name": run.name, "id": run.id, "status": states.get(run.id), "started": run.started}
    return facts[name]


def number(value: str | float) -> float | None:
    """The number that the text stands for, with its unit; None: it is no number."""
    if isinstance(value, (int, float)):
        return float(value)
    found = _NUMBER.fullmatch(value.strip())
    if found is None or found[2].lower() not in (*_UNITS, ""):
        return {"inf": math.inf, "nan": math.nan}.get(value.strip().lower())
    return float(found[1]) * _UNITS.get(found[2].lower(), 1.0)


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"


@lru_cache(64)
def _compiled(pattern: str) -> re.Pattern[str]:
    if _EXPLODES.search(pattern):  # a shared link must not keep the server busy for hours
        raise QueryError(f"“{pattern}” repeats a group that repeats or chooses within itself; write it without that")
    try:
        return re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    except re.error as error:
        raise QueryError(f"“{pattern}” is no regular expression: {error}") from error
