"""Reads that no function mode sees: scripted functions, other threads, transforms and code that is not PyTorch's.

They are found by their results: while all trained Parameters hold NaN, and code that reads them where a mode can see it
gets the weights, only a read behind the mode's back makes the loss NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..types import Operation
from .compute import compute_with
from .linked import DIFFERENTIATES, linked
from .operations import METADATA, Args, Kwargs, Types
from .probe import reads, refuse_write, substituted

_OF_THE_MEMORY = frozenset(
    (torch.Tensor.stride, torch.Tensor.is_contiguous, torch.Tensor.storage_offset, torch.Tensor.data_ptr)
)


class _Hidden(NamedTuple):
    name: str
    parameter: nn.Parameter
    weight: Tensor


class Stored(TorchFunctionMode):
    """Gives operations the stored weights in the place of Parameters.

    Args:
        hidden: id of a Parameter → it and its weights.
    """

    def __init__(self, hidden: Mapping[int, _Hidden]) -> None:
        super().__init__()
        self._hidden = hidden

    def __torch_function__(self, func: Operation, types: Types, args: Args = (), kwargs: Kwargs | None = None) -> object:
        kwargs = kwargs or {}
        if not reads(self._hidden, args) and not reads(self._hidden, kwargs.values()):
            return func(*args, **kwargs)
        if func in DIFFERENTIATES or (func in METADATA and func not in _OF_THE_MEMORY):
            return func(*args, **kwargs)
        refuse_write(self._hidden, func, args, kwargs)
        if func is compute_with:
            parameter, x, compute, *_ = args
            with self:  # for the layer's other reads
                return compute(substituted(parameter, self._hidden, self._weight), x)
        args = [substituted(a, self._hidden, self._weight) for a in args]
        kwargs = {name: substituted(v, self._hidden, self._weight) for name, v in kwargs.items()}
        if func is F.embedding and any(v is not None for v in (*args[3:4], kwargs.get("max_norm"))):
            args[1:2] = [v.clone() for v in args[1:2]]  # it renormalises the rows that it reads, in place
        return func(*args, **kwargs)

    def _weight(self, parameter: Tensor) -> Tensor:
        return linked(parameter, self._hidden[id(parameter)].weight)


@contextmanager
def hiding(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """While it lasts, these Parameters hold NaN, and operations that a function mode sees get their weights."""
    hidden = {id(p): _Hidden(name, p, p.data) for name, p in parameters.items()}
    torch.clear_autocast_cache()  # which knows a weight by its Parameter object
    try:
        for _, parameter, weight in hidden.values():
            nothing = torch.full((), math.nan, dtype=weight.dtype, device=weight.device)
            parameter.data = nothing.expand(weight.shape)  # no memory
        with Stored(hidden) if hidden else nullcontext():  # a mode would have compiled code compiled again
            yield
    finally:
        for _, parameter, weight in hidden.values():
            parameter.data = weight
        torch.clear_autocast_cache()
