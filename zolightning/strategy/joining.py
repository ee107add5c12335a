"""How a process of a run comes into its process group: once for each rank, and all of them with the same number of ranks."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..parallel import Parallel, RanksError
from ._lightning import ClusterEnvironment, MisconfigurationException


def join_group(environment: ClusterEnvironment, parallel: Parallel, rank: int, size: int, device: torch.device) -> None:
    """Make torch.distributed's default group, unless a cluster's own launcher or an earlier run of this Trainer has.

    Args:
        environment: says where rank 0 is.
        parallel: its backend and timeout.
        rank: of this process.
        size: number of ranks.
        device: of this rank.

    Raises:
        MisconfigurationException: there can be no group here.
        RanksError: another process is this rank, or the run has another number of ranks.
    """
    if device.type == "mps":
        raise MisconfigurationException("several processes cannot share an MPS device; use devices=1")
    if not dist.is_available():
        raise MisconfigurationException("this build of PyTorch has no torch.distributed; use devices=1")
    if dist.is_initialized():
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    backend = parallel.backend or ("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    timeout = timedelta(seconds=parallel.timeout)
    store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # its agents deal ranks out, and may keep one store over restarts
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
    else:
        _take_seat(store, rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _take_seat(store: dist.Store, rank: int, size: int) -> None:  # type: ignore[name-defined]
    """Without it a process that comes late would wait for ranks that never answer it."""
    sizes = store.compare_set("zolightning/size", "", str(size)).decode()
    if sizes != str(size):
        raise RanksError(f"the run at {_place()} has {sizes} ranks, and this process was started as rank {rank} of {size}")
    if store.add(f"zolightning/rank-{rank}", 1) > 1:
        raise RanksError(
            f"the run at {_place()} has a rank {rank} already; start a run of your own at another MASTER_PORT, or restart "
            "all ranks"
        )


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
