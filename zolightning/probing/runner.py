"""How points are run: the user's step at each of them, from the same state, and one output that is logged.

One by one; or several in one batch, the batch repeated for each of them, where the step takes that; or replayed as
recorded graphs. The answers are the same: a way of running is taken only where the first batch showed it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..space import Both, View
from ..types import Answer, Batch, Candidate, Forward, PerExample, Point, Shared, SkipStep, StepOutput, Tangent
from .batches import repeat_batch
from .cuda_graphs import Graphs
from .inspection import Examples
from .isolation import Isolation, Probes
from .lockstep import Lockstep
from .loss_splitter import LossSplitter
from .objective import example_losses, loss_of, loss_value, slope_of
from .reuse import Reuses

Ask = Callable[[int | None], Sequence[Point]]

Run = Callable[[Batch, Point | None], StepOutput]

Muted = Callable[[], AbstractContextManager[Any]]
"""Makes the context of a forward that logs nothing."""


class Keeps(Protocol):
    """Keeps the gradients of a forward."""

    def recording(self) -> AbstractContextManager[None]:
        """Around it."""

    def keep(self, out: StepOutput) -> StepOutput:
        """Differentiate its loss; returns the output without a graph."""


@dataclass(frozen=True)
class Runner:
    """Has the user's step run at the points that an estimator asks for.

    Args:
        view: of the weights.
        isolation: of the module.
        examples: whether each example has a loss of its own, and whether the step takes a repeated batch.
        reuse: values that the forwards of a step share.
        graphs: recorded forwards, where they are asked for.
        lockstep: forwards that go through offloaded weights together.
        muted: context of every forward but the first.
        kept: gets the gradients of the first forward.
    """

    view: View
    isolation: Isolation
    examples: Examples
    reuse: Reuses | None = None
    graphs: Graphs | None = None
    lockstep: Lockstep | None = None
    muted: Muted = nullcontext
    kept: Keeps | None = None

    def run(self, forward: Forward, batch: Batch, ask: Ask) -> Ran:
        """Ask for points and answer them, in their order.

        Args:
            forward: the user's step.
            batch: the micro-batch.
            ask: how many examples can have directions of their own, or None → the points.

        Raises:
            SkipStep: the step returned None.
        """
        count, repeats = self.examples.of(batch)
        points = ask((count or None) if self.examples.losses and self.view.per_example else None)
        several = count if repeats else None
        with self.isolation.step() as probes:
            ran = Ran(self, forward, batch, count, probes, reuse=not repeats)
            for group in together(points) if several else [points]:
                if not (several and len(group) > 1 and not ran.refused and ran.in_one_batch(group, several)):
                    ran.each(group)
        return ran


class Ran:
    """The forwards of one micro-batch, and their answers.

    Args:
        runner: whose they are.
        forward: the user's step.
        batch: the micro-batch.
        examples: that it holds, where they are known.
        probes: makes the forwards alike.
        reuse: values that the forwards share, computed once.
    """

    def __init__(
        self, runner: Runner, forward: Forward, batch: Batch, examples: int | None, probes: Probes, reuse: bool
    ) -> None:
        self._runner, self._batch, self._examples, self._probes = runner, batch, examples, probes
        self._forward = forward if runner.graphs is None else lambda b: runner.graphs(forward, b)  # type: ignore[misc]
        plain = runner.graphs is None and runner.lockstep is None
        self._reuse = runner.reuse.step() if reuse and runner.reuse and plain else None
        self.answers: list[Answer] = []
        self.output: StepOutput = None
        """Of the first forward, whose logs count."""
        self.refused = ""
        """A line that says why the step did not take the repeated batch."""

    def each(self, points: Sequence[Point]) -> None:
        """A forward at each point, some of them together where they can be."""
        lockstep = self._lockstep(points)
        for at in range(0, len(points), lockstep.sides if lockstep else len(points)):
            some = points[at : at + lockstep.sides] if lockstep else points
            if lockstep is None or not self._together(lockstep, some):
                self.answers += [self._answer(point, self._run) for point in some]

    def _together(self, lockstep: Lockstep, points: Sequence[Point]) -> bool:
        """In lockstep; False where they turn out to change state, which is as it was before then."""
        outputs: dict[int, StepOutput] = {}

        def answer(point: Point, side: int) -> Answer:
            def run(batch: Batch, point: Point | None) -> StepOutput:
                out = outputs[side] = self._forward(batch)
                return out

            return self._answer(point, run, side)

        logs = self._probes.count == 0
        with self._probes.forward(len(points)):
            answers = lockstep.run(answer, points, logs)
        if self._runner.isolation.changing:
            self._probes.count -= len(points)
            return False
        if logs:
            self.output = outputs[0]
        self.answers += answers
        return True

    def _lockstep(self, points: Sequence[Point]) -> Lockstep | None:
        """Not where the step keeps state, which forwards that go together would all change."""
        lockstep = self._runner.lockstep
        keeps = bool(self._runner.isolation.changing)
        return lockstep if lockstep is not None and not keeps and lockstep.takes(points) else None

    def _answer(self, point: Point, run: Run, side: int = 0) -> Answer:
        if isinstance(point, PerExample):
            losses = self._losses(point, self._batch, point.queries.numel(), run, side)
            return Answer(losses.mean().item(), losses)
        with self._runner.view.at(point, side=side):
            if isinstance(point, Tangent):
                out = _differentiated(run, self._batch, point)
                return Answer(loss_value(out, self._examples), slope=slope_of(out))
            out = run(self._batch, point)
        return Answer(math.nan, candidate=out) if isinstance(out, Candidate) else Answer(loss_value(out, self._examples))

    def in_one_batch(self, group: Sequence[Point], count: int) -> bool:
        """One forward of the batch, repeated for each point; False where the step does not take it."""
        copies = len(group)
        try:
            losses = self._losses(_joined(group, count), repeat_batch(self._batch, count, copies), count * copies, self._run)
        except SkipStep:
            raise
        except Exception as error:  # tensors that have as many entries as there are examples by chance were repeated too
            self.refused = f"a batch of {count} ran in two forwards, since doubling it failed: {error!r}"
            return False
        each = losses.view(copies, count)
        means = each.mean(1).tolist()
        own = each if isinstance(group[0], PerExample) else [None] * copies
        self.answers += [Answer(mean, losses) for mean, losses in zip(means, own, strict=True)]
        return True

    def _losses(self, point: Both | PerExample, batch: Batch, count: int, run: Run, side: int = 0) -> Tensor:
        """A loss for each of the batch's ``count`` examples."""
        splitter = LossSplitter(count)
        with self._runner.view.at(point, splitter, side):
            out = run(batch, None)
        losses = example_losses(out, count, splitter)
        if losses is None:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"the step gave a loss for each example at first, but for this batch of {count} examples it gave {got}; it "
                "must do so for every batch, or use ZOStrategy(estimator='spsa')"
            )
        return losses

    def _run(self, batch: Batch, point: Point | None = None) -> StepOutput:
        first, reuse = self._probes.count == 0, self._reuse
        with (
            self._probes.forward(),
            nullcontext() if first else self._runner.muted(),
            reuse.forward(point) if reuse else nullcontext(),
        ):
            out = self._kept(batch) if first and self._runner.kept else self._forward(batch)
        if first:
            self.output = out
        if reuse is None or not reuse.doubtful:
            return out
        with self._probes.forward(), self._runner.muted():
            full = self._forward(batch)
        a, b = loss_of(out), loss_of(full)
        reuse.prove(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b))
        return full

    def _kept(self, batch: Batch) -> StepOutput:
        kept = self._runner.kept
        assert kept is not None
        with kept.recording():
            out = self._forward(batch)
        return kept.keep(out)


