"""The optimizers that take the place of the module's, in its groups and schedules; their state in checkpoints and ledgers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from helpers import PLAIN, Task, assert_same, batches, fit, loader, mlp, mse, quiet_trainer, weights
from ledgers import Noted, parameters
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from zolightning import LedgerCheckpointIO, ZOStrategy
from zolightning.ledger import read, replay
from zolightning.methods.optimizers import OPTIMIZERS, SignSGD, follow, in_place_of, is_plain_sgd, optimizer_type
from zolightning.methods.recipes import recipe
from zolightning.noise import DISTRIBUTIONS
from zolightning.types import Key

TWINS: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "sign": SignSGD,
    "adam": Adam,
}
FACTORY = partial(RMSprop, alpha=0.5, momentum=0.1)


def grouped(kind: Callable[..., Optimizer] = AdamW) -> Callable[[list[Any]], Optimizer]:
    return lambda p: kind([{"params": p[:2], "lr": 3e-2}, {"params": p[2:], "weight_decay": 0.2}], lr=1e-2, weight_decay=0.1)


# ---- sign


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sign(decay: float, maximize: bool) -> None:
    """W ← W − lr·(sign(g) + wd·W), and a gradient of 0 moves nothing."""
    weight = nn.Parameter(torch.randn(20))
    weight.grad = torch.randn(20)
    weight.grad[:3] = 0.0
    direction = -1 if maximize else 1
    expected = weight.detach() - 0.1 * (direction * weight.grad.sign() + decay * weight.detach())
    SignSGD([weight, nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=decay, maximize=maximize).step()
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("noise", "queries"), [("rademacher", 1), ("gaussian", 1), ("rademacher", 3), ("gaussian", 3)])
def test_sign_is_that_of_every_element(noise: str, queries: int) -> None:
    """Not sign(g)·z, as public code has it, which is another thing but for one direction of ±1."""
    net = mlp()
    start = weights(net)
    strategy = ZOStrategy(recipe("zo-sign").override(lr=0.5, noise=noise, num_queries=queries, seed=7))
    fit(Task(net), batches(1), strategy)
    dist = DISTRIBUTIONS[noise]()
    zs = [reference.directions(net, Key(7, 0, k), dist) for k in range(queries)]
    cs = [term.coefficient for term in strategy.last_record.terms]  # type: ignore[union-attr]
    wrong = 0
    for i, (name, before) in enumerate(start.items()):
        estimate = sum(c * z[i] for c, z in zip(cs, zs, strict=True))  # type: ignore[operator, misc]
        public = sum((1.0 if c > 0 else -1.0) * z[i] for c, z in zip(cs, zs, strict=True)) / queries  # type: ignore[operator, misc]
        now = weights(net)[name]
        torch.testing.assert_close(now, before - 0.5 * torch.sign(estimate), rtol=0, atol=1e-6)  # type: ignore[arg-type]
        wrong += int((~torch.isclose(now, before - 0.5 * public)).sum())
    assert (wrong == 0) == (noise == "rademacher" and queries == 1)


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"weight_decay": -1.0}])
def test_sign_refuses(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"SignSGD\({next(iter(settings))}=...\)` must be >= 0, got -1"):
        SignSGD([nn.Parameter(torch.ones(1))], **settings)


# ---- in place of the module's


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("noise", DISTRIBUTIONS)
@pytest.mark.parametrize("name", TWINS)
def test_training(name: str, noise: str, queries: int) -> None:
    """The torch optimizer on the dense estimate, with the module's two groups and its schedule, over accumulated batches."""
    net, items = mlp(), batches(12)
    twin = copy.deepcopy(net)
    config = PLAIN.override(optimizer=name, noise=noise, num_queries=queries)
    module = Task(net, optimizer=grouped(), scheduler=lambda o: StepLR(o, 2, 0.5))
    fit(module, items, config, accumulate_grad_batches=2)
    stepper = grouped(TWINS[name])(list(twin.parameters()))
    reference.train(
        twin, items, mse, stepper, config.build_distribution(),
        seed=7, eps=1e-3, queries=queries, accumulate=2, scheduler=StepLR(stepper, 2, 0.5),
    )  # fmt: skip
    assert_same(weights(net), weights(twin), None if name != "sgd" else 1e-7)
    assert not module.trainer.optimizers[0].state  # type: ignore[union-attr]


def test_a_function() -> None:
    module, twin = Task(mlp(), optimizer=grouped()), Task(mlp(), optimizer=grouped(FACTORY))
    fit(module, batches(4), PLAIN.override(optimizer=FACTORY))
    fit(twin, batches(4), PLAIN)
    assert_same(weights(module), weights(twin))


def test_schedules_of_momentum_are_the_module_s_alone() -> None:
    """A one-cycle schedule writes momentum into the module's optimizer; plain SGD stays plain."""
    one_cycle = lambda o: OneCycleLR(o, max_lr=1e-2, total_steps=8)  # noqa: E731
    kind = lambda p: SGD(p, lr=1e-2, momentum=0.9)  # noqa: E731
    for name, size in (("sgd", 0), ("momentum", 4)):
        strategy = ZOStrategy(PLAIN, optimizer=name)
        trainer = fit(Task(mlp(), optimizer=kind, scheduler=one_cycle), batches(6), strategy)
        stepper = strategy.session.stepper(trainer.optimizers[0])
        assert is_plain_sgd(stepper) == (name == "sgd")
        assert len(stepper.state) == size
        assert strategy.last_record.lrs != (1e-2,)  # type: ignore[union-attr]


