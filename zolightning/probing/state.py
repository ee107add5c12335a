"""State that user code keeps from one step to the next, in addition to trained weights: buffers, and attributes of modules.

Counters, lists of outputs, hidden states, averages, generators of their own: values of any nesting, found by looking before
and after a forward.
"""

from __future__ import annotations

import pickle
import random
from collections import Counter as Counts
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MISSING = object()
"""The value of an attribute that is not there."""

DEPTH = 8
"""How far down the content of an attribute is looked at."""

_LONG = 4096  # entries; the content of a longer container is taken to be data, which no step writes into
_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Enum, type,
    FunctionType, BuiltinFunctionType, MethodType, partial,
)  # fmt: skip


_NO_STATE = (*_ATOMS, nn.Module)


class Kind(NamedTuple):
    """How the content of a mutable value is copied, put back and compared, and the values that it holds."""

    copy: Callable[[Any], Any]
    put: Callable[[Any, Any], Any]
    same: Callable[[Any, Any], bool]
    held: Callable[[Any], Collection[Any]] = lambda _: ()


def _put_tensor(value: Tensor, copy: tuple[Tensor, int]) -> None:
    content, place = copy
    if value.data_ptr() == place and value.shape == content.shape:
        value.detach().copy_(content)
    else:
        value.data = content.clone()


def _same_items(value: Any, copy: Any) -> bool:
    return len(value) == len(copy) and all(a is b for a, b in zip(value, copy, strict=True))


def _put_items(value: Any, copy: Any) -> None:
    value.clear()
    (value.update if isinstance(value, (dict, set)) else value.extend)(copy)


def _same_entries(value: dict[Any, Any], copy: dict[Any, Any]) -> bool:
    return _same_items(value, copy) and _same_items(value.values(), copy.values())


def _pickled(state: Callable[[Any], Any], put: Callable[[Any, Any], Any]) -> Kind:
    return Kind(
        lambda value: pickle.dumps(state(value)),
        lambda value, copy: put(value, pickle.loads(copy)),
        lambda value, copy: pickle.dumps(state(value)) == copy,
    )


