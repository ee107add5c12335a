"""Which kind of leaf a selected parameter becomes: a value that a recipe holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import nn

from ..noise import Distribution, Rademacher
from .group_leaf import GroupLeaf
from .leaf import DenseLeaf, Leaf
from .outer_leaf import LowRankLeaf, Rank1Leaf
from .sparse_leaf import SparseLeaf

Allocate = Literal["size", "even", "gradient"]
Ratios = Literal["directions", "size", "magnitude", "grasp"]


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


@dataclass(frozen=True)
class Epochs:
    """A number of epochs, where a number of steps can stand too."""

    count: int
    """>= 1."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"`Epochs({self.count})` must be >= 1")


@dataclass(frozen=True)
class Groups(Structure):
    """Disjoint groups of weights, one for each of the step's ``num_queries`` directions: :class:`~zolightning.space.GroupLeaf`.

    With one direction and a sparsity it is ZO-Bench's gradient sparsity, arXiv:2402.11592; with a direction for each weight,
    coordinate-wise estimation. A probe runs only the part of the model that its group reaches, see
    :class:`~zolightning.probing.feature_reuse.FeatureReuse`. The noise must be ±1.
    """

    allocate: Allocate = "size"
    """How directions are dealt out to parameters. 'size': groups of one size. 'even': as many groups for each parameter.
    'gradient': in proportion to √n‖∇L‖ of its n weights, which has the smallest error for the forwards; found on the first
    batch by probes of one parameter at a time."""

    sparsity: float = 0.0
    """Share of the weights that a step leaves out, drawn at random, in [0, 1)."""

    redraw: int | Epochs = 1
    """Steps, or :class:`Epochs`, after which groups and left out weights are drawn anew, >= 1."""

    ratios: Ratios = "directions"
    """Which share of its weights each parameter keeps where there is a sparsity. 'directions': as directions are dealt out.
    'size': the same of each. The others rank all weights, and give a parameter as many as it has among the best: 'magnitude':
    by |θ|; 'grasp': by ZO-GraSP's scores, found on the first batch by forwards."""

    reuse: float = 256.0
    """MiB, >= 0, of outputs that a step keeps, so that a probe runs only the modules that its group reaches. 0: it runs all."""

    def __post_init__(self) -> None:
        for name, allowed in (("allocate", get_args(Allocate)), ("ratios", get_args(Ratios))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"`Groups({name}={value!r})` is unknown; allowed: {', '.join(allowed)}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"`Groups(sparsity=...)` is the share left out of a step, in [0, 1), got {self.sparsity}")
        if isinstance(self.redraw, int) and self.redraw < 1:
            raise ValueError(f"`Groups(redraw=...)` must be >= 1, got {self.redraw}")
        if not self.reuse >= 0:
            raise ValueError(f"`Groups(reuse=...)` is in MiB and must be >= 0, got {self.reuse}")

    def leaf(self, place: Place, linear: bool, before: Mapping[str, float]) -> Leaf:
        if not isinstance(place.distribution, Rademacher):
            raise ValueError(f"groups need noise of ±1, got {place.distribution!r}; use noise='rademacher'")
        return GroupLeaf(place.name, place.number, place.parameter, place.distribution, **before)


STRUCTURES: dict[str, Structure] = {
    "dense": Dense(),
    "rank1": Rank1(),
    "sparse": Sparse(),
    "lowrank": LowRank(),
    "groups": Groups(),
}
"""The ones that a recipe may call by name."""


def structure_of(choice: str | Structure) -> Structure:
    """A structure, or the one of that name in STRUCTURES."""
    return STRUCTURES[choice] if isinstance(choice, str) else choice
