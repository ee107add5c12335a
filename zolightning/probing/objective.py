"""From what the user's step returns to a double, or to one double for each example."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from ..types import RepeatError, SkipStep
from .batches import repeat_batch
from .block_reuse import BlockReuse
from .isolation import _Probes
from .loss_splitter import LossSplitter


class BatchObjective:
    """The loss of one micro-batch wherever the view is: runs the user's code, and keeps its first output.

    Args:
        forward: batch → the user's output; called once a probe.
        batch: the micro-batch.
        probes: makes the forwards alike.
        examples: the batch's size, when its examples have losses of their own.
        repeats: whether ``forward`` takes a repeated batch.
        extra: context of every forward but the first (nothing is logged twice).
        blocks: what every forward of the batch computes alike; a repeated batch runs it in full.
    """

    def __init__(
        self,
        forward: Callable[[Any], Any],
        batch: Any,
        probes: _Probes,
        examples: int | None = None,
        repeats: bool = False,
        extra: Callable[[], AbstractContextManager[Any]] = nullcontext,
        blocks: BlockReuse | None = None,
    ) -> None:
        self._forward, self._batch, self._probes, self._extra = forward, batch, probes, extra
        self.examples, self.repeats = examples, repeats
        self.refused = ""
        """Why the step did not take the repeated batch."""
        self.first: Any = None
        self.dtype: torch.dtype | None = None
        self._reuse = blocks.step() if blocks and not repeats else None

    def __call__(self) -> float:
        return loss_value(self._run(self._batch))

    def derivative(self) -> tuple[float, float]:
        out = self._run(self._batch)
        value, loss = loss_value(out), loss_of(out)
        slope = fwAD.unpack_dual(loss).tangent if isinstance(loss, Tensor) else None  # type: ignore[no-untyped-call]
        if slope is None:
            raise ValueError(
                "a forward gradient needs a loss tensor that depends on the trained weights through differentiable operations; "
                "this one carries no derivative. Use estimator='spsa', which needs none"
            )
        return value, slope.double().mean().item()

    def per_example(self, copies: int) -> Tensor:
        try:
            return self._losses(copies)
        except SkipStep:
            raise
        except Exception as error:  # what has as many entries as there are examples by chance was repeated too
            if copies == 1:
                raise
            self.repeats, self.refused = False, repr(error)
            raise RepeatError from error

    def _losses(self, copies: int) -> Tensor:
        assert self.examples is not None
        batch = repeat_batch(self._batch, self.examples, copies)
        with LossSplitter(self.examples * copies) as splitter:
            out = self._run(batch)
        losses = example_losses(out, self.examples * copies, splitter)
        if losses is None:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"the step gave a loss for each example at first, but now, for {self.examples} examples {copies} times, it "
                f"gave {got}; it must do so for every batch, or use ZOStrategy(estimator='spsa')"
            )
        return losses

    def _run(self, batch: Any) -> Any:
        reuse = self._reuse
        if self._probes.count == 0:
            with self._probes.forward(), reuse.first() if reuse else nullcontext():
                out = self.first = self._forward(batch)
            loss = loss_of(out)
            self.dtype = loss.dtype if isinstance(loss, Tensor) else None
            return out
        with self._probes.forward(), self._extra(), reuse.later() if reuse else nullcontext():
            out = self._forward(batch)
        if reuse is None or not reuse.reused or reuse.blocks.proved:
            return out
        with self._probes.forward(), self._extra():  # is it what a full forward gives?
            full = self._forward(batch)
        a, b = loss_of(out), loss_of(full)
        reuse.blocks.proved = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
        if not reuse.blocks.proved:
            self._reuse = None
        return full


def loss_of(out: Any) -> Any:
    """The loss in what a training step returned: itself, or what it holds as 'loss'."""
    return out.get("loss") if isinstance(out, Mapping) else out


def loss_value(out: Any) -> float:
    """The loss in what a training step returned, as a Python double.

    Raises:
        SkipStep: it returned None.
        TypeError, ValueError: not a number, a one-element tensor, a vector of per-example losses, or a dict with 'loss'.
    """
    if out is None:
        raise SkipStep
    if isinstance(out, Mapping):
        if "loss" not in out:
            raise ValueError(f"the training step returned a dict without 'loss'; its keys are {sorted(map(str, out))}")
        return loss_value(out["loss"])
    if isinstance(out, Tensor):
        if out.is_complex() or (out.dim() > 1 and out.numel() != 1) or out.numel() == 0:
            raise ValueError(
                f"the loss must be a real tensor with one element, or a vector of per-example losses; got {out.dtype} of "
                f"shape {tuple(out.shape)}"
            )
        return out.detach().double().mean().item()
    if isinstance(out, numbers.Real):
        return float(out)
    raise TypeError(f"the loss must be a number, a tensor with one element, or a dict with 'loss'; got {type(out).__name__}")


def example_losses(out: Any, examples: int, splitter: LossSplitter) -> Tensor | None:
    """(examples,) in float64 on the CPU: what the step returned, or what the mean it returned was taken over; else None.

    Raises SkipStep when it returned None.
    """
    if out is None:
        raise SkipStep
    loss = loss_of(out)
    losses = loss if isinstance(loss, Tensor) and loss.shape == (examples,) else splitter.losses(out)
    return None if losses is None else losses.detach().double().cpu()
