"""A module's Parameters whose weights live in a store: whoever reads one, wherever, gets the weights of now.

The Parameter object stays, and with it the optimizer's and the leaves' references. Its own memory is one NaN, spread over
its shape: code that gets past PyTorch's function protocol computes NaN, not with old weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..space.operations import METADATA, Args, Kwargs, Types, write_targets
from ..types import Operation
from .entry import Entry
from .files import OffloadError
from .store import Store

_T = torch.Tensor


class StoredParameter(nn.Parameter):
    """A Parameter whose weights are an entry of a store.

    It is made by :func:`bind`. Questions that read no weights (shape, dtype, gradient) it answers itself; every other operation
    gets the weights as a plain tensor, which may be dropped when the thread reads another one. Writing into them is refused.
    """

    entry: Entry
    store: Store

    @classmethod
    def __torch_function__(cls, func: Operation, types: Types, args: Args = (), kwargs: Kwargs | None = None) -> object:
        kwargs = kwargs or {}
        if func in _ANSWERS:
            return _ANSWERS[func](*args, **kwargs)
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        wanted = _stored((*args, *kwargs.values()))
        _refuse_write(func, args, kwargs)
        tensors = wanted[0].store.hold([p.entry for p in wanted])
        weights = {id(p): tensor for p, tensor in zip(wanted, tensors, strict=True)}
        return func(*_replaced(args, weights), **{k: _replaced(v, weights) for k, v in kwargs.items()})

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise OffloadError(
            f"{self.entry.name!r} is offloaded, and a copy of its module would need all weights in memory; keep averages and "
            "copies of weights only where they fit, without offload"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach().clone(), self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def bind(parameter: nn.Parameter, entry: Entry, store: Store) -> None:
    """Make the Parameter, in place, one whose weights are the store's; its own are dropped.

    Raises:
        OffloadError: something other than Python refers to it, a graph of autograd for one.
    """
    hollow = torch.full((), _nothing(entry.dtype), dtype=entry.dtype, device=entry.device).expand(entry.shape)
    stored = _T._make_subclass(StoredParameter, hollow, parameter.requires_grad)
    stored.__dict__.update(parameter.__dict__)
    try:
        torch.utils.swap_tensors(parameter, stored)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise OffloadError(
            f"the memory of {entry.name!r} cannot be freed, since something else refers to it ({error}); make the model anew"
        ) from error
    assert isinstance(parameter, StoredParameter)
    parameter.entry, parameter.store = entry, store


def move(parameters: Iterable[Tensor], device: torch.device) -> None:
    """Have operations read those of them that are stored on this device from now on."""
    for parameter in stored(parameters):
        if parameter.entry.device != device:
            parameter.entry.device = device
            bind(parameter, parameter.entry, parameter.store)


def stored(parameters: Iterable[Tensor]) -> list[StoredParameter]:
    """Those whose weights are in a store."""
    return [p for p in parameters if isinstance(p, StoredParameter)]


def _stored(values: Iterable[object]) -> list[StoredParameter]:
    found: dict[int, StoredParameter] = {}
    for value in values:
        if isinstance(value, StoredParameter):
            found[id(value)] = value
        elif isinstance(value, (list, tuple)):
            found.update((id(p), p) for p in _stored(value))
    return list(found.values())


def _replaced(value: Any, weights: dict[int, Tensor]) -> Any:
    if isinstance(value, (list, tuple)):
        items = [_replaced(v, weights) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return weights.get(id(value), value) if isinstance(value, StoredParameter) else value


def _refuse_write(func: Operation, args: Args, kwargs: Kwargs) -> None:
    if written := _stored(write_targets(func, args, kwargs)):
        raise OffloadError(
            f"`{getattr(func, '__name__', func)}` writes to {written[0].entry.name!r}, whose weights are offloaded; "
            "they change by the optimizer's steps only. Change weights before `fit` begins, or train without offload"
        )


def _own_storage(parameter: StoredParameter) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.untyped_storage()


def _nothing(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else 0


def _contiguous_strides(parameter: StoredParameter, dim: int | None = None) -> Any:
    strides = torch.empty(parameter.entry.shape, device="meta").stride()
    return strides if dim is None else strides[dim]


def _convert(parameter: StoredParameter, *args: Any, **kwargs: Any) -> Any:
    """``to`` gives itself where nothing has to change, as a module's ``to`` expects."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    entry = parameter.entry
    same_device = device is None or torch.empty(0, device=device).device == entry.device
    if same_device and dtype in (None, entry.dtype) and not kwargs.get("copy"):
        return parameter
    return parameter.store.hold([entry])[0].to(*args, **kwargs)


def _set_data(parameter: StoredParameter, value: Any) -> None:
    if value is not parameter:
        raise OffloadError(
            f"{parameter.entry.name!r} is offloaded and {parameter.entry.dtype} on {parameter.entry.device}: it cannot be "
            "converted, moved or replaced. Give `dtype` to zolightning.offload.from_pretrained, or convert before `fit`"
        )


_ANSWERS: dict[object, Operation] = {
    _T.is_contiguous: lambda parameter, *args, **kwargs: True,
    _T.stride: _contiguous_strides,
    _T.untyped_storage: _own_storage,  # who compares addresses, or counts memory, looks at it
    _T.to: _convert,
    _T.cpu: lambda parameter: _convert(parameter, "cpu"),
    _T.double: lambda parameter: _convert(parameter, torch.float64),
    _T.float: lambda parameter: _convert(parameter, torch.float32),
    _T.half: lambda parameter: _convert(parameter, torch.float16),
    _T.bfloat16: lambda parameter: _convert(parameter, torch.bfloat16),
    _T.data.__set__: _set_data,  # type: ignore[attr-defined]
    _T.data.__get__: lambda parameter: parameter.store.hold([parameter.entry])[0].detach(),  # type: ignore[attr-defined]
}
"""The questions that a stored Parameter answers by itself. ``data`` shares its version with the store's tensor: a write into it
shows."""
