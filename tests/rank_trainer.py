"""Cases of several ranks under the Trainer, for ``rank_worker.py``: each returns the facts that a test compares."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import PLAIN, PerExampleTask, Task, batches, fit, loader, mlp, per_example_mse, quiet_trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from mlflow import MlflowClient
from rank_cases import CONFIGS, DEFAULT, SIZE, examples, rank
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from zolightning import ZOMonitor, ZOStrategy, mlflow_logger
from zolightning.adapt.quantize import quantize
from zolightning.ledger import fingerprint
from zolightning.methods.recipes import recipe
from zolightning.parallel import Parallel
from zolightning.parallel.layout import Mode


class Manual(PerExampleTask):
    """Gives its optimizer the loss as a function."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().step(closure=lambda: self.loss(self.net, batch).mean())


class Prepared(PerExampleTask):
    """Has a part that no probe changes, and counts its uses."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.prepared = 0

    def zo_prepare(self, batch: Any) -> Any:
        self.prepared += 1
        return batch[0].tanh(), batch[1]


def module_of(kind: str) -> Any:
    """A module, the weights of which are the same on all ranks where they cannot be sent."""
    if kind == "scales":
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 3, bias=False))
        return PerExampleTask(quantize(net, kind="int8"), per_example_mse)
    module = {"manual": Manual, "prepared": Prepared}.get(kind, PerExampleTask)(mlp(), per_example_mse)
    if kind == "compiled":
        module.net = torch.compile(module.net, backend="eager")
    return module


def config_of(config: str, kind: str) -> Any:
    return recipe("qzo").override(seed=7) if kind == "scales" else CONFIGS[config]


def trainer(config: str, kind: str, steps: int) -> Any:
    """The Trainer, with a sampler that keeps the examples in their order, which Lightning's own does not."""
    module = module_of(kind)
    trainer = quiet_trainer(ZOStrategy(config_of(config, kind), one_batch=False), devices=dist.get_world_size())
    items = examples(SIZE * steps, 64 if kind == "scales" else 4)
    sampler = DistributedSampler(items, shuffle=False)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader(items, batch_size=SIZE // dist.get_world_size(), sampler=sampler))  # type: ignore[arg-type]
    return {
        "weights": [p.tolist() for p in module.net.parameters()],
        "steps": trainer.global_step,
        "prepared": getattr(module, "prepared", 0),
    }


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

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("tested", self.loss(self.net, batch), sync_dist=True)

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
    items = examples(8)
    trainer.test(module, DataLoader(items, batch_size=2), verbose=False)  # type: ignore[arg-type]
    tested = float(trainer.callback_metrics["tested"])
    predicted = trainer.predict(module, DataLoader(items, batch_size=2))  # type: ignore[arg-type]
    x, y = (torch.stack(part) for part in zip(*items, strict=True))
    with torch.no_grad():
        wanted, loss = module.net(x), float(module.loss(module.net, (x, y)))
    shared = {
        "weights": fingerprint(module.net.named_parameters()),
        "buffers": fingerprint(module.net.named_buffers()),
        "metrics": metrics,
        "predicted": sorted(torch.cat(predicted).sum(1).tolist()),  # type: ignore[arg-type, type-var]
        "wanted": sorted(wanted.sum(1).tolist()),
        "tested": [tested, loss],
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


def tracked() -> Any:
    """An MLflow run, a monitor and messages."""
    print("tracked", flush=True)
    store = f"sqlite:///{Path.cwd()}/tracked.db"
    logger = mlflow_logger("two ranks", store=store, folder=Path.cwd())
    module, settings = Task(mlp()), {"devices": 2, "use_distributed_sampler": False}
    fit(module, batches(4), ZOStrategy(PLAIN), logger=logger, callbacks=[ZOMonitor(min_seconds=0.0)], **settings)
    print("/tracked", flush=True)
    dist.barrier()
    client = MlflowClient(store)
    runs = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    return {"runs": len(runs), "losses": [m.value for m in history], "examples": runs[0].data.metrics["examples_seen"]}


def launched(devices: int, nodes: int, start_method: str = "popen") -> Any:
    """A run whose processes only the launcher's variables tell who they are."""
    module = PerExampleTask(mlp(), per_example_mse)
    strategy = ZOStrategy(DEFAULT, parallel=Parallel(start_method=start_method, timeout=60))  # type: ignore[arg-type]
    trainer = fit(module, batches(4), strategy, devices=devices, num_nodes=nodes, use_distributed_sampler=False)
    return {
        "print": fingerprint(module.net.named_parameters()),
        "steps": trainer.global_step,
        "rank": [trainer.global_rank, trainer.world_size],
        "told": rank_zero_only.rank,  # type: ignore[attr-defined]
    }


def offloaded(tier: str | None) -> Any:
    """Weights in memory or elsewhere: six steps, and the last three again from a checkpoint in a run of its own."""

    def run(path: str | None = None) -> str:
        torch.manual_seed(rank())
        net = nn.Sequential(nn.Linear(8, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 3))
        torch.manual_seed(rank() if path is None else 0)
        module, folder = PerExampleTask(net, per_example_mse), f"offloaded-{tier}"
        checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        strategy = ZOStrategy(DEFAULT, offload=tier)  # type: ignore[arg-type]
        items = batches(6, size=4 - rank(), inputs=8, seed=rank())
        settings = {"devices": 2, "use_distributed_sampler": False, "callbacks": [checkpoints], "enable_checkpointing": True}
        trainer = quiet_trainer(strategy, default_root_dir=folder, **settings)
        trainer.fit(module, loader(items[3 if path else 0 :]), ckpt_path=path)
        return fingerprint(net.named_parameters())

    return {"whole": run(), "resumed": run(f"offloaded-{tier}/step=3.ckpt")}


class Visited(Callback):
    """Training goes on when a stranger has been refused."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            Path("begun").touch()
            wait_for(Path("refused"))


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def visited() -> Any:
    """Two ranks, and a third process that comes when they are at work and says that it is rank 1."""
    stranger = os.environ["PLACE"] == "2"
    if stranger:
        wait_for(Path("begun"))
    module, settings = PerExampleTask(mlp(), per_example_mse), {"devices": 2, "use_distributed_sampler": False}
    try:
        fit(module, batches(4), ZOStrategy(DEFAULT, parallel=Parallel(timeout=60)), callbacks=[Visited()], **settings)
    except RuntimeError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        if stranger:
            Path("refused").touch()
    return {"print": fingerprint(module.net.named_parameters())}


_ALL = (trainer, whole, uneven, plateau, kept, resumed, tracked, launched, offloaded, visited)
CASES: dict[str, Callable[..., Any]] = {case.__name__: case for case in _ALL}
