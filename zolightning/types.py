"""The few values that flow through one step. A ZO gradient is never a vector: it is (key, coefficient) pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class SkipStep(Exception):
    """The user's step returned None: this micro-batch gives no estimate."""


class PerExampleError(ValueError):
    """The model reads a weight in a way that no direction of its own can reach for each example."""


class RepeatError(RuntimeError):
    """The user's step does not take this batch repeated."""


class Key(NamedTuple):
    """The name of one perturbation: its noise is a pure function of this key, the leaf and the element.

    Args:
        seed: the run's seed, 64 bit.
        step: the optimizer step, counted from 0.
        query: which of the step's directions.
    """

    seed: int
    step: int
    query: int = 0


class Term(NamedTuple):
    """``coefficient * z(key)``: one summand of a perturbation or of an update."""

    key: Key
    coefficient: float


class Shared(NamedTuple):
    """All examples see θ + Σ_k c_k z_k, whose keys are of one step."""

    terms: Sequence[Term]

    @property
    def key(self) -> Key:
        return self.terms[0].key


class Both(NamedTuple):
    """The first half of the examples sees θ + c z, the second half θ − c z."""

    term: Term
    examples: int
    """In both halves together."""

    @property
    def key(self) -> Key:
        return self.term.key


class PerExample(NamedTuple):
    """Example n sees θ + offsets[n] · z(key with queries[n])."""

    key: Key
    queries: Tensor
    offsets: Tensor


class Tangent(NamedTuple):
    """All examples see θ, as dual tensors with the tangent z(key)."""

    key: Key


Point = Shared | Both | PerExample | Tangent


class Stencil(NamedTuple):
    r"""Where a directional derivative is probed.

    .. math:: z \cdot \nabla f \approx \frac1\epsilon \sum_i w_i f(\theta + o_i\,\epsilon z)
    """

    offsets: tuple[float, ...]
    weights: tuple[float, ...]


CENTRAL = Stencil(offsets=(1.0, -1.0), weights=(0.5, -0.5))
FORWARD = Stencil(offsets=(1.0, 0.0), weights=(1.0, -1.0))


class Objective(Protocol):
    """The loss of the current micro-batch at whatever point the view is at."""

    def __call__(self) -> float:
        """The mean loss, in double precision. Raises SkipStep when the user's step returned None."""

    def derivative(self) -> tuple[float, float]:
        """The mean loss and its derivative along the tangents of the weights, in double precision, in one forward."""

    def per_example(self, copies: int) -> Tensor:
        """Losses of shape (copies * examples,) of the batch repeated ``copies`` times, in float64, in one forward.

        Raises RepeatError when the user's step does not take it; ``repeats`` is False from then on.
        """

    @property
    def examples(self) -> int | None:
        """How many examples the micro-batch holds, or None when they have no losses of their own."""

    @property
    def repeats(self) -> bool:
        """Whether ``copies`` may be more than 1: the module takes a batch of any size, and treats its copies alike."""


class Estimate(NamedTuple):
    r"""The estimated gradient :math:`\hat g = \sum_k c_k z(\mathrm{key}_k)` of one step.

    Args:
        terms: the (key, coefficient) pairs; coefficients are doubles.
        losses: the mean loss of each probe, in the order they ran.
        forwards: probes, counted in batches of the user's size; one that left unperturbed blocks out counts as one.
        ties: how many coefficients came out exactly 0 because both probes gave the same loss.
    """

    terms: tuple[Term, ...]
    losses: tuple[float, ...]
    forwards: int
    ties: int = 0

    @property
    def coefficients(self) -> tuple[float, ...]:
        return tuple(t.coefficient for t in self.terms)

    @property
    def loss(self) -> float:
        """Mean loss over the probes, to second order in eps the loss at the unperturbed weights."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan  # fsum raises on inf - inf

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.coefficients))


class StepRecord(NamedTuple):
    """What one optimizer step did: enough to log it, and, with the base weights, to redo it.

    Args:
        step: optimizer steps taken before this one.
        terms: the (key, coefficient) pairs handed to the optimizer; empty when the step was skipped.
        raw: the projected gradients before shaping, one for each term.
        loss: mean training loss over the probes of the window.
        lrs: learning rate of each parameter group.
        forwards: forward passes spent in the window.
        ties: projected gradients that are exactly 0.
        clipped: coefficients that the Trainer's gradient clipping or the recipe's clip changed.
        skipped: why no update was made ("" when one was): nothing finite to go by, or nothing but ties.
    """

    step: int
    terms: tuple[Term, ...]
    raw: tuple[float, ...]
    loss: float
    lrs: tuple[float, ...]
    forwards: int
    ties: int
    clipped: int
    skipped: str = ""

    @property
    def projected_grad(self) -> float:
        """Root mean square of the projected gradients: |g| when there is one query."""
        return math.sqrt(math.fsum(g * g for g in self.raw) / len(self.raw)) if self.raw else math.nan
