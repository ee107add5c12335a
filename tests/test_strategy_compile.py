"""Compiled code cannot be seen into: its weights are swapped, and training goes on as without compiling."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import PLAIN, Task, assert_same, batches, fit, mlp, mse, weights
from torch import nn

from zolightning import ZOStrategy
from zolightning.noise import Rademacher
from zolightning.space import build_view
from zolightning.types import Key


def compare(module: pl.LightningModule, plain: Task, tolerance: float = 1e-6, **settings: Any) -> None:
    fit(module, batches(5), ZOStrategy(PLAIN), **settings)
    fit(plain, batches(5), ZOStrategy(PLAIN), **settings)
    ours = {name.replace("_orig_mod.", ""): value for name, value in weights(module).items()}
    assert_same(ours, weights(plain), tolerance)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["function", "method"])
@pytest.mark.parametrize("part", ["layer", "net"])
def test_submodule(part: str, how: str, backend: str) -> None:
    module = Task(mlp())
    target = module.net[0] if part == "layer" else module.net
    if how == "method":
        target.compile(backend=backend)
    elif part == "layer":
        module.net[0] = torch.compile(target, backend=backend)  # type: ignore[assignment]
    else:
        module.net = torch.compile(target, backend=backend)  # type: ignore[assignment]
    compare(module, Task(mlp()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_whole_module(backend: str) -> None:
    compare(torch.compile(Task(mlp()), backend=backend), Task(mlp()))  # type: ignore[arg-type]


def test_inductor() -> None:
    module = Task(mlp())
    module.net.compile()
    compare(module, Task(mlp()))


def test_script_module() -> None:
    module = Task(mlp())
    module.net[0] = torch.jit.trace(module.net[0], torch.randn(5, 4))  # type: ignore[no-untyped-call]
    compare(module, Task(mlp()))


def test_state_is_restored_after_an_exception() -> None:
    net = nn.Sequential(torch.compile(nn.Linear(4, 3), backend="eager"))  # type: ignore[arg-type]
    view, before = build_view(net, net.parameters(), Rademacher()), weights(net)
    forward = net[0].forward

    def fail() -> None:
        with view.along(Key(0, 0), 0.1):
            assert not torch.equal(net[0]._orig_mod.weight.data, before["0._orig_mod.weight"])  # type: ignore[union-attr]
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert_same(weights(net), before)
    assert net[0].forward == forward


def test_no_recompilation_per_probe() -> None:
    """Swapped weights keep shape, dtype and layout, so one graph serves all probes."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    module = Task(mlp())
    module.net = torch.compile(module.net, backend=backend)  # type: ignore[assignment]
    fit(module, batches(6))
    assert len(graphs) == 1


def test_uncompiled_neighbours_are_perturbed_too() -> None:
    net, x = mlp(), torch.randn(5, 4)
    twin = copy.deepcopy(net)
    net[0] = torch.compile(net[0], backend="eager")  # type: ignore[assignment]
    ours, theirs = (build_view(n, n.parameters(), Rademacher()) for n in (net, twin))
    with torch.no_grad(), ours.along(Key(1, 1), 0.1):
        probed = net(x)
    with torch.no_grad(), theirs.along(Key(1, 1), 0.1):
        torch.testing.assert_close(probed, twin(x), rtol=1e-6, atol=1e-6)
    assert mse(net, (x, torch.zeros(5, 3))).requires_grad
