"""Whether a run still steps: a few skipped steps are said, many in a row end it."""

from __future__ import annotations

import math

from ..types import StepRecord


class SkipWatch:
    """Counts steps in a row that had no finite projected gradient.

    Args:
        most: how many end the run, >= 1.
    """

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0

    def __call__(self, record: StepRecord) -> str:
        """Note a step; a line for the user where it was skipped for that reason, else "".

        Raises:
            RuntimeError: it is one too many.
        """
        if not record.raw:  # the user's step returned None
            return ""
        if not record.skipped or all(map(math.isfinite, record.raw)):  # a tie is none of them
            self.count = 0
            return ""
        self.count += 1
        if self.count >= self.most:
            raise RuntimeError(
                f"{self.count} steps in a row had no finite projected gradient (last: {record.skipped}). The weights are "
                "those of the last finite step. Lower lr or eps, or look at the loss; ZOStrategy(max_skips=...) sets this limit"
            )
        return f"step {record.step} skipped: {record.skipped}; the weights are as before"
