"""From the output of the user's step to doubles: the mean loss, a loss for each example, a derivative."""

from __future__ import annotations

import numbers
from collections.abc import Mapping

import numpy as np
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from ..types import Batch, Forward, SkipStep, StepOutput
from .loss_splitter import LossSplitter


def returned_loss(out: StepOutput) -> object:
    """The loss in the output of a training step as it is: the output, or its entry 'loss'."""
    return out.get("loss") if isinstance(out, Mapping) else out


def loss_of(out: StepOutput) -> object:
    """The loss in the output of a training step, lists of numbers and arrays as a tensor."""
    loss = returned_loss(out)
    if isinstance(loss, np.ndarray) and loss.dtype.kind in "biufc":
        return torch.from_numpy(loss.astype(complex if loss.dtype.kind == "c" else np.float64))
    if isinstance(loss, (list, tuple)) and all(map(_is_number, loss)):
        return torch.tensor([float(value) for value in loss], dtype=torch.float64)
    return loss


def _is_number(value: object) -> bool:
    """Also a tensor or an array with one element."""
    if isinstance(value, (Tensor, np.ndarray)):
        return isinstance(loss := loss_of(value), Tensor) and loss.numel() == 1 and not loss.is_complex()
    return isinstance(value, numbers.Real)


def evaluated(forward: Forward, batch: Batch) -> StepOutput:
    """``forward(batch)``.

    Raises:
        RuntimeError: among the step's own errors, that it asks for gradients where no graph is recorded.
    """
    try:
        return forward(batch)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise RuntimeError(
            "the training step asks for gradients (torch.autograd.grad, backward), but a ZO probe records no graph for them; "
            f"put the part that is differentiated and the call into `with torch.enable_grad():`. {error}"
        ) from error


def loss_value(out: StepOutput, examples: int | None = None) -> float:
    """The loss in the output of a training step, as a Python double.

    Args:
        out: of the user's step.
        examples: of the batch, where they are known; a vector of losses must have as many.

    Raises:
        SkipStep: it is None.
        TypeError, ValueError: not a number, one element, a vector of per-example losses (tensor, array or list), or a dict
            with such a 'loss'.
    """
    if isinstance(out, Mapping) and "loss" not in out:
        raise ValueError(f"the training step returned a dict without 'loss'; its keys are {sorted(map(str, out))}")
    loss = loss_of(out)
    if loss is None:
        raise SkipStep
    if isinstance(loss, Tensor):
        if loss.is_complex() or (loss.dim() > 1 and loss.numel() != 1) or loss.numel() == 0:
            raise ValueError(
                f"the loss must be a real tensor with one element, or a vector of per-example losses; got {loss.dtype} of "
                f"shape {tuple(loss.shape)}"
            )
        if examples is not None and loss.numel() not in (1, examples):
            raise ValueError(
                f"the step returned {loss.numel()} losses for a batch of {examples} examples; return one loss for each "
                "example, or their mean"
            )
        return loss.detach().double().mean().item()
    if isinstance(loss, numbers.Real):
        return float(loss)
    raise TypeError(
        "the loss must be a number, a tensor or array with one element, a loss for each example (tensor, array or list of "
        f"numbers), or a dict with such a 'loss'; got {type(loss).__name__}"
    )


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
