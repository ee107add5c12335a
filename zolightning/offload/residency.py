"""A module's Parameters whose weights live in a store: whoever reads one, wherever, gets the weights of now.

The Parameter object stays, and with it the optimizer's and the leaves' references. Its own memory is one NaN, spread over
its shape: code that gets past PyTorch's function protocol computes NaN, not with old weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..space.operations import METADATA, Args, Kwargs, Types, write_targets
from ..types import Operation
from .entry import Entry
from .files import OffloadError
from .parts import Parts
from .store import Store

_T = torch.Tensor


class StoredParameter(nn.Parameter):
    """A Parameter whose weights are entries of a store: one, or several that have its rows.

    It is made by :func:`bind`. Questions that read no weights (shape, dtype, gradient) it answers itself; every other operation
    gets the weights as a plain tensor, which may be dropped when the thread reads another one. Where they are in several
    entries, reads by rows get those only. Writing into them is refused.
    """

    entries: tuple[Entry, ...]
    store: Store
    parts: Parts

    def weights(self) -> Tensor:
        """All of them, as a plain tensor."""
        if len(self.entries) == 1:
            return self.store.hold(self.entries)[0]
        return self.store.lend(self.entries[0], self.parts.whole())

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
        if func in _BY_ROWS and (rows := _BY_ROWS[func](*args, **kwargs)) is not None:
            return rows
        weights = {id(p): p.weights() for p in wanted if len(p.entries) > 1}
        single = [p for p in wanted if id(p) not in weights]
        if single:
            tensors = single[0].store.hold([p.entries[0] for p in single])
            weights |= {id(p): tensor for p, tensor in zip(single, tensors, strict=True)}
        return func(*_replaced(args, weights), **{k: _replaced(v, weights) for k, v in kwargs.items()})

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise OffloadError(
            f"{self.entries[0].parameter!r} is offloaded, and a copy of its module would need all weights in memory; keep "
            "averages and copies of weights only where they fit, without offload"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach().clone(), self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def bind(parameter: nn.Parameter, entries: Sequence[Entry], store: Store) -> None:
    """Make the Parameter, in place, one whose weights are the store's; its own are dropped.

    Args:
        parameter: whose.
        entries: of its weights: one, or those of its rows, in their order.
        store: that has them.

    Raises:
        OffloadError: something other than Python refers to it, a graph of autograd for one.
    """
    first = entries[0]
    hollow = torch.full((), _nothing(first.dtype), dtype=first.dtype, device=first.device).expand(parameter.shape)
    stored = _T._make_subclass(StoredParameter, hollow, parameter.requires_grad)
    stored.__dict__.update(parameter.__dict__)
    try:
        torch.utils.swap_tensors(parameter, stored)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise OffloadError(
            f"the memory of {first.parameter!r} cannot be freed, since something else refers to it ({error}); make the model "
            "anew"
        ) from error
    assert isinstance(parameter, StoredParameter)
    parameter.entries, parameter.store = tuple(entries), store
    parameter.parts = Parts(parameter.entries, lambda entry: store.hold([entry])[0])


def move(parameters: Iterable[Tensor], device: torch.device) -> None:
    """Have operations read those of them that are stored on this device from now on."""
    for parameter in stored(parameters):
        if parameter.entries[0].device != device:
            for entry in parameter.entries:
                entry.device = device
            bind(parameter, parameter.entries, parameter.store)


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
            f"`{getattr(func, '__name__', func)}` writes to {written[0].entries[0].parameter!r}, whose weights are offloaded; "
            "they change by the optimizer's steps only. Change weights before `fit` begins, or train without offload"
        )


def _own_storage(parameter: StoredParameter) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.untyped_storage()


def _nothing(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else 0


def _contiguous_strides(parameter: StoredParameter, dim: int | None = None) -> Any:
    strides = torch.empty(parameter.shape, device="meta").stride()
    return strides if dim is None else strides[dim]


def _convert(parameter: StoredParameter, *args: Any, **kwargs: Any) -> Any:
    """``to`` gives itself where nothing has to change, as a module's ``to`` expects."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    entry = parameter.entries[0]
    same_device = device is None or torch.empty(0, device=device).device == entry.device
    if same_device and dtype in (None, entry.dtype) and not kwargs.get("copy"):
        return parameter
    return parameter.weights().to(*args, **kwargs)


def _set_data(parameter: StoredParameter, value: Any) -> None:
    if value is not parameter:
        entry = parameter.entries[0]
        raise OffloadError(
            f"{entry.parameter!r} is offloaded and {entry.dtype} on {entry.device}: it cannot be "
            "converted, moved or replaced. Give `dtype` to zolightning.offload.from_pretrained, or convert before `fit`"
        )


def _embedded(input: Tensor, weight: Any, padding_idx: Any = None, max_norm: Any = None, *args: Any, **kwargs: Any) -> Any:
    """The other arguments matter only to the backward pass."""
    divided = isinstance(weight, StoredParameter) and len(weight.entries) > 1 and max_norm is None
    return weight.parts.gathered(input) if divided else None


def _at(parameter: Any, index: Any) -> Tensor | None:
    return parameter.parts.at(index) if isinstance(parameter, StoredParameter) and len(parameter.entries) > 1 else None


_BY_ROWS: dict[object, Operation] = {F.embedding: _embedded, _T.__getitem__: _at}
"""Operations that read some rows of a weight; None: not those."""

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
    _T.data.__get__: lambda parameter: parameter.weights().detach(),  # type: ignore[attr-defined]
}
"""The questions that a stored Parameter answers by itself. ``data`` shares its version with the store's tensor: a write into it
shows."""
