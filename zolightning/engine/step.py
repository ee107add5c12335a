"""One ZO step between probes and update: merge the estimates of a window, shape them, make the record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer

from ..methods.shaping import Shaping, State
from ..types import Estimate, Key, StepRecord, Term


def merge(window: Sequence[Estimate]) -> Estimate:
    """The mean over the micro-batches of an accumulation window.

    Micro-batches share a step's directions, whose projected gradients are averaged; per-example directions differ, and
    are listed one after another.
    """
    sums: dict[Key, list[float]] = {}
    for estimate in window:
        for key, g in estimate.terms:
            sums.setdefault(key, []).append(g)
    return Estimate(
        terms=tuple(Term(key, sum(gs) / len(gs)) for key, gs in sums.items()),
        losses=tuple(loss for estimate in window for loss in estimate.losses),
        forwards=sum(estimate.forwards for estimate in window),
        ties=sum(not any(gs) for gs in sums.values()),  # in every micro-batch
    )


def finish(
    estimate: Estimate, clipped: Sequence[float], shaping: Shaping, state: State, optimizer: Optimizer, step: int
) -> tuple[StepRecord, State]:
    """Shape the projected gradients and divide by their number: the record whose terms the optimizer applies.

    Args:
        estimate: the window's.
        clipped: its coefficients after the Trainer's gradient clipping.
        shaping: the recipe's.
        state: the shaping's state before this step.
        optimizer: for its learning rates.
        step: optimizer steps taken so far.
    """
    raw = estimate.coefficients
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
        loss=estimate.loss,
        lrs=tuple(float(g["lr"]) for g in optimizer.param_groups),
        forwards=estimate.forwards,
        ties=estimate.ties,
        clipped=changed,
        skipped=skipped,
    )
    return record, state


def keep_best(record: StepRecord, loss_at: Callable[[Sequence[Term]], float], forwards: int) -> StepRecord:
    r"""The step, the opposite one or none, whichever leaves the smallest loss: conservative ZO-SGD, arXiv:2402.11592.

    .. math:: \theta \leftarrow \arg\min_{s \in \{0, 1, -1\}} L(\theta - s\,\mathrm{lr}\,\hat g)

    Weight decay is left out of the trials, not of the step.

    Args:
        record: of a step of plain SGD that is about to be applied.
        loss_at: terms → the loss at θ + Σ_k c_k z_k, over the batches of the step.
        forwards: forward passes that one call of it takes.

    Raises:
        ValueError: parameter groups have learning rates of their own.
    """
    if len(set(record.lrs)) > 1:
        raise ValueError(f"`conservative=True` needs one learning rate for all parameter groups, got {record.lrs}")

    def loss(side: float) -> float:
        value = loss_at([Term(t.key, -side * record.lrs[0] * t.coefficient) for t in record.terms] if side else [])
        return value if math.isfinite(value) else math.inf

    best = min((0.0, 1.0, -1.0), key=loss)  # the first of equals: a step that does not lower the loss is not taken
    terms = tuple(Term(t.key, best * t.coefficient) for t in record.terms) if best else ()
    skipped = "" if best else "no trial step lowers the loss"
    return record._replace(terms=terms, forwards=record.forwards + 3 * forwards, skipped=skipped)
