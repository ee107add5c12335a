"""How losses at perturbed weights become (key, projected gradient) pairs.

An estimator is asked for the points where it wants the loss, and told the answers. It neither knows nor says how the
points are run: one by one, in one batch, recorded, or spread over devices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from ..types import Answer, Estimate, Key, PerExample, Point, Shared, Tangent, Term


class Estimator(ABC):
    r"""Estimates :math:`\nabla L` as the mean of :math:`g_k z(\mathrm{key}_k)` over its queries.

    Args:
        num_queries: directions per step, >= 1.
    """

    eps = 0.0
    """Perturbation scale; 0 where nothing is perturbed."""

    fewest = 1
    """Directions that it needs at least."""

    per_example = False
    """Whether it can give every example a direction of its own."""

    def __init__(self, num_queries: int = 1) -> None:
        if num_queries < self.fewest or int(num_queries) != num_queries:
            raise ValueError(
                f"`{type(self).__name__}(num_queries=...)` must be a whole number >= {self.fewest}, got {num_queries}"
            )
        self.num_queries = int(num_queries)

    @abstractmethod
    def ask(self, key: Key, examples: int | None = None) -> Sequence[Point]:
        """The points where the loss is wanted.

        Args:
            key: of the step; ``key.query`` is the first query number that no micro-batch of the step has taken.
            examples: how many examples can have directions of their own; None: a direction is shared by the batch.
        """

    @abstractmethod
    def tell(self, key: Key, answers: Sequence[Answer]) -> Estimate:
        """The estimate from the answers at the points that :meth:`ask` gave for this key, in their order."""

    def directions(self, key: Key) -> list[Key]:
        """The keys of the step's directions, the same for all its micro-batches."""
        return [key._replace(query=query) for query in range(self.num_queries)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_queries={self.num_queries})"


class FiniteDifference(Estimator, ABC):
    """Compares losses at perturbed weights.

    Args:
        eps: perturbation scale, > 0.
        num_queries: directions per step, >= 1.
    """

    def __init__(self, eps: float, num_queries: int = 1) -> None:
        super().__init__(num_queries)
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"`{type(self).__name__}(eps=...)` must be a finite number > 0, got {eps}")
        self.eps = float(eps)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(eps={self.eps}, num_queries={self.num_queries})"


class SPSA(FiniteDifference):
    r"""Two-point simultaneous perturbation, one direction for the whole batch, q queries:

    .. math:: g_k = \frac{L(\theta + \epsilon z_k) - L(\theta - \epsilon z_k)}{2\epsilon}, \qquad
              \hat g = \frac1q \sum_k g_k z_k

    Spall 1992; MeZO, arXiv:2305.17333.

    Args:
        eps: perturbation scale, > 0; about 1e-3 in float32, 3e-3 where the forward runs in bfloat16.
        num_queries: q >= 1; cost grows with q, variance falls as 1/q.
    """

    def ask(self, key: Key, examples: int | None = None) -> Sequence[Point]:
        return [Shared((Term(z, side * self.eps),)) for z in self.directions(key) for side in (1.0, -1.0)]

    def tell(self, key: Key, answers: Sequence[Answer]) -> Estimate:
        pairs = zip(answers[::2], answers[1::2], strict=True)
        gs = [(plus.loss - minus.loss) / (2 * self.eps) for plus, minus in pairs]
        return Estimate.of(map(Term, self.directions(key), gs), answers)


class OneSidedSPSA(FiniteDifference):
    r"""Every direction compared with the weights themselves, q + 1 forwards:

    .. math:: g_k = \frac{L(\theta + \epsilon z_k) - L(\theta)}{\epsilon}

    In FZOO, arXiv:2506.09034.

    Args:
        eps: perturbation scale, > 0.
        num_queries: q >= 1.
    """

    @property
    def unit(self) -> float:
        """Of z, in a probe."""
        return self.eps

    def ask(self, key: Key, examples: int | None = None) -> Sequence[Point]:
        return [Shared(), *(Shared((Term(z, self.unit),)) for z in self.directions(key))]

    def tell(self, key: Key, answers: Sequence[Answer]) -> Estimate:
        base, *others = answers
        gs = [(answer.loss - base.loss) / self.unit for answer in others]
        return Estimate.of(map(Term, self.directions(key), gs), answers)


