"""The operations that write into a tensor, and those that only ask about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ..types import Operation

Args: TypeAlias = Sequence[Any]
Kwargs: TypeAlias = Mapping[str, Any]
Types: TypeAlias = Sequence[type]
"""Of an operation's call, as a function mode gets them."""

_T = torch.Tensor
_IN_PLACE = re.compile(r"[^_].*[^_]_|_foreach_\w+_|__setitem__|__set__|__i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor)__")
_PROPERTIES = """
    shape dtype device layout ndim requires_grad is_leaf grad grad_fn is_cuda is_mps is_xpu is_meta is_sparse is_quantized
    is_nested names itemsize nbytes _version _base retains_grad
"""
_METHODS = """
    size dim stride numel nelement element_size storage_offset is_contiguous is_floating_point is_complex is_signed get_device
    data_ptr __len__ __hash__ requires_grad_ register_hook is_inference is_pinned
"""
_SETTERS = "grad requires_grad"  # of zero_grad() and toggle_optimizer() inside a closure
_FUNCTIONS = "_has_compatible_shallow_copy_type is_floating_point is_complex numel is_tensor"
METADATA: frozenset[object] = frozenset(
    [getattr(_T, name).__get__ for name in str.split(_PROPERTIES) if hasattr(_T, name)]
    + [getattr(_T, name).__set__ for name in str.split(_SETTERS)]
    + [getattr(_T, name) for name in str.split(_METHODS)]
    + [getattr(torch, name) for name in str.split(_FUNCTIONS)]
)
"""Questions about a tensor that do not read it."""


def write_targets(func: Operation, args: Args, kwargs: Kwargs) -> list[object]:
    """The tensors that the call of an operation writes into."""
    if "out" in kwargs:
        return [kwargs["out"]]
    return [*args, *kwargs.values()][:1] if _IN_PLACE.fullmatch(getattr(func, "__name__", "")) else []
