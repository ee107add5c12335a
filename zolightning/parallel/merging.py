"""Means of estimates: over the micro-batches of a window, and over the groups of a run."""

from __future__ import annotations

from collections.abc import Sequence

from ..types import Estimate, Key, Term


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


def joined(estimates: Sequence[Estimate], examples: Sequence[int]) -> Estimate:
    """The mean over groups, by their examples and in their order, so that it has the same bits wherever it is taken.

    Args:
        estimates: of the groups that have one.
        examples: that each of them is the mean of, > 0.
    """
    shares = [1.0] * len(examples) if len(set(examples)) == 1 else [float(n) for n in examples]
    parts: dict[Key, list[tuple[float, float]]] = {}
    for estimate, share in zip(estimates, shares, strict=True):
        for key, g in estimate.terms:
            parts.setdefault(key, []).append((share, g))
    return Estimate(
        terms=tuple(Term(key, mean(parts[key])) for key in sorted(parts)),
        losses=(mean([(share, estimate.loss) for estimate, share in zip(estimates, shares, strict=True)]),) if shares else (),
        forwards=sum(estimate.forwards for estimate in estimates),
        ties=sum(not any(g for _, g in gs) for gs in parts.values()),
    )


def mean(parts: Sequence[tuple[float, float]]) -> float:
    """Of values with their weights, summed in their order; a single value as it is."""
    if len(parts) == 1:
        return parts[0][1]
    return sum(weight * value for weight, value in parts) / sum(weight for weight, _ in parts)
