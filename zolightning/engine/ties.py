"""Whether an objective is too coarse for its probes: both see the same loss, and the step learns nothing."""

from __future__ import annotations


class TieWatch:
    """Looks at windows of steps, and gives advice where in most of them every pair of probes tied.

    A metric that counts (an accuracy, exact match) changes in jumps; one direction whose probes tie is no loss, a step
    whose directions all tie is a wasted one.

    Args:
        steps: length of a window, >= 1.
        limit: largest share of wasted steps in silence.
    """

    def __init__(self, steps: int = 20, limit: float = 0.5) -> None:
        self.steps, self.limit = steps, limit
        self._seen: list[tuple[int, int]] = []

    def __call__(self, ties: int, directions: int, eps: float) -> str:
        """Note a step; the advice at the end of a coarse window, else ""."""
        self._seen.append((ties, directions))
        if len(self._seen) < self.steps:
            return ""
        seen, self._seen = self._seen, []
        wasted = sum(t == n for t, n in seen)
        if wasted <= self.limit * len(seen):
            return ""
        rate = sum(t for t, _ in seen) / sum(n for _, n in seen)
        return (
            f"in {wasted} of {len(seen)} steps both probes of every direction gave exactly the same loss ({rate:.0%} of all "
            f"pairs tied), so these steps did nothing: the objective is too coarse for eps={eps:g}, or it does not depend on "
            "the trained weights. Raise eps (a 0/1 metric wants 1e-2 and more), the batch or num_queries, or train on a soft "
            "form of the metric, as zolightning.objectives.soft_zero_one is of the error rate"
        )
