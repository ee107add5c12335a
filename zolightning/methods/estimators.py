"""How loss values at perturbed weights become (key, projected gradient) pairs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import suppress

import torch
from torch import Tensor

from ..space import View
from ..types import CENTRAL, Estimate, Key, Objective, RepeatError, Stencil, Term


class Estimator(ABC):
    r"""Estimates :math:`\nabla L` as the mean of :math:`g_k z(\mathrm{key}_k)` over its queries.

    Args:
        num_queries: directions per step, >= 1.
    """

    eps = 0.0
    """Perturbation scale; 0 where nothing is perturbed."""

    fewest = 1
    """Directions that it needs at least."""

    two_sided = False
    """Whether it probes a direction that all examples share at θ + εz and θ − εz."""

    def __init__(self, num_queries: int = 1) -> None:
        if num_queries < self.fewest or int(num_queries) != num_queries:
            raise ValueError(
                f"`{type(self).__name__}(num_queries=...)` must be a whole number >= {self.fewest}, got {num_queries}"
            )
        self.num_queries = int(num_queries)

    @abstractmethod
    def __call__(self, objective: Objective, view: View, key: Key) -> Estimate:
        """Probe the objective through the view. ``key.query`` is the first query number that is free."""

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

    Spall 1992; MeZO, arXiv:2305.17333. With ``stencil=FORWARD`` one-sided: q + 1 forwards instead of 2q. Both probes of a
    direction run in one batch, each weight's noise made once, where the objective takes a repeated batch.

    Args:
        eps: perturbation scale, > 0; about 1e-3 in float32, 3e-3 where the forward runs in bfloat16.
        num_queries: q >= 1; cost grows with q, variance falls as 1/q.
        stencil: where to probe, :data:`~zolightning.types.CENTRAL` or :data:`~zolightning.types.FORWARD`.
    """

    def __init__(self, eps: float, num_queries: int = 1, stencil: Stencil = CENTRAL) -> None:
        super().__init__(eps, num_queries)
        self.stencil, self.two_sided = stencil, stencil is CENTRAL

    def __call__(self, objective: Objective, view: View, key: Key) -> Estimate:
        terms, losses = [], []
        ties = 0
        base: float | None = None
        for query in range(self.num_queries):
            direction = key._replace(query=query)
            values: list[float] = []
            if self.two_sided and objective.repeats and objective.examples:
                with suppress(RepeatError), view.along_both(direction, self.eps, 2 * objective.examples):
                    values = objective.per_example(2).view(2, -1).mean(1).tolist()
                losses += values
            for offset in self.stencil.offsets[len(values) :]:
                if offset == 0.0 and base is not None:
                    values.append(base)
                    continue
                with view.along(direction, offset * self.eps):
                    value = objective()
                losses.append(value)
                values.append(value)
                if offset == 0.0:
                    base = value
            g = sum(w * v for w, v in zip(self.stencil.weights, values, strict=True)) / self.eps
            terms.append(Term(direction, g))
            ties += g == 0.0
        return Estimate(tuple(terms), tuple(losses), len(losses), ties)


class ForwardGradient(Estimator):
    r"""The exact derivative along each direction, by forward-mode differentiation:

    .. math:: g_k = z_k \cdot \nabla L(\theta)

    One forward a direction, which carries a tangent beside every value: two to three times the work of a plain one, and
    twice its activations, with one weight's direction at a time in memory. No eps. Every operation must have a forward
    derivative; attention falls back to its plain form. Baydin et al., arXiv:2202.08587; in ZO-Bench, arXiv:2402.11592.

    Args:
        num_queries: directions per step, >= 1.
    """

    def __call__(self, objective: Objective, view: View, key: Key) -> Estimate:
        terms, losses = [], []
        for query in range(self.num_queries):
            direction = key._replace(query=query)
            try:
                with view.tangent(direction):
                    loss, slope = objective.derivative()
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"a forward gradient needs a forward derivative of every operation; use estimator='spsa'. {error}"
                ) from error
            losses.append(loss)
            terms.append(Term(direction, slope))
        return Estimate(tuple(terms), tuple(losses), len(losses), sum(t.coefficient == 0.0 for t in terms))


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

    def __call__(self, objective: Objective, view: View, key: Key) -> Estimate:
        directions = [key._replace(query=query) for query in range(self.num_queries)]
        losses = []
        for direction in directions:
            with view.along(direction, self.eps):
                losses.append(objective())
        count = len(losses)
        above = [loss - losses[0] for loss in losses]  # exactly 0 where all are equal
        mean = sum(above) / count
        gs = [(value - mean) * count / (count - 1) / self.eps for value in above]
        return Estimate(tuple(map(Term, directions, gs)), tuple(losses), count, 0 if any(above) else count)


class PerExampleSPSA(FiniteDifference):
    r"""A direction for every example:

    .. math:: g_i = \frac{\ell_i(\theta + \epsilon z_i) - \ell_i(\theta - \epsilon z_i)}{2\epsilon}, \qquad
              \hat g = \frac1B \sum_i g_i z_i

    B directions for the price of one two-point step; the rank-1 :math:`z_i = u_i v_i^\top` act on activations, so the
    weights are not touched by the probes. All probes run in one batch where the module takes a repeated batch, else in
    two forwards. Without per-example losses or rank-1 leaves it is :class:`SPSA`, a direction shared by the batch. After
    GRZO.

    Args:
        eps: perturbation scale, > 0.
        num_queries: directions per example, >= 1.
    """

    two_sided = True  # where it is SPSA

    def __call__(self, objective: Objective, view: View, key: Key) -> Estimate:
        count = objective.examples if view.per_example else None
        if not count:
            return SPSA(self.eps, self.num_queries)(objective, view, key)
        first = key.query
        directions = count * self.num_queries
        queries = torch.arange(first, first + directions)
        offsets = torch.full((directions,), self.eps, dtype=torch.float32)
        if objective.repeats:
            with suppress(RepeatError), view.along_each(key, queries.repeat(2), torch.cat((offsets, -offsets))):
                plus, minus = objective.per_example(2 * self.num_queries).view(2, directions)
        if not objective.repeats:
            plus, minus = (self._one_by_one(objective, view, key, queries, side * offsets) for side in (1, -1))
        g = ((plus - minus) / (2 * self.eps)).tolist()
        terms = tuple(Term(key._replace(query=first + i), v) for i, v in enumerate(g))
        forwards = 2 * self.num_queries
        return Estimate(terms, (plus.mean().item(), minus.mean().item()), forwards, sum(v == 0.0 for v in g))

    def _one_by_one(self, objective: Objective, view: View, key: Key, queries: Tensor, offsets: Tensor) -> Tensor:
        """One side of the probes, a forward for each query."""
        losses = []
        for q, o in zip(queries.chunk(self.num_queries), offsets.chunk(self.num_queries), strict=True):
            with view.along_each(key, q, o):
                losses.append(objective.per_example(1))
        return torch.cat(losses)
