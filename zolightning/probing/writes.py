"""Writes to parameters inside a training step, kept before they happen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..space.operations import METADATA, Args, Kwargs, Types, write_targets
from ..space.view import compiled_regions
from ..types import Operation
from .state import Kept, Slot, modules


def seen(module: nn.Module) -> bool:
    """Whether function modes see the operations of the module: not where they run as compiled code."""
    return getattr(module, "_compiler_ctx", None) is None and not compiled_regions(module)


class Writes(TorchFunctionMode):
    """Keeps each parameter as it was before an operation writes into it, or into a view of its memory.

    Args:
        module: which has the parameters, or holds modules that have them.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._slots: dict[int, list[Slot]] = {}
        for owner, part in modules(module):
            for name, parameter in part._parameters.items():
                if parameter is not None and (place := _memory(parameter)):
                    self._slots.setdefault(place, []).append(Slot(owner, part._parameters, name))
        self.kept: dict[Slot, Kept] = {}

    def __torch_function__(self, func: Operation, types: Types, args: Args = (), kwargs: Kwargs | None = None) -> object:
        kwargs = kwargs or {}
        for target in write_targets(func, args, kwargs):
            for tensor in target if isinstance(target, (list, tuple)) else (target,):
                if isinstance(tensor, Tensor) and func not in METADATA:
                    for slot in self._slots.get(_memory(tensor), ()):
                        if slot not in self.kept:
                            with torch._C.DisableTorchFunction():
                                self.kept[slot] = Kept(slot.value, 1)
        return func(*args, **kwargs)


def _memory(tensor: Tensor) -> int:
    """Where the tensor's storage is; 0: nowhere."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # it has none: sparse, meta, or not made yet
        return 0
