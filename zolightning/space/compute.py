"""Where a layer that computes from a parameter in its own way lets a probe take part."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

Compute = Callable[[Tensor, Tensor], Tensor]
"""(value of the parameter, x) → the layer's output."""


class Rounds:
    """Marks a layer that rounds its weight in the forward; the recipe 'zeroqat' trains through it."""


def compute_with(parameter: Tensor, x: Tensor, compute: Compute, bias: Tensor | None = None) -> Tensor:
    """``compute(parameter, x)``, of which a probe replaces the parameter, or the input and the output of each example.

    Args:
        parameter: the layer's matrix is made from it.
        x: (N, …, in).
        compute: gives (N, …, out), bias included.
        bias: (out,), added by ``compute``.
    """
    if has_torch_function_unary(parameter):  # inside a probe, as torch's own functions ask
        return handle_torch_function(compute_with, (parameter,), parameter, x, compute, bias)
    return compute(parameter, x)
