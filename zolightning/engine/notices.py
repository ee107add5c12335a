"""What a fit says of its steps, each topic once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from ..probing.runner import Ran, Runner
from ..space import View
from ..types import Estimate, Key
from .ties import TieWatch

Say: TypeAlias = Callable[[str], None]
"""Where a line for the user goes."""


class Notices:
    """Remembers what was said.

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
        """What the probes of a micro-batch showed."""
        reuse, graphs = runner.reuse, runner.graphs
        for notice in (reuse.notice() if reuse else "", *(graphs.notices() if graphs else ())):
            if notice:
                self.inform(f"ZO: {notice}")
        if ran.refused:
            self.once("apart", ran.refused)
        if ran.dtype in (torch.float16, torch.bfloat16):
            self.once(
                "coarse",
                f"the loss is {ran.dtype}, whose steps are coarse for the difference of two probes; compute it in float32 "
                "(loss_fn(logits.float(), y))",
            )
        if estimate.terms and (found := self._ties(estimate.ties, len(estimate.terms), eps)):
            self.once("ties", found)

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
