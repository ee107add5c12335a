"""A probe point: while it is active, whoever reads a trained weight reads it perturbed. The weight is never written.

A probe is a torch function mode. Every torch operation that takes a leaf's Parameter as an argument, wherever in the
user's code it is called from, gets the perturbed tensor instead: layers, functional calls, slices of a tied head,
parametrizations. So restoring is exact by construction, also when a probe raises, and no model code is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..types import Key, Term
from .leaf import Leaf, Rank1Leaf, Scratch


class Shared(NamedTuple):
    """All examples see θ + Σ_k c_k z_k."""

    terms: Sequence[Term]


class PerExample(NamedTuple):
    """Example n sees θ + offsets[n] · z(key with queries[n])."""

    key: Key
    queries: Tensor
    offsets: Tensor


Point = Shared | PerExample

_T = torch.Tensor
_METADATA = frozenset(
    [
        getattr(_T, name).__get__
        for name in (
            "shape dtype device layout ndim requires_grad is_leaf grad grad_fn is_cuda is_mps is_xpu is_meta is_sparse "
            "is_quantized is_nested names itemsize nbytes _version _base retains_grad"
        ).split()
        if hasattr(_T, name)
    ]
    + [
        getattr(_T, name)
        for name in (
            "size dim stride numel nelement element_size storage_offset is_contiguous is_floating_point is_complex "
            "is_signed get_device data_ptr __len__ __hash__ requires_grad_ register_hook is_inference is_pinned"
        ).split()
    ]
    + [torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor]
)


class Probe(TorchFunctionMode):
    """Substitutes perturbed tensors for the leaves' parameters at one point.

    Args:
        leaves: id of a Parameter → its leaf.
        point: where the probe is.
        scratch: buffer for the weight of the operation that runs now.
    """

    def __init__(self, leaves: Mapping[int, Leaf], point: Point, scratch: Scratch) -> None:
        super().__init__()
        self._leaves, self._point, self._scratch = leaves, point, scratch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._reads_leaf(args) and not (kwargs and self._reads_leaf(kwargs.values())):
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(*args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if self._writes_leaf(func, args):
            raise RuntimeError(
                f"`{func.__name__}` writes to the trained parameter {self._leaves[id(args[0])].name!r} inside the training "
                "step; a ZO probe evaluates the loss at perturbed weights, which are read-only. Move the write out of "
                "training_step, or leave this parameter out with ZOStrategy(select=...)."
            )
        if isinstance(self._point, Shared):
            if func is F.embedding and len(args) == 2 and id(args[1]) in self._leaves and not kwargs.get("max_norm"):
                return self._leaves[id(args[1])].rows(args[0], self._point.terms)
            if func is _T.__getitem__ and _is_row_index(args[1]) and id(args[0]) in self._leaves:
                return self._leaves[id(args[0])].rows(args[1], self._point.terms)
        return func(*self._substitute(args), **{k: self._substitute(v) for k, v in kwargs.items()})

    def _reads_leaf(self, values: Iterable[Any]) -> bool:
        leaves = self._leaves
        for value in values:
            if id(value) in leaves or (isinstance(value, (list, tuple)) and self._reads_leaf(value)):
                return True
        return False

    def _writes_leaf(self, func: Any, args: Sequence[Any]) -> bool:
        name = getattr(func, "__name__", "")
        in_place = (name.endswith("_") and not name.startswith("__")) or name in ("__setitem__", "__set__")
        return in_place and bool(args) and id(args[0]) in self._leaves

    def _substitute(self, value: Any) -> Any:
        leaf = self._leaves.get(id(value))
        if leaf is not None:
            if isinstance(self._point, Shared):
                return leaf.perturbed(self._point.terms)
            raise ValueError(
                f"per-example directions reach a weight only through a linear layer, but {leaf.name!r} is read in another "
                "way; leave it out with ZOStrategy(select=...), or use ZOStrategy(estimator='spsa')"
            )
        if isinstance(value, (list, tuple)) and self._reads_leaf(value):
            items = [self._substitute(v) for v in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        leaf = self._leaves.get(id(weight))
        if bias is not None:
            bias = self._substitute(bias)
        if leaf is None:
            return F.linear(self._substitute(input), weight, bias)
        if isinstance(self._point, Shared):
            return leaf.linear(input, bias, self._point.terms, self._scratch)
        if not isinstance(leaf, Rank1Leaf):
            raise TypeError(f"per-example directions need rank-1 leaves, {leaf.name!r} is dense")
        return leaf.linear_each(input, bias, *self._point)


def _is_row_index(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.int64
