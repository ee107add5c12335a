"""``lr="auto"``, the default recipe's: steps free of the scale of weights, loss and the module's learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Resumable, Task, assert_same, batches, fit, mlp, mse, quiet_trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from zolightning import ZOStrategy
from zolightning.engine.session import Session
from zolightning.engine.step_size import START, StepSize, StepSizes
from zolightning.ledger import read
from zolightning.ledger.format import Step
from zolightning.methods.config import ZOConfig
from zolightning.methods.recipes import DEFAULT
from zolightning.space import Cycle
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


def way(size: StepSize, loss: Callable[[float], float], x: float, share: float = 1.0) -> float:
    """Steps along one direction until the next look, and that look; the place they came to."""
    while not size.due:
        size.took(StepRecord(0, (Term(Key(0, 0, 0), 1.0),), (1.0,), 0.0, (share * size.size,), 2, 0, 0))
        x -= share * size.size
    size.choose(size.look(lambda terms: loss(x + sum(term.coefficient for term in terms))))
    return x


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_first_look_is_a_search_and_later_ones_are_the_textbook_parabola(share: float) -> None:
    """Of full steps, also where a schedule has taken shorter ones."""

    def loss(x: float) -> float:
        return 10 * (x - 1) ** 2 + 7

    size = StepSize(rms=1.0, size=0.1)
    x = way(size, lambda x: loss(-x), 0.0, share)  # downhill: full steps come from 0 to -0.5
    assert size.found
    assert size.size == 0.1 * 2  # 5 steps of 0.2 come to 1, of 0.4 to 2
    for _ in range(3):
        before, begun = size.size, x
        x = way(size, lambda x: loss(-x), x, share)
        full = 10 * before  # where ten full steps would have been best
        wanted = (x + share * full - -1) / full
        assert x - begun == pytest.approx(-10 * share * before)
        assert size.size == pytest.approx(before * min(max(wanted, 0.8), 1.25))


def test_a_search_that_comes_to_nothing_is_repeated_twice() -> None:
    size, seen = StepSize(rms=1.0, size=0.08), []
    for _ in range(5):
        way(size, lambda x: -x, 0.0)  # every step leads uphill
        seen.append((size.size, size.searches))
    assert [searches for _, searches in seen] == [1, 2, 3, 3, 3]
    assert [s for s, _ in seen] == pytest.approx([0.04, 0.02, 0.01, 0.008, 0.0064])
    for _ in range(30):
        way(size, lambda x: -x, 0.0)
    assert size.size == 1e-3  # of the RMS: the least


def test_a_coarse_loss_says_nothing_and_a_broken_one_shortens() -> None:
    size = StepSize(rms=1.0, size=0.03)
    way(size, lambda x: 1.0, 0.0)
    assert (size.size, size.searches, size.found) == (0.03, 1, False)
    way(size, lambda x: 1.0 if x == 0 else float("nan") if x < -1 else x, 0.0)  # the longest way before it breaks
    assert size.size == pytest.approx(0.03 * 4)
    way(size, lambda x: float("nan"), 0.0)
    assert size.size == pytest.approx(0.03 * 4 / 1.25)


@pytest.mark.parametrize(
    ("optimizer", "settings", "most"),
    [
        (SGD, {}, 1.0),
        (partial(SGD, momentum=0.9), {}, 0.03),
        (AdamW, {}, 0.03),
        (AdamW, {"optimizer": "sgd"}, 1.0),
    ],
)
def test_ways_that_an_optimizer_with_state_takes_are_kept_short(optimizer: Any, settings: Any, most: float) -> None:
    """The way that is looked at is not theirs: under AdamW with a warm-up a transformer ended at 1.3 times its first loss."""
    net = mlp()
    steps = optimizer(net.parameters(), lr=1e-3)
    session = Session(net, steps, ZOConfig(lr="auto", seed=0, select="all", **settings))
    for batch in learnable(200):
        session.estimate(lambda b: mse(net, b), batch)
        session.update()
    (size,) = session.state_dict()["step_sizes"].values()
    assert size["most"] == most
    assert size["size"] <= most * size["rms"] * (1 + 1e-12)


def test_blocks_that_take_turns_are_looked_at_one_step_at_a_time() -> None:
    """A probe is at the leaves of one step."""
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]), "head": nn.Linear(4, 3)}
    )

    def loss(batch: Any) -> Tensor:
        x = batch[0]
        for block in model["blocks"]:  # type: ignore[attr-defined]
            x = block(x)
        return mse(model["head"], (x, batch[1]))

    config = ZOConfig(estimator="spsa", structure="dense", select="all", lr="auto", seed=0, cycle=Cycle())
    session = Session(model, SGD(model.parameters(), lr=1e-3), config)
    for batch in learnable(12):
        session.estimate(loss, batch)
        session.update()
    (size,) = session.state_dict()["step_sizes"].values()
    assert {key[1] for key, _ in size["terms"]} == {11}
    assert size["way"] == size["size"]


def test_a_checkpoint_of_the_version_before_goes_on_at_its_size() -> None:
    """It followed single steps and kept their slope and curvature."""
    sizes = StepSizes(True, inform=print, decide=lambda make: make())
    before = {"rms": 0.1, "size": 3e-3, "slope": 1.0, "curvature": 2.0, "looks": 7, "steps": 40, "applied": 1e-3, "terms": []}
    sizes.load_state_dict({0: before})
    assert sizes.state_dict() == {0: asdict(StepSize(0.1, 3e-3, found=True))}


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
    looks = {step: count - 2 for step, count in enumerate(forwards) if count > 2}
    assert looks == {5: 4, 15: 3, 25: 3, 35: 3}


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="`lr='fast'` is unknown; allowed: 'auto', 'module' and numbers >= 0"):
        ZOStrategy(lr="fast")  # type: ignore[arg-type]
