"""Folders, warnings and callbacks that nobody thought of when the code was written."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    PLAIN,
    PerExampleTask,
    Resumable,
    Task,
    assert_same,
    batches,
    loader,
    mlp,
    mse,
    per_example_mse,
    quiet_trainer,
    weights,
)
from ledgers import file_size_limit, parameters
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from zolightning import LedgerCheckpointIO, ZOMonitor, ZOStrategy, mlflow_logger
from zolightning.cli import main
from zolightning.ledger import LedgerError, read, replay


def test_a_path_that_is_not_ascii(tmp_path: Path) -> None:
    """Ledger, checkpoints, store, replay and resume."""
    folder = tmp_path / "Größe 模型 run"
    logger = mlflow_logger("läuft", store=f"sqlite:///{folder}/mlflow.db", folder=folder)
    checkpoints = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)
    common: dict[str, Any] = {"default_root_dir": folder, "plugins": [LedgerCheckpointIO()]}
    trainer = quiet_trainer(
        ZOStrategy(PLAIN), logger=logger, enable_checkpointing=True, callbacks=[ZOMonitor(), checkpoints], **common
    )
    module = Task(mlp())
    trainer.fit(module, loader(batches(4)))
    (ledger,) = folder.rglob("ledger.zo")
    main(["replay", str(ledger), "--out", str(folder / "öut")])
    assert (folder / "öut" / "model.safetensors").is_file()
    again = quiet_trainer(ZOStrategy(PLAIN), max_epochs=2, **common)
    resumed = Task(mlp())
    again.fit(resumed, loader(batches(4)), ckpt_path=checkpoints.best_model_path)
    assert again.global_step == 8
    assert not torch.equal(resumed.net[0].weight, module.net[0].weight)  # type: ignore[arg-type]


def test_no_warning_where_nothing_is_wrong(tmp_path: Path) -> None:
    """As under ``python -W error``, but for what Lightning says of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for own in ("LeafSpec", "does not have many workers", "smaller than the logging interval"):
            warnings.filterwarnings("ignore", f".*{own}.*")
        trainer = quiet_trainer(ZOStrategy(PLAIN, ledger=tmp_path / "ledger.zo"))
        trainer.fit(Task(mlp()), loader(batches(3)))
    assert trainer.global_step == 3


@pytest.mark.parametrize("strategy", ["auto", "zo"])
def test_weight_averaging_is_that_of_the_stock_strategy(strategy: str) -> None:
    """SWA's weights are the mean of those that its epochs began with."""
    seen: list[dict[str, Tensor]] = []

    class Note(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            seen.append(weights(module))

    average = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2, annealing_epochs=1)
    trainer = quiet_trainer("auto" if strategy == "auto" else ZOStrategy(PLAIN), max_epochs=4, callbacks=[Note(), average])
    module = Task(mlp())
    trainer.fit(module, loader(batches(4)))
    mean = {name: torch.stack([before[name] for before in seen[1:]]).mean(0) for name in seen[0]}
    assert_same(weights(module), mean, 1e-6)


def test_parameters_that_are_unfrozen_between_epochs_train_example_by_example(tmp_path: Path) -> None:
    class Unfreezes(PerExampleTask):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch > 0)  # type: ignore[operator]

        def on_train_epoch_end(self) -> None:
            between.append(weights(self))

    between: list[dict[str, Tensor]] = []
    module = Unfreezes(mlp(), per_example_mse)
    before = weights(module)
    each = PLAIN.override(estimator="per_example", structure="rank1")
    quiet_trainer(ZOStrategy(each, ledger=tmp_path / "ledger.zo"), max_epochs=2).fit(module, loader(batches(4)))
    moved = [[not torch.equal(a[name], b[name]) for name in a] for a, b in zip([before, *between], between, strict=False)]
    assert moved == [[False, False, True, True], [True] * 4]
    rebuilt = parameters(before)
    replay(read(tmp_path / "ledger.zo"), rebuilt)
    assert_same({name: p.detach() for name, p in rebuilt.items()}, weights(module))


# ---- two runs in one folder


