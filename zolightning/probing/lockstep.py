"""Forwards at several points that go through offloaded weights together: one read of the weights for all of them.

Only one of them runs at a time, with its own random numbers; the losses are those of forwards one after another, which the
first batch has to show. Steps that keep state run one after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import torch

from ..offload import Store, Walk, stored
from ..space import View
from ..types import Batch, Forward, Key, PerExample, Point, Shared, SkipStep, Term
from .isolation import Isolation, rng_state, set_rng_state
from .rehearsal import number

T = TypeVar("T")

_FAR = 0.01
_PATIENCE = 60.0  # seconds, at least, or so many times those of two forwards one after another:
_SLOWER = 20


class Lockstep:
    """Runs calls side by side, each at a point of its own.

    Args:
        view: of the weights, of which some are in the store.
        store: whose weights are read once.
        device: where the forwards run.
        muted: makes the context of a forward that logs nothing.
    """

    def __init__(
        self, view: View, store: Store, device: torch.device, muted: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self._view, self._store, self._device, self._muted = view, store, device, muted
        self.sides = store.lockstep
        """Forwards that go together, at most."""
        self._patience = _PATIENCE
        self._threads = ThreadPoolExecutor(max(1, self.sides - 1), "zolightning-lockstep")

    def takes(self, points: Sequence[Point]) -> bool:
        """Whether forwards at these points can go together."""
        return len(points) > 1 and all(isinstance(point, (Shared, PerExample)) for point in points)

    def run(self, call: Callable[[Point, int], T], points: Sequence[Point], logs: bool) -> list[T]:
        """``call`` of each point and its side, which probes there.

        Args:
            call: runs a forward; it gives the side to the view.
            points: at most :attr:`sides`.
            logs: whether the first call logs; the others never do.
        """
        state = rng_state(self._device)
        states = [state] * len(points)

        @contextmanager
        def stretch(side: int) -> Iterator[None]:
            with torch._C.DisableTorchFunction():
                set_rng_state(states[side], self._device)
            with nullcontext() if logs and side == 0 else self._muted():
                yield
            with torch._C.DisableTorchFunction():
                states[side] = rng_state(self._device)

        inherited = _Inherited(self._device)
        calls = [partial(call, point, side) for side, point in enumerate(points)]
        calls[1:] = map(inherited.given_to, calls[1:])
        self._store.let_go()
        walk = Walk(self._store.places, stretch, self._patience)
        try:
            return walk.run(calls, self._threads)
        finally:
            self._store.let_go(walk)
            set_rng_state(states[0], self._device)

    def agrees(self, forward: Forward, batch: Batch, isolation: Isolation) -> bool:
        """Try whether two forwards in lockstep give the losses that they give one after another; leave no trace."""
        if isolation.changing or self._view.opaque:
            return False
        points = [Shared((Term(Key(0, 0), side),)) for side in (_FAR, -_FAR)]

        def loss(point: Point, side: int = 0) -> float:
            with self._view.at(point, side=side):
                return number(forward(batch))

        alone, began = [], time.monotonic()
        for point in points:
            with self._muted(), isolation.dry():
                alone.append(loss(point))
        self._patience = max(_PATIENCE, _SLOWER * (time.monotonic() - began))
        try:
            with isolation.dry():
                together = self.run(loss, points, logs=False)
        except (SkipStep, MemoryError):
            raise
        except Exception:  # code that minds threads
            return False
        return all(a == b or (a != a and b != b) for a, b in zip(alone, together, strict=True))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False)  # one that is stuck would be waited for


class _Inherited:
    """PyTorch's settings of a thread, as they are in this one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._context = device, copy_context()
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def given_to(self, call: Callable[[], T]) -> partial[T]:
        """The call, to be run once in another thread."""

        def inside() -> T:
            enabled, dtype = self._autocast
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode(self._inference))
                stack.enter_context(torch.set_grad_enabled(self._grad))
                stack.enter_context(torch.autocast(self._device.type, dtype, enabled))
                if self._stream is not None:
                    stack.enter_context(torch.cuda.stream(self._stream))
                return call()

        return partial(self._context.copy().run, inside)


def lockstep_of(view: View, isolation: Isolation, muted: Callable[[], AbstractContextManager[Any]]) -> Lockstep | None:
    """Lockstep of forwards, where weights are offloaded and their options ask for it."""
    away = stored(isolation.module.parameters())
    if not away or away[0].store.lockstep < 2:
        return None
    return Lockstep(view, away[0].store, isolation.device, muted)
