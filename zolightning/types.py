"""The few values that flow through one step. A ZO gradient is never a vector: it is (key, coefficient) pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Batch: TypeAlias = Any
"""Whatever the data loader gives: tensors in tuples, lists, mappings or dataclasses."""

StepOutput: TypeAlias = Any
"""Whatever the user's step returns: None, a number, a tensor, or a mapping with 'loss'."""

Forward: TypeAlias = Callable[[Batch], StepOutput]
"""The user's step: it evaluates the batch that it is given."""

Prepare: TypeAlias = Callable[[Batch], Batch]
"""Makes, once for all probes, the value that the user's step gets in place of the batch; None: it gets the batch."""

StateDict: TypeAlias = dict[str, Any]
"""A checkpoint, or the part of it that one object keeps: values that ``torch.save`` takes, by name."""

ParamGroup: TypeAlias = dict[str, Any]
"""An entry of an optimizer's ``param_groups``: its parameters, and its settings by name."""

Operation: TypeAlias = Callable[..., Any]
"""A function of PyTorch's, as a function mode sees it called."""


class SkipStep(Exception):
    """The user's step returned None: this micro-batch gives no estimate."""


class PerExampleError(ValueError):
    """The model reads a weight in a way that no direction of its own can reach for each example."""


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
    """A point that all examples share: θ + Σ_k c_k z_k, whose keys are of one step; without terms θ itself."""

    terms: tuple[Term, ...] = ()

    @property
    def key(self) -> Key:
        return self.terms[0].key


class PerExample(NamedTuple):
    """Example n sees θ + offsets[n] · z(key with queries[n])."""

    key: Key
    queries: Tensor
    """int64 of shape (B,)."""
    offsets: Tensor
    """float32 of shape (B,)."""


class Tangent(NamedTuple):
    """All examples see θ, as dual tensors with the tangent z(key)."""

    key: Key


Point = Shared | PerExample | Tangent
"""Where an estimator wants the loss."""


class Candidate:
    """The output of a step that has no loss: an object that is ranked, see :class:`~zolightning.methods.ranking.Ranking`.

    Args:
        value: a picture, a text, any object.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


class Answer(NamedTuple):
    """The output of the user's step at one point, in double precision.

    Args:
        loss: the mean loss.
        losses: float64 of shape (B,) on the CPU, each example's own, at a :class:`PerExample` point.
        slope: the loss's derivative along the tangent, at a :class:`Tangent` point.
        candidate: in place of a loss, which is nan then.
    """

    loss: float
    losses: Tensor | None = None
    slope: float | None = None
    candidate: Candidate | None = None


class Estimate(NamedTuple):
    r"""The estimated gradient :math:`\hat g = \sum_k c_k z(\mathrm{key}_k)` of one step.

    Args:
        terms: the (key, coefficient) pairs; coefficients are doubles.
        losses: the mean loss of each probe, in the order they ran.
        forwards: probes, counted in batches of the user's size; one that left unperturbed blocks out counts as one.
        ties: how many coefficients came out exactly 0 because the probes gave the same loss.
        output: of the user's step at the first point.
    """

    terms: tuple[Term, ...]
    losses: tuple[float, ...]
    forwards: int
    ties: int = 0
    output: StepOutput = None

    @classmethod
    def of(cls, terms: Iterable[Term], answers: Sequence[Answer]) -> Estimate:
        """From the terms and the answers that they were made of, a forward each."""
        terms = tuple(terms)
        ties = sum(term.coefficient == 0.0 for term in terms)
        return cls(terms, tuple(answer.loss for answer in answers), len(answers), ties)

    @property
    def coefficients(self) -> tuple[float, ...]:
        return tuple(t.coefficient for t in self.terms)

    @property
    def loss(self) -> float:
        """Mean loss over the probes, to second order in eps the loss at the unperturbed weights."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan  # fsum raises on inf - inf


class StepRecord(NamedTuple):
    """The record of one optimizer step: enough to log it, and, with the base weights, to redo it.

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
        unread: places of the leaves that no probe of the step read, and that get no update.
        backprop: names of the parameters that backprop trains in the same step, whose gradients the record does not hold.
        anchor: (λ of :class:`~zolightning.ZOConfig`, the step before which θ₀ was noted); None: no weight is drawn back.
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
    unread: tuple[int, ...] = ()
    backprop: tuple[str, ...] = ()
    anchor: tuple[float, int] | None = None

    @property
    def projected_grad(self) -> float:
        """Root mean square of the projected gradients: |g| when there is one query."""
        return math.sqrt(math.fsum(g * g for g in self.raw) / len(self.raw)) if self.raw else math.nan

    @property
    def ranked(self) -> bool:
        """Whether probes were compared and none had a loss."""
        return math.isnan(self.loss) and bool(self.raw) and all(map(math.isfinite, self.raw))
