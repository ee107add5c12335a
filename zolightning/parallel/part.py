"""One micro-batch of a step that several ranks take."""

from __future__ import annotations

from collections.abc import Sequence

from ..methods.estimators import Estimator
from ..types import Answer, Estimate, Key, PerExample, Point
from .layout import Layout


class Part:
    """One micro-batch, of whose points this rank runs its share.

    Args:
        layout: of the ranks.
        estimator: whose points they are.
        key: of the step; its query is the first number that no micro-batch of this rank's step has taken.
        examples: of the batch; at least 1.
        digest: of the batch.
    """

    def __init__(self, layout: Layout, estimator: Estimator, key: Key, examples: int = 1, digest: int = 0) -> None:
        self.key, self.examples, self.digest = key, examples, digest
        self._layout, self._estimator = layout, estimator
        self.own = 0
        """Examples with directions of their own; 0: they share them."""
        self.answers: Sequence[Answer] = ()
        self.estimate = Estimate((), (), 0)
        """What this rank knows: the batch's, or only losses where its points are spread."""

    def ask(self, examples: int | None) -> list[Point]:
        """The points that run here."""
        points = self._estimator.ask(self.key, examples)
        self.own = next((p.queries.numel() for p in points if isinstance(p, PerExample)), 0)
        mine = self._layout.shares(points)[self._layout.member]
        return [self._layout.point(points[place]) for place in mine]

    def tell(self, answers: Sequence[Answer]) -> Estimate:
        """What these answers at the points say."""
        self.answers = answers
        if self._layout.members > 1:
            self.estimate = Estimate((), tuple(answer.loss for answer in answers), len(answers))
        else:
            self.estimate = told(self._layout, self._layout.group, self._estimator, self.key, answers)
        return self.estimate

    @property
    def taken(self) -> int:
        """Query numbers that it used up; those of shared directions come again."""
        return max(self.own * self._estimator.num_queries, len(self.estimate.terms))


def told(layout: Layout, group: int, estimator: Estimator, key: Key, answers: Sequence[Answer]) -> Estimate:
    """The estimate of a group's micro-batch, under the keys that its directions have in the run."""
    estimate = estimator.tell(key, answers)
    if layout.groups == 1 or all(answer.losses is None for answer in answers):
        return estimate
    return estimate._replace(terms=tuple(layout.term(term, group) for term in estimate.terms))
