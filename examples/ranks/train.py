"""One script for every way to start ranks: handwritten digits, trained from forward passes only, go on where they stopped.

python train.py --ranks 2                                       # the script starts the second process itself
torchrun --nproc-per-node 2 --max-restarts 3 train.py           # restarts all ranks when one ends
torchrun --nproc-per-node 2 --max-restarts 3 train.py --die-at 30 --steps 100        # to see that
torchrun --nnodes 2 --nproc-per-node 1 --rdzv-endpoint HOST:29400 --rdzv-backend c10d train.py --nodes 2   # on each machine
srun --ntasks-per-node 2 python train.py --ranks 2              # in a SLURM job
python train.py --ranks 1 --steps 300                           # goes on from the last checkpoint, on another number of ranks
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zolightning import ZOMixin, ZOStrategy
from zolightning.ledger import fingerprint
from zolightning.parallel import Parallel


class Digits(ZOMixin, L.LightningModule):
    """8 × 8 pixels, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def zo_objective(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y, reduction="none")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Accident(Callback):
    """The last rank is killed before a step, in the first attempt only."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        last = trainer.global_rank == trainer.world_size - 1
        if last and trainer.global_step == self.step and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)


class Say(Callback):
    """Where training begins and ends."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        print(f"rank {trainer.global_rank} of {trainer.world_size} begins at step {trainer.global_step}", flush=True)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        print(f"rank {trainer.global_rank} ends at step {trainer.global_step}", flush=True)
        print(f"weights {fingerprint(module.named_parameters())}", flush=True)


def loaders(batch: int = 16) -> tuple[DataLoader, DataLoader]:
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    train, test = torch.utils.data.random_split(data, [1400, len(data) - 1400], torch.Generator().manual_seed(0))
    return DataLoader(train, batch, shuffle=True), DataLoader(test, 64)


def fit(folder: Path, strategy: ZOStrategy, steps: int, callbacks: list[Callback] | None = None, **settings: Any) -> L.Trainer:
    """Train up to a step, from the last checkpoint in the folder if there is one."""
    L.seed_everything(0, verbose=False)
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=20, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=strategy,
        max_steps=steps,
        callbacks=[checkpoints, Say(), *(callbacks or [])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    last = folder / "last.ckpt"
    trainer.fit(Digits(), *loaders(), ckpt_path=last if last.exists() else None)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="on each machine")
    parser.add_argument("--nodes", type=int, default=1, help="number of machines")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--parallel", default="data", help="data, query, sign or data+sign")
    parser.add_argument("--start", default="popen", help="how the script starts its other ranks: popen, spawn or fork")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="of checkpoints and ledger")
    parser.add_argument("--die-at", type=int, help="step at which the last rank is killed, once")
    args = parser.parse_args()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", args.ranks))  # torchrun has chosen
    strategy = ZOStrategy(parallel=Parallel(args.parallel, timeout=60, start_method=args.start))
    accidents: list[Callback] = [] if args.die_at is None else [Accident(args.die_at)]
    trainer = fit(args.out, strategy, args.steps, accidents, devices=ranks, num_nodes=args.nodes)
    if trainer.is_global_zero:
        print(f"accuracy {float(trainer.callback_metrics.get('accuracy', torch.nan)):.3f}", flush=True)


if __name__ == "__main__":
    main()
