"""Values that the probes of a step share instead of computing them again: the tools, and the runner's interface to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..space.operations import Args, Kwargs
from ..types import Operation, Point

_PLAIN = (type(None), bool, int, float, str)

Call: TypeAlias = Callable[[int, Operation, Args, Kwargs], object]
"""(place of a module, its forward, its arguments) → its output."""


class Reuse(Protocol):
    """The values that one micro-batch's probes share."""

    def forward(self, point: Point | None) -> AbstractContextManager[None]:
        """Around each forward, of which the first runs everything.

        Args:
            point: where it is; None: not known.
        """

    @property
    def doubtful(self) -> bool:
        """Whether the last forward left something out in a way that was not tried before."""

    def prove(self, equal: bool) -> None:
        """Told whether that forward gave the loss of a full one, bit for bit."""


class Reuses(Protocol):
    """The same for all steps."""

    def step(self) -> Reuse:
        """For the probes of one micro-batch."""

    def notice(self) -> str:
        """The decision made since the last call, for the log; else ""."""


@contextmanager
def instead(modules: Sequence[nn.Module], call: Call) -> Iterator[None]:
    """Have each module's forward go through ``call``; restored whatever happens."""
    own = [module.__dict__.get("forward") for module in modules]

    def through(index: int, forward: Operation) -> Operation:
        return lambda *args, **kwargs: call(index, forward, args, kwargs)

    try:
        for i, module in enumerate(modules):
            object.__setattr__(module, "forward", through(i, module.forward))
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                object.__setattr__(module, "forward", forward)


def hooked(modules: Sequence[nn.Module]) -> bool:
    """Whether any of them, or of those inside them, would call hooks."""
    return any(m._forward_hooks or m._forward_pre_hooks for module in modules for m in module.modules())


def generators(device: torch.device) -> list[Any]:
    """The state of all that draws random numbers."""
    _, numbers, position, *_ = np.random.get_state(legacy=True)
    states = [torch.get_rng_state(), torch.from_numpy(numbers.astype(np.int64)), position, random.getstate()]  # type: ignore[union-attr]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def comparable(value: Any) -> bool:
    """Whether it holds nothing but tensors and plain values."""
    if type(value) in (tuple, list):
        return all(map(comparable, value))
    if type(value) is dict:
        return all(map(comparable, value.values()))
    return isinstance(value, Tensor) or type(value) in _PLAIN


def copied(value: Any) -> Any:
    """By value: later code may write into it."""
    if type(value) in (tuple, list):
        return type(value)(map(copied, value))
    if type(value) is dict:
        return {k: copied(v) for k, v in value.items()}
    return value.detach().clone() if isinstance(value, Tensor) else value


def same(a: Any, b: Any) -> bool:
    """Whether the values are equal, bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def versions(value: Any) -> object:
    """Of the tensors in it; PyTorch counts the writes into each."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return tuple(map(versions, value))
    return value._version if isinstance(value, Tensor) else None


def size_of(value: Any) -> int:
    """Bytes of the tensors in it."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return sum(map(size_of, value))
    return value.nbytes if isinstance(value, Tensor) else 0
