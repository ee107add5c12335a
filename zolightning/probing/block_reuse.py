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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..space import View, blocks
from ..space.operations import Args, Kwargs
from ..types import Operation, Point
from .reuse import comparable, copied, generators, hooked, instead, same


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
    if hooked(chosen) or ids & elsewhere or len(set(map(id, stack))) < len(stack):
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
        self._started, self._usable = False, bool(unperturbed)
        self.reused = False
        """Whether the last forward left blocks out."""

    @contextmanager
    def forward(self, point: Point | None) -> Iterator[None]:
        """The first one runs all blocks."""
        first, self._started, self.reused = not self._started, True, False
        with instead(self._blocks, self._watch if first else self._skip) if first or self._usable else nullcontext():
            yield
        if first and (not self._usable or self._next < len(self._blocks)):
            self._usable, self._input, self._output = False, None, None

    @property
    def doubtful(self) -> bool:
        return self.reused and self.blocks.proved is None

    def prove(self, equal: bool) -> None:
        self.blocks.proved = equal
        self._usable = equal

    def _watch(self, index: int, forward: Operation, args: Args, kwargs: Kwargs) -> object:
        inputs = (args, kwargs)
        if index != self._next:
            self._usable = False  # another order, or a second pass
        if self._usable and index == 0:
            self._usable, self._rng = comparable(inputs), generators(self._device)
            self._input = copied(inputs) if self._usable else None
        output = forward(*args, **kwargs)
        self._next += 1
        if self._usable and index == len(self._blocks) - 1:
            self._usable = comparable(output) and same(self._rng, generators(self._device))
            self._output = copied(output) if self._usable else None
        return output

    def _skip(self, index: int, forward: Operation, args: Args, kwargs: Kwargs) -> object:
        if index == 0:
            self.reused = same(self._input, (args, kwargs))
        return copied(self._output) if self.reused else forward(*args, **kwargs)
