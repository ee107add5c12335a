"""From the output of the user's step to doubles: the mean loss, a loss for each example, a derivative."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch.autograd.forward_ad as fwAD
from torch import Tensor

from ..types import SkipStep, StepOutput
from .loss_splitter import LossSplitter


def loss_of(out: StepOutput) -> Any:
    """The loss in the output of a training step: itself, or its entry 'loss'."""
    return out.get("loss") if isinstance(out, Mapping) else out


def loss_value(out: StepOutput, examples: int | None = None) -> float:
    """The loss in the output of a training step, as a Python double.

    Args:
        out: of the user's step.
        examples: of the batch, where they are known; a vector of losses must have as many.

    Raises:
        SkipStep: it is None.
        TypeError, ValueError: not a number, a one-element tensor, a vector of per-example losses, or a dict with 'loss'.
    """
    if out is None:
        raise SkipStep
    if isinstance(out, Mapping):
        if "loss" not in out:
            raise ValueError(f"the training step returned a dict without 'loss'; its keys are {sorted(map(str, out))}")
        return loss_value(out["loss"], examples)
    if isinstance(out, Tensor):
        if out.is_complex() or (out.dim() > 1 and out.numel() != 1) or out.numel() == 0:
            raise ValueError(
                f"the loss must be a real tensor with one element, or a vector of per-example losses; got {out.dtype} of "
                f"shape {tuple(out.shape)}"
            )
        if examples is not None and out.numel() not in (1, examples):
            raise ValueError(
                f"the step returned {out.numel()} losses for a batch of {examples} examples; return one loss for each example, "
                "or their mean"
            )
        return out.detach().double().mean().item()
    if isinstance(out, numbers.Real):
        return float(out)
    raise TypeError(f"the loss must be a number, a tensor with one element, or a dict with 'loss'; got {type(out).__name__}")


def example_losses(out: StepOutput, examples: int, splitter: LossSplitter) -> Tensor | None:
    """float64 of shape (examples,) on the CPU: the losses that the step returned, or those behind their mean; else None.

    Raises:
        SkipStep: the step returned None.
    """
    if out is None:
        raise SkipStep
    loss = loss_of(out)
    losses = loss if isinstance(loss, Tensor) and loss.shape == (examples,) else splitter.losses(loss)
    return None if losses is None else losses.detach().double().cpu()


def slope_of(out: StepOutput) -> float:
    """The derivative that the loss carries along the tangents of the weights, as a Python double.

    Raises:
        ValueError: it carries none.
    """
    loss = loss_of(out)
    slope = fwAD.unpack_dual(loss).tangent if isinstance(loss, Tensor) else None  # type: ignore[no-untyped-call]
    if slope is None:
        raise ValueError(
            "a forward gradient needs a loss tensor that depends on the trained weights through differentiable operations; "
            "this one carries no derivative. Use estimator='spsa', which needs none"
        )
    return float(slope.double().mean().item())
