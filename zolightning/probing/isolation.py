"""Identical probes: every forward of a step starts from the same state and the step leaves the state of one forward."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

_ALWAYS = 1 << 20  # bytes; a larger buffer (quantised weights, masks) is watched only if the first forward changes it


def rng_state(device: torch.device) -> dict[str, Any]:
    """Every generator that a forward on ``device`` may draw from, in types that a safe checkpoint holds."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), *rest],  # type: ignore[union-attr]
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`rng_state` gave."""
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
    """Runs a step's forwards alike: same dropout, same BatchNorm statistics, same metric states.

    Args:
        module: whose buffers and torchmetrics are kept.
        device: whose generator is kept beside the CPU's.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self._metrics = [m for m in module.modules() if isinstance(m, Metric)]
        inside = {id(part) for metric in self._metrics for part in metric.modules()}
        self._buffers = [
            (owner, name) for owner in module.modules() if id(owner) not in inside for name, _ in owner._buffers.items()
        ]
        self._narrowed = False

    @contextmanager
    def step(self) -> Iterator[Probes]:
        """Around the probes of one micro-batch: its :meth:`Probes.forward` goes around each of them."""
        probes = Probes(self)
        try:
            yield probes
        finally:
            probes.finish()

    @contextmanager
    def dry(self) -> Iterator[None]:
        """Around a forward that leaves no trace."""
        rng, before = rng_state(self.device), self.snapshot()
        try:
            yield
        finally:
            set_rng_state(rng, self.device)
            self.restore(before)

    def snapshot(self) -> list[Any]:
        buffers = [owner._buffers[name] for owner, name in self._buffers]
        return [_kept(b) for b in buffers] + [_copies(m) for m in self._metrics]

    def restore(self, saved: list[Any]) -> None:
        for (owner, name), value in zip(self._buffers, saved, strict=False):
            current = owner._buffers[name]
            if current is value:
                continue
            if (
                _repeats(current)
                or current is None
                or value is None
                or current.shape != value.shape
                or current.dtype != value.dtype
            ):
                owner._buffers[name] = _kept(value)
            else:
                current.copy_(value)
        for metric, state in zip(self._metrics, saved[len(self._buffers) :], strict=True):
            metric.__dict__.update({name: _copied(value) for name, value in state.items()})

    def narrow(self, before: list[Any]) -> list[Any]:
        """After the first forward ever: stop watching large buffers that it left alone. Returns ``before``, narrowed."""
        if self._narrowed:
            return before
        self._narrowed = True
        kept: list[Any] = []
        watched = []
        for (owner, name), value in zip(self._buffers, before, strict=False):
            current = owner._buffers[name]
            # by value: BatchNorm's CPU kernel changes running_mean without bumping its version
            if value is None or current is None or value.nbytes <= _ALWAYS or not torch.equal(current, value):
                watched.append((owner, name))
                kept.append(value)
        kept += before[len(self._buffers) :]
        self._buffers = watched
        return kept


class Probes:
    """The forwards of one micro-batch: each starts from the state before the first one."""

    def __init__(self, isolation: Isolation) -> None:
        self._isolation = isolation
        self._rng: dict[str, Any] | None = None
        self._before: list[Any] = []
        self._after: list[Any] = []
        self.count = 0
        """Forwards that came to their end."""

    @contextmanager
    def forward(self) -> Iterator[None]:
        device = self._isolation.device
        if self._rng is None:
            self._rng, self._before = rng_state(device), self._isolation.snapshot()
        else:
            set_rng_state(self._rng, device)
            self._isolation.restore(self._before)
        yield
        self.count += 1
        if self.count == 1:
            self._before = self._isolation.narrow(self._before)
            self._after = self._isolation.snapshot()

    def finish(self) -> None:
        if self.count > 0:  # also when a later forward raised
            self._isolation.restore(self._after)


def _kept(buffer: Tensor | None) -> Tensor | None:
    """A copy; itself where elements share memory, as after ``expand``: nothing can write into it."""
    return buffer if buffer is None or _repeats(buffer) else buffer.clone()


def _repeats(buffer: Tensor | None) -> bool:
    return buffer is not None and 0 in buffer.stride()


def _copies(metric: Metric) -> dict[str, Any]:
    """All that a metric holds: its states, and what a wrapper counts beside them."""
    return {name: _copied(value) for name, value in vars(metric).items()}


def _copied(value: Any) -> Any:
    """Tensors by value; lists shallowly, since a forward appends to them and does not write into them."""
    return value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value
