"""Identical probes: every forward of a step starts from the same state and the step leaves the state of one forward.

State is found by looking: state that a forward changed is kept from then on and nothing else is, so that a step pays for the
state that it has and for no other.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ..types import StateDict
from .state import DEPTH, MISSING, Kept, Slot, attributes, modules
from .writes import Writes, seen

_ALWAYS = 1 << 20  # bytes; a larger buffer (quantised weights, masks) is watched only if the first forward changes it


def rng_state(device: torch.device) -> StateDict:
    """Every generator that a forward on ``device`` may draw from, in types that a safe checkpoint holds."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: StateDict = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), *rest],  # type: ignore[union-attr]
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: StateDict, device: torch.device) -> None:
    """Restore the result of :func:`rng_state`."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])


class Isolation:
    """Runs a step's forwards alike: same dropout, same BatchNorm statistics, same metric states, same counters and lists.

    Args:
        module: whose state is kept.
        device: whose generator is kept in addition to the CPU's.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self._metrics = [(name, m) for name, m in module.named_modules() if isinstance(m, Metric)]
        inside = {id(part) for _, metric in self._metrics for part in metric.modules()}
        self._watched: dict[Slot, int] = {}  # how deep their changes go
        self._weights: frozenset[int] = frozenset()  # ids of parameters, which are no state where a list holds them
        for owner, part in module.named_modules():
            if id(part) not in inside:
                buffers = dict(part._buffers.items()) if isinstance(part, torch.jit.ScriptModule) else part._buffers
                self._watched.update({Slot(owner, buffers, name): 1 for name in buffers})
        self.changing: set[Slot] = set()
        """State that a forward was seen to change."""
        self.looked = False
        """Whether a forward has shown its changes."""
        self._steps = 0

    @property
    def due(self) -> bool:
        """Whether the next step looks for state that nobody knew of: it may begin to change later, or deeper down."""
        return not self.looked or self._steps in (1, 2, 3) or self._steps & (self._steps - 1) == 0 < self._steps

    @contextmanager
    def step(self) -> Iterator[Probes]:
        """Around the probes of one micro-batch: its :meth:`Probes.forward` goes around each of them.

        Raises:
            RuntimeError: the probes write frozen parameters, each with other values.
        """
        probes = Probes(self, everywhere=self.due)
        self._steps += 1
        try:
            yield probes
        finally:
            probes.finish()

    @contextmanager
    def rehearsal(self, everywhere: bool = True) -> Iterator[Probes]:
        """Around the probes of a step that leaves no trace."""
        probes = Probes(self, everywhere)
        try:
            yield probes
        finally:
            probes.undo()

    @contextmanager
    def dry(self, everywhere: bool = True) -> Iterator[None]:
        """Around a forward that leaves no trace, ``everywhere`` or in the state that is known to change."""
        with self.rehearsal(everywhere or self.due) as probes, probes.forward():
            yield

    def tried(self, call: Callable[[Any], Any], argument: Any) -> Any:
        """``call(argument)``, which leaves no trace."""
        with self.dry():
            return call(argument)

    def snapshot(self) -> dict[Slot, Kept]:
        """The state that is known to change."""
        metrics = {  # states, and the counters of a wrapper
            Slot(owner, vars(metric), name): Kept(value, 1)
            for owner, metric in self._metrics
            for name, value in vars(metric).items()
        }
        return metrics | {slot: Kept(slot.value, depth, self._weights) for slot, depth in self._watched.items()}

    def everything(self) -> dict[Slot, Kept]:
        """All state that there may be."""
        written = {id(slot.value) for slot in self._watched}
        weights = (id(p) for _, m in modules(self.module) for p in m._parameters.values())
        self._weights = frozenset(p for p in weights if p not in written)
        known = self.snapshot()
        limit = _ALWAYS if self.looked else math.inf
        return known | {s: Kept(s.value, DEPTH, self._weights, math.inf if s in known else limit) for s in self._places()}

    def state(self) -> dict[Slot, Kept]:
        """The state that was seen to change, with all that it holds."""
        return {slot: Kept(slot.value, DEPTH, self._weights) for slot in self.changing}

    def holds(self, shapes: AbstractSet[torch.Size]) -> bool:
        """Whether a tensor of such a shape is part of the state."""
        kept = (Kept(slot.value, DEPTH, self._weights, limit=-1) for slot in self._places())
        return any(was.shape in shapes for k in kept for was, _ in k.tensors(k.value))

    def changed(self, before: dict[Slot, Kept], written: Mapping[Slot, Kept], complete: bool) -> dict[Slot, Kept]:
        """The part of ``before`` that is to be restored after a forward: the state that it changed is watched from now on.

        Args:
            before: from :meth:`everything`.
            written: parameters as they were.
            complete: the forward came to its end.
        """
        new = {slot: Kept(MISSING, 0) for slot in self._places() if slot not in before}
        before = {**before, **written, **new}
        changes = {slot: kept.change(slot.value) for slot, kept in before.items()}
        changes.update(dict.fromkeys(written, 1))  # even with the value that they had
        self._weights -= {id(slot.value) for slot in written}
        for slot, depth in changes.items():
            if depth is not None:
                self.changing.add(slot)
                self._watched[slot] = max(depth, self._watched.get(slot, 0))
        if complete and not self.looked:
            self.looked = True
            for slot in [slot for slot in self._watched if changes.get(slot) is None and _large(slot.value)]:
                del self._watched[slot]
        kept = self.snapshot()
        return {slot: value for slot, value in before.items() if slot in kept}

    def _places(self) -> Iterator[Slot]:
        for owner, module in modules(self.module):
            yield from (Slot(owner, module._buffers, name) for name in module._buffers)
            yield from (Slot(owner, vars(module), name) for name in attributes(module))
            for name, parameter in module._parameters.items():  # quantised ones carry their scales
                if parameter is not None:
                    yield from (Slot(f"{owner}.{name}", vars(parameter), entry) for entry in vars(parameter))


