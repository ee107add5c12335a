"""Which weights matter, by magnitude or by forwards only, for masks and for directions dealt out to groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..space import DenseLeaf, GroupLeaf, Groups, Leaf, View, arrange, deal
from ..types import Batch, Forward, Key, Shared, SkipStep, Term
from .isolation import Isolation
from .objective import loss_value

ROUNDS = 4
"""Probed directions of each parameter: the mean square of so many slopes is off by a factor of about two."""

GRASP_DIRECTIONS = 192
"""Of DeepZero's experiments; each takes four forwards, once."""

Loss = Callable[[Sequence[Term]], float]
"""Of the first batch at θ + Σ_k c_k z_k, without a trace."""


@torch.no_grad()
def deal_out(
    structure: Groups, queries: int | None, forward: Forward, batch: Batch, view: View, isolation: Isolation, eps: float
) -> None:
    """Give each leaf the weights that a step trains, and its part of the step's directions.

    Args:
        structure: the rules.
        queries: directions of a step; None: as many as a step trains weights.
        forward: the user's step.
        batch: the first micro-batch.
        view: of groups; weights are not written.
        isolation: of the module.
        eps: of the probes, > 0.
    """
    leaves = [leaf for leaf in view.leaves if isinstance(leaf, GroupLeaf)]
    sizes = [leaf.parameter.numel() for leaf in leaves]
    total = round((1 - structure.sparsity) * sum(sizes))
    importance = [1.0] * len(leaves)
    if structure.allocate == "gradient":
        found = importances(_loss(forward, batch, view, isolation), leaves, eps)
        importance = found if any(found) else [float(size) for size in sizes]
    if not structure.sparsity:
        kept = sizes
    elif structure.ratios == "magnitude":
        kept = best([leaf.parameter.detach().abs() for leaf in leaves], total)
    elif structure.ratios == "grasp":
        dense = [DenseLeaf(leaf.name, leaf.index, leaf.parameter, leaf.distribution) for leaf in leaves]
        kept = best(grasp(_loss(forward, batch, View(view.root, dense), isolation), dense, eps), total)
    else:
        by_size = structure.ratios == "size" or structure.allocate == "size"
        kept = deal(total, sizes, [float(size) for size in sizes] if by_size else importance)
    arrange(leaves, queries, kept, [float(count) for count in kept] if structure.allocate == "size" else importance)


def _loss(forward: Forward, batch: Batch, view: View, isolation: Isolation) -> Loss:
    def loss(terms: Sequence[Term]) -> float:
        with isolation.dry(), view.at(Shared(tuple(terms))):
            try:
                return loss_value(forward(batch))
            except SkipStep:
                return math.nan

    return loss


def importances(loss: Loss, leaves: Sequence[GroupLeaf], eps: float) -> list[float]:
    r"""√n‖∇L‖ of each leaf, whose n weights are moved without the others.

    With :math:`n_l` weights in :math:`q_l` groups the squared error of leaf l is :math:`(n_l/q_l - 1)\|\nabla_l\|^2`. Its sum
    is smallest where :math:`q_l \propto \sqrt{n_l}\,\|\nabla_l\|` (Neyman 1934), and
    :math:`\mathrm{E}(s \cdot \nabla_l)^2 = \|\nabla_l\|^2` for s of ±1. Two forwards for each leaf and round.
    """
    sizes, count = [leaf.parameter.numel() for leaf in leaves], len(leaves)
    arrange(leaves, count, sizes, [1.0] * count)
    for place, leaf in enumerate(leaves):
        leaf.begin, leaf.end = float(place), place + 1.0
    found = []
    for place, size in enumerate(sizes):
        keys = [Key(0, step, place) for step in range(ROUNDS)]
        square = math.fsum(_slope(loss, key, eps, unit=math.sqrt(count)) ** 2 for key in keys) / ROUNDS
        found.append(math.sqrt(size * square) if math.isfinite(square) else 0.0)
    return found


def grasp(loss: Loss, leaves: Sequence[Leaf], eps: float) -> list[Tensor]:
    r"""ZO-GraSP's scores of the weights, of which large ones are kept: θ ⊙ Hg by forwards only, DeepZero, arXiv:2310.02025.

    .. math:: g_0 = \tfrac1m \textstyle\sum_k g_k(\theta) z_k, \qquad g_1 = \tfrac1m \sum_k g_k(\theta + \epsilon g_0) z_k,
              \qquad Hg = (g_1 - g_0)/\epsilon

    GraSP, arXiv:2002.07376, takes the weights away whose −θ ⊙ Hg is largest. Both estimates share their m directions, as
    many as :data:`GRASP_DIRECTIONS` or as there are weights. The weights are not written, so nothing is to be restored.
    """
    count = min(GRASP_DIRECTIONS, sum(leaf.parameter.numel() for leaf in leaves))
    keys = [Key(0, 0, query) for query in range(count)]
    first = [_slope(loss, key, eps) for key in keys]
    there = [Term(key, eps * g / count) for key, g in zip(keys, first, strict=True)]
    second = [_slope(loss, key, eps, there) for key in keys]
    curvature = [Term(k, (b - a) / (eps * count)) for k, a, b in zip(keys, first, second, strict=True)]
    return [leaf.parameter.detach() * leaf.gradient(curvature) for leaf in leaves]


def _slope(loss: Loss, key: Key, eps: float, there: Sequence[Term] = (), unit: float = 1.0) -> float:
    """Along the key's direction, divided by ``unit``, at θ or at a point near it."""
    step = eps / unit
    return (loss([*there, Term(key, step)]) - loss([*there, Term(key, -step)])) / (2 * eps)


def best(scores: Sequence[Tensor], total: int) -> list[int]:
    """How many of the ``total`` largest scores each tensor holds; scores that are not finite come last."""
    flat = torch.cat([score.reshape(-1).float().nan_to_num(-math.inf, -math.inf, -math.inf) for score in scores])
    ends = torch.tensor([score.numel() for score in scores]).cumsum(0)
    home = torch.bucketize(flat.topk(total, sorted=False).indices.cpu(), ends, right=True)
    return torch.bincount(home, minlength=len(scores)).tolist()