def test_a_run_beside_another_in_its_folder(tmp_path: Path) -> None:
    """Each keeps its own ledger and checkpoints, and each checkpoint is its own run's."""
    ended: dict[str, tuple[dict[str, Tensor], dict[str, Tensor], str, str]] = {}

    def run(name: str, *callbacks: pl.Callback) -> None:
        module = Task(mlp(), optimizer=lambda p: SGD(p, lr=1e-2 if name == "outer" else 3e-2))
        before, checkpoints = weights(module), ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, save_last=True)
        trainer = quiet_trainer(
            ZOStrategy(PLAIN), callbacks=[checkpoints, *callbacks], enable_checkpointing=True, default_root_dir=tmp_path,
            plugins=[LedgerCheckpointIO()],
        )  # fmt: skip
        trainer.fit(module, loader(batches(6)))
        assert isinstance(trainer.strategy, ZOStrategy)
        ended[name] = (before, weights(module), checkpoints.best_model_path, checkpoints.last_model_path)

    class Beside(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
            if trainer.global_step == 3:
                run("inner")

    run("outer", Beside())
    ledgers = {path: read(path) for path in tmp_path.rglob("ledger*.zo")}
    assert len(ledgers) == 2
    assert all(ledger.last == 6 for ledger in ledgers.values())
    for before, after, best, last in ended.values():
        rebuilt = []
        for ledger in ledgers.values():
            rebuilt.append(parameters(before))
            replay(ledger, rebuilt[-1])
        assert sum(all(torch.equal(values[name], after[name]) for name in after) for values in rebuilt) == 1
        for path in (best, last):
            resumed = Task(mlp())
            quiet_trainer(ZOStrategy(PLAIN), plugins=[LedgerCheckpointIO()], max_steps=6).fit(
                resumed, loader(batches(6)), ckpt_path=path
            )
            assert_same(weights(resumed), after)
    assert len({path for *_, best, last in ended.values() for path in (best, last)}) == 4


def begin_at_once(name: str, ledger: bool | Path, folder: Path, barrier: Any, results: Any) -> None:
    """One of two processes: it goes on to train when both know whether they may."""
    torch.set_num_threads(1)
    module = Task(mlp(), optimizer=lambda p: SGD(p, lr=1e-2 if name == "one" else 3e-2))

    class Together(pl.Callback):
        def on_train_start(self, *args: Any) -> None:
            barrier.wait(60)

    trainer = quiet_trainer(
        ZOStrategy(PLAIN, ledger=ledger),
        callbacks=[Together(), ModelCheckpoint(filename=name)],
        enable_checkpointing=True,
        default_root_dir=folder,
    )
    barrier.wait(60)
    try:
        trainer.fit(module, loader(batches(3)))
        results.put({key: value.tolist() for key, value in weights(module).items()})
    except LedgerError as error:
        barrier.wait(60)
        results.put(str(error))


@pytest.mark.parametrize("given", [True, False])
def test_two_processes_begin_in_one_folder_at_the_same_instant(given: bool, tmp_path: Path) -> None:
    """One gets the ledger that both were given, and the other is told; else each finds a name of its own."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    ledger = tmp_path / "run" / "ledger.zo" if given else True
    both = [
        context.Process(target=begin_at_once, args=(name, ledger, tmp_path / "run", barrier, results))
        for name in ("one", "two")
    ]
    for process in both:
        process.start()
    ends = [results.get(timeout=120) for _ in both]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    told = [end for end in ends if isinstance(end, str)]
    assert told == (
        [f"another run writes to the ledger {ledger}; give this one a path of its own: ZOStrategy(ledger='...')"] * given
    )
    rebuilt = []
    for path in sorted(tmp_path.rglob("ledger*.zo")):
        assert read(path).last == 3
        rebuilt.append(parameters(weights(Task(mlp()))))
        replay(read(path), rebuilt[-1])
    trained = [end for end in ends if not isinstance(end, str)]
    assert len(rebuilt) == len(trained)
    for end in trained:
        assert sum(all(values[key].tolist() == end[key] for key in end) for values in rebuilt) == 1


# ---- a disk that is full


@pytest.mark.filterwarnings("ignore:the ledger .* cannot be written now")
@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(whole: bool, tmp_path: Path) -> None:
    class Filled(pl.Callback):
        """From step 4 on no file may grow beyond a kilobyte."""

        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                limit.__enter__()

    limit = file_size_limit(1000)
    module, checkpoints = (
        Task(mlp(hidden=64)),
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1),
    )
    plugins = [] if whole else [LedgerCheckpointIO()]
    ledger = tmp_path / "ledger.zo"
    trainer = quiet_trainer(
        ZOStrategy(PLAIN, ledger=ledger), callbacks=[checkpoints, Filled()], enable_checkpointing=True, plugins=plugins
    )
    try:
        with pytest.raises((OSError, RuntimeError)):
            trainer.fit(module, Resumable(batches(8)))
    finally:
        limit.__exit__(None, None, None)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt"]
    resumed, straight = Task(mlp(hidden=64)), Task(mlp(hidden=64))
    quiet_trainer(ZOStrategy(PLAIN), plugins=plugins).fit(resumed, Resumable(batches(8)), ckpt_path=tmp_path / "step=2.ckpt")
    quiet_trainer(ZOStrategy(PLAIN)).fit(straight, Resumable(batches(8)))
    assert_same(weights(resumed), weights(straight))


# ---- a user who may write nowhere


@pytest.fixture
def closed() -> Iterator[Path]:
    """A home that any user can reach, and that only root may write to."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        yield Path(name)
        Path(name).chmod(0o700)


AS_NOBODY = """
import os, sys
import torch
sys.path.insert(0, sys.argv[1])
from helpers import PLAIN, Task, batches, fit, mlp
from zolightning import ZOMonitor, ZOStrategy
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    open("probe", "w")
except PermissionError:
    for strategy in (ZOStrategy(), PLAIN):
        module = Task(mlp())
        fit(module, batches(3), strategy, callbacks=[ZOMonitor()], default_root_dir=".")
    print(module.net[0].weight.double().sum().item())
"""


@pytest.mark.integration
def test_nobody_who_may_write_nowhere_trains_as_all_others(closed: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(closed), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", AS_NOBODY, str(Path(__file__).parent)]
    done = subprocess.run(arguments, cwd=closed, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    module = Task(mlp())
    quiet_trainer(ZOStrategy(PLAIN)).fit(module, loader(batches(3)))
    assert float(done.stdout) == module.net[0].weight.double().sum().item()  # type: ignore[union-attr,operator,index]


# ---- fewer texts than a batch


@pytest.mark.parametrize("last", ["kept", "dropped"])
@pytest.mark.parametrize("recipe", ["default", "spsa", "fzoo"])
def test_fewer_examples_than_a_batch(recipe: str, last: str) -> None:
    """They are one small batch; where the loader drops it nothing is trained and nothing breaks."""
    ((x, y),) = batches(1, size=3)
    module, strategy = Task(mlp()), ZOStrategy(recipe, seed=0)
    before, trainer = weights(module), quiet_trainer(strategy, max_epochs=2)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=8, drop_last=last == "dropped"))
    moved = [not torch.equal(value, before[name]) for name, value in weights(module).items()]
    assert moved == [last == "kept"] * 4
    assert trainer.global_step == (2 if last == "kept" else 0)
    if last == "kept":
        assert strategy.last_record is not None
        assert strategy.last_record.loss == pytest.approx(float(mse(module.net, (x, y))), rel=0.1)


# ---- tuners, beside the stock strategy


class Tuned(Task):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.lr, self.batch_size = 1e-3, 2

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        ((x, y),) = batches(1, size=64)
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size)


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_a_batch_size_is_found_as_under_the_stock_strategy(mode: str, tmp_path: Path) -> None:
    found = []
    for strategy in ("auto", ZOStrategy(PLAIN)):
        module = Tuned()
        before = weights(module)
        trainer = quiet_trainer(strategy, default_root_dir=tmp_path)
        size = Tuner(trainer).scale_batch_size(module, mode=mode, steps_per_trial=1, max_trials=4)
        assert_same(weights(module), before)
        trainer.fit(module)
        found.append((size, module.batch_size, trainer.global_step))
        assert not list(tmp_path.rglob("*.ckpt"))
    assert found[0] == found[1]


def test_learning_rates_are_tried_as_under_the_stock_strategy(tmp_path: Path) -> None:
    """The same ones, and a loss for each of them that is of its own batch at the weights before its step."""
    found = []
    for strategy in ("auto", ZOStrategy(PLAIN)):
        module = Tuned()
        before = weights(module)
        trainer = quiet_trainer(strategy, default_root_dir=tmp_path)
        finder = Tuner(trainer).lr_find(module, num_training=20, min_lr=1e-6, max_lr=1e-2, early_stop_threshold=None)
        assert finder is not None
        assert_same(weights(module), before)
        assert module.lr == finder.suggestion()
        found.append(finder.results)
    assert found[0]["lr"] == pytest.approx(found[1]["lr"])
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=0.02)  # small steps: what differs is the batches