class Coordinatewise(OneSidedSPSA):
    r"""The finite difference of each group of weights, of which a probe moves each by :math:`\mu`; q + 1 forwards:

    .. math:: \hat g = \sum_k \frac{L(\theta + \mu\, s_k) - L(\theta)}{\mu}\, s_k, \qquad s_k = \pm 1 \text{ on group } k

    For :class:`~zolightning.space.Groups`, whose :math:`z_k = \sqrt q\, s_k`; a group of one weight has its derivative.
    DeepZero, arXiv:2310.02025.

    Args:
        eps: μ > 0, of the size of a weight's own step.
        num_queries: groups of a step, q >= 1.
    """

    @property
    def unit(self) -> float:
        return self.eps / math.sqrt(self.num_queries)


class ForwardGradient(Estimator):
    r"""The exact derivative along each direction, by forward-mode differentiation:

    .. math:: g_k = z_k \cdot \nabla L(\theta)

    One forward a direction, which carries a tangent with every value: two to three times the work of a plain one, and
    twice its activations, with one weight's direction at a time in memory. No eps. Every operation must have a forward
    derivative; attention falls back to its plain form. Baydin et al., arXiv:2202.08587; in ZO-Bench, arXiv:2402.11592.

    Args:
        num_queries: directions per step, >= 1.
    """

    def ask(self, key: Key, examples: int | None = None) -> Sequence[Point]:
        return [Tangent(z) for z in self.directions(key)]

    def tell(self, key: Key, answers: Sequence[Answer]) -> Estimate:
        slopes = [a.slope for a in answers if a.slope is not None]
        return Estimate.of(map(Term, self.directions(key), slopes), answers)


class Population(FiniteDifference):
    r"""One forward a direction, compared with the other directions instead of with the weights themselves:

    .. math:: g_k = \frac{1}{\epsilon} \Big( \ell_k - \frac{1}{q-1} \sum_{j \ne k} \ell_j \Big), \qquad
              \ell_k = L(\theta + \epsilon z_k)

    Evolution strategies with the mean of the others as the baseline, which leaves the estimate unbiased; the mean of all
    would shrink it by (q − 1)/q. Salimans et al., arXiv:1703.03864; Qiu et al., arXiv:2509.24372.

    Args:
        eps: perturbation scale, > 0 (the papers' σ).
        num_queries: q >= 2, the population.
    """

    fewest = 2

    def ask(self, key: Key, examples: int | None = None) -> Sequence[Point]:
        return [Shared((Term(z, self.eps),)) for z in self.directions(key)]

    def tell(self, key: Key, answers: Sequence[Answer]) -> Estimate:
        count = len(answers)
        above = [answer.loss - answers[0].loss for answer in answers]  # exactly 0 where all are equal
        mean = sum(above) / count
        gs = [(value - mean) * count / (count - 1) / self.eps for value in above]
        estimate = Estimate.of(map(Term, self.directions(key), gs), answers)
        return estimate._replace(ties=0 if any(above) else count)  # one that gave the mean of all is no tie


class PerExampleSPSA(SPSA):
    r"""A direction for every example:

    .. math:: g_i = \frac{\ell_i(\theta + \epsilon z_i) - \ell_i(\theta - \epsilon z_i)}{2\epsilon}, \qquad
              \hat g = \frac1B \sum_i g_i z_i

    B directions for the price of one two-point step; the rank-1 :math:`z_i = u_i v_i^\top` act on activations, so the
    weights are not touched by the probes. Where examples have no losses of their own it is :class:`SPSA`. After GRZO.

    Args:
        eps: perturbation scale, > 0.
        num_queries: directions per example, >= 1.
    """

    per_example = True

    def ask(self, key: Key, examples: int | None = None) -> Sequence[Point]:
        if examples is None:
            return super().ask(key)
        queries = torch.arange(key.query, key.query + examples * self.num_queries).chunk(self.num_queries)
        offset = torch.full((examples,), self.eps, dtype=torch.float32)
        return [PerExample(key, each, side * offset) for side in (1, -1) for each in queries]

    def tell(self, key: Key, answers: Sequence[Answer]) -> Estimate:
        losses = [answer.losses for answer in answers if answer.losses is not None]
        if not losses:
            return super().tell(key, answers)
        plus, minus = torch.cat(losses).chunk(2)
        gs = ((plus - minus) / (2 * self.eps)).tolist()
        return Estimate.of([Term(key._replace(query=key.query + i), g) for i, g in enumerate(gs)], answers)