def _differentiated(run: Run, batch: Batch, point: Tangent) -> StepOutput:
    try:
        return run(batch, point)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"a forward gradient needs a forward derivative of every operation; use estimator='spsa'. {error}"
        ) from error


def together(points: Sequence[Point]) -> Iterator[Sequence[Point]]:
    """The points in groups that one batch may hold: all per-example ones, and the two sides of a shared direction."""
    if points and all(isinstance(point, PerExample) for point in points):
        yield points
        return
    at = 0
    while at < len(points):
        size = 2 if at + 1 < len(points) and opposite(points[at], points[at + 1]) else 1
        yield points[at : at + size]
        at += size


def opposite(one: Point, other: Point) -> bool:
    """Whether the points are θ + c z and θ − c z."""
    if not (isinstance(one, Shared) and isinstance(other, Shared) and len(one.terms) == len(other.terms) == 1):
        return False
    (key, c), (twin, d) = one.terms[0], other.terms[0]
    return key == twin and c == -d


def _joined(group: Sequence[Point], count: int) -> Both | PerExample:
    """The point at which one batch has ``count`` examples at each of the group's points."""
    if isinstance(first := group[0], Shared):
        return Both(first.terms[0], len(group) * count)
    each = [point for point in group if isinstance(point, PerExample)]
    return PerExample(each[0].key, torch.cat([p.queries for p in each]), torch.cat([p.offsets for p in each]))
