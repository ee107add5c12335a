"""Anchored weight decay: its textbook twin, in low precision on average, over a resumed fit and out of the ledger."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from helpers import PLAIN, Resumable, Task, assert_same, batches, mlp, mse, quiet_trainer, weights
from ledgers import Noted, parameters
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from zolightning import Cycle, LedgerCheckpointIO, Sparse, ZOConfig, ZOStrategy
from zolightning.engine.anchor import Anchor
from zolightning.engine.session import Session
from zolightning.ledger import LedgerError, read, replay
from zolightning.noise import Rademacher, stochastic_round_
from zolightning.space import DenseLeaf
from zolightning.types import Key

ANCHORED = PLAIN.override(anchor=5.0)
MAKES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=1e-2),
    "sgd, weight decay, maximize": lambda p: SGD(p, lr=1e-2, weight_decay=0.1, maximize=True),
    "momentum": lambda p: SGD(p, lr=1e-2, momentum=0.9),
    "adamw": lambda p: AdamW(p, lr=1e-2),
}


def anchored(optimizer: Optimizer, decay: float = 5.0) -> Optimizer:
    """The textbook's: both models in memory, and the pull before each step."""
    first = [(group, p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]

    def pull(*_: object) -> None:
        with torch.no_grad():
            for group, p, began in first:
                p -= (p - began) * (group["lr"] * decay)

    optimizer.register_step_pre_hook(pull)
    return optimizer


def run(net: nn.Module, items: list[Any], config: ZOConfig = ANCHORED, make: Any = MAKES["sgd"], **settings: Any) -> Session:
    session = Session(net, make(net.parameters()), config, **settings)
    for batch in items:
        session.estimate(lambda batch: mse(net, batch), batch)
        session.update()
    return session


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", MAKES)
def test_a_step_is_the_textbooks(make: str, dtype: torch.dtype) -> None:
    items = [(x.to(dtype), y.to(dtype)) for x, y in batches(8)]
    net, twin, free = (mlp().to(dtype) for _ in range(3))
    optimizer = MAKES[make](net.parameters())
    session, scheduler = Session(net, optimizer, ANCHORED), StepLR(optimizer, 3, 0.5)
    for batch in items:
        session.estimate(lambda batch: mse(net, batch), batch)
        session.update()
        scheduler.step()
    expected = anchored(MAKES[make](twin.parameters()))
    settings: Any = {"seed": 7, "eps": 1e-3, "scheduler": StepLR(expected, 3, 0.5)}
    reference.train(twin, items, mse, expected, Rademacher(), **settings)
    assert_same(weights(net), weights(twin))
    run(free, items, PLAIN, MAKES[make])
    assert not torch.equal(net[0].weight, free[0].weight)


def test_low_precision_is_drawn_back_on_average_by_bits_of_its_own() -> None:
    """A pull of a twentieth of an ulp, which rounding to nearest would lose at all weights."""
    ulp, count = 2.0**-7, 1 << 18
    leaf = DenseLeaf("w", 3, nn.Parameter(torch.ones(count, dtype=torch.bfloat16)), Rademacher())
    anchor = Anchor(0.5)
    anchor.begin([leaf], 0)
    with torch.no_grad():
        leaf.parameter += ulp
        before = leaf.parameter.float()
        anchor.pull_([leaf], 0.1, Key(7, 4))
        moved = (before - leaf.parameter.float()) / ulp
        assert set(moved.tolist()) == {0.0, 1.0}
        assert abs(moved.mean().item() - 0.05) < 5 * math.sqrt(0.05 * 0.95 / count)
        stepped = before.bfloat16()  # as the optimizer's step of the same key rounds the same value
        stochastic_round_(stepped, before - 0.05 * ulp, Key(7, 4), leaf.index, 0)
        both = torch.corrcoef(torch.stack(((before - stepped.float()) / ulp, moved)))[0, 1]
        assert abs(both.item()) < 5 / math.sqrt(count)
        anchor.pull_([leaf], 100.0, Key(7, 5))  # no further than to the first weights
        assert torch.equal(leaf.parameter, torch.ones_like(leaf.parameter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_rate_or_a_finite_loss_no_bit_changes(dtype: torch.dtype) -> None:
    net, items = mlp().to(dtype), [(x.to(dtype), y.to(dtype)) for x, y in batches(4)]
    optimizer = MAKES["sgd"](net.parameters())
    session = Session(net, optimizer, ANCHORED)
    for lr, scale in ((1e-2, 1.0), (1e-2, 1.0), (0.0, 1.0), (1e-2, math.nan)):
        optimizer.param_groups[0]["lr"] = lr
        before = weights(net)
        session.estimate(lambda batch, scale=scale: mse(net, batch) * scale, items[session.step])
        assert bool(session.update().skipped) is math.isnan(scale)
        if lr and scale == 1.0:
            assert not torch.equal(net[0].weight, before["0.weight"])
        else:
            assert_same(weights(net), before)


def test_only_weights_whose_turn_it_is_are_drawn() -> None:
    """As weight decay: the block of the step, and of a sparse leaf the small weights."""
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)))
    net = nn.ModuleDict({"blocks": blocks})
    config = ANCHORED.override(cycle=Cycle(), structure=Sparse(0.5), anchor=1e4)
    session, first = Session(net, SGD(net.parameters(), lr=1e-4), config), weights(net)
    for step, (x, _) in enumerate(batches(4)):
        session.estimate(lambda x: blocks(x).square().mean().double(), x)
        for p in net.parameters():  # by other code, so that there is something to draw back
            p.data *= 1.1 if step else 1.0
        before = weights(net)
        session.update()
        leaves = [leaf for leaf in session.view().leaves if leaf.active(Key(7, step))]
        assert len(leaves) == 2
        for leaf in session.view().leaves:
            now, small = leaf.parameter.detach(), before[leaf.name].abs() <= leaf.settings["threshold"]
            drawn = small if leaf in leaves else torch.zeros_like(small)
            assert torch.equal(now[~drawn], before[leaf.name][~drawn])
            torch.testing.assert_close(now[drawn], first[leaf.name][drawn], rtol=0, atol=5e-3)
            assert not drawn.any() or not torch.equal(now[drawn], before[leaf.name][drawn])


