"""The perturbed weights: leaves, the views that hold them, and the probes that read them perturbed."""

from .build import Scales, build_view, take_turns
from .compute import Rounds, compute_with
from .cycle import Cycle, Turn
from .dominant import dominant_block
from .group_leaf import GroupLeaf, arrange, deal
from .leaf import DenseLeaf, Leaf, block_rows, keep_
from .outer_leaf import LowRankLeaf, Rank1Leaf
from .probe import Both
from .scale_leaf import AbsoluteScaleLeaf, RelativeScaleLeaf, RowScaleLeaf, ScaleLeaf
from .scales import expose_scales
from .select import Select, blocks, select
from .sparse_leaf import SparseLeaf
from .structure import STRUCTURES, Dense, Epochs, Groups, LowRank, Place, Rank1, Sparse, Structure, structure_of
from .together import descend_
from .view import View

LEAVES: dict[str, type[Leaf]] = {
    "dense": DenseLeaf,
    "rank1": Rank1Leaf,
    "sparse": SparseLeaf,
    "lowrank": LowRankLeaf,
    "group": GroupLeaf,
    "absolute-scale": AbsoluteScaleLeaf,
    "relative-scale": RelativeScaleLeaf,
    "row-scale": RowScaleLeaf,
}
"""The kinds by the names that a ledger gives them."""

__all__ = [
    "LEAVES",
    "STRUCTURES",
    "AbsoluteScaleLeaf",
    "Both",
    "Cycle",
    "Dense",
    "DenseLeaf",
    "Epochs",
    "GroupLeaf",
    "Groups",
    "Leaf",
    "LowRank",
    "LowRankLeaf",
    "Place",
    "Rank1",
    "Rank1Leaf",
    "RelativeScaleLeaf",
    "Rounds",
    "RowScaleLeaf",
    "ScaleLeaf",
    "Scales",
    "Select",
    "Sparse",
    "SparseLeaf",
    "Structure",
    "Turn",
    "View",
    "arrange",
    "block_rows",
    "blocks",
    "build_view",
    "compute_with",
    "deal",
    "descend_",
    "dominant_block",
    "expose_scales",
    "keep_",
    "select",
    "structure_of",
    "take_turns",
]
