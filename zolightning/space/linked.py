"""Perturbed weights that a step can differentiate by: inner gradient steps, test-time training, gradients of a penalty."""

from __future__ import annotations

import torch
from torch import Tensor

DIFFERENTIATES: frozenset[object] = frozenset((torch.autograd.grad, torch.Tensor.backward))
"""Functions that name weights without reading them."""


class _Linked(torch.autograd.Function):
    """The value, with the parameter in its place in the graph: dL/dW is the gradient at the value."""

    generate_vmap_rule = True

    @staticmethod
    def forward(parameter: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[object, ...], output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def linked(parameter: Tensor, value: Tensor) -> Tensor:
    """The value; where a graph is recorded, one whose gradient is the parameter's."""
    if not (torch.is_grad_enabled() and parameter.requires_grad):
        return value
    return _Linked.apply(parameter, value)  # type: ignore[no-any-return, no-untyped-call]
