"""The ranks of ``ranks.py``: each runs cases and writes down what it saw.

Libraries are imported once, by one process; the ranks of each group are forks of it, and may break their process group.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import rank_cases
import rank_trainer
import torch
import torch._dynamo  # once for all forks
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rank_cases import TIMEOUT
from ranks import environment

Cases = Sequence[Sequence[Any]]


def run(cases: Cases, path: Path) -> None:
    """One after another, up to the first that breaks."""
    known = {**rank_cases.CASES, **rank_trainer.CASES}
    found: dict[str, Any] = {}
    for name, *arguments in cases:
        torch.manual_seed(int(os.environ["PLACE"]))  # ranks begin with other weights
        try:
            found[str([name, *arguments])] = known[name](*arguments)
        except Exception:
            found[str([name, *arguments])] = {"raised": traceback.format_exc()}
            break
        finally:
            path.write_text(json.dumps(found))


def begin(cases: Cases, launcher: str | None, rank: int, size: int, port: int, path: Path) -> int:
    """The process id of a rank, forked."""
    if child := os.fork():
        return child
    try:
        with open(f"rank-{rank}.txt", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.environ.update({**environment(launcher, rank, size, port), "PLACE": str(rank)})
        rank_zero_only.rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))  # type: ignore[attr-defined]
        if launcher is None:
            dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT if cases[0][0] == "fault" else 60))
        run(cases, path)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def main() -> None:
    """Each group after the other; a rank that is stopped is ended when the others have had time to see it."""
    torch.set_num_threads(1)
    rank_trainer.module_of("scales")  # so that its libraries are imported once
    for number, (cases, size, launcher, port) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        paths = [Path.cwd() / f"found-{number}.{rank}" for rank in range(size)]
        for child in [begin(cases, launcher, rank, size, port, path) for rank, path in enumerate(paths)]:
            _, status = os.waitpid(child, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                time.sleep(TIMEOUT + 2)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


if __name__ == "__main__":
    main()
