"""Modules that run before the first weight that a probe moves compute the same in every probe: once is enough.

Feature reuse of DeepZero (arXiv:2310.02025), in the order in which the modules of any model are seen to run: stacks,
branches, residual stages, functions between them. A probe of one group of weights is given the kept output of each module
that ended before the first of these weights is read, and computes the rest. It changes no bit:

- a module is kept only where it runs once a forward, draws no random number, has no hooks, and gives nothing but tensors and
  plain values; functions between modules run again, on the kept outputs;
- kept outputs are those of one micro-batch, and of the same input value by value;
- the first forward that starts at a module is run again in full, and gives the same loss bit for bit; else nothing is reused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from ..space import GroupLeaf, View
from ..space.operations import Args, Kwargs
from ..types import Batch, Forward, Key, Operation, Point, Shared, SkipStep, Term
from .isolation import Isolation
from .reuse import comparable, copied, generators, hooked, instead, same, size_of, versions


class Unit(NamedTuple):
    """A module that may be left out.

    Args:
        module: itself.
        end: the interval that begins with its end, between beginnings and ends of modules, counted from 0.
    """

    module: nn.Module
    end: int


class FeatureReuse:
    """The order of a model's units and weights.

    Args:
        units: in the order of their ends.
        read: id of a Parameter → the interval in which it was first read.
        view: of groups.
        room: bytes of outputs that a step may keep.
    """

    def __init__(self, units: Sequence[Unit], read: Mapping[int, int], view: View, room: float) -> None:
        self.units, self.room, self.device = tuple(units), room, view.leaves[0].parameter.device
        self._read, self._leaves = read, [leaf for leaf in view.leaves if isinstance(leaf, GroupLeaf)]
        self.proved: dict[tuple[int, ...], bool] = {}
        """By the places of the units that were left out: whether that gave the loss of a full forward."""
        self.written: set[int] = set()
        """Places of units into whose outputs later code writes: these are given as copies."""
        self.looked: set[tuple[int, int]] = set()
        """(units left out, place of one): the values of its output were looked at after such a forward."""
        self.kept = 0
        """Bytes that the last step kept."""
        self._described = False
        self._before = lru_cache(maxsize=1 << 16)(self._units_before)

    def step(self) -> KeptFeatures:
        return KeptFeatures(self)

    def before(self, point: Point | None) -> int:
        """How many units end before the point's weights are read; all, where it moves none."""
        if not isinstance(point, Shared):
            return 0
        return min((self._before(term.key.query) for term in point.terms), default=len(self.units))

    def _units_before(self, query: int) -> int:
        moved = [leaf for leaf in self._leaves if leaf.moved([Term(Key(0, 0, query), 1.0)])]
        first = min((self._read.get(id(leaf.parameter), 0) for leaf in moved), default=math.inf)
        return sum(unit.end <= first for unit in self.units)

    def notice(self) -> str:
        if self._described or not self.proved:
            return ""
        self._described = True
        if not all(self.proved.values()):
            return (
                "each probe runs the whole model: with the outputs of modules that it does not reach the loss was another one"
            )
        return (
            f"a probe runs only the modules that its group of weights reaches; outputs of {len(self.units)} others are kept "
            f"({self.kept / 2**20:.1f} MiB)"
        )


def feature_reuse(forward: Forward, batch: Batch, view: View, isolation: Isolation, room: float) -> FeatureReuse | None:
    """See in which order the step's modules run and read the weights, without a trace.

    Args:
        forward: the user's step.
        batch: the first micro-batch.
        view: of groups.
        isolation: of the module.
        room: bytes of outputs that a step may keep; 0: None is returned.
    """
    if view.opaque or not room:
        return None
    leaves = [leaf for leaf in view.leaves if isinstance(leaf, GroupLeaf)]
    all_ = Shared(tuple(Term(Key(0, 0, query), 0.0) for query in range(leaves[0].queries)))
    modules = [module for module in view.root.modules() if module is not view.root]
    order = _Order(view)
    try:
        with isolation.dry(), view.at(all_), instead(modules, order.call):
            forward(batch)
    except SkipStep:
        return None
    order.look()
    last = max(order.read.values(), default=0)
    ends = [(ends[0], place) for place, ends in order.ends.items() if len(ends) == 1 and ends[0] <= last]
    units = [Unit(modules[place], end) for end, place in sorted(ends) if not hooked([modules[place]])]
    return FeatureReuse(units, order.read, view, room) if units else None