class Fit:
    """A Trainer's run of some steps, its checkpoints and its ledger."""

    def __init__(
        self, folder: Path, steps: int = 8, ckpt: Path | None = None, precision: Any = "32-true", **settings: Any
    ) -> None:
        io = settings.pop("checkpoint_io", None)
        self.ledger, self.noted = settings.pop("ledger", folder / "ledger.zo"), Noted()
        torch.manual_seed(3)
        self.module = Task(mlp(), optimizer=settings.pop("make", MAKES["adamw"]))
        self.strategy = ZOStrategy(PLAIN, ledger=self.ledger, checkpoint_io=io, **{"anchor": 5.0, **settings})
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = quiet_trainer(
            self.strategy, max_steps=steps, max_epochs=-1, callbacks=[self.noted, keep], precision=precision,
            enable_checkpointing=True,
        )  # fmt: skip
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        trainer.fit(self.module, Resumable([(x.to(dtype), y.to(dtype)) for x, y in batches(8)]), ckpt_path=ckpt)


@pytest.mark.parametrize("io", [None, LedgerCheckpointIO])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_resumed_fit_ends_with_the_same_bits_and_so_does_its_replay(precision: str, io: Any, tmp_path: Path) -> None:
    """With the records of both fits in one ledger; the file of the first weights may be moved to the second."""
    make = partial(Fit, precision=precision)
    whole = make(tmp_path / "whole", checkpoint_io=io and io())
    make(tmp_path / "half", 4, checkpoint_io=io and io())
    (file,) = (tmp_path / "half").glob("first-weights-*.bin")
    again = tmp_path / "again"
    again.mkdir()
    file.rename(again / file.name)
    resumed = make(again, 8, tmp_path / "half" / "step=4.ckpt", checkpoint_io=io and io())
    assert_same(weights(resumed.module), weights(whole.module))
    for fit in (whole, resumed):
        for step in range(fit is resumed and 5, 9):
            rebuilt = parameters(whole.noted.weights[0])
            replay(read(fit.ledger), rebuilt, step)
            assert_same(rebuilt, whole.noted.weights[step])  # type: ignore[arg-type]
    free = make(tmp_path / "free", anchor=None)
    assert not torch.equal(free.module.net[0].weight, whole.module.net[0].weight)


