"""A Lightning strategy for whichever devices the Trainer assigns: one, or several with a process for each."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel import Parallel, Team
from ._lightning import (
    ClusterEnvironment,
    ParallelStrategy,
    Strategy,
    _MultiProcessingLauncher,
    _SubprocessScriptLauncher,
    _sync_ddp_if_available,
    rank_zero_info,
    rank_zero_only,
)
from .evening import Evened, evened
from .joining import join_group
from .onednn import keep_few_shapes


class DevicesStrategy(ParallelStrategy):
    """The devices come from the Trainer, not from the constructor; on one, every collective operation is the identity.

    Args:
        parallel: how several processes work together.
        accelerator: as for any Lightning strategy; the Trainer fills it in.
        checkpoint_io: likewise.
        precision_plugin: likewise.
        cluster_environment: says who starts the processes; None: the Trainer finds out.
    """

    def __init__(
        self,
        parallel: Parallel,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        cluster_environment: ClusterEnvironment | None = None,
    ) -> None:
        self.parallel = parallel
        self._devices: list[torch.device] = []
        self._nodes, self._running = 1, False
        self.team: Team | None = None
        """The ranks of this run, where it has several."""
        self._evened: list[Evened] = []
        super().__init__(
            accelerator=accelerator,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )

    # who is there

    @property
    def parallel_devices(self) -> list[torch.device]:
        """This machine's. Between runs it reads as empty, so that the next Trainer of the same object may set it again."""
        return self._devices if self._running else []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._devices = devices or []

    @property
    def num_processes(self) -> int:
        """On this machine."""
        return max(1, len(self._devices))

    @property
    def num_nodes(self) -> int:
        return self._nodes

    @num_nodes.setter
    def num_nodes(self, number: int) -> None:
        self._nodes = number

    @property
    def is_distributed(self) -> bool:
        return self.num_processes * self.num_nodes > 1

    @property
    def world_size(self) -> int:
        return super().world_size if self.is_distributed else 1

    @property
    def global_rank(self) -> int:
        return super().global_rank if self.is_distributed else 0

    @property
    def local_rank(self) -> int:
        return super().local_rank if self.is_distributed else 0

    @property
    def node_rank(self) -> int:
        return super().node_rank if self.is_distributed else 0

    @property
    def root_device(self) -> torch.device:
        return self._devices[self.local_rank] if self._devices else torch.device("cpu")

    @property
    def groups(self) -> int:
        """Batches that a micro-batch of the run consists of."""
        return self.parallel.layout(self.global_rank, self.world_size).groups

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Examples are dealt out to groups of ranks."""
        layout = self.parallel.layout(self.global_rank, self.world_size)
        return {"num_replicas": layout.groups, "rank": layout.group}

    # processes

    def set_world_ranks(self) -> None:
        environment = self.cluster_environment
        if self.is_distributed and environment is not None:
            environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            environment.set_world_size(self.num_nodes * self.num_processes)
            rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def _configure_launcher(self) -> None:
        environment = self.cluster_environment
        if not self.is_distributed or environment is None:
            self._launcher = None
        elif self.parallel.start_method == "popen":
            self._launcher = _SubprocessScriptLauncher(environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = _MultiProcessingLauncher(self, start_method=self.parallel.start_method)

    def setup_environment(self) -> None:
        self._running = True
        super().setup_environment()
        if self.is_distributed:
            self.set_world_ranks()
            assert self.cluster_environment is not None
            join_group(self.cluster_environment, self.parallel, self.global_rank, self.world_size, self.root_device)
            self.team, self._evened = Team(self.parallel), []
        else:
            self._refuse_strays()
        if self.root_device.type == "cpu" and (change := keep_few_shapes()):
            rank_zero_info(f"ZO: {change}")

    def _refuse_strays(self) -> None:
        environment = self.cluster_environment
        if environment is not None and environment.creates_processes_externally and "TORCHELASTIC_RUN_ID" in os.environ:
            environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def process_dataloader(self, dataloader: object) -> object:
        """A training loader with as many batches as those of the other ranks."""
        module = self.lightning_module
        if self.team is None or module is None or not module.trainer.training:
            return dataloader
        even = evened(dataloader, self.team)
        self._evened += [even] if isinstance(even, Evened) else []
        return even

    def leaving(self) -> AbstractContextManager[None]:
        """Around code in which an error concerns this rank alone: the others are then not waited for."""
        return nullcontext() if self.team is None else self.team.leaving()

    def stands_in(self) -> bool:
        """Whether the batch of this step is no more than a stand-in for one of the epoch's."""
        if not self._evened:
            return False
        assert self.lightning_module is not None
        place = self.lightning_module.trainer.fit_loop.epoch_loop.batch_idx
        return any(loader.real is not None and place >= loader.real for loader in self._evened)

    def teardown(self) -> None:
        if self.is_distributed:
            super().teardown()
        else:  # the environment's variables are none of ours
            Strategy.teardown(self)
        self._running, self._evened = False, []

    # collective operations: of metrics and of Lightning's own

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if self._several(tensor) else tensor

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return super().all_gather(tensor, group, sync_grads) if self._several(tensor) else tensor

    def barrier(self, *args: object, **kwargs: object) -> None:
        if self._several():
            dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not self._several():
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return super().reduce_boolean_decision(decision, all) if self._several() else decision

    def _several(self, tensor: object = None) -> bool:
        if self.team is None or not dist.is_initialized():
            return False
        return not self.team.exchange.broken and (tensor is None or isinstance(tensor, Tensor))
