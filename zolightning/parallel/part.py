"""One micro-batch of a step: all of its points, or this rank's share of them."""

from __future__ import annotations

from collections.abc import Sequence

from ..methods.estimators import Estimator
from ..types import Answer, Estimate, Key, PerExample, Point
from .layout import Layout


class Part:
    """A micro-batch of which all points run here.

    Args:
        estimator: whose points they are.
        key: of the step; its query is the first number that no micro-batch of this rank's step has taken.
        examples: of the batch; at least 1.
    """

    def __init__(self, estimator: Estimator, key: Key, examples: int = 1) -> None:
        self._estimator, self.key, self.examples = estimator, key, examples
        self.estimate = Estimate((), (), 0)
        """Made of the answers; of their losses only, where other ranks have the rest."""

    def ask(self, examples: int | None) -> Sequence[Point]:
        """The points that run here."""
        return self._estimator.ask(self.key, examples)

    def tell(self, answers: Sequence[Answer]) -> Estimate:
        """The estimate from the answers at these points."""
        self.estimate = self._estimator.tell(self.key, answers)
        return self.estimate

    @property
    def taken(self) -> int:
        """Query numbers that it used up; those of shared directions come again."""
        return len(self.estimate.terms)


class Share(Part):
    """A micro-batch of one group of ranks, of which this rank runs some points.

    Args:
        estimator: whose points they are.
        key: as for :class:`Part`.
        examples: of the batch; at least 1.
        layout: of the ranks.
        digest: of the batch.
    """

    def __init__(self, estimator: Estimator, key: Key, examples: int, layout: Layout, digest: int) -> None:
        super().__init__(estimator, key, examples)
        self.layout, self.digest = layout, digest
        self.own = 0
        """Examples with directions of their own; 0: they share them."""
        self.answers: Sequence[Answer] = ()

    def ask(self, examples: int | None) -> Sequence[Point]:
        points = super().ask(examples)
        self.own = next((p.queries.numel() for p in points if isinstance(p, PerExample)), 0)
        return [self.layout.point(points[place]) for place in self.layout.shares(points)[self.layout.member]]

    def tell(self, answers: Sequence[Answer]) -> Estimate:
        self.answers = answers
        if self.layout.members > 1:
            self.estimate = Estimate((), tuple(answer.loss for answer in answers), len(answers))
        else:
            self.estimate = told(self.layout, self.layout.group, self._estimator, self.key, answers)
        return self.estimate

    @property
    def taken(self) -> int:
        return max(self.own * self._estimator.num_queries, len(self.estimate.terms))


def told(layout: Layout, group: int, estimator: Estimator, key: Key, answers: Sequence[Answer]) -> Estimate:
    """The estimate of a group's micro-batch, under the keys that its directions have in the run."""
    estimate = estimator.tell(key, answers)
    if layout.groups == 1 or all(answer.losses is None for answer in answers):
        return estimate
    return estimate._replace(terms=tuple(layout.term(term, group) for term in estimate.terms))
