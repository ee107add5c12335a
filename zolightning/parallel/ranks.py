"""A session's side of a step: its questions to the ranks that it is one of, and a run of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import nn
from torch.optim import Optimizer

from ..methods.estimators import Estimator
from ..noise import Distribution
from ..space import View
from ..space.fingerprint import fingerprint
from ..types import Batch, Estimate, Key
from .merging import merge
from .part import Part

T = TypeVar("T")


class Standing(NamedTuple):
    """All that must be equal on all ranks when they take a step.

    Args:
        step: its number.
        place: of the optimizer that takes it.
        groups: the settings of its parameter groups: those of rank 0 count.
        read: places of the leaves that a probe of this rank has read: those of all ranks count.
        weights: a fingerprint of the parameters, at steps that compare it.
    """

    step: int
    place: int
    groups: tuple[Mapping[str, Any], ...]
    read: frozenset[int]
    weights: str = ""

    @classmethod
    def of(cls, step: int, place: int, optimizer: Optimizer, view: View | None, module: nn.Module, check: bool) -> Standing:
        """This rank's, with the weights' fingerprint where that is wanted; the view is None before a first estimate."""
        plain = (bool, int, float, str, tuple)
        groups = tuple({k: v for k, v in g.items() if isinstance(v, plain)} for g in optimizer.param_groups)
        leaves = () if view is None else view.leaves
        read = frozenset(i for i, leaf in enumerate(leaves) if view is not None and id(leaf.parameter) in view.read)
        return cls(step, place, groups, read, fingerprint(module.named_parameters()) if check else "")

    @classmethod
    def received(cls, row: Sequence[Any]) -> Standing:
        """From JSON, which knows no tuples and no sets."""
        step, place, groups, read, weights = row
        own = tuple({k: tuple(v) if isinstance(v, list) else v for k, v in group.items()} for group in groups)
        return cls(step, place, own, frozenset(read), weights)

    def digest(self) -> int:
        text = repr((self.step, self.place, [sorted(g.items()) for g in self.groups], sorted(self.read), self.weights))
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


class Joint(NamedTuple):
    """The findings of all ranks in a step.

    Args:
        estimate: of all of them.
        looks: the mean losses along the way over the last steps, where it was looked at.
        standing: that holds on all of them, where theirs differed.
    """

    estimate: Estimate
    looks: Sequence[float]
    standing: Standing | None = None


class Ranks(Protocol):
    """The questions of a session to the ranks that it is one of."""

    rank: int
    size: int

    def decide(self, make: Callable[[], T]) -> T:
        """Rank 0's value, which is of JSON's types."""

    def begin(self, module: nn.Module, estimator: Estimator, noise: Distribution, settings: Mapping[str, Any]) -> None:
        """Check that the ranks belong together, and give all of them the weights of rank 0."""

    def part(self, estimator: Estimator, key: Key, before: int, batch: Batch) -> Part:
        """This rank's part of a micro-batch, of which ``before`` came before it in the window."""

    def stale(self, place: int, holds: bool) -> bool:
        """Whether the subspace of this optimizer is to be found anew."""

    def found(self, place: int) -> None:
        """It is found."""

    def join(self, key: Key, parts: Sequence[Part], looks: Sequence[float], standing: Callable[[bool], Standing]) -> Joint:
        """Exchange the step."""

    def means(self, values: Sequence[float], examples: int) -> list[float]:
        """Means over the ranks' batches."""


class Alone:
    """The one process of a run that has no others."""

    rank, size = 0, 1

    def decide(self, make: Callable[[], T]) -> T:
        return make()

    def begin(self, module: nn.Module, estimator: Estimator, noise: Distribution, settings: Mapping[str, Any]) -> None:
        pass

    def part(self, estimator: Estimator, key: Key, before: int, batch: Batch) -> Part:
        return Part(estimator, key)

    def stale(self, place: int, holds: bool) -> bool:
        return not holds

    def found(self, place: int) -> None:
        pass

    def join(self, key: Key, parts: Sequence[Part], looks: Sequence[float], standing: Callable[[bool], Standing]) -> Joint:
        return Joint(merge([part.estimate for part in parts]), looks)

    def means(self, values: Sequence[float], examples: int) -> list[float]:
        return list(values)