class _Order:
    """Counts the intervals between beginnings and ends of modules, and sees the weights that are read in them."""

    def __init__(self, view: View) -> None:
        self._view, self._now = view, 0
        self.ends: dict[int, list[int]] = {}
        self.read: dict[int, int] = {}
        view.read.clear()

    def call(self, place: int, forward: Operation, args: Args, kwargs: Kwargs) -> object:
        self.look()
        out = forward(*args, **kwargs)
        self.look()
        self.ends.setdefault(place, []).append(self._now)
        return out

    def look(self) -> None:
        """An interval ends, in which all was read that was not before."""
        self.read.update({parameter: self._now for parameter in self._view.read if parameter not in self.read})
        self._now += 1


class KeptFeatures:
    """The outputs that one micro-batch's probes share; they go with the object.

    Args:
        order: of the model's units and weights.
    """

    def __init__(self, order: FeatureReuse) -> None:
        self._order = order
        self._outputs: dict[int, Any] = {}
        self._input: tuple[int, object] | None = None
        self._left = order.room
        self._fresh, self._out = True, 0
        self._given: dict[int, tuple[object, object]] = {}
        """Places of the units that the forward left out, with the versions of their outputs, and copies of new ones."""

    @contextmanager
    def forward(self, point: Point | None) -> Iterator[None]:
        order, self._fresh = self._order, True
        self._given.clear()
        units = order.units[: order.before(point)] if all(order.proved.values()) else ()
        self._out = len(units)
        try:
            with instead([unit.module for unit in units], self._call):
                yield
        finally:
            self._look_for_writes()
        order.kept = int(order.room - self._left)

    def _look_for_writes(self) -> None:
        """An output that the forward wrote into has served its last time, and is given as a copy from now on."""
        written = self._order.written
        for place, (before, copy) in self._given.items():
            own = self._outputs[place]
            if place not in written and (versions(own) != before or (copy is not None and not same(own, copy))):
                written.add(place)
                self._left += size_of(self._outputs.pop(place))
            self._order.looked.add((self._out, place))

    def _call(self, place: int, forward: Operation, args: Args, kwargs: Kwargs) -> object:
        with torch._C.DisableTorchFunction():  # none of this is the model's
            if self._fresh:
                self._begin(place, (args, kwargs))
            if place in self._outputs:
                own, written = self._outputs[place], place in self._order.written
                new = not written and (self._out, place) not in self._order.looked
                self._given[place] = versions(own), copied(own) if new else None
                return copied(own) if written else own
            before = generators(self._order.device)
        out = forward(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            size = size_of(out)
            if comparable(out) and size <= self._left and same(before, generators(self._order.device)):
                self._outputs[place] = copied(out)
                self._left -= size
        return out

    def _begin(self, place: int, inputs: object) -> None:
        """The first unit of a forward: all is kept for one input."""
        self._fresh = False
        if self._input is None or self._input[0] != place or not same(self._input[1], inputs):
            self._outputs.clear()
            self._left = self._order.room
            self._input = (place, copied(inputs)) if comparable(inputs) else None

    @property
    def doubtful(self) -> bool:
        return bool(self._given) and tuple(self._given) not in self._order.proved

    def prove(self, equal: bool) -> None:
        self._order.proved[tuple(self._given)] = equal
