"""Which kind of leaf a selected parameter becomes: a value that a recipe holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..noise import Distribution
from .leaf import DenseLeaf, Leaf
from .outer_leaf import LowRankLeaf, Rank1Leaf
from .sparse_leaf import SparseLeaf


class Place(NamedTuple):
    """The arguments of every leaf; see :class:`~zolightning.space.Leaf`."""

    name: str
    number: int
    parameter: nn.Parameter
    distribution: Distribution


class Structure(ABC):
    """Makes the leaves of a view. A function from parameters to leaves: it keeps nothing."""

    @abstractmethod
    def leaf(self, place: Place, linear: bool, before: Mapping[str, float]) -> Leaf | None:
        """The leaf of a parameter; None leaves it as it is, untrained.

        Args:
            place: the parameter, its name and number, and its noise.
            linear: it is a matrix that only linear layers own.
            before: the leaf's settings earlier in this training, which a resumed run goes on with; {} when it begins.
        """


@dataclass(frozen=True)
class Dense(Structure):
    """z of the parameter's shape."""

    def leaf(self, place: Place, linear: bool, before: Mapping[str, float]) -> Leaf:
        return DenseLeaf(*place)


@dataclass(frozen=True)
class Rank1(Structure):
    """z = u vᵀ on the matrices of linear layers, applied to activations, and dense z on vectors; nothing else is trained.

    Each example of a batch can have directions of its own: a vector's where the model reads it beside activations.
    """

    vectors: bool = True
    """False: only matrices."""

    def leaf(self, place: Place, linear: bool, before: Mapping[str, float]) -> Leaf | None:
        if linear:
            return Rank1Leaf(*place)
        return DenseLeaf(*place) if self.vectors and place.parameter.dim() == 1 else None


@dataclass(frozen=True)
class Sparse(Structure):
    """Dense z on the small weights of each parameter, the large ones stay: :class:`~zolightning.space.SparseLeaf`."""

    sparsity: float = 0.75
    """Share of each parameter's weights that is left out, in [0, 1): 0.75 trains the quarter nearest to zero."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"`Sparse(sparsity=...)` is the share left untrained, in [0, 1), got {self.sparsity}")

    def leaf(self, place: Place, linear: bool, before: Mapping[str, float]) -> Leaf:
        known = before.get("threshold") if before.get("sparsity") == self.sparsity else None
        return SparseLeaf(*place, self.sparsity, known)


@dataclass(frozen=True)
class LowRank(Structure):
    """z = U Vᵀ/√r on matrices, V the same for some steps: :class:`~zolightning.space.LowRankLeaf`. Dense z on vectors."""

    rank: int = 1
    """r, >= 1."""

    hold: int = 100
    """Steps that share V, >= 1."""

    def __post_init__(self) -> None:
        for name in ("rank", "hold"):
            if getattr(self, name) < 1:
                raise ValueError(f"`LowRank({name}=...)` must be >= 1, got {getattr(self, name)}")

    def leaf(self, place: Place, linear: bool, before: Mapping[str, float]) -> Leaf:
        if place.parameter.dim() < 2 or not place.parameter.numel():
            return DenseLeaf(*place)
        return LowRankLeaf(*place, self.rank, self.hold)


STRUCTURES: dict[str, Structure] = {"dense": Dense(), "rank1": Rank1(), "sparse": Sparse(), "lowrank": LowRank()}
"""The ones that a recipe may call by name."""
