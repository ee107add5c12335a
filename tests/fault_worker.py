"""A process that trains whatever it is asked to, each run in a fork of its own that may die at any moment.

``python tests/fault_worker.py`` reads jobs, a line of JSON each, and answers each with the run's process id when it has
started and its exit status when it has ended. PyTorch is imported once.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import safetensors.torch
import torch
from helpers import PLAIN, PerExampleTask, Resumable, Task, batches, dropped, mlp, mse, per_example_mse, quiet_trainer
from ledgers import hashed
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from zolightning import LedgerCheckpointIO, ZOConfig, ZOStrategy
from zolightning.engine.session import Session
from zolightning.ledger import PendingLedger, Recorder
from zolightning.ledger.writer import LedgerWriter
from zolightning.space import DenseLeaf, Leaf

PHASES = ("starting", "probing", "recording", "updating", "saving", "ending")
END = -1  # in place of a step's number
EXIT = 77  # status of a run that left by os._exit in the middle of an update

PAUSE = 5e-4  # seconds before each parameter's update
UPDATES: list[tuple[Any, str]] = [(DenseLeaf, "sgd_"), (Leaf, "sgd_"), (Leaf, "gradient")]

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=1e-2, weight_decay=0.1),
    "momentum": lambda p: SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adamw": lambda p: AdamW(p, lr=1e-2, amsgrad=True),
    "rmsprop": lambda p: RMSprop(p, lr=1e-2, centered=True),
    "adagrad": lambda p: Adagrad(p, lr=1e-2),
}
SCHEDULERS = {
    "none": None,
    "cosine": lambda o: CosineAnnealingLR(o, 40),
    "one cycle": lambda o: OneCycleLR(o, 0.02, total_steps=64),
}


class Recipe(NamedTuple):
    """A run, drawn from its number."""

    optimizer: str
    scheduler: str
    precision: str
    per_example: bool
    noise: str
    queries: int
    normalize: bool
    accumulate: int
    clip: float | None
    dropout: bool
    items: int
    epochs: int
    every: int
    """Steps between checkpoints."""

    @classmethod
    def draw(cls, number: int) -> Recipe:
        generator = random.Random(number)
        optimizer = generator.choice(list(OPTIMIZERS))
        cycles = optimizer in ("momentum", "adamw")
        return cls(
            optimizer=optimizer,
            scheduler=generator.choice(["none", "cosine", "one cycle"] if cycles else ["none", "cosine"]),
            precision=generator.choice(list(DTYPES)),
            per_example=generator.random() < 0.4,
            noise=generator.choice(["rademacher", "gaussian"]),
            queries=generator.randint(1, 3),
            normalize=generator.random() < 0.3,
            accumulate=generator.choice([1, 1, 2]),
            clip=generator.choice([None, 0.05]),
            dropout=generator.random() < 0.5,
            items=generator.randint(8, 14),
            epochs=generator.randint(2, 3),
            every=generator.choice([1, 1, 2, 5]),
        )

    def config(self) -> ZOConfig:
        method = {"estimator": "per_example", "structure": "rank1"} if self.per_example else {}
        return PLAIN.override(noise=self.noise, num_queries=self.queries, normalize=self.normalize, **method)

    def module(self) -> Task:
        net: nn.Module = mlp()
        make, schedule = OPTIMIZERS[self.optimizer], SCHEDULERS[self.scheduler]
        if self.per_example:
            return PerExampleTask(net, per_example_mse, make, schedule)
        return Task(net, dropped if self.dropout else mse, make, schedule)

    def data(self) -> Resumable:
        dtype = DTYPES[self.precision]
        return Resumable([(x.to(dtype), y.to(dtype)) for x, y in batches(self.items)])


class Progress:
    """What outlives the process: where it is, in shared memory, and a line of the log after every update."""

    def __init__(self, folder: Path) -> None:
        with (folder / "phase").open("w+b") as file:
            file.write(bytes(1))
            file.flush()
            self._phase = mmap.mmap(file.fileno(), 1)
        self._log = os.open(folder / "steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def enter(self, phase: str) -> None:
        self._phase[0] = PHASES.index(phase)

    def note(self, step: int, weights: str) -> None:
        os.write(self._log, f"{step} {weights}\n".encode())


def train(folder: Path, number: int, resume: str | None, fault: dict[str, Any] | None) -> None:
    """One run to its end, which the log says."""
    recipe, progress = Recipe.draw(number), Progress(folder)
    torch.manual_seed(number if resume is None else random.Random().getrandbits(60))
    module = recipe.module()
    watch(progress, module)
    if fault is not None:
        arm(**fault)
    trainer = quiet_trainer(
        ZOStrategy(recipe.config(), ledger=folder / "ledger.zo"),
        precision=recipe.precision,
        max_epochs=recipe.epochs,
        accumulate_grad_batches=recipe.accumulate,
        gradient_clip_val=recipe.clip,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=recipe.every, save_top_k=-1)],
        plugins=[LedgerCheckpointIO()],
    )
    torch.manual_seed(number)
    trainer.fit(module, recipe.data(), ckpt_path=resume)
    if not trainer.interrupted and not trainer.received_sigterm:
        progress.note(END, hashed(module))


def watch(progress: Progress, module: nn.Module) -> None:
    """Say which phase the run is in, and what the weights are after every update."""

    def within(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            progress.enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                progress.enter("probing")

        return wrapped

    def slowly(kind: Any, name: str) -> None:  # or hardly a kill would meet an update of these few weights
        function = getattr(kind, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            time.sleep(PAUSE)
            return function(*args, **kwargs)

        setattr(kind, name, wrapped)

    for kind, name in UPDATES:
        slowly(kind, name)

    applied = Recorder.applied

    def noted(self: Recorder) -> None:
        applied(self)
        progress.note(self._step, hashed(module))

    Recorder.applied = noted  # type: ignore[method-assign]
    Recorder.step = within("recording", Recorder.step)  # type: ignore[method-assign]
    begun = Session.__init__

    def begin(self: Session, *args: Any, **settings: Any) -> None:
        begun(self, *args, **settings)
        self._apply_update = within("updating", self._apply_update)

    Session.__init__ = begin  # type: ignore[method-assign]
    ZOStrategy.save_checkpoint = within("saving", ZOStrategy.save_checkpoint)  # type: ignore[method-assign]
    PendingLedger.close = within("ending", PendingLedger.close)  # type: ignore[method-assign]
    ZOStrategy.training_step = within("probing", ZOStrategy.training_step)  # type: ignore[method-assign]


def arm(where: str, count: int, how: str) -> None:
    """Die at the ``count``-th call of a function in the middle of something."""
    calls = [0]

    def due() -> bool:
        calls[0] += 1
        return calls[0] == count

    def before(kind: Any, name: str) -> None:
        function = getattr(kind, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if due():
                die(how)
            return function(*args, **kwargs)

        setattr(kind, name, wrapped)

    if where == "update":  # some parameters are updated, some are not
        for kind, name in UPDATES:
            before(kind, name)
    elif where == "record":  # half a record is written
        flush = LedgerWriter._flush

        def torn(self: LedgerWriter) -> None:
            if self._pending and due():
                self._file.seek(self._written)
                self._file.write(self._pending[: len(self._pending) // 2])
                die(how)
            flush(self)

        LedgerWriter._flush = torn  # type: ignore[method-assign]
    elif where == "checkpoint":  # the position is noted, the file is not there
        before(TorchCheckpointIO, "save_checkpoint")
    else:  # the base is written and has no name yet
        save = safetensors.torch.save_file

        def unnamed(*args: Any) -> None:
            save(*args)
            die(how)

        safetensors.torch.save_file = unnamed


def die(how: str) -> NoReturn:
    if how == "exit":
        os._exit(EXIT)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def child(job: dict[str, Any]) -> NoReturn:
    """Run the job with a log of its own for what it prints."""
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    out = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for handle in (1, 2):
        os.dup2(out, handle)
    os.chdir(folder)
    try:
        train(folder, job["number"], job["resume"], job["fault"])
    except SystemExit as exit:
        os._exit(exit.code if isinstance(exit.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def warm_up() -> None:
    """A run that loads, once for all forks, what is loaded when it is first used."""
    with tempfile.TemporaryDirectory() as folder:
        for number in (0, 1):
            quiet_trainer(
                ZOStrategy(Recipe.draw(number).config(), ledger=Path(folder) / "ledger.zo"),
                enable_checkpointing=True,
                callbacks=[ModelCheckpoint(folder, every_n_train_steps=1)],
                plugins=[LedgerCheckpointIO()],
                max_steps=2,
            ).fit(Task(mlp(), mse, OPTIMIZERS["adamw"]), Resumable(batches(2)))


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            child(json.loads(line))
        print(process, flush=True)
        print(os.waitpid(process, 0)[1], flush=True)


if __name__ == "__main__":
    main()
