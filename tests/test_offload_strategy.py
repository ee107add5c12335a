"""Lightning fits with offloaded weights end with the bits of fits in memory, resumed ones too, whenever they died."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import PLAIN, Task, exact_epochs
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from zolightning import ZOStrategy
from zolightning.offload import Offload, OffloadError, StoredParameter
from zolightning.strategy.ledger_io import LedgerCheckpointIO

WIDTH = 260


class Watched(Task):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(self.net, batch))


def module(**options: Any) -> Watched:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)]
    return Watched(nn.Sequential(*layers), **options)


def batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)) for _ in range(6)]
    return DataLoader(pairs, batch_size=2)  # type: ignore[arg-type]


def trainer(offload: Any, folder: str | Path, epochs: int = 2, callbacks: Any = (), **options: Any) -> pl.Trainer:
    keep = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1)
    return pl.Trainer(
        strategy=ZOStrategy(PLAIN, offload=offload),
        max_epochs=epochs,
        logger=False,
        callbacks=[keep, *callbacks],
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fitted(
    offload: Any, folder: str, ckpt_path: str | None = None, make: Callable[..., Watched] = module, **options: Any
) -> tuple[dict[str, Tensor], float]:
    task, fit = make(), trainer(offload, folder, **options)
    fit.fit(task, batches(), batches(), ckpt_path=ckpt_path)
    weights = {name: parameter.detach().clone() for name, parameter in task.named_parameters()}
    return weights, fit.callback_metrics["val"].item()


def same(one: tuple[dict[str, Tensor], float], other: tuple[dict[str, Tensor], float]) -> bool:
    return one[1] == other[1] and all(torch.equal(value, other[0][name]) for name, value in one[0].items())


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()  # a module that is gone gives its work folder back


@pytest.mark.parametrize("offload", ["cpu", "disk", Offload("disk", write_every=4, prefetch=0)])
@exact_epochs
def test_a_fit_and_a_resumed_fit_end_with_the_bits_of_memory(offload: Any) -> None:
    expected = fitted(None, "memory")
    assert same(fitted(offload, "offloaded"), expected)
    gc.collect()
    assert same(fitted(offload, "offloaded", ckpt_path="offloaded/step=3.ckpt"), expected)
    assert os.path.getsize("offloaded/step=3.ckpt") < 30_000


class Stacked(nn.Module):
    """Three experts in one tensor, of which each step reads two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH) * 0.05)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.experts[0]) @ self.experts[2]


@exact_epochs
def test_a_resumed_fit_goes_on_from_the_parts_that_its_work_files_hold() -> None:
    def make() -> Watched:
        return Watched(Stacked(), optimizer=lambda p: AdamW(p, lr=1e-3))

    expected = fitted(None, "memory", make=make)
    assert same(fitted("disk", "offloaded", make=make), expected)
    gc.collect()
    assert same(fitted("disk", "offloaded", ckpt_path="offloaded/step=3.ckpt", make=make), expected)


@exact_epochs
def test_adamw_accumulation_schedule_clipping_and_early_stopping() -> None:
    def make() -> Watched:
        return module(
            optimizer=lambda p: AdamW(p, lr=1e-3, weight_decay=0.1),
            scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        )

    def options() -> dict[str, Any]:
        stop = EarlyStopping("val", patience=1, min_delta=10.0)
        return {"make": make, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "epochs": 9, "callbacks": [stop]}

    expected = fitted(None, "memory", **options())
    assert same(fitted("disk", "offloaded", **options()), expected)
    gc.collect()
    path = "offloaded/step=2.ckpt"
    assert same(fitted("disk", "offloaded", ckpt_path=path, **options()), expected)


def test_testing_and_predicting_read_the_weights_of_a_checkpoint_and_write_nothing() -> None:
    fitted(None, "memory", epochs=1)
    resident, offloaded = module(), module()
    pl.Trainer(strategy="zo", logger=False, accelerator="cpu", enable_progress_bar=False).validate(
        resident, batches(), ckpt_path="memory/step=3.ckpt", verbose=False
    )
    fitted("disk", "offloaded", epochs=2)
    before = {path: path.read_bytes() for path in Path("offloaded/offload").iterdir()}
    again = trainer("disk", "offloaded")
    again.validate(offloaded, batches(), ckpt_path="offloaded/step=3.ckpt", verbose=False)
    assert torch.equal(offloaded.net[0].weight.detach(), resident.net[0].weight.detach())
    assert {path: path.read_bytes() for path in before} == before


def test_the_checkpoint_holds_a_position_and_no_weights_of_the_store() -> None:
    fitted("disk", "offloaded", epochs=1)
    checkpoint = torch.load("offloaded/step=3.ckpt", weights_only=True)
    assert not any(value.numel() > WIDTH for value in checkpoint["state_dict"].values())
    assert set(checkpoint["zolightning"]["replayed"]) == {name for name, _ in module().named_parameters()}


