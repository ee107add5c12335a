"""Starts several ranks of a worker on this machine, as torchrun does, and collects what they saw."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Of one rank."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **fixed, **{name: str(value) for name, value in names.items()}}


def start(command: Sequence[str], folder: Path, size: int = 2, port: int | None = None) -> list[subprocess.Popen[str]]:
    """The ranks, each of which writes to ``rank-N.txt`` in the folder."""
    port = port or free_port()
    started = []
    for rank in range(size):
        with open(folder / f"rank-{rank}.txt", "w") as output:
            started.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env=environment(rank, size, port),
                    cwd=folder,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    return started


def run_groups(groups: Sequence[Sequence[Sequence[Any]]], folder: Path, size: int = 2) -> list[dict[str, Any]]:
    """Rank by rank: case → what it gave. Each group of cases has a process group of its own."""
    path = folder / "cases.json"
    path.write_text(json.dumps([[cases, free_port()] for cases in groups]))
    started = start([str(TESTS / "rank_worker.py"), str(path)], folder, size)
    try:
        codes = [rank.wait(timeout=600) for rank in started]
    finally:
        for rank in started:
            rank.kill()
    texts = [(folder / f"rank-{rank}.txt").read_text() for rank in range(size)]
    assert codes == [0] * size, texts
    found: list[dict[str, Any]] = [{} for _ in range(size)]
    for number in range(len(groups)):
        for rank in range(size):
            if (file := folder / f"found-{number}.{rank}").exists():
                found[rank].update(json.loads(file.read_text()))
    return found
