"""Ctrl-C waits until an update is whole: no weights are left between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block has ended; they reach their own handlers then.

    Signal handlers run in the main thread, and only it can set them: elsewhere there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _held(signal.SIGINT), _held(signal.SIGTERM):  # one within the other: each is restored though a handler raises
        yield


@contextmanager
def _held(number: signal.Signals) -> Iterator[None]:
    handler = signal.getsignal(number)
    if not callable(handler):
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    signal.signal(number, lambda *arguments: arrived.append(arguments))
    try:
        yield
    finally:
        signal.signal(number, handler)
        for arguments in arrived:
            handler(*arguments)
