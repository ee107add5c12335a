"""The lines that a fit logs about its steps, each topic once: findings of the probes, ties, skipped steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..probing.objective import loss_of
from ..probing.runner import Ran, Runner
from ..space import View
from ..types import Estimate, Key, StepRecord

Say: TypeAlias = Callable[[str], None]
"""Where a line for the user goes."""


class Notices:
    """Remembers the topics that were logged.

    Args:
        inform: gets lines on the choices that the fit made.
        warn: gets lines on settings that the user should change.
    """

    def __init__(self, inform: Say, warn: Say) -> None:
        self.inform, self.warn = inform, warn
        self._said: set[str] = set()
        self._ties = TieWatch()

    def once(self, topic: str, message: str, say: Say | None = None) -> None:
        """Say it, as a warning, unless the topic was had before in this fit."""
        if topic not in self._said:
            self._said.add(topic)
            (say or self.warn)(message)

    def report(self, runner: Runner, ran: Ran, estimate: Estimate, eps: float) -> None:
        """Log the findings of a micro-batch's probes."""
        reuse, graphs = runner.reuse, runner.graphs
        for notice in (reuse.notice() if reuse else "", *(graphs.notices() if graphs else ())):
            if notice:
                self.inform(f"ZO: {notice}")
        if ran.refused:
            self.once("apart", ran.refused)
        if estimate.terms and (found := self._ties(estimate.ties, len(estimate.terms), eps)):
            self.once("ties", found)
        loss = loss_of(ran.output)
        if isinstance(loss, Tensor) and loss.dtype in (torch.float16, torch.bfloat16):
            self.once(
                "coarse",
                f"the loss is {loss.dtype}, whose steps are coarse for the difference of two probes; compute it in float32 "
                "(loss_fn(logits.float(), y))",
            )

    def unread(self, view: View, key: Key) -> tuple[int, ...]:
        """Places of the leaves whose turn it was and that no probe of the key's step read: they get no update."""
        if places := view.unread(key):
            some = listed([view.leaves[place].name for place in places])
            line = f"ZO: no probe of step {key.step} read {some}; weights that the loss does not read get no update"
            self.once("unread", line, self.inform)
        return places


def listed(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
