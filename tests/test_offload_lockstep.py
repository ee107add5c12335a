"""Forwards that go through offloaded weights together read them once, and give the losses of forwards one after another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers import PLAIN, Task
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from zolightning import Session, ZOConfig, ZOStrategy
from zolightning.engine.deferred import Deferred
from zolightning.engine.updates import apply_update
from zolightning.offload import Offload, OffloadError, attach
from zolightning.types import SkipStep

WIDTH, LAYERS, STEPS = 260, 6, 4
MATRIX = WIDTH * WIDTH * 4


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + self.dropout(torch.tanh(layer(self.norm(x))))
        return self.head(x)


class Experts(nn.Module):
    """Each example goes to the experts that its perturbed router chooses: the sides part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.router = nn.Linear(WIDTH, 8)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        places = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for place in places.unique().tolist():
            out[places == place] = self.experts[place](x[places == place])
        return self.head(out).view(*ids.shape, -1)


class Outcome(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]
    read: list[float]
    """Bytes read in each step, as a part of the offloaded weights."""


def ids(step: int, examples: int = 4) -> Tensor:
    return torch.randint(0, WIDTH, (examples, 6), generator=torch.Generator().manual_seed(step))


def token_loss(module: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(module(batch).float().flatten(0, 1), batch.roll(1, 1).flatten())


def example_loss(module: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(module(batch).float().transpose(1, 2), batch.roll(1, 1), reduction="none").mean(1)


def trained(
    module: nn.Module,
    options: Offload | None,
    config: ZOConfig = PLAIN,
    *,
    make: Callable[[Any], Any] = lambda p: SGD(p, lr=1e-3),
    loss: Callable[[nn.Module, Tensor], Any] = token_loss,
    examples: int = 4,
    repeatable: bool = False,
    steps: int = STEPS,
) -> Outcome:
    torch.manual_seed(0)
    store = None if options is None else attach(module, options, torch.device("cpu"), Path("work"))
    session = Session(
        module,
        make(module.parameters()),
        config,
        repeatable=repeatable,
        apply=apply_update if store is None else Deferred(store),
    )
    losses, read = [], [0]
    if store is not None:
        store.start()
    try:
        for step in range(steps):
            estimate = session.estimate(lambda batch: loss(module, batch), ids(step, examples))
            losses += [] if estimate is None else estimate.losses
            session.update()
            read.append(0 if store is None else store.tier.read_bytes)
        if store is not None:
            store.flush()
        weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    finally:
        session.close()
        if store is not None:
            store.stop()
    away = sum(entry.nbytes for entry in store.entries) if store is not None else 1
    return Outcome(losses, weights, [(b - a) / away for a, b in pairwise(read)])


def same(one: Outcome, other: Outcome) -> bool:
    return one.losses == other.losses and all(torch.equal(w, other.weights[name]) for name, w in one.weights.items())


def passes(outcome: Outcome) -> float:
    """Reads of all weights in a step; now and then one is read ahead for the next step."""
    return median(outcome.read[1:])


DISK = Offload("disk", pool=2 * MATRIX, prefetch=1)


@pytest.mark.parametrize(
    "build",
    [Net, lambda: Net(dropout=0.2), lambda: Net(tied=True), lambda: Net().bfloat16(), Experts],
    ids=["plain", "dropout", "tied", "bf16", "experts"],
)
def test_two_forwards_read_once_and_give_the_bits_of_memory(build: Callable[[], nn.Module]) -> None:
    options = DISK if build is not Experts else Offload("disk", prefetch=0)
    outcome = trained(build(), options)
    assert same(outcome, trained(build(), None))
    assert 0.8 <= passes(outcome) <= 1.2 or build is Experts


def test_without_lockstep_they_read_twice() -> None:
    outcome = trained(Net(), Offload("disk", pool=2 * MATRIX, prefetch=1, lockstep=1))
    assert passes(outcome) == pytest.approx(2, abs=0.2)
    assert same(outcome, trained(Net(), None))


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=1e-3), lambda p: SGD(p, lr=1e-3, momentum=0.9)])
def test_optimizers_with_state(make: Callable[[Any], Any]) -> None:
    assert same(trained(Net(), Offload("cpu"), make=make), trained(Net(), None, make=make))


def test_many_forwards_of_one_step() -> None:
    config = PLAIN.override(estimator="one_sided", num_queries=3)
    outcome = trained(Net(), Offload("disk", pool=2 * MATRIX, prefetch=1, lockstep=4), config)
    assert same(outcome, trained(Net(), None, config))
    assert passes(outcome) <= 1.2


