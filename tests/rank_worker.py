"""One rank of several: runs cases one after another and writes down what it saw. ``ranks.py`` starts it."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import PLAIN, PerExampleTask, batches, mlp, per_example_mse, quiet_trainer
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, DistributedSampler

from zolightning import ZOConfig, ZOStrategy
from zolightning.engine.session import Session
from zolightning.ledger import fingerprint
from zolightning.methods.recipes import recipe
from zolightning.parallel import Parallel, Team
from zolightning.parallel.layout import Mode

DEFAULT = recipe("default").override(select="all", seed=7)
CONFIGS = {
    "spsa": PLAIN,
    "two directions": PLAIN.override(num_queries=2),
    "default": DEFAULT,
    "per example": DEFAULT.override(lr=1e-2, num_queries=2),
}
STEPS, SIZE = 20, 8


def trained(config: ZOConfig, items: Sequence[Any], **settings: Any) -> tuple[nn.Module, Session, list[str]]:
    """A small net after a plain loop, with its fingerprint after each step."""
    net, prints = mlp(), []
    session = Session(net, SGD(net.parameters(), lr=1e-2), config, **settings)
    for batch in items:
        session.estimate(lambda batch: per_example_mse(net, batch), batch)
        session.update()
        prints.append(fingerprint(net.named_parameters()))
    return net, session, prints


def examples(count: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*batches(1, size=count)[0], strict=True))


def loop(mode: Mode, config: str, steps: int = STEPS) -> Any:
    """A bare loop: each group gets its examples of a batch."""
    team = Team(Parallel(mode, check_every=5))
    team_items = [[part[team.layout.group :: team.layout.groups] for part in batch] for batch in batches(steps, size=SIZE)]
    _, session, prints = trained(CONFIGS[config], team_items, ranks=team)
    assert session.last_record is not None
    return {"prints": prints, "sent": team.exchange.traffic.sent, "terms": len(session.last_record.terms)}


def trainer(config: str, steps: int) -> Any:
    """The Trainer, with a sampler that keeps the examples in their order, which Lightning's own does not."""
    module = PerExampleTask(mlp(), per_example_mse)
    trainer = quiet_trainer(ZOStrategy(CONFIGS[config], one_batch=False), devices=dist.get_world_size())
    items = examples(SIZE * steps)
    sampler = DistributedSampler(items, shuffle=False)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader(items, batch_size=SIZE // dist.get_world_size(), sampler=sampler))  # type: ignore[arg-type]
    return {"weights": [p.tolist() for p in module.net.parameters()], "steps": trainer.global_step}


CASES: dict[str, Callable[..., Any]] = {case.__name__: case for case in (loop, trainer)}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for name, *arguments in json.loads(Path(sys.argv[1]).read_text()):
        torch.manual_seed(dist.get_rank())  # ranks begin with other weights
        try:
            found[str([name, *arguments])] = CASES[name](*arguments)
        except Exception:
            found[str([name, *arguments])] = {"error": traceback.format_exc()}
            break
    Path(f"{sys.argv[1]}.{dist.get_rank()}").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
