"""Starts the ranks of ``rank_worker.py`` on this machine, as the launchers do, and collects what they saw."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

TESTS = Path(__file__).parent
Found: TypeAlias = Sequence[Mapping[str, Any]]
"""Rank by rank: case → what it gave."""


class Group(NamedTuple):
    """Processes that run cases together, until one of these raises.

    Args:
        cases: each a name and its arguments.
        size: number of processes.
        launcher: whose environment they get, see :func:`environment`. None: they are a process group already.
    """

    cases: Sequence[Sequence[Any]]
    size: int = 2
    launcher: str | None = None


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(launcher: str | None, rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that a launcher sets for a rank on loopback; the third process of "stranger" comes as another rank 1."""
    if launcher == "stranger":
        rank, size = min(rank, 1), 2
    torchrun = {"RANK": rank, "WORLD_SIZE": size, "TORCHELASTIC_RUN_ID": "tests"}
    slurm = {"SLURM_NTASKS": size, "SLURM_PROCID": rank, "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": 1234}
    one, two = {"SLURM_NTASKS_PER_NODE": size, "SLURM_NNODES": 1}, {"SLURM_NTASKS_PER_NODE": 1, "SLURM_NNODES": size}
    names = {
        "torchrun": {**torchrun, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0},
        "torchrun, two nodes": {**torchrun, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank},
        "slurm": {**slurm, **one, "SLURM_LOCALID": rank, "SLURM_NODEID": 0},
        "slurm, two nodes": {**slurm, **two, "SLURM_LOCALID": 0, "SLURM_NODEID": rank},
        "stranger": {"LOCAL_RANK": rank},
        "lightning, two nodes": {"NODE_RANK": rank},
        "fork": {},
    }[launcher or "torchrun"]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **{name: str(value) for name, value in names.items()}}


def run_groups(groups: Sequence[Group], folder: Path) -> list[Found]:
    """The findings of each group; rank N writes to ``rank-N.txt`` in the folder."""
    path = folder / "groups.json"
    path.write_text(json.dumps([[*group, free_port()] for group in groups]))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    subprocess.run(
        [sys.executable, str(TESTS / "rank_worker.py"), str(path)],
        env={**environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        check=True,
        timeout=600,
    )
    files = [[folder / f"found-{number}.{rank}" for rank in range(group.size)] for number, group in enumerate(groups)]
    found = [[json.loads(file.read_text()) if file.exists() else {} for file in of_group] for of_group in files]
    errors = [result["raised"] for group in found for rank in group for result in rank.values() if "raised" in result]
    assert not errors, errors[0]
    return found