class Probes:
    """The forwards of one micro-batch: each starts from the state before the first one.

    Args:
        isolation: of the module.
        everywhere: look for state that nobody knew of.
    """

    def __init__(self, isolation: Isolation, everywhere: bool) -> None:
        self._isolation, self._everywhere = isolation, everywhere
        self._rng: StateDict | None = None
        self._before: dict[Slot, Kept] = {}
        self._after: dict[Slot, Kept] = {}
        self.count = 0
        """Forwards that came to their end."""

    @contextmanager
    def forward(self, count: int = 1) -> Iterator[None]:
        """Around each of them, or around so many at a time, where none of them changes any state.

        Raises:
            RuntimeError: after the second: each has written other values into a parameter.
        """
        if self._rng is None:
            with self._first():
                yield
        else:
            with torch._C.DisableTorchFunction():  # a probe's mode shall not look at this
                set_rng_state(self._rng, self._isolation.device)
                restore(self._before)
            yield
        self.count += count
        with torch._C.DisableTorchFunction():
            if self.count == count:
                self._after = self._isolation.snapshot()
            elif self.count == 2:
                self._refuse_writes()

    @contextmanager
    def _first(self) -> Iterator[None]:
        isolation, writes = self._isolation, None
        with torch._C.DisableTorchFunction():
            self._rng = rng_state(isolation.device)
            self._before = isolation.everything() if self._everywhere else isolation.snapshot()
            if self._everywhere and seen(isolation.module):
                writes = Writes(isolation.module)
        complete = False
        try:
            with writes or nullcontext():
                yield
            complete = True
        finally:
            if self._everywhere:
                with torch._C.DisableTorchFunction():
                    self._before = isolation.changed(self._before, writes.kept if writes else {}, complete)

    def moved(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, as it was, as it is) of each tensor, parameters apart, that the forwards have changed."""
        for slot, kept in self._before.items():
            if not isinstance(slot.value, nn.Parameter):
                for was, now in kept.tensors(slot.value):
                    if was.shape == now.shape and not torch.equal(was, now):
                        yield str(slot), was, now

    @property
    def written(self) -> list[Slot]:
        """The parameters that the first forward wrote."""
        return [slot for slot in self._before if isinstance(slot.value, nn.Parameter)]

    def _refuse_writes(self) -> None:
        for slot in self.written:
            if slot in self._after and self._after[slot].change(slot.value) is not None:
                self._after = self._before
                raise RuntimeError(
                    f"the training step writes the parameter {str(slot)!r}, and each probe another value: it follows the "
                    "trained weights, which are perturbed there. Move the write to `on_train_batch_end`, where they are not; "
                    "or, where it follows activations, hold it as a buffer, which gets the value of a step's first forward"
                )

    def finish(self) -> None:
        """Leave the state of the first forward."""
        if self.count > 0:  # also when a later forward raised
            restore(self._after)

    def undo(self) -> None:
        """Leave the state before the first forward."""
        if self._rng is not None:
            set_rng_state(self._rng, self._isolation.device)
            restore(self._before)


def restore(saved: Mapping[Slot, Kept]) -> None:
    """Put the values back, with the content that they had."""
    for slot, kept in saved.items():
        slot.put(kept)


def _large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.nbytes > _ALWAYS