def test_a_checkpoint_of_other_weights_is_refused() -> None:
    fitted("disk", "offloaded", epochs=1)
    other = module()
    nn.init.zeros_(other.net[0].weight)
    with pytest.raises(Exception, match="not the weights that the run"):
        trainer("disk", "elsewhere").fit(other, batches(), ckpt_path="offloaded/step=3.ckpt")


def test_a_vanished_work_folder_costs_a_replay_and_no_bits() -> None:
    expected = fitted(None, "memory")
    fitted("disk", "offloaded", epochs=1)
    gc.collect()
    subprocess.run(["rm", "-r", "offloaded/offload"], check=True)
    assert same(fitted("disk", "offloaded", ckpt_path="offloaded/step=3.ckpt"), expected)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: trainer(Offload("disk", folder="file"), "x"), "cannot be written to"),
        (lambda: trainer("disk", "x", plugins=[LedgerCheckpointIO()]), "leave the plugin out"),
        (lambda: trainer("floppy", "x"), "must be 'cpu' or 'disk'"),
    ],
)
def test_refusals(make: Callable[[], pl.Trainer], error: str) -> None:
    Path("file").write_text("")
    task = module()
    with pytest.raises((OffloadError, ValueError), match=error):
        make().fit(task, batches())
    assert not any(isinstance(p, StoredParameter) and p.isnan().any() for p in task.parameters())


def test_a_checkpoint_without_a_ledger_is_refused_by_name() -> None:
    task = module()
    fit = pl.Trainer(
        strategy=ZOStrategy(PLAIN, offload="disk", ledger=False), max_epochs=1, accelerator="cpu", enable_progress_bar=False
    )
    with pytest.raises(OffloadError, match="keeps no ledger"):
        fit.fit(task, batches())


def test_recorded_graphs_are_refused_by_name() -> None:
    fit = pl.Trainer(strategy=ZOStrategy(PLAIN, offload="disk", cuda_graphs=True), max_epochs=1, accelerator="cpu")
    with pytest.raises(OffloadError, match="recorded graph"):
        fit.fit(module(), batches())


def test_compiled_code_is_refused_by_name() -> None:
    task = module()
    task.net.compile(backend="eager")
    with pytest.raises(OffloadError, match="compiled code"):
        trainer("disk", "x").fit(task, batches())


@torch.jit.script
def scripted(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x @ weight.t())


class Scripted(nn.Module):
    """Its second and third matrices are read where no function mode and no tensor subclass sees it."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.layers[1].requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        first, *inner, last = self.layers
        x = first(x)
        for layer in inner:
            x = scripted(x, layer.weight)
        return last(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("frozen", [True, False])
def test_reads_of_offloaded_weights_that_nothing_sees_are_refused_by_name(frozen: bool, tmp_path: Path) -> None:
    task = Watched(Scripted(frozen))
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    with pytest.raises(RuntimeError, match=r"reads 'net\.layers\.1\.weight', 'net\.layers\.2\.weight' in a scripted function"):
        trainer("cpu", tmp_path).fit(task, batches())
    assert all(torch.equal(p.detach(), before[name]) for name, p in task.named_parameters())


def test_a_loss_that_is_nan_by_itself_names_no_weight(tmp_path: Path) -> None:
    task = Watched(nn.Linear(WIDTH, WIDTH), loss=lambda net, batch: net(batch[0]).sum() * float("nan"))
    fit = trainer("cpu", tmp_path, epochs=1)
    with pytest.warns(UserWarning, match="finite"):
        fit.fit(task, batches())
    assert fit.global_step == 3


def worker(folder: str, epochs: int) -> None:
    """A run that may be killed: it goes on from its last checkpoint, and at the end leaves its weights."""
    torch.set_num_threads(1)
    found = sorted(Path(folder).glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2].partition("-")[0]))
    task = module(optimizer=lambda p: SGD(p, lr=1e-4, momentum=0.9))
    trainer("disk", folder, epochs).fit(task, batches(), batches(), ckpt_path=str(found[-1]) if found else None)
    torch.save({name: p.detach().clone() for name, p in task.named_parameters()}, f"{folder}/last.pt")


@pytest.mark.slow
@exact_epochs
def test_a_run_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not() -> None:
    """``pytest tests/test_offload_strategy.py -m slow``; ZOLIGHTNING_KILLS says how many times (5)."""
    chance, folder = random.Random(0), Path("killed").absolute()
    command, said = [sys.executable, __file__, str(folder)], Path("said.txt").absolute()
    kills = 0
    while not (folder / "last.pt").exists():
        with said.open("ab") as errors:
            process = subprocess.Popen(command, stderr=errors, stdout=subprocess.DEVNULL)
        if kills < int(os.environ.get("ZOLIGHTNING_KILLS", "5")):
            started = len(list(folder.glob("step=*.ckpt")))
            while len(list(folder.glob("step=*.ckpt"))) <= started and process.poll() is None:
                time.sleep(0.01)
            time.sleep(chance.random() * 0.5)
            process.send_signal(signal.SIGKILL)
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL), said.read_text()[-3000:]
    worker("whole", 60)
    expected, found = torch.load("whole/last.pt"), torch.load(folder / "last.pt")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


if __name__ == "__main__":
    worker(sys.argv[1], 60)
