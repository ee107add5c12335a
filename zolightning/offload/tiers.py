"""Where the bytes of weights live while no operation needs them: in host memory, or on a disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .files import OffloadError


class Tier(ABC):
    """Holds tensors by name, and counts the bytes that come and go."""

    def __init__(self) -> None:
        self.read_bytes = self.written_bytes = 0

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A copy in memory of its own.

        Raises:
            OSError, OffloadError: the bytes cannot be had.
        """

    @abstractmethod
    def write(self, name: str, tensor: Tensor) -> None:
        """Keep the tensor's present content. A new name is given room.

        Raises:
            OSError, OffloadError: there is no room.
        """

    @abstractmethod
    def keep(self, name: str, tensor: Tensor) -> None:
        """Take the tensor in as it is before training."""

    @abstractmethod
    def commit(self, notes: Mapping[str, Any]) -> None:
        """Make all that was written until now last, where the tier outlives the process.

        Args:
            notes: kept with it.
        """

    def committed(self) -> list[Mapping[str, Any]]:
        """Notes of the commits of earlier processes whose tensors are whole, newest first."""
        return []

    def adopt(self, place: int, names: Mapping[str, bool]) -> None:
        """Go on from one of :meth:`committed`.

        Args:
            place: in that list.
            names: of tensors whose bytes count; the others come from the base.
        """
        raise LookupError(f"no commit {place} of an earlier process")

    @abstractmethod
    def rewind(self) -> None:
        """Have every tensor as it was before training.

        Raises:
            OffloadError: these weights are gone.
        """

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""


class HostTier(Tier):
    """Host memory, pinned where weights go to an accelerator.

    Args:
        device: where operations read the weights.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._tensors: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        host = self._tensors[name]
        self.read_bytes += host.nbytes
        return host.to(self._device, copy=True)

    def write(self, name: str, tensor: Tensor) -> None:
        host = self._tensors.get(name)
        if host is None:
            pinned = self._device.type == "cuda"
            host = self._tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        host.copy_(tensor)
        self.written_bytes += host.nbytes

    def keep(self, name: str, tensor: Tensor) -> None:
        self.write(name, tensor)

    def commit(self, notes: Mapping[str, Any]) -> None:
        """It does not outlive the process."""

    def rewind(self) -> None:
        raise OffloadError(
            "offload='cpu' keeps weights as they are now and not as they were before training, so this module cannot go back "
            "to a checkpoint; make the model anew and load the checkpoint into that, or use offload='disk'"
        )

    def close(self) -> None:
        self._tensors.clear()
