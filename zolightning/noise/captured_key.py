"""A key that GPU kernels read from memory: launches that are recorded once run again with the noise of another step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..types import Key
from .philox import philox_key

_current: CapturedKey | None = None


class CapturedKey:
    """Stands for a key while launches are recorded.

    Args:
        key: the first that it is.
        device: where the kernels run.
    """

    def __init__(self, key: Key, device: torch.device) -> None:
        self.words = torch.tensor(key_words(key), dtype=torch.int64).to(device)
        self.kept: list[Tensor] = []
        """Other tensors that the recorded launches read: they must live as long as the launches."""
        self._named = key_words(key)

    def set(self, key: Key) -> None:
        """Recorded launches draw the noise of this key from here on."""
        self.words.copy_(torch.tensor(key_words(key), dtype=torch.int64))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Launches inside that are given the first key read it from here."""
        global _current
        before, _current = _current, self
        try:
            yield
        finally:
            _current = before


def key_words(key: Key) -> tuple[int, int, int]:
    """The words of a key that kernels read."""
    return *philox_key(key), key.query


def captured_words(words: tuple[int, ...]) -> Tensor | None:
    """Where launches find these words while they are recorded; None: they are no held key's."""
    return _current.words if _current is not None and words == _current._named else None


def keep(tensor: Tensor) -> Tensor:
    """The tensor, which lives as long as the launches that are recorded now."""
    if _current is not None:
        _current.kept.append(tensor)
    return tensor
