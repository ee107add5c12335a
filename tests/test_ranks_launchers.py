"""The example's script under real launchers: each starts its own processes, which takes a minute and more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import free_port

SCRIPT = Path(__file__).parents[1] / "examples" / "ranks" / "train.py"
TORCHRUN = ["-m", "torch.distributed.run"]
pytestmark = pytest.mark.slow


def start(command: Sequence[object]) -> subprocess.Popen[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(*started: subprocess.Popen[str]) -> str:
    texts = [process.communicate(timeout=900)[0] for process in started]
    assert all(process.returncode == 0 for process in started), texts
    return "".join(texts)


def weights(text: str) -> list[str]:
    """Of each rank, at its end."""
    return re.findall(r"weights ([0-9a-f]{32})", text)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of two ranks that Lightning started in its usual way."""
    text = said(start([SCRIPT, "--steps", 60, "--out", tmp_path_factory.mktemp("usual")]))
    first, second = weights(text)
    assert first == second
    return first


def test_spawn(usual: str, tmp_path: Path) -> None:
    assert weights(said(start([SCRIPT, "--steps", 60, "--out", tmp_path, "--start", "spawn"]))) == [usual] * 2


def test_two_nodes_of_torchrun(usual: str, tmp_path: Path) -> None:
    node = [*TORCHRUN, "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d"]
    node += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", SCRIPT, "--nodes", 2, "--steps", 60, "--out", tmp_path]
    assert weights(said(start(node), start(node))) == [usual] * 2


def test_torchrun_restarts_the_ranks_when_one_is_killed_and_another_number_goes_on(tmp_path: Path) -> None:
    run = ["--nproc-per-node", 2, "--max-restarts", 1, "--master-port", free_port()]
    text = said(start([*TORCHRUN, *run, SCRIPT, "--die-at", 30, "--steps", 60, "--out", tmp_path]))
    begun = sorted(re.findall(r"rank (\d) of 2 begins at step (\d+)", text))
    assert begun == [("0", "0"), ("0", "20"), ("1", "0"), ("1", "20")]
    assert len(set(weights(text))) == 1
    for ranks, steps in ((1, 70), (3, 80)):
        text = said(start([SCRIPT, "--ranks", ranks, "--steps", steps, "--out", tmp_path]))
        assert text.count(f"begins at step {steps - 10}") == ranks
        assert len(weights(text)) == ranks and len(set(weights(text))) == 1