_TENSOR = Kind(
    lambda t: (t.detach().clone(), t.data_ptr()),
    _put_tensor,
    lambda t, copy: t.shape == copy[0].shape and torch.equal(t.detach(), copy[0]),
)
_ARRAY = Kind(np.copy, np.copyto, np.array_equal)
_SEQUENCE = Kind(list, _put_items, _same_items, lambda copy: copy)
_TUPLE = Kind(tuple, lambda value, copy: None, lambda value, copy: True, lambda copy: copy)
_SET = Kind(set, _put_items, lambda value, copy: value == copy)
_DICT = Kind(dict, _put_items, _same_entries, lambda copy: copy.values())
_OBJECT = Kind(
    lambda value: dict(vars(value)),
    lambda value, copy: _put_items(vars(value), copy),
    lambda value, copy: _same_entries(vars(value), copy),
    lambda copy: copy.values(),
)
_KINDS: dict[type, Kind] = {
    **dict.fromkeys((list, deque), _SEQUENCE),
    **dict.fromkeys((dict, OrderedDict, defaultdict, Counts), _DICT),
    tuple: _TUPLE,
    set: _SET,
    torch.Generator: Kind(torch.Generator.get_state, torch.Generator.set_state, lambda g, c: torch.equal(g.get_state(), c)),
    random.Random: _pickled(random.Random.getstate, random.Random.setstate),
    np.random.RandomState: _pickled(np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: _pickled(lambda g: g.bit_generator.state, lambda g, state: setattr(g.bit_generator, "state", state)),
}


def _kind(value: Any) -> Kind | None:
    """None: the value cannot be changed, or nobody knows how."""
    if isinstance(value, _NO_STATE):
        return None
    if isinstance(value, Tensor):
        plain = value.layout is torch.strided and not value.is_meta and not is_traceable_wrapper_subclass(value)
        return _TENSOR if plain and 0 not in value.stride() else None  # nothing can write into elements in one place
    if isinstance(value, np.ndarray):
        return None if value.dtype.hasobject else _ARRAY
    if (kind := _KINDS.get(type(value))) is not None:
        return kind
    if isinstance(value, tuple):
        return _TUPLE
    return _OBJECT if _holds_values(value, set()) else None


def _holds_values(value: object, seen: set[int]) -> bool:
    """Whether an object holds values and nothing else: no lock, no connection, nothing that the world outside knows."""
    if isinstance(value, (*_ATOMS, Tensor, np.ndarray, nn.Module)) or id(value) in seen:
        return True
    seen.add(id(value))
    if (kind := _KINDS.get(type(value))) is not None:
        held = kind.held(value)
    elif hasattr(value, "__dict__") and (type(value).__module__ != "builtins" or type(value) is SimpleNamespace):
        held = vars(value).values()
    else:
        return False
    return len(held) <= _LONG and all(_holds_values(v, seen) for v in held)


def _alike(one: object, other: object) -> bool:
    """Whether numbers, of whichever kind, are the same but for rounding; True for other values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        one, other = one.detach().cpu().numpy(force=True), other.detach().cpu().numpy(force=True)
    if isinstance(one, (int, float, np.ndarray)) and isinstance(other, (int, float, np.ndarray)):
        return np.shape(one) == np.shape(other) and np.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
    return type(one) is type(other)


class Kept:
    """A value as it was.

    Args:
        value: the object.
        depth: 0 keeps the object's identity; 1 its content too; 2 the contents of its entries, and so on.
        opaque: ids of objects that are not looked into.
        limit: bytes of the largest tensor whose content is kept.
    """

    __slots__ = ("_copy", "_inner", "_kind", "value")

    def __init__(self, value: object, depth: int, opaque: set[int] | frozenset[int] = frozenset(), limit: float = float("inf")):
        self.value = value
        kind = _kind(value) if depth > 0 and id(value) not in opaque else None
        if isinstance(value, Tensor) and kind is not None and value.nbytes > limit:
            kind = None
        self._kind = kind
        self._inner: list[Kept] = []
        if kind is None:
            return
        self._copy = kind.copy(value)
        if depth > 1 and len(held := kind.held(self._copy)) <= _LONG:
            opaque = {*opaque, id(value)}  # an object may hold itself
            self._inner = [Kept(v, depth - 1, opaque, limit) for v in held]

    def restore(self) -> object:
        """The value, its content as it was."""
        for inner in self._inner:
            inner.restore()
        if self._kind is not None:
            self._kind.put(self.value, self._copy)
        return self.value

    def change(self, now: object) -> int | None:
        """How deep the change to the value that stands in its place now is; None: there is none."""
        depth = self._moved()
        return depth if depth or now is not self.value else None

    def _moved(self) -> int:
        inner = max((inner._moved() for inner in self._inner), default=0)
        if inner:
            return 1 + inner
        return int(self._kind is not None and not self._kind.same(self.value, self._copy))

    def like(self, other: Kept) -> bool:
        """Whether the values are the same but for rounding, as far as they were kept."""
        if self._kind is not other._kind or type(self.value) is not type(other.value):
            return False
        if self._kind is None:
            return _alike(self.value, other.value)
        if self._inner or other._inner:
            return len(self._inner) == len(other._inner) and all(map(Kept.like, self._inner, other._inner))
        mine, others = ((k._copy[0],) if k._kind is _TENSOR else self._kind.held(k._copy) or (k._copy,) for k in (self, other))
        return len(mine) == len(others) and all(map(_alike, mine, others))

    def tensors(self, now: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """(as it was, as it is) of each tensor in the value that stands in the place of this one now."""
        if isinstance(now, Tensor):
            was = self._copy[0] if self._kind is _TENSOR else self.value
            if isinstance(was, Tensor):
                yield was, now
        elif (kind := _kind(now)) is not None and kind is self._kind:
            for inner, child in zip(self._inner, kind.held(kind.copy(now)), strict=False):
                yield from inner.tensors(child)


class Slot(NamedTuple):
    """A place that holds a value: an attribute or a buffer of a module.

    Args:
        owner: the module's name.
        space: its attributes, its buffers or its parameters.
        name: of the entry.
    """

    owner: str
    space: dict[str, Any]
    name: str

    def __hash__(self) -> int:
        return hash((id(self.space), self.name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slot) and self.space is other.space and self.name == other.name

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}" if self.owner else self.name

    @property
    def value(self) -> Any:
        return self.space.get(self.name, MISSING)

    def put(self, kept: Kept) -> None:
        value = kept.restore()
        if self.value is value:
            return
        if value is MISSING:
            del self.space[self.name]
        else:
            self.space[self.name] = value


def modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of all parts, and of modules that they hold without owning them, as a list that hides a teacher."""
    seen: set[int] = set()
    waiting = [("", root)]
    while waiting:
        prefix, top = waiting.pop()
        for path, module in top.named_modules(prefix=prefix):
            if id(module) in seen or isinstance(module, torch.jit.ScriptModule):  # which has no attributes in Python
                continue
            seen.add(id(module))
            yield path, module
            for name, value in attributes(module).items():
                waiting += [(f"{path}.{name}" if path else name, found) for found in _modules_in(value, 2)]


def _modules_in(value: object, depth: int) -> list[nn.Module]:
    if isinstance(value, nn.Module):
        return [value]
    held = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [m for v in held for m in _modules_in(v, depth - 1)] if depth and len(held) <= _LONG else []


def attributes(module: nn.Module) -> dict[str, object]:
    """The attributes of a module other than parameters, buffers and submodules."""
    own = ("_parameters", "_buffers", "_modules")
    return {name: value for name, value in vars(module).items() if name not in own}
