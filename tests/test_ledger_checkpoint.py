"""Checkpoints that hold a position in the ledger: what they weigh, what they give back, and when they are whole instead."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from importlib.metadata import version
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
    dropped,
    exact_epochs,
    lm_loss,
    loader,
    mlp,
    mse,
    per_example_mse,
    quiet_trainer,
    tiny_causal_lm,
    token_batches,
    weights,
)
from ledgers import Idle, Noted, copies, parameters, small_disk
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from packaging.version import Version
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from zolightning import LedgerCheckpointIO, ZOStrategy
from zolightning.ledger import LedgerError, base_path, load_base, read, replay
from zolightning.space import together
from zolightning.strategy.ledger_io import base_of

OPTIMIZERS: dict[str, Callable[[list[Any]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=1e-2),
    "momentum": lambda p: SGD(p, lr=1e-2, momentum=0.9),
    "adamw": lambda p: AdamW(p, lr=1e-2),
    "adagrad": lambda p: Adagrad(p, lr=1e-2),
}
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}


def make(optimizer: str = "sgd", net: nn.Module | None = None) -> Task:
    return Task(net or mlp(), dropped, OPTIMIZERS[optimizer], lambda o: CosineAnnealingLR(o, 20))


def data(precision: str = "32-true", count: int = 6) -> Resumable:
    return Resumable([(x.to(DTYPES[precision]), y.to(DTYPES[precision])) for x, y in batches(count)])


def every_step(folder: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, **{"filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1, **settings})


def fit(
    module: pl.LightningModule,
    items: Any,
    folder: Path,
    *callbacks: Callback,
    io: Any = None,
    ckpt: Path | None = None,
    config: Any = PLAIN,
    **settings: Any,
) -> pl.Trainer:
    """A run whose files are all in one folder."""
    trainer = quiet_trainer(
        ZOStrategy(config, ledger=folder / "ledger.zo"),
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        callbacks=list(callbacks),
        plugins=[LedgerCheckpointIO() if io is None else io],
        default_root_dir=folder,
        **settings,
    )
    trainer.fit(module, items, ckpt_path=ckpt)
    return trainer


def same_module(left: nn.Module, right: nn.Module) -> None:
    """Parameters and buffers."""
    assert_same(dict(left.state_dict()), dict(right.state_dict()))


# ---- what they weigh


def test_size_does_not_depend_on_the_model(tmp_path: Path) -> None:
    sizes = {}
    for hidden in (8, 512):
        folder = tmp_path / str(hidden)
        fit(make("adamw", mlp(hidden=hidden)), data(), folder, every_step(folder))
        sizes[hidden] = [path.stat().st_size for path in sorted(folder.glob("*.ckpt"))]
    assert len(sizes[8]) == len(sizes[512]) == 6
    assert max(sizes[512]) - min(sizes[8]) < 500  # what AdamW keeps for 4,600 weights alone is 37 KB
    plain = tmp_path / "plain"
    fit(make("adamw", mlp(hidden=512)), data(), plain, every_step(plain), io=_whole())
    assert min(path.stat().st_size for path in plain.glob("*.ckpt")) > 50_000


def _whole() -> Any:
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    return TorchCheckpointIO()


def test_a_checkpoint_takes_a_few_bytes_of_the_ledger(tmp_path: Path) -> None:
    few, every = tmp_path / "few", tmp_path / "every"
    fit(make(), data(count=20), few, every_step(few, every_n_train_steps=20))
    fit(make(), data(count=20), every, every_step(every))
    assert (every / "ledger.zo").stat().st_size - (few / "ledger.zo").stat().st_size == 18 * 37  # both note the first step's


# ---- what they give back


def scripted(how: str) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
    front = torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.randn(5, 4))  # type: ignore[no-untyped-call]
    return nn.Sequential(front, nn.Linear(8, 3))


@pytest.mark.parametrize("io", [_whole, LedgerCheckpointIO])
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_modules(how: str, io: Any, tmp_path: Path) -> None:
    """Their buffers are not kept as other modules'."""
    whole = make(net=scripted(how))
    fit(whole, data(), tmp_path / "a", every_step(tmp_path / "a"), io=io())
    half = make(net=scripted(how))
    fit(half, data(), tmp_path / "b", io=io(), ckpt=tmp_path / "a" / "step=3.ckpt")
    same_module(half, whole)
    assert read(tmp_path / "b" / "ledger.zo").header.buffers == tuple(
        f"net.0.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    )


class Validated(Task):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", mse(self.net, batch))

    test_step = validation_step


def test_best_and_last(tmp_path: Path) -> None:
    noted, held = Noted(), batches(2, seed=8)
    best = every_step(
        tmp_path / "run", monitor="val_loss", filename="best", save_top_k=1, save_last=True, every_n_train_steps=3
    )
    module = Validated(mlp(), optimizer=lambda p: AdamW(p, lr=0.1))
    trainer = quiet_trainer(
        ZOStrategy(PLAIN),
        enable_checkpointing=True,
        callbacks=[best, noted],
        plugins=[LedgerCheckpointIO()],
        max_epochs=4,
        val_check_interval=3,
    )
    trainer.fit(module, loader(batches(6)), loader(held))
    ledger = read(tmp_path / "run" / "ledger.zo")
    for path in (best.best_model_path, best.last_model_path):
        state = LedgerCheckpointIO().load_checkpoint(path)
        step = state["zolightning"]["zo_step"]
        expected = noted.weights[step]
        assert_same(state["state_dict"], expected)
        rebuilt = base_of(ledger)
        replay(ledger, rebuilt, step)  # "give me step 740", without any checkpoint
        assert_same(rebuilt, expected)  # type: ignore[arg-type]
    assert_same(noted.weights[24], weights(module))


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole state", "weights alone"])
def test_testing_and_validating(weights_only: bool, tmp_path: Path) -> None:
    held, module, noted = batches(2, seed=8), Validated(mlp(), optimizer=OPTIMIZERS["adamw"]), Noted()
    fit(module, loader(batches(6)), tmp_path, noted, every_step(tmp_path, save_weights_only=weights_only))
    path = tmp_path / "step=4.ckpt"
    assert ("optimizer_states" in torch.load(path, weights_only=True)) is not weights_only
    fresh, reference = Validated(mlp()), Validated(mlp())
    reference.load_state_dict(noted.weights[4])
    evaluator = quiet_trainer(ZOStrategy(PLAIN), plugins=[LedgerCheckpointIO()])
    for run in (evaluator.test, evaluator.validate):
        [found] = run(fresh, loader(held), ckpt_path=path, verbose=False)
        [expected] = run(reference, loader(held), verbose=False)
        assert found == expected
    assert_same(weights(fresh), noted.weights[4])
    stock = quiet_trainer(plugins=[LedgerCheckpointIO()])  # no strategy of ours
    assert stock.test(Validated(mlp()), loader(held), ckpt_path=path, verbose=False) == [expected]


def test_loads_without_pickled_code(tmp_path: Path) -> None:
    fit(make("adamw"), data(), tmp_path, every_step(tmp_path))
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert saved["state_dict"] == {}
    assert saved["optimizer_states"][0]["state"] == {}
    assert set(saved["zolightning"]["ledger"]) == {"path", "digest", "weights"}
    resumed = make("adamw")
    trainer = quiet_trainer(ZOStrategy(PLAIN), plugins=[LedgerCheckpointIO()], max_epochs=2)
    if "weights_only" in trainer.fit.__code__.co_varnames:
        trainer.fit(resumed, data(), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
        assert trainer.global_step == 12


def _async() -> Any:
    return AsyncCheckpointIO(LedgerCheckpointIO())


@pytest.mark.parametrize(
    ("io", "optimizer", "precision"),
    [
        *((LedgerCheckpointIO, optimizer, precision) for optimizer in ("sgd", "momentum", "adamw") for precision in DTYPES),
        *((io, *rest) for io in (_async, _whole) for rest in (("sgd", "64-true"), ("adamw", "bf16-true"))),
    ],
)
@pytest.mark.parametrize(
    "at", [pytest.param(6, marks=exact_epochs, id="between epochs"), pytest.param(9, id="inside an epoch")]
)
def test_resume(at: int, optimizer: str, precision: str, io: Any, tmp_path: Path) -> None:
    """Bit for bit the uninterrupted run, with a ledger that goes back to the first base."""
    torch.manual_seed(3)
    whole, noted = make(optimizer), Noted()
    fit(
        whole,
        data(precision),
        tmp_path / "a",
        noted,
        every_step(tmp_path / "a", every_n_train_steps=at),
        io=io(),
        precision=precision,
        max_epochs=3,
    )
    torch.manual_seed(99)
    resumed = make(optimizer)
    fit(resumed, data(precision), tmp_path / "b", every_step(tmp_path / "b"), io=io(), ckpt=tmp_path / "a" / f"step={at}.ckpt",
        precision=precision, max_epochs=3)  # fmt: skip
    same_module(resumed, whole)
    ledger = read(tmp_path / "b" / "ledger.zo")
    assert (ledger.header.start, ledger.last, ledger.torn, ledger.damage) == (0, 18, 0, "")
    for step in (2, at, at + 1, 18):
        rebuilt = parameters(noted.weights[0])
        replay(ledger, rebuilt, step)
        assert_same(rebuilt, noted.weights[step])  # type: ignore[arg-type]


@exact_epochs
def test_chain_of_runs(tmp_path: Path) -> None:
    """Stopped after every third step, each time in a new folder; the last ledger holds all of it."""
    whole, noted = make("adamw"), Noted()
    torch.manual_seed(3)
    fit(whole, data(), tmp_path / "whole", noted, every_step(tmp_path / "whole"), max_epochs=2)
    ckpt = None
    for steps in (3, 6, 9, 12):
        folder = tmp_path / str(steps)
        part = make("adamw")
        torch.manual_seed(steps)
        fit(part, data(), folder, every_step(folder), ckpt=ckpt, max_epochs=2, max_steps=steps)
        ckpt = folder / f"step={steps}.ckpt"
        assert_same(weights(part), noted.weights[steps])
    ledger = read(tmp_path / "12" / "ledger.zo")
    rebuilt = base_of(ledger)
    assert replay(ledger, rebuilt).step == 12
    assert_same(rebuilt, weights(whole))  # type: ignore[arg-type]
    assert len(list(tmp_path.glob("*/base-*.safetensors"))) == 5


def test_buffers_and_tied_weights(tmp_path: Path) -> None:
    def normed() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    whole, resumed = Task(normed()), Task(normed())
    fit(whole, data(), tmp_path / "a", every_step(tmp_path / "a"), max_epochs=2)
    saved = torch.load(tmp_path / "a" / "step=9.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {"net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"}
    fit(resumed, data(), tmp_path / "b", ckpt=tmp_path / "a" / "step=9.ckpt", max_epochs=2)
    same_module(resumed, whole)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tied_weights(kind: str, tmp_path: Path) -> None:
    whole, resumed = Task(tiny_causal_lm(kind), lm_loss), Task(tiny_causal_lm(kind), lm_loss)
    items = token_batches(4)
    fit(whole, Resumable(items), tmp_path, every_step(tmp_path), max_epochs=2)
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert not saved["state_dict"].keys() & {"net.lm_head.weight", *dict(whole.named_parameters())}
    fit(resumed, Resumable(items), tmp_path, ckpt=tmp_path / "step=6.ckpt", max_epochs=2)
    same_module(resumed, whole)


def test_a_direction_for_each_example(tmp_path: Path) -> None:
    def task() -> PerExampleTask:
        return PerExampleTask(mlp(), per_example_mse, OPTIMIZERS["adamw"])

    config = PLAIN.override(estimator="per_example", structure="rank1", normalize=True)
    whole, resumed = task(), task()
    fit(whole, data(), tmp_path / "a", every_step(tmp_path / "a"), config=config, max_epochs=2)
    fit(resumed, data(), tmp_path / "b", ckpt=tmp_path / "a" / "step=7.ckpt", config=config, max_epochs=2)
    same_module(resumed, whole)


class Lazy(pl.LightningModule):
    """Its second optimizer, which makes its state at once, steps from step 4 on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        left, right = self.optimizers()  # type: ignore[misc, attr-defined]
        for optimizer in (left, right) if batch_idx > 3 else (left,):
            optimizer.step(closure=lambda: (self.second(self.first(x)) - y).square().mean())

    def configure_optimizers(self) -> Any:
        return [AdamW(self.first.parameters(), lr=1e-2), Adagrad(self.second.parameters(), lr=1e-2)]


@pytest.mark.skipif(
    Version(version("lightning")) < Version("2.5.3"), reason="older Lightning miscounts the batches of manual optimisation"
)
@pytest.mark.parametrize("at", [3, 8])
def test_two_optimizers(at: int, tmp_path: Path) -> None:
    whole, resumed = Lazy(), Lazy()
    fit(whole, data(count=7), tmp_path / "a", every_step(tmp_path / "a"))
    fit(resumed, data(count=7), tmp_path / "b", ckpt=tmp_path / "a" / f"step={at}.ckpt")
    same_module(resumed, whole)


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.net[0])  # type: ignore[index, arg-type]

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1e-3)  # type: ignore[index, arg-type]


@pytest.mark.parametrize("io", [LedgerCheckpointIO, _whole], ids=["positions", "whole"])
@pytest.mark.parametrize("at", [2, 4])  # Lightning does not call finetune_function again for an epoch that a checkpoint is in
def test_finetuning(at: int, io: Any, tmp_path: Path) -> None:
    def task() -> Task:
        return Task(mlp(), optimizer=lambda p: AdamW([q for q in p if q.requires_grad], lr=1e-2))

    whole, resumed = task(), task()
    fit(whole, data(), tmp_path / "a", Thaw(), every_step(tmp_path / "a"), io=io(), max_epochs=3)
    fit(resumed, data(), tmp_path / "b", Thaw(), io=io(), ckpt=tmp_path / "a" / f"step={at}.ckpt", max_epochs=3)
    same_module(resumed, whole)


# ---- where the ledger is


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a finished run, and in ``folder.weights`` what it had after step 3."""
    noted = Noted()
    fit(make("adamw"), data(), tmp_path / "run", noted, every_step(tmp_path / "run"))
    torch.save(noted.weights[3], tmp_path / "weights3.pt")
    return tmp_path / "run"


def loads(path: Path) -> None:
    """The checkpoint of step 3 gives the weights of step 3."""
    found = LedgerCheckpointIO().load_checkpoint(path)
    assert_same(found["state_dict"], torch.load(path.parents[1] / "weights3.pt", weights_only=True))


def test_folder_was_moved_or_copied(saved: Path) -> None:
    loads(saved / "step=3.ckpt")
    copy = shutil.copytree(saved, saved.parent / "copy")
    loads(copy / "step=3.ckpt")
    moved = saved.rename(saved.parent / "moved")
    loads(moved / "step=3.ckpt")
    inner = moved / "checkpoints"
    inner.mkdir()
    shutil.move(moved / "step=3.ckpt", inner / "step=3.ckpt")
    shutil.copy(saved.parent / "weights3.pt", moved / "weights3.pt")
    loads(inner / "step=3.ckpt")  # Lightning's default: the ledger is one folder above
    resumed = make("adamw")
    fit(resumed, data(), saved.parent / "next", ckpt=inner / "step=3.ckpt", max_epochs=2)
    assert read(saved.parent / "next" / "ledger.zo").header.start == 0


def test_ledger_made_room(saved: Path) -> None:
    """Another run in the same folder, then one that goes on from the first's checkpoint, twice."""
    fit(make("sgd"), data(), saved)
    assert (saved / "ledger.zo").read_bytes() != (saved / "ledger.zo.1").read_bytes()
    loads(saved / "step=3.ckpt")
    ends = []
    for _ in range(2):
        resumed = make("adamw")
        fit(resumed, data(), saved, ckpt=saved / "step=3.ckpt", max_epochs=2)
        ends.append(weights(resumed))
        ledger = read(saved / "ledger.zo")
        assert (ledger.header.start, ledger.last) == (0, 12)
    assert_same(*ends)
    assert sorted(path.name for path in saved.glob("ledger*")) == ["ledger.zo", "ledger.zo.1", "ledger.zo.2", "ledger.zo.3"]


def _lose_ledger(run: Path) -> None:
    (run / "ledger.zo").unlink()


def _take_anothers(run: Path) -> None:
    fit(make("sgd"), data(), run.parent / "other")
    shutil.copy(run.parent / "other" / "ledger.zo", run / "ledger.zo")


def _cut(run: Path) -> None:
    path = run / "ledger.zo"
    path.write_bytes(path.read_bytes()[:1400])


def _alter(run: Path) -> None:
    path = run / "ledger.zo"
    data = bytearray(path.read_bytes())
    data[read(path).spans[2][0] + 9] ^= 1
    path.write_bytes(data)


def _no_ledger(run: Path) -> None:
    (run / "ledger.zo").write_bytes(b"something else")


def _lose_base(run: Path) -> None:
    next(run.glob("base-*")).unlink()


def _cut_base(run: Path) -> None:
    path = next(run.glob("base-*"))
    path.write_bytes(path.read_bytes()[:-1])


def _alter_base(run: Path) -> None:
    path = next(run.glob("base-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "ledger missing": (_lose_ledger, r"rests on a ledger that is not to be had: .*No such file or directory.*ledger\.zo"),
    "another run's": (
        _take_anothers,
        r"not to be had: .*does not hold the record \w{16}: it is another run's ledger, or an older",
    ),
    "ledger cut short": (
        _cut,
        r"not to be had: .*does not hold the record \w{16}: it is another run's ledger, or an older copy",
    ),
    "ledger altered": (_alter, r"not to be had: .*does not hold the record \w{16}: the record at byte \d+ of .* was altered"),
    "no ledger": (_no_ledger, r"not to be had: .*is not a replay ledger: it begins with b'somethin'"),
    "base missing": (_lose_base, r"base-\w{32}\.safetensors is missing: the weights that the run of .*ledger\.zo started from"),
    "base cut short": (_cut_base, r"base-\w{32}\.safetensors is not a whole safetensors file: "),
    "base altered": (
        _alter_base,
        r"these are not the weights that the run of .* started from \(fingerprint \w{32}, the run's \w{32}",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_said(name: str, saved: Path) -> None:
    breaks, message = BROKEN[name]
    breaks(saved)
    with pytest.raises(LedgerError, match=message):
        fit(make("adamw"), data(), saved.parent / "next", ckpt=saved / "step=3.ckpt", max_epochs=2)


def test_read_without_the_plugin_it_says_so(saved: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"step=3\.ckpt holds a position in a replay ledger instead of weights; read"
    ):
        fit(make("adamw"), data(), saved.parent / "next", io=_whole(), ckpt=saved / "step=3.ckpt", max_epochs=2)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):  # Lightning's own ways know no plugin
        Task.load_from_checkpoint(saved / "step=3.ckpt", net=mlp())


def test_whole_checkpoint_continues_the_ledger_or_starts_a_new_one(tmp_path: Path) -> None:
    whole = make("sgd")
    fit(whole, data(), tmp_path / "a", every_step(tmp_path / "a"), io=_whole(), max_epochs=2)
    assert not list((tmp_path / "a").glob("base-*"))  # a run with whole checkpoints needs none
    ckpt = tmp_path / "a" / "step=9.ckpt"
    there, gone = make("sgd"), make("sgd")
    fit(there, data(), tmp_path / "b", io=_whole(), ckpt=ckpt, max_epochs=2)
    assert read(tmp_path / "b" / "ledger.zo").header.start == 0
    (tmp_path / "a" / "ledger.zo").unlink()
    noted = Noted()
    with pytest.warns(RuntimeWarning, match=r"starts from the weights of now, not from the first run's base: .*No such file"):
        fit(gone, data(), tmp_path / "c", noted, io=_whole(), ckpt=ckpt, max_epochs=2)
    ledger = read(tmp_path / "c" / "ledger.zo")
    assert (ledger.header.start, ledger.last) == (9, 12)
    rebuilt = parameters(noted.weights[9])
    replay(ledger, rebuilt)
    for end in (weights(there), weights(gone), rebuilt):
        assert_same(end, weights(whole))  # type: ignore[arg-type]


def test_a_base_does_not_hold_the_optimizers_state(tmp_path: Path) -> None:
    """Goes on from a whole checkpoint whose ledger is gone: trains as ever, and says why it cannot be replayed."""
    whole, resumed = make("adamw"), make("adamw")
    fit(whole, data(), tmp_path / "a", every_step(tmp_path / "a"), io=_whole(), max_epochs=2)
    (tmp_path / "a" / "ledger.zo").unlink()
    noted = Noted()
    with (
        pytest.warns(RuntimeWarning, match="starts from the weights of now"),
        pytest.warns(UserWarning, match=r"checkpoints are whole ones, .*: AdamW has state from before the first step"),
    ):
        fit(
            resumed,
            data(),
            tmp_path / "b",
            noted,
            every_step(tmp_path / "b"),
            ckpt=tmp_path / "a" / "step=9.ckpt",
            max_epochs=2,
        )
    same_module(resumed, whole)
    ledger = read(tmp_path / "b" / "ledger.zo")
    with pytest.raises(
        LedgerError, match=r"the steps from 9 on cannot be replayed: AdamW has state from before the first step"
    ):
        replay(ledger, parameters(noted.weights[9]))
    again = make("adamw")
    fit(again, data(), tmp_path / "c", ckpt=tmp_path / "b" / "step=10.ckpt", max_epochs=2)  # a whole one
    same_module(again, whole)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_change_of_checkpoints_from_whole_to_positions(optimizer: str, tmp_path: Path) -> None:
    whole, resumed, again = (make(optimizer) for _ in range(3))
    fit(whole, data(), tmp_path / "a", every_step(tmp_path / "a"), io=_whole(), max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(resumed, data(), tmp_path / "b", every_step(tmp_path / "b"), ckpt=tmp_path / "a" / "step=8.ckpt", max_epochs=2)
        fit(again, data(), tmp_path / "c", ckpt=tmp_path / "b" / "step=10.ckpt", max_epochs=2)
    same_module(resumed, whole)
    same_module(again, whole)


# ---- whole ones, where a position would not do


def is_whole(path: Path) -> bool:
    saved = torch.load(path, weights_only=True)
    return "replayed" not in saved["zolightning"] and "net.0.weight" in saved["state_dict"]


class Saver(Callback):
    """Saves at a hook."""

    def __init__(self, hook: str, path: Path) -> None:
        setattr(self, hook, lambda trainer, *_, **__: trainer.save_checkpoint(path))


def test_before_the_first_step(tmp_path: Path) -> None:
    whole, resumed = make("adamw"), make("adamw")
    fit(whole, data(), tmp_path, Saver("on_train_start", tmp_path / "x.ckpt"))
    assert is_whole(tmp_path / "x.ckpt")
    fit(resumed, data(), tmp_path / "next", ckpt=tmp_path / "x.ckpt")
    same_module(resumed, whole)


@pytest.mark.parametrize("hook", ["on_fit_end", "teardown"])
def test_after_the_last_step(hook: str, tmp_path: Path) -> None:
    module = make("adamw")
    trainer = fit(module, data(), tmp_path, Saver(hook, tmp_path / "hook.ckpt"))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("hook.ckpt", "after.ckpt"):
        assert not is_whole(tmp_path / name)
        assert_same(LedgerCheckpointIO().load_checkpoint(tmp_path / name)["state_dict"], dict(module.state_dict()))
    with torch.no_grad():
        module.net[0].bias += 1.0  # type: ignore[index, operator]
    with pytest.warns(
        UserWarning, match="checkpoints are whole ones, .*: 'net.0.bias' was changed after step 6 by something else"
    ):
        trainer.save_checkpoint(tmp_path / "changed.ckpt")
    assert is_whole(tmp_path / "changed.ckpt")


def test_optimizers_that_cannot_be_replayed(tmp_path: Path) -> None:
    class Own(SGD):
        pass

    OPTIMIZERS["own"] = lambda p: Own(p, lr=1e-2, momentum=0.9)
    whole, resumed = make("own"), make("own")
    with pytest.warns(
        UserWarning, match=r"checkpoints are whole ones, not positions in the ledger: .*Own is not one of torch\.optim's"
    ):
        fit(whole, data(), tmp_path / "a", every_step(tmp_path / "a"), max_epochs=2)
    assert is_whole(tmp_path / "a" / "step=9.ckpt")
    fit(resumed, data(), tmp_path / "b", ckpt=tmp_path / "a" / "step=9.ckpt", max_epochs=2)
    same_module(resumed, whole)


def test_after_an_error_in_the_middle_of_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an update is in the weights: no position says so, but the weights are kept as they are."""
    calls, original = [0], together.sgd_all_

    def failing(targets: Any, dist: Any, terms: Any, leaves: Any, *rest: Any) -> None:
        calls[0] += 1
        if calls[0] == 3 + 1:
            original(targets[:1], dist, terms, leaves[:1], *rest)
            raise RuntimeError("on purpose")
        original(targets, dist, terms, leaves, *rest)

    monkeypatch.setattr(together, "sgd_all_", failing)
    module, noted = make("sgd"), Noted()
    torch.manual_seed(3)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        pytest.warns(UserWarning, match="checkpoints are whole ones, .*: a step was interrupted, so the weights are no step's"),
    ):
        fit(module, data(), tmp_path, noted, OnExceptionCheckpoint(tmp_path, "error"))
    assert is_whole(tmp_path / "error.ckpt")
    saved = torch.load(tmp_path / "error.ckpt", weights_only=True)["state_dict"]
    assert_same(saved, dict(module.state_dict()))
    assert not torch.equal(saved["net.0.weight"], noted.weights[3]["net.0.weight"])  # updated
    assert torch.equal(saved["net.2.weight"], noted.weights[3]["net.2.weight"])  # not any more
    ledger = read(tmp_path / "ledger.zo")
    assert (ledger.last, ledger.torn, ledger.damage) == (4, 0, "")  # what step 3 would have led to can be had, too
    monkeypatch.undo()
    rebuilt, whole = base_of(ledger), make("sgd")
    replay(ledger, rebuilt)
    torch.manual_seed(3)
    fit(whole, data(), tmp_path / "whole", noted)
    assert_same(rebuilt, noted.weights[4])  # type: ignore[arg-type]


def test_weights_changed_behind_the_optimizer_do_not_come_back_as_if_nothing_had_been(tmp_path: Path) -> None:
    class Meddler(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                pl_module.net[0].bias.data.mul_(1.1)

    with pytest.warns(
        UserWarning, match="checkpoints are whole ones, .*: 'net.0.bias' was changed after step 3 by something else"
    ):
        fit(
            make("sgd"),
            data(),
            tmp_path / "each",
            Meddler(),
            Saver("on_train_batch_start", tmp_path / "x.ckpt"),
            every_step(tmp_path / "each"),
        )
    assert [is_whole(tmp_path / "each" / f"step={step}.ckpt") for step in range(1, 7)] == [False] * 3 + [True] * 3
    fit(make("sgd"), data(), tmp_path / "end", Meddler(), every_step(tmp_path / "end", every_n_train_steps=6))
    with pytest.raises(
        LedgerError, match=r"the weights after step 6 differ from the run's .* changed by something else than the opt"
    ):
        LedgerCheckpointIO().load_checkpoint(tmp_path / "end" / "step=6.ckpt")


class Target(Task):
    """A second net that follows the first, as a Parameter or, clipped, the first itself."""

    def __init__(self, follows: bool, where: str) -> None:
        super().__init__(mlp(), optimizer=lambda _: SGD(self.net.parameters(), lr=1e-2))
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.follows, self.where = follows, where

    @torch.no_grad()
    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        if self.where == "on_before_zero_grad":
            self.change()

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        if self.where == "on_train_batch_end":
            self.change()

    def change(self) -> None:
        for target, weight in zip(self.target.parameters(), self.net.parameters(), strict=True):
            if self.follows:
                target.lerp_(weight, 0.1)
            else:
                weight.clamp_(-0.1, 0.1)


@pytest.mark.parametrize("where", ["on_train_batch_end", "on_before_zero_grad"])
@pytest.mark.parametrize(("follows", "name"), [(True, r"target\.0\.weight"), (False, r"net\.0\.weight")])
def test_weights_changed_in_every_step_are_kept_whole(follows: bool, name: str, where: str, tmp_path: Path) -> None:
    """Before a checkpoint or after it: from the second step on no position stands for the weights."""
    with pytest.warns(UserWarning, match=rf"checkpoints are whole ones, .*: '{name}' was changed after step \d by something"):
        fit(Target(follows, where), data(), tmp_path / "a", every_step(tmp_path / "a", every_n_train_steps=3))
    fit(Target(follows, where), data(), tmp_path / "b", every_step(tmp_path / "b"), io=_whole())
    for name in ("step=3.ckpt", "step=6.ckpt"):
        assert is_whole(tmp_path / "a" / name)
        saved, expected = (torch.load(tmp_path / folder / name)["state_dict"] for folder in "ab")
        assert_same(saved, expected)


def test_averaged_weights_are_kept_and_are_not_taken_for_the_runs(tmp_path: Path) -> None:
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")

    def average() -> Callback:
        return averaging.EMAWeightAveraging(decay=0.5)

    whole, resumed, noted = make("adamw"), make("adamw"), Noted()
    fit(whole, data(), tmp_path / "a", average(), noted, every_step(tmp_path / "a"), max_epochs=2)
    ledger = read(tmp_path / "a" / "ledger.zo")
    rebuilt = base_of(ledger)
    assert replay(ledger, rebuilt).checked == 12  # before the average took the place of the weights
    assert_same(rebuilt, noted.weights[12])  # type: ignore[arg-type]
    assert not torch.equal(weights(whole)["net.0.weight"], noted.weights[12]["net.0.weight"])
    saved = LedgerCheckpointIO().load_checkpoint(tmp_path / "a" / "step=9.ckpt")
    assert_same(saved["current_model_state"], noted.weights[9])
    assert not torch.equal(saved["state_dict"]["net.0.weight"], noted.weights[9]["net.0.weight"])
    fit(resumed, data(), tmp_path / "b", average(), ckpt=tmp_path / "a" / "step=9.ckpt", max_epochs=2)
    same_module(resumed, whole)


def test_full_disk_before_the_first_step(tmp_path: Path) -> None:
    """The base cannot be kept, nor anything else beside it: whole checkpoints go where there is room."""
    with small_disk(tmp_path / "disk", "256k") as fill:
        if fill is None:
            pytest.skip("may not mount a small disk")
        fill(True)
        whole, resumed = make("adamw", mlp(hidden=512)), make("adamw", mlp(hidden=512))
        elsewhere = every_step(tmp_path / "elsewhere")
        trainer = quiet_trainer(
            ZOStrategy(PLAIN), enable_checkpointing=True, callbacks=[elsewhere], plugins=[LedgerCheckpointIO()],
            logger=Idle(tmp_path / "disk"), max_epochs=2,
        )  # fmt: skip
        with pytest.warns(UserWarning, match="this run keeps no replay ledger: .* cannot be kept in .*disk"):
            trainer.fit(whole, data())
        assert is_whole(tmp_path / "elsewhere" / "step=9.ckpt")
        assert {path.name for path in (tmp_path / "disk").rglob("*")} == {"filler", "run", "1", ".ledger.zo.lock"}
    fit(resumed, data(), tmp_path / "b", ckpt=tmp_path / "elsewhere" / "step=9.ckpt", max_epochs=2)
    same_module(resumed, whole)


# ---- tuners try steps out and take them back


@pytest.mark.parametrize("io", [LedgerCheckpointIO, _whole], ids=["positions", "whole"])
def test_learning_rate_finder(io: Any, tmp_path: Path) -> None:
    class Tuned(Task):
        lr = 1e-2

        def configure_optimizers(self) -> Optimizer:
            return AdamW(self.parameters(), lr=self.lr)

    module, noted = Tuned(mlp()), Noted()
    trainer = fit(
        module, loader(batches(20)), tmp_path, LearningRateFinder(num_training_steps=10), noted, every_step(tmp_path), io=io()
    )
    ledger = read(tmp_path / "ledger.zo")
    assert (ledger.header.start, ledger.last) == (0, trainer.global_step)
    rebuilt = parameters(noted.weights[0])
    assert replay(ledger, rebuilt).checked == ledger.last
    assert_same(rebuilt, weights(module))  # type: ignore[arg-type]


def test_batch_size_finder(tmp_path: Path) -> None:
    class Sized(Task):
        batch_size = 2

        def train_dataloader(self) -> Any:
            items = [(torch.randn(4), torch.randn(3)) for _ in range(32)]
            return torch.utils.data.DataLoader(items, batch_size=self.batch_size)  # type: ignore[arg-type]

    module, noted = Sized(mlp()), Noted()
    trainer = quiet_trainer(
        ZOStrategy(PLAIN), callbacks=[BatchSizeFinder(max_trials=2, steps_per_trial=2), noted], logger=CSVLogger(tmp_path)
    )
    trainer.fit(module)
    [path] = tmp_path.rglob("ledger.zo")
    ledger = read(path)
    rebuilt = parameters(noted.weights[0])
    assert replay(ledger, rebuilt).checked == ledger.last == trainer.global_step
    assert_same(rebuilt, weights(module))  # type: ignore[arg-type]


# ---- which files a run leaves


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}


def test_default_folders(tmp_path: Path) -> None:
    trainer = quiet_trainer(ZOStrategy(PLAIN), enable_checkpointing=True, logger=True, default_root_dir=tmp_path)
    trainer.fit(make(), data())
    found = files(tmp_path)
    assert "lightning_logs/version_0/ledger.zo" in found
    assert "lightning_logs/version_0/checkpoints/epoch=0-step=6.ckpt" in found


def test_csv_logger_has_no_reason_to_complain(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            trainer = quiet_trainer(ZOStrategy(PLAIN), logger=CSVLogger(tmp_path), enable_checkpointing=True)
            trainer.fit(make(), data())
    assert not [w for w in caught if "not empty" in str(w.message)]
    assert {"lightning_logs/version_0/ledger.zo", "lightning_logs/version_1/ledger.zo"} <= files(tmp_path)


@pytest.mark.integration
def test_mlflow_logger(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / "artifacts"))
    trainer = quiet_trainer(ZOStrategy(PLAIN), logger=logger, enable_checkpointing=True, default_root_dir=tmp_path / "root")
    trainer.fit(make(), data())
    [ledger], [checkpoint] = tmp_path.rglob("ledger.zo"), (tmp_path / "root").rglob("*.ckpt")
    assert ledger.parent == checkpoint.parents[1]
    assert logger.run_id in str(ledger)


def test_no_logger(tmp_path: Path) -> None:
    trainer = quiet_trainer(ZOStrategy(PLAIN), enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(make(), data())
    assert files(tmp_path) == {"ledger.zo", "checkpoints/epoch=0-step=6.ckpt"}


def test_folder_of_the_checkpoints_was_given(tmp_path: Path) -> None:
    """Not where the run was started."""
    trainer = quiet_trainer(
        ZOStrategy(PLAIN),
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(tmp_path / "mine")],
        default_root_dir=tmp_path / "root",
    )
    trainer.fit(make(), data())
    assert files(tmp_path) == {"mine/ledger.zo", "mine/epoch=0-step=6.ckpt"}


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ({}, {"logger": False, "enable_checkpointing": False}),
        ({}, {"logger": True, "enable_checkpointing": True, "fast_dev_run": True}),
        ({"ledger": False}, {"logger": False, "enable_checkpointing": False}),
        ({"ledger": "given.zo"}, {"fast_dev_run": 2}),
    ],
    ids=["nothing kept", "fast_dev_run", "unwanted", "fast_dev_run, path given"],
)
def test_no_files(strategy: Any, settings: Any, tmp_path: Path) -> None:
    trainer = quiet_trainer(ZOStrategy(PLAIN, **strategy), **{"default_root_dir": tmp_path, **settings})
    trainer.fit(make(), data())
    assert list(tmp_path.rglob("*")) == []


def test_no_ledger_is_wanted_but_checkpoints_are(tmp_path: Path) -> None:
    trainer = quiet_trainer(
        ZOStrategy(PLAIN, ledger=False),
        enable_checkpointing=True,
        callbacks=[every_step(tmp_path)],
        plugins=[LedgerCheckpointIO()],
    )
    trainer.fit(make(), data())
    assert is_whole(tmp_path / "step=3.ckpt")
    assert files(tmp_path) == {f"step={step}.ckpt" for step in range(1, 7)}


def test_folder_that_is_not_on_this_machine(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"this run keeps no replay ledger: memory://bucket/run is not on this machine\. Give it a"
    ):
        quiet_trainer(
            ZOStrategy(PLAIN),
            enable_checkpointing=True,
            callbacks=[ModelCheckpoint("memory://bucket/run")],
            default_root_dir=tmp_path,
        ).fit(make(), data())
    assert files(tmp_path) == files(Path.cwd()) == set()


def test_evaluation_keeps_no_ledger(tmp_path: Path) -> None:
    trainer = quiet_trainer(ZOStrategy(PLAIN), logger=CSVLogger(tmp_path))
    trainer.test(Validated(mlp()), loader(batches(2)), verbose=False)
    trainer.validate(Validated(mlp()), loader(batches(2)), verbose=False)
    assert not list(tmp_path.rglob("*.zo*"))


def test_base_is_written_once_and_shared(tmp_path: Path) -> None:
    fit(make(), data(), tmp_path / "a", every_step(tmp_path / "a"))
    fit(make(), data(), tmp_path / "b", every_step(tmp_path / "b"), ckpt=tmp_path / "a" / "step=4.ckpt", max_epochs=2)
    header = read(tmp_path / "b" / "ledger.zo").header
    first, second = (base_path(tmp_path / run, header.base) for run in "ab")
    assert first.stat().st_ino == second.stat().st_ino  # a link
    assert_same(load_base(second), copies(make()))  # type: ignore[arg-type]
    first.unlink()
    assert_same(load_base(second), copies(make()))  # type: ignore[arg-type]


def test_parameters_on_the_same_memory(tmp_path: Path) -> None:
    """Frozen ones may be: the base takes each as its own."""

    class Shared(Task):
        def __init__(self) -> None:
            super().__init__(mlp())
            frozen = torch.arange(6.0)
            self.a, self.b = nn.Parameter(frozen, requires_grad=False), nn.Parameter(frozen, requires_grad=False)

    whole, resumed = Shared(), Shared()
    fit(whole, data(), tmp_path / "a", every_step(tmp_path / "a"))
    fit(resumed, data(), tmp_path / "b", ckpt=tmp_path / "a" / "step=4.ckpt")
    same_module(resumed, whole)


def test_kinds_of_tensors_in_a_base(tmp_path: Path) -> None:
    class Odd(Task):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.scalar = nn.Parameter(torch.tensor(2.0))
            self.empty = nn.Parameter(torch.empty(0, 3))
            self.strided = nn.Parameter(torch.arange(12.0).view(3, 4).T)
            self.small = nn.Parameter(torch.ones(3, dtype=torch.float16), requires_grad=False)
            self.whole = nn.Parameter(torch.arange(3), requires_grad=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.scalar.double() + self.strided.double().sum()  # type: ignore[no-any-return]

    whole, resumed = Odd(), Odd()
    fit(whole, data(), tmp_path / "a", every_step(tmp_path / "a"))
    fit(resumed, data(), tmp_path / "b", ckpt=tmp_path / "a" / "step=4.ckpt")
    same_module(resumed, whole)


def test_another_optimizer_begins_another_ledger(tmp_path: Path) -> None:
    """Its state is not that of the steps before: positions count from the weights it began with."""

    def train(name: str, optimizer: str, steps: int, checkpoint: Path | None = None) -> Task:
        task, saver = Task(mlp()), ModelCheckpoint(tmp_path / name, every_n_train_steps=steps, save_top_k=-1, filename="{step}")
        strategy = ZOStrategy(PLAIN.override(optimizer=optimizer), ledger=tmp_path / name / "ledger.zo")
        trainer = quiet_trainer(
            strategy, callbacks=[saver], plugins=[LedgerCheckpointIO()], enable_checkpointing=True, max_steps=steps
        )
        trainer.fit(task, Resumable(batches(8)), ckpt_path=checkpoint)
        return task

    train("before", "momentum", 4)
    with pytest.warns(UserWarning, match="starts without the state of 'momentum'"):
        task = train("after", "adam", 8, tmp_path / "before" / "step=4.ckpt")
    loaded = LedgerCheckpointIO().load_checkpoint(tmp_path / "after" / "step=8.ckpt")
    assert_same(loaded["state_dict"], task.state_dict())
