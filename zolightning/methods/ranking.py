"""Training by comparisons: somebody says which of a few candidates are better, and nobody a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cmp_to_key
from itertools import groupby
from typing import Protocol, TypeAlias

from ..mixin import ZOMixin
from ..types import Answer, Candidate, Estimate, Forward, Key, Point, Shared, Term
from .estimators import Estimator, FiniteDifference

Groups: TypeAlias = Sequence["int | Sequence[int]"]
"""Numbers of candidates, the best first; equal ones together. Those that are not named are worse than all of them."""


class RankingError(ValueError):
    """An oracle's answer is no ranking of the candidates."""


class EndOfRanking(Exception):
    """The person who ranks stops. It ends the fit; the weights are those of the last ranking."""


class Oracle(Protocol):
    """Ranks candidates."""

    def __call__(self, candidates: Sequence[object], top: int) -> Groups:
        """The best ``top`` of them in order, or more, or fewer."""


class Ranking(FiniteDifference):
    r"""The order of m probes, of which the best k are told apart:

    .. math:: \hat g = \frac{1}{\mu |E|} \sum_{(i, j) \in E} (z_j - z_i) = \frac1\mu \sum_i w_i z_i, \qquad
              w_i = \frac{\#\{j \text{ better than } i\} - \#\{j \text{ worse than } i\}}{|E|}

    over all pairs E of which i is better than j. The weights sum to 0: at rank r < k, counted from 0, without equal ones
    w = (2r − m + 1)/|E|, and k/|E| for the others. ZO-RankSGD, arXiv:2303.03751.

    ``ZOMixin.zo_candidate(batch)`` gives the object that is ranked: a picture, a text, anything.

    Args:
        oracle: ranks the candidates; :func:`by_score`, :func:`by_comparison`, :class:`Terminal`, or any function.
        candidates: m >= 2, probes a step.
        top: k, how many the oracle is asked to order, 1 … m − 1.
        eps: μ > 0, how far the candidates are from the weights.
    """

    fewest = 2

    def __init__(self, oracle: Oracle, candidates: int = 6, top: int = 3, eps: float = 0.1) -> None:
        super().__init__(eps, candidates)
        if not callable(oracle):
            raise ValueError(f"`Ranking(oracle=...)` must be a function of candidates, got {oracle!r}")
        if not 1 <= top < self.num_queries:
            raise ValueError(f"`Ranking(top=...)` must be in 1 … {self.num_queries - 1}, got {top}")
        self.oracle, self.top = oracle, top

    def ask(self, key: Key, examples: int | None = None) -> Sequence[Point]:
        return [Shared((Term(z, self.eps),)) for z in self.directions(key)]

    def tell(self, key: Key, answers: Sequence[Answer]) -> Estimate:
        if any(answer.candidate is None for answer in answers):
            raise TypeError(
                "`Ranking` needs candidates: derive the module from ZOMixin and define `zo_candidate(batch)`, or let the step "
                "return `Candidate(...)`"
            )
        shown = [answer.candidate.value for answer in answers if answer.candidate is not None]
        weights = ranking_weights(self.oracle(shown, self.top), len(shown))
        count = len(weights)  # an estimate is a mean over its terms
        terms = [Term(z, w * count / self.eps) for z, w in zip(self.directions(key), weights, strict=True)]
        return Estimate(tuple(terms), (), count, 0 if any(weights) else count)

    def __repr__(self) -> str:
        return f"Ranking(candidates={self.num_queries}, top={self.top}, eps={self.eps})"


def forward_of(module: ZOMixin, estimator: Estimator) -> Forward:
    """The function that probes call: the module's objective, or its maker of candidates."""
    if isinstance(estimator, Ranking):
        return lambda batch: Candidate(module.zo_candidate(batch))
    return module.zo_objective


def ranking_weights(ranking: Groups, count: int) -> list[float]:
    """The weight of each of ``count`` candidates, see :class:`Ranking`; all 0 when none is better than another.

    Raises:
        RankingError: a number that no candidate has, or one that comes twice.
    """
    groups = [[group] if isinstance(group, int) else list(group) for group in ranking]
    named = [number for group in groups for number in group]
    if len(set(named)) < len(named) or not set(named) <= set(range(count)):
        raise RankingError(f"a ranking names some of the candidates 0 … {count - 1}, each once; got {list(ranking)}")
    groups.append([number for number in range(count) if number not in set(named)])
    better, excess, pairs = 0, [0] * count, 0
    for group in groups:
        worse = count - better - len(group)
        for number in group:
            excess[number] = better - worse
        pairs += len(group) * worse
        better += len(group)
    return [number / pairs if pairs else 0.0 for number in excess]


def by_score(score: Callable[[object], float]) -> Oracle:
    """An oracle that orders candidates by a number, the smallest first; equal numbers are equal.

    Args:
        score: of one candidate. Only its order counts.
    """

    def oracle(candidates: Sequence[object], top: int) -> Groups:
        scores = [float(score(candidate)) for candidate in candidates]
        if any(value != value for value in scores):
            raise RankingError(f"the scores {scores} have no order")
        order = sorted(range(len(scores)), key=scores.__getitem__)
        return _first([list(group) for _, group in groupby(order, scores.__getitem__)], top)

    return oracle


def by_comparison(compare: Callable[[object, object], float]) -> Oracle:
    """An oracle that sorts by comparing two candidates at a time, about m·log₂ m times.

    Args:
        compare: (a, b) → below 0 when a is better, above 0 when b is, 0 when they are equal.
    """

    def oracle(candidates: Sequence[object], top: int) -> Groups:
        def between(i: int, j: int) -> int:
            difference = compare(candidates[i], candidates[j])
            return (difference > 0) - (difference < 0)

        order = sorted(range(len(candidates)), key=cmp_to_key(between))
        groups = [[order[0]]]
        for number in order[1:]:
            if between(groups[-1][0], number) == 0:
                groups[-1].append(number)
            else:
                groups.append([number])
        return _first(groups, top)

    return oracle


def _first(groups: list[list[int]], top: int) -> Groups:
    """As many groups as hold the best ``top``."""
    taken: list[list[int]] = []
    while groups and sum(map(len, taken)) < top:
        taken.append(groups.pop(0))
    return taken


class Terminal:
    """Asks a person at the terminal: numbers from the best on, as "3 1=2 5"; "stop" ends the training.

    Args:
        show: candidate → the text that stands for it.
        read: gives a line for a prompt.
        write: takes a line.
    """

    def __init__(
        self, show: Callable[[object], str] = str, read: Callable[[str], str] = input, write: Callable[[str], object] = print
    ) -> None:
        self.show, self.read, self.write = show, read, write

    def __call__(self, candidates: Sequence[object], top: int) -> Groups:
        for number, candidate in enumerate(candidates, 1):
            self.write(f"[{number}]\n{self.show(candidate)}")
        while True:
            line = self.read(f"the best {top} of {len(candidates)}, as '3 1=2', or stop: ").strip()
            if line == "stop":
                raise EndOfRanking("stopped at the terminal")
            try:
                ranking = [[int(number) - 1 for number in group.split("=")] for group in line.split()]
                ranking_weights(ranking, len(candidates))
            except ValueError:
                self.write(f"that is no ranking of 1 to {len(candidates)}: numbers, each once, '=' between equal ones")
                continue
            if ranking:
                return ranking
