"""One rank of several: runs cases and writes down what it saw. ``ranks.py`` starts it.

Libraries are imported once; each group of cases then runs in a fork with a process group of its own, which it may break.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import PLAIN, PerExampleTask, Task, batches, fit, loader, mlp, mse, per_example_mse, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from zolightning import ZOConfig, ZOStrategy
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


def examples(count: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*batches(1, size=count)[0], strict=True))


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


def trainer(config: str, steps: int) -> Any:
    """The Trainer, with a sampler that keeps the examples in their order, which Lightning's own does not."""
    module = PerExampleTask(mlp(), per_example_mse)
    trainer = quiet_trainer(ZOStrategy(CONFIGS[config], one_batch=False), devices=dist.get_world_size())
    items = examples(SIZE * steps)
    sampler = DistributedSampler(items, shuffle=False)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader(items, batch_size=SIZE // dist.get_world_size(), sampler=sampler))  # type: ignore[arg-type]
    return {"weights": [p.tolist() for p in module.net.parameters()], "steps": trainer.global_step}


class Whole(Task):
    """Dropout, BatchNorm, synchronised metrics, a schedule, and batches that are noted."""

    def __init__(self) -> None:
        torch.manual_seed(rank())
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        super().__init__(net, optimizer=lambda p: AdamW(p, lr=1e-2), scheduler=lambda o: StepLR(o, 2, 0.5))
        self.seen: list[float] = []
        self.masks: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(float(batch[0].sum()))
        self.masks.append(float(F.dropout(torch.ones(64), 0.5).sum()))
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss.float(), sync_dist=True, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("rank", float(rank()), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.all_gather(self.net(batch[0])).flatten(0, 1)


def whole(mode: Mode) -> Any:
    """Two epochs with all that a Trainer does, and a prediction."""
    module = Whole()
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 2, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(ZOStrategy("spsa", select="all", parallel=mode), devices=dist.get_world_size(), **settings)
    data = DataLoader(examples(16), batch_size=4, shuffle=True)  # type: ignore[arg-type]
    trainer.fit(module, data, DataLoader(examples(8), batch_size=4))  # type: ignore[arg-type]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    module.eval()
    predicted = trainer.predict(module, DataLoader(examples(8), batch_size=2))  # type: ignore[arg-type]
    shared = {
        "weights": fingerprint(module.net.named_parameters()),
        "buffers": fingerprint(module.net.named_buffers()),
        "metrics": metrics,
        "predicted": [len(each) for each in predicted or []],  # type: ignore[arg-type]
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
    }
    traffic = trainer.strategy.traffic()  # type: ignore[attr-defined]
    return {"shared": shared, "seen": module.seen, "masks": module.masks[:4], "traffic": traffic}


def uneven(sized: bool) -> Any:
    """Rank 0 has five batches, the last of them short, and rank 1 three."""
    items = [(x, y) for x, y in batches(5 if rank() == 0 else 3)]
    items[-1] = tuple(part[: 3 - rank()] for part in items[-1])  # type: ignore[assignment]

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from items

    module = PerExampleTask(mlp(), per_example_mse)
    trainer = quiet_trainer(ZOStrategy(DEFAULT), devices=2, max_epochs=2, use_distributed_sampler=False)
    trainer.fit(module, loader(items) if sized else DataLoader(Stream(), batch_size=None))
    return {"print": fingerprint(module.net.named_parameters()), "steps": trainer.global_step}


def plateau() -> Any:
    """A rank whose schedule goes its own way takes the learning rate of rank 0."""
    module = Task(mlp(), scheduler=lambda o: StepLR(o, 1, 0.5 if rank() == 0 else 0.9))
    trainer = fit(module, batches(4), ZOStrategy(PLAIN), devices=2, use_distributed_sampler=False)
    return {"print": fingerprint(module.net.named_parameters()), "steps": trainer.global_step}


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


def kept() -> Any:
    """A ledger of rank 0, and checkpoints."""
    module = PerExampleTask(mlp(), per_example_mse)
    strategy = ZOStrategy(DEFAULT, ledger="kept.zo")
    checkpoints = ModelCheckpoint("kept", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    settings = {"devices": 2, "use_distributed_sampler": False, "enable_checkpointing": True}
    fit(module, batches(6), strategy, callbacks=[checkpoints], **settings)
    return {"print": fingerprint(module.net.named_parameters())}


def resumed() -> Any:
    """From the third step of :func:`kept`, to its end."""
    module = PerExampleTask(mlp(), per_example_mse)
    trainer = quiet_trainer(ZOStrategy(DEFAULT), devices=2, use_distributed_sampler=False)
    trainer.fit(module, loader(batches(6)[3:]), ckpt_path="kept/step=3.ckpt")
    return {"print": fingerprint(module.net.named_parameters()), "steps": trainer.global_step}


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


_ALL = (loop, large, trainer, whole, uneven, plateau, skips, kept, resumed, fault, late, refused)
CASES: dict[str, Callable[..., Any]] = {case.__name__: case for case in _ALL}


def run(cases: Sequence[Sequence[Any]], port: int, path: Path) -> None:
    """A group of cases, one after another, up to the first that breaks."""
    os.environ["MASTER_PORT"] = str(port)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT if cases[0][0] == "fault" else 60))
    found: dict[str, Any] = {}
    for name, *arguments in cases:
        torch.manual_seed(rank())  # ranks begin with other weights
        try:
            found[str([name, *arguments])] = CASES[name](*arguments)
        except Exception:
            found[str([name, *arguments])] = {"raised": traceback.format_exc()}
            break
        finally:
            path.write_text(json.dumps(found))


def main() -> None:
    """Each group in a fork; one that is stopped or hangs is ended."""
    torch.set_num_threads(1)
    folder, mine = Path.cwd(), int(os.environ["RANK"])
    for number, (cases, port) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        path = folder / f"found-{number}.{mine}"
        if (child := os.fork()) == 0:
            try:
                run(cases, port, path)
            finally:
                sys.stdout.flush()
                os._exit(0)
        _, status = os.waitpid(child, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            time.sleep(TIMEOUT + 2)  # the others wait for it meanwhile
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