@pytest.mark.parametrize("repeatable", [True, False], ids=["one batch", "lockstep"])
def test_directions_for_each_example_read_once(repeatable: bool) -> None:
    config = PLAIN.override(estimator="per_example", structure="auto")

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        x = F.one_hot(batch, WIDTH).float().mean(1)
        return (module(x) - x).square().mean(1)

    kept: dict[str, Any] = {"loss": loss, "repeatable": repeatable}
    outcome = trained(build(), DISK, config, **kept)
    assert same(outcome, trained(build(), None, config, **kept))
    assert 0.8 <= passes(outcome) <= 1.2


def test_both_probes_in_one_batch_read_once() -> None:
    kept: dict[str, Any] = {"loss": example_loss, "repeatable": True}
    outcome = trained(Net(), DISK, **kept)
    assert same(outcome, trained(Net(), None, **kept))
    assert 0.8 <= passes(outcome) <= 1.2


def test_a_step_that_keeps_state_runs_one_forward_after_another() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)), nn.BatchNorm1d(WIDTH))

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        return module(F.one_hot(batch, WIDTH).float().mean(1)).square().mean()

    module, resident = build(), build()
    outcome = trained(module, DISK, loss=loss)
    assert same(outcome, trained(resident, None, loss=loss))
    assert passes(outcome) > 1.6
    assert torch.equal(module[-1].running_mean, resident[-1].running_mean)


class Late(nn.Sequential):
    """Begins to keep state at its fourth step."""

    keeps = False

    def forward(self, x: Tensor) -> Tensor:
        if self.keeps:
            self.total += 1
        return super().forward(x) + 0.0 * self.total


def test_state_that_begins_late_counts_once() -> None:
    totals = []
    for options in (None, DISK):
        torch.manual_seed(0)
        module = Late(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
        module.register_buffer("total", torch.zeros(()))

        def loss(module: nn.Module, batch: Tensor) -> Tensor:
            module.keeps = bool((batch == ids(2)).all())  # a step in which state is looked for
            return module(F.one_hot(batch, WIDTH).float().mean(1)).square().mean()

        totals.append((trained(module, options, loss=loss), module.total.item()))
    assert same(totals[0][0], totals[1][0])
    assert totals[0][1] == totals[1][1] == 1


def test_an_error_or_a_skip_in_one_side_ends_both() -> None:
    def calls(broken: int, problem: Exception) -> tuple[int, list[float]]:
        """How often the step was called, and the losses; call number ``broken`` ends with the problem."""
        count = 0

        def loss(module: nn.Module, batch: Tensor) -> Any:
            nonlocal count
            count = mine = count + 1
            out = token_loss(module, batch)
            if mine == broken:
                raise problem
            return out

        losses = trained(Net(), DISK, loss=loss).losses
        return count, losses

    last, _ = calls(0, RuntimeError())
    for side in (last, last - 1):
        with pytest.raises(RuntimeError, match="on purpose"):
            calls(side, RuntimeError("broken on purpose"))
    assert len(calls(last, SkipStep())[1]) == 2 * (STEPS - 1)


@pytest.mark.integration
def test_a_lock_that_one_side_holds_ends_no_run_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zolightning.probing.lockstep._PATIENCE", 3.0)
    monkeypatch.setattr("zolightning.probing.lockstep._SLOWER", 0)
    lock, locked = threading.Lock(), True

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        if not locked:
            return token_loss(module, batch)
        with lock:
            return token_loss(module, batch)

    outcome = trained(Net(), DISK, loss=loss)  # the first batch shows it: the forwards run one after another
    assert same(outcome, trained(Net(), None, loss=loss))
    assert passes(outcome) > 1.5
    locked = False
    count = 0

    def later(module: nn.Module, batch: Tensor) -> Tensor:
        nonlocal locked, count
        count += 1
        locked = count > 8
        return loss(module, batch)

    with pytest.raises(OffloadError, match=r"did not come to its next weight.*lockstep=1"):
        trained(Net(), DISK, loss=later, steps=8)
    assert not lock.locked()


class Logged(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self.net, batch)
        self.log("seen", 1.0, reduce_fx="sum", on_epoch=True, on_step=False)
        return loss


def test_a_lightning_step_logs_once() -> None:
    def build() -> Task:
        torch.manual_seed(0)
        return Logged(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)))

    pairs = [(torch.randn(WIDTH), torch.randn(WIDTH)) for _ in range(12)]
    for offload in (None, "disk"):
        fit = pl.Trainer(
            strategy=ZOStrategy(PLAIN, offload=offload),  # type: ignore[arg-type]
            max_epochs=1,
            logger=False,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        fit.fit(build(), DataLoader(pairs, batch_size=2))  # type: ignore[arg-type]
        assert fit.callback_metrics["seen"].item() == 6


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="lockstep"):
        Offload(lockstep=0)
