"""One ZO step between probes and update: shape the projected gradients of a window, make the record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from ..methods.shaping import Shaping, State
from ..types import Estimate, StepRecord, Term

Clip: TypeAlias = Callable[[Sequence[float]], Sequence[float]]
"""The projected gradients → as many clipped ones."""


def finish(
    estimate: Estimate, clip: Clip | None, shaping: Shaping, state: State, lrs: Sequence[float], step: int
) -> tuple[StepRecord, State]:
    """Clip and shape the projected gradients and divide by their number: the record whose terms the optimizer applies.

    Args:
        estimate: the window's.
        clip: the Trainer's gradient clipping.
        shaping: the recipe's.
        state: the shaping's state before this step.
        lrs: the learning rate of each parameter group.
        step: optimizer steps taken so far.
    """
    raw, loss = estimate.coefficients, estimate.loss
    clipped = raw if clip is None else clip(raw)
    skipped = ""
    if not raw:
        skipped = "training_step returned None"
    elif not all(map(math.isfinite, raw)):
        skipped = f"non-finite projected gradient ({next(g for g in raw if not math.isfinite(g))})"
    terms: tuple[Term, ...] = ()
    changed = 0
    if not skipped:
        shaped, state, limited = shaping(clipped, state)
        cut = [a != b for a, b in zip(raw, clipped, strict=True)]
        changed = sum(a or b for a, b in zip(cut, limited or cut, strict=True))
        if any(shaped):
            terms = tuple(Term(t.key, c / len(shaped)) for t, c in zip(estimate.terms, shaped, strict=True))
        else:
            skipped = "all probes gave the same loss"
    record = StepRecord(
        step=step,
        terms=terms,
        raw=raw,
        loss=loss,
        lrs=tuple(lrs),
        forwards=estimate.forwards,
        ties=estimate.ties,
        clipped=changed,
        skipped=skipped,
    )
    return record, state


def keep_best(record: StepRecord, losses: Callable[[Sequence[Sequence[Term]]], Sequence[float]], forwards: int) -> StepRecord:
    r"""The step, the opposite one or none, whichever leaves the smallest loss: conservative ZO-SGD, arXiv:2402.11592.

    .. math:: \theta \leftarrow \arg\min_{s \in \{0, 1, -1\}} L(\theta - s\,\mathrm{lr}\,\hat g)

    Weight decay is left out of the trials, not of the step.

    Args:
        record: of a step of plain SGD that is about to be applied.
        losses: a few Σ_k c_k z_k → the loss at θ plus each of them, over the batches of the step.
        forwards: forward passes that each takes.

    Raises:
        ValueError: parameter groups have learning rates of their own.
    """
    if len(set(record.lrs)) > 1:
        raise ValueError(f"`conservative=True` needs one learning rate for all parameter groups, got {record.lrs}")

    sides = (0.0, 1.0, -1.0)
    found = losses([[Term(t.key, -s * record.lrs[0] * t.coefficient) for t in record.terms] if s else [] for s in sides])
    bounded = [value if math.isfinite(value) else math.inf for value in found]
    best = sides[bounded.index(min(bounded))]  # the first of equals: a step that does not lower the loss is not taken
    terms = tuple(Term(t.key, best * t.coefficient) for t in record.terms) if best else ()
    skipped = "" if best else "no trial step lowers the loss"
    return record._replace(terms=terms, forwards=record.forwards + 3 * forwards, skipped=skipped)