def test_follow_takes_over_new_groups() -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    leader = SGD([a], lr=torch.tensor(0.5), weight_decay=0.1, momentum=0.9)
    optimizer = in_place_of(leader, Adam)
    leader.add_param_group({"params": [b], "lr": 0.25, "maximize": True})
    leader.param_groups[0]["weight_decay"] = 0.2
    follow(optimizer, leader)
    shared = [{k: g[k] for k in ("params", "lr", "weight_decay", "maximize")} for g in optimizer.param_groups]
    assert shared == [
        {"params": [a], "lr": 0.5, "weight_decay": 0.2, "maximize": False},
        {"params": [b], "lr": 0.25, "weight_decay": 0.1, "maximize": True},
    ]
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)


def test_optimizer_type() -> None:
    assert optimizer_type("SignSGD") is SignSGD
    assert optimizer_type("Adam") is Adam
    assert optimizer_type("lr_scheduler") is None
    assert optimizer_type("Nobody") is None


def test_is_plain_sgd() -> None:
    net = mlp()
    assert is_plain_sgd(SGD(net.parameters(), lr=1.0, weight_decay=1.0))
    assert not is_plain_sgd(SGD(net.parameters(), lr=1.0, momentum=0.1))
    assert not is_plain_sgd(Adam(net.parameters()))


# ---- what is kept


class Thaw(BaseFinetuning):
    """Unfreezes the last layer after a while."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[2])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[2], optimizer, lr=5e-3)


def only_trainable(p: list[Any]) -> Optimizer:
    return AdamW([x for x in p if x.requires_grad], lr=1e-2)


@pytest.mark.parametrize("callbacks", [[], [Thaw]], ids=["", "unfreezing"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, FACTORY], ids=str)
def test_replay_is_training(optimizer: Any, precision: str, callbacks: list[Any], tmp_path: Path) -> None:
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    noted, module = Noted(), Task(mlp(), optimizer=only_trainable)
    strategy = ZOStrategy(PLAIN, optimizer=optimizer, ledger=tmp_path / "ledger.zo")
    trainer = quiet_trainer(strategy, callbacks=[noted, *(c() for c in callbacks)], precision=precision, max_epochs=2)
    trainer.fit(module, loader([(x.to(dtype), y.to(dtype)) for x, y in batches(3)]))
    ledger = read(tmp_path / "ledger.zo")
    assert sorted(noted.weights) == list(range(7))
    for step, expected in noted.weights.items():
        replay(ledger, rebuilt := parameters(noted.weights[0]), step)
        assert_same(rebuilt, expected)  # type: ignore[arg-type]
    moved = noted.weights[6]["net.2.weight"], noted.weights[3]["net.2.weight"], noted.weights[0]["net.2.weight"]
    assert not torch.equal(moved[0], moved[1])
    assert torch.equal(moved[1], moved[2]) == bool(callbacks)


@pytest.mark.parametrize("io", [None, LedgerCheckpointIO], ids=["whole", "position"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, FACTORY], ids=str)
def test_resumed_is_uninterrupted(optimizer: Any, precision: str, io: Any, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    items = [(x.to(dtype), y.to(dtype)) for x, y in batches(3)]

    def run(epochs: int, checkpoint: Path | None = None) -> Any:
        module = Task(mlp(), optimizer=grouped())
        strategy = ZOStrategy(PLAIN, optimizer=optimizer, ledger=tmp_path / f"{epochs}{checkpoint is None}" / "ledger.zo")
        plugins = [] if io is None else [io()]
        trainer = quiet_trainer(strategy, precision=precision, max_epochs=epochs, plugins=plugins)
        trainer.fit(module, loader(items), ckpt_path=checkpoint)
        return trainer, module

    trainer, _ = run(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    _, resumed = run(2, tmp_path / "one.ckpt")
    _, whole = run(2)
    assert_same(weights(resumed), weights(whole))


def test_state_of_another_optimizer_is_left_behind(tmp_path: Path) -> None:
    trainer = fit(Task(mlp()), batches(2), ZOStrategy(PLAIN, optimizer="momentum"))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = quiet_trainer(ZOStrategy(PLAIN, optimizer="adam"), max_epochs=2)
    with pytest.warns(UserWarning, match="optimizer='adam' starts without the state of 'momentum' in the checkpoint"):
        again.fit(Task(mlp()), loader(batches(2)), ckpt_path=tmp_path / "x.ckpt")
    assert again.strategy.zo_step == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "numbers"), [("zo-sign", 0), ("zo-momentum", 1), ("zo-adam", 2)])
def test_memory_of_a_recipe(name: str, numbers: int) -> None:
    """float32 numbers for each trained weight, beside a step count."""
    strategy = ZOStrategy(name)
    trainer = fit(Task(mlp()), batches(2), strategy)
    state = strategy.session.stepper(trainer.optimizers[0]).state
    sizes = {n: v.numel() for p, s in state.items() for n, v in s.items() if v.shape == p.shape}
    assert len(sizes) == numbers
    assert all(v.dtype == torch.float32 for s in state.values() for v in s.values())
