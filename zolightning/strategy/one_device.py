"""A Lightning strategy for whichever one device the Trainer assigns, CPU, CUDA or MPS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._lightning import MisconfigurationException, Strategy, rank_zero_info
from .onednn import keep_few_shapes


class OneDeviceStrategy(Strategy):
    """The device comes from the Trainer, not from the constructor; every collective operation is the identity."""

    global_rank = local_rank = node_rank = 0
    world_size = 1
    is_distributed = False
    is_global_zero = True

    _devices: list[torch.device]
    _nodes: int = 1

    def __init__(self, accelerator: Any = None, checkpoint_io: Any = None, precision_plugin: Any = None) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self._devices = []

    @property
    def parallel_devices(self) -> list[torch.device]:
        """Set by the Trainer: exactly one. Reads as empty, so that the next Trainer of the same object may set it again."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._devices = devices or []
        self._refuse_several()

    @property
    def num_nodes(self) -> int:
        return self._nodes

    @num_nodes.setter
    def num_nodes(self, number: int) -> None:
        self._nodes = number
        self._refuse_several()

    def _refuse_several(self) -> None:
        if len(self._devices) > 1 or self._nodes > 1:
            raise MisconfigurationException(
                f"{type(self).__name__} trains on one device, got devices={len(self._devices)}, num_nodes={self._nodes}; "
                "use Trainer(devices=1)"
            )

    @property
    def root_device(self) -> torch.device:
        return self._devices[0] if self._devices else torch.device("cpu")

    def setup_environment(self) -> None:
        super().setup_environment()
        if self.root_device.type == "cpu" and (change := keep_few_shapes()):
            rank_zero_info(f"ZO: {change}")

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def reduce(self, tensor: object, *args: object, **kwargs: object) -> object:
        return tensor

    def all_gather(self, tensor: Tensor, group: object = None, sync_grads: bool = False) -> Tensor:
        return tensor

    def barrier(self, *args: object, **kwargs: object) -> None:
        pass

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj
