"""Cases of several ranks in a plain loop, for ``rank_worker.py``: each returns the facts that a test compares."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import PLAIN, batches, mlp, mse, per_example_mse
from torch import Tensor, nn
from torch.optim import SGD

from zolightning import ZOConfig
from zolightning.engine.session import Session
from zolightning.ledger import PendingLedger, claim, fingerprint
from zolightning.methods.recipes import recipe
from zolightning.parallel import Parallel, Team
from zolightning.parallel.layout import Mode

DEFAULT = recipe("default").override(select="all", seed=7)
CONFIGS = {
    "spsa": PLAIN,
    "two directions": PLAIN.override(num_queries=2),
    "default": DEFAULT,
    "per example": DEFAULT.override(lr=1e-2, num_queries=2),
    "population": recipe("es").override(num_queries=4, lr=1e-2, seed=7),
    "one-sided": recipe("fzoo").override(num_queries=3, lr=1e-2, seed=7),
    "forward gradient": recipe("forward-gradient").override(num_queries=2, lr=1e-2, seed=7),
    "conservative": recipe("zo-conservative").override(lr=1e-3, seed=7),
    "anchored": PLAIN.override(anchor=10.0),
    "momentum": PLAIN.override(optimizer="momentum", lr=1e-3),
}
STEPS, SIZE, TIMEOUT = 10, 8, 4


def trained(
    config: ZOConfig, items: Sequence[Any], before: Callable[[int, nn.Module], None] | None = None, **settings: Any
) -> tuple[nn.Module, Session, list[str]]:
    """A small net after a plain loop, with its fingerprint after each step."""
    net, prints = mlp(), []
    session = Session(net, SGD(net.parameters(), lr=1e-2), config, **settings)
    for step, batch in enumerate(items):
        if before is not None:
            before(step, net)
        session.estimate(lambda batch: None if batch is None else per_example_mse(net, batch), batch)
        session.update()
        prints.append(fingerprint(net.named_parameters()))
    return net, session, prints


def examples(count: int, inputs: int = 4) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*batches(1, count, inputs)[0], strict=True))


def rank() -> int:
    return dist.get_rank()


def loop(mode: Mode, config: str, steps: int = STEPS) -> Any:
    """A bare loop: each group gets its examples of a batch."""
    team = Team(Parallel(mode, check_every=5))
    items = [[part[team.layout.group :: team.layout.groups] for part in batch] for batch in batches(steps, size=SIZE)]
    _, session, prints = trained(CONFIGS[config], items, ranks=team)
    assert session.last_record is not None
    return {"prints": prints, "sent": team.exchange.traffic.sent, "terms": len(session.last_record.terms)}


def large(width: int) -> Any:
    """The payload of five steps of a net of this width."""
    net = mlp(hidden=width)
    team = Team()
    session = Session(net, SGD(net.parameters(), lr=1e-2), PLAIN, ranks=team)
    begun = team.exchange.traffic.sent
    for batch in batches(5):
        session.estimate(lambda batch: mse(net, batch), batch)
        session.update()
    return {"sent": team.exchange.traffic.sent - begun}


def skips(config: str) -> Any:
    """Rank 1 has no loss at step 1 and NaN at step 2, rank 0 no loss at step 0."""
    items: list[Any] = list(batches(5))
    if rank() == 0:
        items[0] = None
    else:
        items[1] = None
        items[2] = (items[2][0] * torch.nan, items[2][1])
    _, session, prints = trained(CONFIGS[config], items, ranks=Team())
    return {"prints": prints, "step": session.step}


def fault(kind: str) -> Any:
    """What ends the ranks, and after how many seconds."""

    def strike(step: int, net: Any) -> None:
        if step != 3:
            return
        if rank() == 1 and kind == "dies":
            os._exit(0)
        if rank() == 1 and kind == "hangs":
            os.kill(os.getpid(), signal.SIGSTOP)
        if rank() == 1 and kind == "flips":
            net[2].weight.data.view(torch.int32)[0, 0] ^= 1
        began.append(time.monotonic())

    team = Team(Parallel(timeout=TIMEOUT, check_every=2))
    began: list[float] = []
    config, settings = CONFIGS["spsa"], {}
    if kind == "stranger" and rank() == 1:
        config = config.override(eps=2e-3)
    if rank() == 0:
        settings = {"ledger": PendingLedger(claim(Path(f"{kind}.zo")), {})}
    try:
        trained(config, batches(8), strike, ranks=team, **settings)
    except RuntimeError as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - began[-1] if began else 0.0}
    return {"error": ""}


def late() -> Any:
    """A rank that lost a step."""
    net, team = mlp(), Team()
    session = Session(net, SGD(net.parameters(), lr=1e-2), PLAIN, ranks=team)
    for step, batch in enumerate(batches(3)):
        if step == 2 and rank() == 1:
            session.step -= 1
        session.estimate(lambda batch: mse(net, batch), batch)
        try:
            session.update()
        except RuntimeError as error:
            return {"refused": str(error), "step": step}
    return {"refused": ""}


def refused(mode: Mode, config: str) -> Any:
    """The reason why a mode does not take a method."""
    try:
        trained(CONFIGS[config], batches(1), ranks=Team(Parallel(mode)))
    except ValueError as error:
        return {"refused": str(error)}
    return {"refused": ""}


CASES: dict[str, Callable[..., Any]] = {case.__name__: case for case in (loop, large, skips, fault, late, refused)}