def test_a_resumed_fit_needs_the_first_weights(tmp_path: Path) -> None:
    Fit(tmp_path, 4)
    (file,) = tmp_path.glob("first-weights-*.bin")
    data = bytearray(file.read_bytes())
    for change, message in (
        (lambda: file.write_bytes(data[:-1]), "bytes in place of"),
        (lambda: file.write_bytes(bytes([data[0] ^ 1]) + data[1:]), "has others"),
        (file.unlink, "is not there. Put their file back where it was, or into"),
    ):
        change()
        with pytest.raises(ValueError, match=message):
            Fit(tmp_path, 8, tmp_path / "step=4.ckpt", ledger=False)
    Fit(tmp_path, 8, tmp_path / "step=4.ckpt", ledger=False, anchor=None)


def test_a_fit_may_begin_to_draw_where_it_is_resumed(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """To the checkpoint's weights, which the log says; a later fit without it, and one with it again, likewise."""
    Fit(tmp_path, 4, anchor=None)
    with caplog.at_level("INFO"):
        late = Fit(tmp_path, 8, tmp_path / "step=4.ckpt")
    assert "draws to those of the checkpoint" in caplog.text
    rebuilt = parameters(weights(mlp_task()))
    assert replay(read(late.ledger), rebuilt).checked == 8
    assert_same(rebuilt, weights(late.module))  # type: ignore[arg-type]


def mlp_task() -> nn.Module:
    torch.manual_seed(3)
    return Task(mlp())


def test_a_ledger_says_that_it_lacks_the_first_weights(tmp_path: Path) -> None:
    Fit(tmp_path, 4, ledger=False)
    resumed = Fit(tmp_path, 8, tmp_path / "step=4.ckpt")
    with pytest.raises(LedgerError, match="drawn to those before step 0, and the ledger begins at step 4"):
        replay(read(resumed.ledger), parameters(resumed.noted.weights[4]))
    with pytest.raises(LedgerError, match="offloaded weights do not have"):
        replay(read(Fit(tmp_path / "b", 2).ledger), parameters(weights(mlp_task())), apply=lambda *_: None)


def test_files_go_with_a_session_that_nothing_names(tmp_path: Path) -> None:
    for kept in (False, True):
        session = run(mlp(), batches(2), folder=str(tmp_path))
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size == sum(p.numel() * 4 for p in mlp().parameters())
        if kept:
            session.state_dict()
        del session
        gc.collect()
        assert file.exists() is kept


def test_a_session_goes_on_from_its_state(tmp_path: Path) -> None:
    whole, half, items = mlp(), mlp(), batches(6)
    run(whole, items)
    state = run(half, items[:3], folder=str(tmp_path)).state_dict()
    session = Session(half, MAKES["sgd"](half.parameters()), ANCHORED)
    session.load_state_dict(state)
    for batch in items[3:]:
        session.estimate(lambda batch: mse(half, batch), batch)
        session.update()
    assert_same(weights(half), weights(whole))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`anchor=\.\.\.` with offloaded weights.*leave one of them out"):
        Fit(tmp_path, 1, offload="cpu")


def test_drawing_counts_as_a_change_of_the_step() -> None:
    net, items = mlp(), batches(2)
    session = run(net, items[:1], ANCHORED.override(anchor=100.0, normalize=True, lr=1e-3))
    for p in net.parameters():
        p.data += 1.0
    session.measure_update = True
    session.estimate(lambda batch: mse(net, batch), items[1])
    assert session.update().anchor == (100.0, 0)
    assert session.last_stats.rms == pytest.approx(0.1, rel=0.05)
