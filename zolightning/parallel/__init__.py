"""Several processes that take one step together: they exchange projected gradients and losses, never weights."""

from .exchange import RanksError
from .layout import MODES, Layout, Parallel
from .merging import merge
from .part import Part
from .ranks import Alone, Joint, Ranks, Standing
from .team import Team, tensors_of

__all__ = [
    "MODES",
    "Alone",
    "Joint",
    "Layout",
    "Parallel",
    "Part",
    "Ranks",
    "RanksError",
    "Standing",
    "Team",
    "merge",
    "tensors_of",
]
