"""The engine without a Trainer: a bare loop gives the bits of the strategy, goes on from its state, and keeps a ledger."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PLAIN, PerExampleTask, assert_same, batches, fit, mlp, mse, per_example_mse, weights
from lightning.fabric import Fabric
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from zolightning import ZOConfig, ZOStrategy
from zolightning.engine.session import Session
from zolightning.ledger import PendingLedger, claim, read, replay
from zolightning.methods.recipes import RECIPES, recipe

DEFAULT = recipe("default").override(select="all", lr=1e-3, seed=7)


def run(net: nn.Module, items: list[Any], config: ZOConfig, make: Any = SGD, **settings: Any) -> Session:
    """A plain loop over the items."""
    session = Session(net, make(net.parameters(), lr=1e-2), config, **settings)
    for batch in items:
        session.estimate(lambda batch: per_example_mse(net, batch), batch)
        session.update()
    return session


@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("config", [PLAIN, DEFAULT, recipe("fzoo").override(lr=1e-3, seed=7)], ids=["spsa", "default", "fzoo"])
def test_a_bare_loop_gives_the_bits_of_the_strategy(config: ZOConfig, make: Any) -> None:
    module = PerExampleTask(mlp(), per_example_mse, lambda p: make(p, lr=1e-2))
    fit(module, batches(6), config)
    net = mlp()
    session = run(net, batches(6), config, make)
    assert_same(weights(net), weights(module.net))
    assert session.step == 6


@pytest.mark.parametrize("config", [PLAIN, DEFAULT], ids=["spsa", "default"])
def test_accumulation_is_several_estimates_and_one_update(config: ZOConfig) -> None:
    module = PerExampleTask(mlp(), per_example_mse)
    fit(module, batches(6), config, accumulate_grad_batches=2)
    net, items = mlp(), batches(6)
    session = Session(net, SGD(net.parameters(), lr=1e-2), config)
    for first, second in zip(items[::2], items[1::2], strict=True):
        for batch in (first, second):
            session.estimate(lambda batch: per_example_mse(net, batch), batch)
        session.update()
    assert_same(weights(net), weights(module.net))


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_a_session_goes_on_from_its_state(make: Any) -> None:
    items = batches(6)
    whole = mlp()
    run(whole, items, DEFAULT, make)
    half = mlp()
    session = run(half, items[:3], DEFAULT, make)
    saved = copy.deepcopy((half.state_dict(), session.optimizer_state(session.optimizers[0]), session.state_dict()))
    torch.rand(3)  # other code draws numbers meanwhile
    net = mlp()
    net.load_state_dict(saved[0])
    optimizer = make(net.parameters(), lr=1e-2)
    again = Session(net, optimizer, DEFAULT)
    again.load_optimizer_state(optimizer, saved[1])
    again.load_state_dict(saved[2])
    for batch in items[3:]:
        again.estimate(lambda batch: per_example_mse(net, batch), batch)
        again.update()
    assert_same(weights(net), weights(whole))


def test_the_ledger_of_a_bare_loop_replays(tmp_path: Path) -> None:
    net = mlp()
    base = {name: nn.Parameter(p.detach().clone()) for name, p in net.named_parameters()}
    session = run(net, batches(5), DEFAULT, ledger=PendingLedger(claim(tmp_path / "run.zo"), {"recipe": "default"}))
    session.close()
    assert replay(read(tmp_path / "run.zo"), base).step == 5
    assert_same({name: p.detach() for name, p in base.items()}, weights(net))


def test_schedules_and_learning_rates_are_read_at_each_step() -> None:
    net, items = mlp(), batches(4)
    optimizer = SGD(net.parameters(), lr=1.0)
    schedule = CosineAnnealingLR(optimizer, 4)
    session = Session(net, optimizer, PLAIN.override(lr=1e-2), schedulers=[schedule])
    rates = []
    for batch in items:
        session.estimate(lambda batch: mse(net, batch), batch)
        rates.append(session.update().lrs[0])
        schedule.step()
    twin = SGD(net.parameters(), lr=1e-2)
    expected = CosineAnnealingLR(twin, 4)
    for rate in rates:
        assert rate == pytest.approx(twin.param_groups[0]["lr"])
        twin.step()
        expected.step()


def test_a_step_that_returns_none_is_skipped() -> None:
    net = mlp()
    session, before = Session(net, SGD(net.parameters(), lr=1e-2), PLAIN), weights(net)
    assert session.estimate(lambda batch: None, batches(1)[0]) is None
    assert session.update().skipped == "training_step returned None"
    assert_same(weights(net), before)


def test_the_output_of_the_first_point_is_given_back() -> None:
    net = mlp()
    session = Session(net, SGD(net.parameters(), lr=1e-2), PLAIN)
    estimate = session.estimate(lambda batch: {"loss": mse(net, batch), "n": 3}, batches(1)[0])
    assert estimate is not None
    assert estimate.output["n"] == 3
    assert estimate.loss == pytest.approx(float(mse(net, batches(1)[0])), rel=1e-2)


def test_fabric_is_told_what_to_do() -> None:
    with pytest.raises(Exception, match=re.escape("session.estimate(loss_fn, batch); session.update()")):
        Fabric(accelerator="cpu", strategy=ZOStrategy())


def test_the_session_of_a_strategy_without_a_fit() -> None:
    with pytest.raises(RuntimeError, match="call trainer"):
        ZOStrategy().session  # noqa: B018


@pytest.mark.integration
def test_the_engine_runs_without_lightning() -> None:
    """In a process where importing Lightning is an error."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"lightning", "pytorch_lightning", "lightning_fabric"}:
            raise AssertionError(name)
sys.meta_path.insert(0, Refuse())
import types
package = types.ModuleType("zolightning"); package.__path__ = [sys.argv[1]]; sys.modules["zolightning"] = package
import torch
from zolightning.engine.session import Session
net = torch.nn.Linear(3, 2)
session = Session(net, torch.optim.SGD(net.parameters(), lr=1e-2))
x = torch.randn(4, 3)
for _ in range(3):
    session.estimate(lambda x: net(x).square().sum(-1), x)
    assert not session.update().skipped
"""
    import zolightning

    subprocess.run([sys.executable, "-c", code, str(Path(zolightning.__file__).parent)], check=True)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_asks_and_is_told(name: str) -> None:
    """One answer for each point, and a coefficient for each direction, whatever runs the points."""
    from zolightning.types import Answer, Key, PerExample, Tangent

    estimator = recipe(name).build_estimator(torch.float32)
    for examples in (None, 3):
        points = estimator.ask(Key(1, 2, 5), examples)
        answers = [
            Answer(1.0 + i, torch.full((3,), 1.0 + i, dtype=torch.float64) if isinstance(p, PerExample) else None, 0.5)
            if isinstance(p, PerExample | Tangent)
            else Answer(1.0 + i)
            for i, p in enumerate(points)
        ]
        estimate = estimator.tell(Key(1, 2, 5), answers)
        each = examples if estimator.per_example and examples else 1
        assert len(estimate.terms) == estimator.num_queries * each
        assert len({term.key for term in estimate.terms}) == len(estimate.terms)
        assert estimate.forwards == len(points)
