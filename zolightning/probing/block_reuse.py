"""The blocks before the first perturbed one compute the same in every probe of a step: once is enough.

After DeepZero's feature reuse (arXiv:2310.02025). The first probe runs them and keeps the output of the last; in the others
each of them gives that output at once. This is done only where it changes nothing:

- no trained parameter is used outside the later blocks, no block is compiled, none of the earlier ones has hooks;
- the earlier blocks are entered once a forward, in order, and no random number is drawn while they run (dropout);
- the input of the first block is, value by value, that of the first probe, and holds nothing but tensors and
  plain values (a cache of keys and values would stay empty: call the model with ``use_cache=False``);
- the first forward that could reuse them is run again in full, and gives the same loss bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..space import View, blocks
from ..space.operations import Args, Kwargs
from ..types import Operation

_PLAIN = (type(None), bool, int, float, str)


class BlockReuse:
    """The unperturbed first blocks of a module.

    Args:
        unperturbed: these blocks, in order; may be none.
        name: of the stack that they are in.
        device: whose random numbers they could draw.
    """

    def __init__(self, unperturbed: Sequence[nn.Module], name: str, device: torch.device) -> None:
        self._blocks, self.name, self._device = tuple(unperturbed), name, device
        self.proved: bool | None = None
        """Whether reuse gave the loss of a full forward; None until it was tried."""
        self._described = False

    def __len__(self) -> int:
        return len(self._blocks)

    def step(self) -> Reuse:
        """For the probes of one micro-batch."""
        return Reuse(self, () if self.proved is False else self._blocks, self._device)

    def notice(self) -> str:
        """The decision made since the last call, for the log; else ""."""
        if self.proved is None or self._described:
            return ""
        self._described = True
        last = len(self) - 1
        if self.proved:
            return f"blocks 0 to {last} of {self.name!r} are not perturbed and run only in the first probe of a step"
        return f"blocks 0 to {last} of {self.name!r} run in every probe: without them the loss was another one"


def block_reuse(view: View) -> BlockReuse:
    """The blocks of the module's stack before the first one with a trained parameter, as far as they may be left out."""
    root, trained = view.root, [leaf.parameter for leaf in view.leaves]
    name, length = blocks(root)
    stack = list(root.get_submodule(name).children()) if length and not view.opaque else []
    ids = {id(p) for p in trained}
    first = next((i for i, block in enumerate(stack) if any(id(p) in ids for p in block.parameters())), 0)
    later = {id(m) for block in stack[first:] for m in block.modules()}
    elsewhere = {id(p) for m in root.modules() if id(m) not in later for p in m.parameters(recurse=False)}
    chosen = stack[:first]
    hooked = any(m._forward_hooks or m._forward_pre_hooks for block in chosen for m in block.modules())
    if hooked or ids & elsewhere or len(set(map(id, stack))) < len(stack):
        chosen = []
    return BlockReuse(chosen, name, trained[0].device)


class Reuse:
    """The activation that one micro-batch's probes share. Holds one activation, and gives it back with the object.

    Args:
        blocks: told whether reuse gives the loss of a full forward.
        unperturbed: blocks to leave out in all forwards but the first.
        device: whose random numbers they could draw.
    """

    def __init__(self, blocks: BlockReuse, unperturbed: Sequence[nn.Module], device: torch.device) -> None:
        self.blocks, self._blocks, self._device = blocks, unperturbed, device
        self._input: object = None
        self._output: Any = None
        self._rng: list[object] = []
        self._next = 0  # the block that should be entered now
        self._usable = False
        self.reused = False
        """Whether the last forward left blocks out."""

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the forward that runs all blocks."""
        self._next, self._usable = 0, bool(self._blocks)
        with self._instead(self._watch):
            yield
        if self._next < len(self._blocks):
            self._usable = False
        if not self._usable:
            self._input = self._output = None

    @contextmanager
    def later(self) -> Iterator[None]:
        """Around any other forward."""
        self.reused = False
        with self._instead(self._skip if self._usable else None):
            yield

    def _watch(self, index: int, forward: Operation, args: Args, kwargs: Kwargs) -> object:
        inputs = (args, kwargs)
        if index != self._next:
            self._usable = False  # another order, or a second pass
        if self._usable and index == 0:
            self._usable, self._rng = _comparable(inputs), self._random()
            self._input = _copy(inputs) if self._usable else None
        output = forward(*args, **kwargs)
        self._next += 1
        if self._usable and index == len(self._blocks) - 1:
            self._usable = _comparable(output) and _same(self._rng, self._random())
            self._output = _copy(output) if self._usable else None
        return output

    def _skip(self, index: int, forward: Operation, args: Args, kwargs: Kwargs) -> object:
        if index == 0:
            self.reused = _same(self._input, (args, kwargs))
        return _copy(self._output) if self.reused else forward(*args, **kwargs)

    def _random(self) -> list[Any]:
        _, numbers, position, *_ = np.random.get_state(legacy=True)
        states = [torch.get_rng_state(), torch.from_numpy(numbers.astype(np.int64)), position, random.getstate()]  # type: ignore[union-attr]
        return [*states, torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else states

    @contextmanager
    def _instead(self, call: Callable[[int, Operation, Args, Kwargs], object] | None) -> Iterator[None]:
        """Have each block's forward go through ``call``; restored whatever happens."""
        own = [block.__dict__.get("forward") for block in self._blocks]

        def through(index: int, forward: Operation) -> Operation:
            return lambda *args, **kwargs: call(index, forward, args, kwargs)  # type: ignore[misc]

        try:
            if call is not None:
                for i, block in enumerate(self._blocks):
                    object.__setattr__(block, "forward", through(i, block.forward))
            yield
        finally:
            for block, forward in zip(self._blocks, own, strict=True):
                block.__dict__.pop("forward", None)
                if forward is not None:
                    object.__setattr__(block, "forward", forward)


def _comparable(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_comparable, value))
    if type(value) is dict:
        return all(map(_comparable, value.values()))
    return isinstance(value, Tensor) or type(value) in _PLAIN


def _copy(value: Any) -> Any:
    """By value: later code may write into it."""
    if type(value) in (tuple, list):
        return type(value)(map(_copy, value))
    if type(value) is dict:
        return {k: _copy(v) for k, v in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return bool(a == b)
