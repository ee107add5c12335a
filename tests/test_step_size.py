"""``lr="auto"``, the default recipe's: steps free of the scale of weights, loss and the module's learning rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Resumable, Task, assert_same, batches, fit, mlp, mse, quiet_trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from zolightning import ZOStrategy
from zolightning.engine.session import Session
from zolightning.engine.step_size import START, StepSize
from zolightning.ledger import read
from zolightning.ledger.format import Step
from zolightning.methods.config import ZOConfig
from zolightning.methods.recipes import DEFAULT
from zolightning.types import Key, StepRecord, Term

STEPS = 60


def learnable(count: int = STEPS) -> list[Any]:
    """Batches of one function."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(4, 3, generator=generator)
    inputs = [torch.randn(16, 4, generator=generator) for _ in range(count)]
    return [(x, torch.tanh(x @ matrix)) for x in inputs]


def lrs_of(path: Path) -> list[float]:
    return [record.lrs[0] for record in read(path) if isinstance(record, Step)]


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd 1e-1": lambda p: SGD(p, lr=1e-1),
    "sgd 1e-3": lambda p: SGD(p, lr=1e-3),
    "adamw 1e-3": lambda p: AdamW(p, lr=1e-3, weight_decay=0.0),
    "adamw 2e-5": lambda p: AdamW(p, lr=2e-5, weight_decay=0.0),
}
SCHEDULES: dict[str, Callable[[Optimizer], Any] | None] = {
    "none": None,
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, STEPS),
    "warm-up": lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, step / 10)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:.*steps through the module's AdamW")
def test_an_unchanged_module_ends_below_the_loss_it_began_with(name: str, schedule: str) -> None:
    torch.manual_seed(0)
    task, items = Task(mlp(hidden=16), optimizer=OPTIMIZERS[name], scheduler=SCHEDULES[schedule]), learnable()
    with torch.no_grad():
        before = sum(float(mse(task.net, batch)) for batch in items)
        fit(task, items, ZOStrategy(seed=0))
        assert sum(float(mse(task.net, batch)) for batch in items) < 0.9 * before


def test_the_modules_rate_does_not_matter(tmp_path: Path) -> None:
    """Nor does the scale of the loss, to the last few digits: its units fall out of slope over curvature."""
    ends = []
    for i, (lr, scale) in enumerate([(1e-1, 1.0), (1e-1 * 2**-10, 1.0), (1e-1, 1024.0)]):
        torch.manual_seed(0)
        task = Task(mlp(), lambda net, batch, scale=scale: scale * mse(net, batch), lambda p, lr=lr: SGD(p, lr=lr))
        fit(task, learnable(30), ZOStrategy(seed=0, ledger=tmp_path / f"{i}.zo"))
        ends.append((weights(task), lrs_of(tmp_path / f"{i}.zo")))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-12)
    for end, _ in ends[1:]:
        assert_same(ends[0][0], end, tolerance=1e-4)


def test_the_schedule_keeps_its_shape(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = Task(mlp(), optimizer=lambda p: SGD(p, lr=5.0), scheduler=lambda o: LambdaLR(o, lambda step: 0.5**step))
    rms = float(torch.cat([w.flatten() for w in weights(task).values()]).double().square().mean().sqrt())
    fit(task, learnable(4), ZOStrategy(seed=0, ledger=tmp_path / "l.zo"))  # before the first change of the size
    assert lrs_of(tmp_path / "l.zo") == pytest.approx([START * rms * 0.5**step for step in range(4)])
    assert task.trainer.optimizers[0].param_groups[0]["lr"] == 5.0 * 0.5**4


def test_a_look_is_the_textbook_parabola() -> None:
    """On a quadratic slope and curvature are exact, and the size ends at half of Newton's step along u."""
    direction = [Term(Key(0, 0, 0), 1.0)]
    size = StepSize(rms=1.0, size=0.02)
    for step in range(60):
        size.took(StepRecord(step, tuple(direction), (1.0,), 0.0, (size.size,), 2, 0, 0))
        start, rate = 0.0, size.size  # the step began at 0, where L' = -4 and L'' = 20 against the step

        def loss(terms: Any, start: float = start, rate: float = rate) -> float:
            x = start - rate + sum(term.coefficient for term in terms)
            return 10 * x**2 + 4 * x + 7

        size.choose(size.look(loss))
    assert size.size == pytest.approx(0.5 * 4 / 20)


def test_a_coarse_loss_says_nothing_and_a_broken_one_shortens() -> None:
    size = StepSize(rms=1.0, size=0.03)
    size.took(StepRecord(0, (Term(Key(0, 0, 0), 1.0),), (1.0,), 0.0, (0.03,), 2, 0, 0))
    size.choose(size.look(lambda _: 1.0))
    assert size == StepSize(rms=1.0, size=0.03, steps=1, applied=0.03, terms=size.terms)
    size.choose(size.look(lambda terms: 1.0 if terms else float("nan")))
    assert size.size == pytest.approx(0.02)


def test_resumed_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    def run(*callbacks: Any, **settings: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        task = Task(mlp(), optimizer=lambda p: SGD(p, lr=1e-2), scheduler=lambda o: CosineAnnealingLR(o, 40))
        quiet_trainer(ZOStrategy(seed=0), callbacks=[*callbacks], enable_checkpointing=bool(callbacks)).fit(
            task, Resumable(learnable(28)), **settings
        )
        return weights(task)

    whole = run(ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=14, save_top_k=-1))
    assert_same(whole, run(ckpt_path=tmp_path / "step=14.ckpt"))


@pytest.mark.parametrize("lr", ["module", None])
def test_the_modules_own_rate(lr: Any, tmp_path: Path) -> None:
    assert DEFAULT.override(lr="module").lr is None
    fit(Task(mlp(), optimizer=lambda p: SGD(p, lr=1e-3)), batches(3), ZOStrategy(lr=lr, ledger=tmp_path / "l.zo"))
    assert lrs_of(tmp_path / "l.zo") == [1e-3] * 3


@pytest.mark.parametrize("lr", [0, 0.0, "auto", "module"])
def test_no_rate_at_all_leaves_every_bit(lr: Any) -> None:
    task = Task(mlp(), optimizer=lambda p: SGD(p, lr=0.0))
    before = weights(task)
    fit(task, batches(25), ZOStrategy(lr=lr))
    assert_same(before, weights(task))


def test_weights_that_are_zero_take_the_modules_rate(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    fit(Task(net, optimizer=lambda p: SGD(p, lr=1e-3)), batches(3), ZOStrategy(ledger=tmp_path / "l.zo"))
    assert lrs_of(tmp_path / "l.zo") == [1e-3] * 3


def test_looks_are_counted_and_no_more_than_said() -> None:
    model = mlp()
    session = Session(model, SGD(model.parameters(), lr=1e-3), ZOConfig(estimator="spsa", structure="dense", lr="auto", seed=0))
    forwards = []
    for batch in learnable(45):
        session.estimate(lambda batch: mse(model, batch), batch)
        forwards.append(session.update().forwards)
    assert [step for step, count in enumerate(forwards) if count == 5] == [*range(1, 21), 30, 40]
    assert set(forwards) == {2, 5}


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="`lr='fast'` is unknown; allowed: 'auto', 'module' and numbers >= 0"):
        ZOStrategy(lr="fast")  # type: ignore[arg-type]
