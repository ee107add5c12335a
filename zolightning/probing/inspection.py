"""Whether a step gives each example a loss of its own, found by trying it on the first batch, without a trace."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..space import Both, View
from ..types import Batch, Forward, Key, PerExample, PerExampleError, Point, Shared, Term
from .batches import batch_examples, batch_numel, repeat_batch
from .block_reuse import block_reuse
from .isolation import Isolation
from .loss_splitter import LossSplitter
from .objective import example_losses, loss_value

_SMALL = 256  # numbers in a batch: twice as many cost little memory, and less than twice the time
_LARGE = 4096  # beyond it they cost twice the time, and activations that may not fit

_FAR = 0.05  # a perturbation that no loss can fail to notice


class Examples(NamedTuple):
    """How a step treats its examples.

    Args:
        losses: each has a loss of its own.
        repeats: the step takes a repeated batch, and the copies get equal losses (dropout would draw for each).
        both: both probes of a direction that the examples share run in one batch, where it is small.
        shown: the batch could show it: more than one example, and no loss that is not finite.
        most: numbers in a batch that is repeated for directions of their own.
    """

    losses: bool
    repeats: bool
    both: bool = False
    shown: bool = True
    most: int = _LARGE

    def of(self, batch: Batch) -> tuple[int | None, bool]:
        """How many examples the batch holds, or None, and whether it may be repeated for them."""
        largest = self.largest
        return batch_examples(batch), 0 < batch_numel(batch) <= largest

    @property
    def largest(self) -> int:
        """Numbers in the largest batch that is repeated; 0: none is."""
        return self.most if self.repeats else _SMALL if self.both else 0


def inspect_step(forward: Forward, batch: Batch, view: View, isolation: Isolation, repeatable: bool) -> Examples:
    """Try the step with a direction for each example, and leave no trace.

    Args:
        forward: batch → the user's output.
        batch: the first micro-batch.
        view: rank-1 leaves.
        isolation: of the module.
        repeatable: whether ``forward`` evaluates the batch that it is given.
    """
    examples = batch_examples(batch)
    if examples is None or not view.per_example:
        return Examples(False, False)

    def losses(copies: int, offsets: Tensor) -> Tensor | None:
        count = examples * copies
        point = PerExample(Key(0, 0), torch.arange(count), offsets)
        return _losses(forward, repeat_batch(batch, examples, copies), count, view, point, isolation)

    try:
        plain = losses(1, torch.zeros(examples, dtype=torch.float32))
        moved = losses(1, torch.arange(examples).eq(0).to(torch.float32) * _FAR)
    except PerExampleError:
        return Examples(False, False)
    if plain is None or moved is None or not _close(plain[1:], moved[1:]):
        return Examples(False, False)  # moving one example moves others: they have no losses of their own
    shown = examples > 1 and bool(plain.isfinite().all())
    if not repeatable or batch_numel(batch) > _LARGE:
        return Examples(True, False, shown=shown)
    try:
        double = losses(2, torch.zeros(2 * examples, dtype=torch.float32)) if _keeps_alike(forward, batch, isolation) else None
    except Exception:  # code that takes no other batch than its own, or no memory for two
        return Examples(True, False, shown=shown)
    # A CPU computes a large batch no faster, and in forwards one by one the first blocks may run once.
    most = _SMALL if view.leaves[0].parameter.device.type == "cpu" and block_reuse(view) else _LARGE
    return Examples(True, double is not None and _close(double, plain.repeat(2)), shown=shown, most=most)


def _losses(forward: Forward, batch: Batch, count: int, view: View, point: Point | Both, isolation: Isolation) -> Tensor | None:
    """(count,) of the batch's examples at the point, or None; without a trace."""
    splitter = LossSplitter(count)
    with isolation.dry(), view.at(point, splitter):
        return example_losses(forward(batch), count, splitter)


def _keeps_alike(forward: Forward, batch: Batch, isolation: Isolation) -> bool:
    """Whether a step keeps the same of a batch and of one that holds it twice; sums and counts of examples are not."""
    if not isolation.changing:
        return True
    with isolation.dry():
        forward(batch)
        once = isolation.state()
    try:
        with isolation.dry():
            forward(repeat_batch(batch, batch_examples(batch) or 0, 2))
            twice = isolation.state()
    except Exception:  # code that takes no other batch than its own, or no memory for two
        return False
    return all(kept.like(twice[slot]) for slot, kept in once.items())


def _close(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-3, atol=1e-4, equal_nan=True)


def takes_both(forward: Forward, batch: Batch, view: View, isolation: Isolation) -> bool:
    """Try whether both probes of a direction give in one batch the losses that they give in two; leave no trace.

    Args:
        forward: batch → the user's output; it evaluates the batch that it is given.
        batch: the first micro-batch.
        view: of the weights.
        isolation: of the module.
    """
    examples = batch_examples(batch)
    if examples is None or view.opaque or block_reuse(view) or batch_numel(batch) > _SMALL:
        return False
    if not _keeps_alike(forward, batch, isolation):
        return False
    twice = repeat_batch(batch, examples, 2)
    for offset in (_FAR, 0.1 * _FAR, 0.02 * _FAR):
        if (agree := _agree(forward, batch, twice, 2 * examples, view, isolation, offset)) is not None:
            return agree
    return False


def _agree(
    forward: Forward, batch: Batch, twice: Batch, count: int, view: View, isolation: Isolation, offset: float
) -> bool | None:
    """Whether the halves of the doubled batch have the losses that the batch has at either side; None: rounding hides it.

    Other kernels may compute a batch of another size, and a deep model far from its weights makes much of their rounding.
    """
    key = Key(0, 0)

    def halves(point: Point | Both) -> list[float] | None:
        losses = _losses(forward, twice, count, view, point, isolation)
        return None if losses is None else losses.view(2, count // 2).mean(1).tolist()

    each = []
    for side in (offset, -offset):
        with isolation.dry(), view.along(key, side):
            each.append(loss_value(forward(batch)))
    apart = abs(each[0] - each[1])  # a step that mixes the sides up is off by about that much
    if not math.isfinite(apart):
        return False
    try:
        if (sides := halves(Both(Term(key, offset), count))) is None:
            return False
        off = max(abs(a - b) for a, b in zip(sides, each, strict=True))
        if off <= 1e-2 * apart:
            return True
        alike = halves(Shared((Term(key, offset),)))
    except Exception:  # code that takes no other batch than its own, or no memory for two
        return False
    if alike is None:
        return False
    rounding = max(abs(loss - each[0]) for loss in alike)
    return off <= 4 * rounding if rounding <= 0.05 * apart else None
