"""How much of the gradient is in each parameter, by forwards: what directions of groups are dealt out by."""

from __future__ import annotations

import math

import torch

from ..space import GroupLeaf, View, arrange
from ..types import Batch, Forward, Key, Shared, SkipStep, Term
from .isolation import Isolation
from .objective import loss_value

ROUNDS = 4
"""Probed directions of each parameter: the mean square of so many slopes is off by a factor of about two."""


@torch.no_grad()
def importances(forward: Forward, batch: Batch, view: View, isolation: Isolation, eps: float) -> list[float]:
    r"""√n‖∇L‖ of each leaf, whose n weights are moved without the others, without a trace.

    With :math:`n_l` weights in :math:`q_l` groups the squared error of leaf l is :math:`(n_l/q_l - 1)\|\nabla_l\|^2`. Its sum
    is smallest where :math:`q_l \propto \sqrt{n_l}\,\|\nabla_l\|` (Neyman 1934), and
    :math:`\mathrm{E}(s \cdot \nabla_l)^2 = \|\nabla_l\|^2` for s of ±1. Two forwards for each leaf and round.
    """
    leaves = [leaf for leaf in view.leaves if isinstance(leaf, GroupLeaf)]
    count = len(leaves)
    arrange(leaves, count, 0.0, [1.0] * count)
    for place, leaf in enumerate(leaves):
        leaf.begin, leaf.end = float(place), place + 1.0

    def loss(key: Key, offset: float) -> float:
        with isolation.dry(), view.at(Shared((Term(key, offset / math.sqrt(count)),))):
            try:
                return loss_value(forward(batch))
            except SkipStep:
                return math.nan

    found = []
    for place, leaf in enumerate(leaves):
        keys = [Key(0, step, place) for step in range(ROUNDS)]
        slopes = [(loss(key, eps) - loss(key, -eps)) / (2 * eps) for key in keys]
        square = math.fsum(slope * slope for slope in slopes) / ROUNDS
        found.append(math.sqrt(leaf.parameter.numel() * square) if math.isfinite(square) else 0.0)
    return found
