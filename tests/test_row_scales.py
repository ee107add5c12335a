"""Scales with a direction for each example: the noise by the textbook, and activations that do what other scales would."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PerExampleTask, Task, assert_same, batches, fit, loader, mse, per_example_mse, quiet_trainer, weights
from torch import Tensor, nn
from torch.optim import SGD

from zolightning import ZOConfig, ZOStrategy
from zolightning.adapt.fakequant import export_quantized, fake_quantize
from zolightning.adapt.quantize import quantize
from zolightning.ledger import fingerprint, read, replay
from zolightning.noise import Distribution, Gaussian, Rademacher, sample
from zolightning.space import DenseLeaf, Rank1Leaf, RelativeScaleLeaf, RowScaleLeaf, View, build_view, expose_scales
from zolightning.types import Key, PerExample, PerExampleError, Term

pytest.importorskip("bitsandbytes", reason="pip install 'bitsandbytes>=0.50'")

EACH = ZOConfig(estimator="per_example", eps=1e-2, select="scales", scales="relative", normalize=False, seed=7)
every_kind = pytest.mark.parametrize("kind", ["nf4", "int8", "3 bits"])


def net(kind: str) -> nn.Sequential:
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(192, 64), nn.Tanh(), nn.Linear(64, 128, bias=False), nn.LayerNorm(128), nn.Linear(128, 3))
    module: Any = export_quantized(fake_quantize(plain, 3)) if kind == "3 bits" else quantize(plain, kind)  # type: ignore[arg-type]
    expose_scales(module)
    return module  # type: ignore[no-any-return]


def data(count: int) -> list[Any]:
    return batches(count, inputs=192)


def view_of(module: nn.Module, noise: Distribution) -> View:
    return build_view(
        module, module.parameters(), noise, select_spec="scales", structure="rank1", scales="relative"
    )  # fmt: skip


def coordinates(leaf: Any, key: Key) -> tuple[Tensor, Tensor | None]:
    """u for the outputs and v for the groups, so that z has variance 1 in units of the scale."""
    outputs, groups = leaf.parameter.shape
    count = outputs + (groups if groups > 1 else 0)
    values = sample(leaf.distribution, key, leaf.index, torch.zeros(1, dtype=torch.int64), count)[0]
    return (values, None) if groups == 1 else (values[:outputs] / math.sqrt(2), values[outputs:] / math.sqrt(2))


def textbook_z(leaf: Any, key: Key) -> Tensor:
    u, v = coordinates(leaf, key)
    scales = leaf.parameter.detach()
    rows = [[s * (u[o] + (0 if v is None else v[g])) for g, s in enumerate(row)] for o, row in enumerate(scales)]
    return torch.tensor(rows)


@pytest.mark.parametrize("noise", [Rademacher(), Gaussian()], ids=repr)
@every_kind
def test_noise_by_the_textbook(kind: str, noise: Distribution) -> None:
    terms = [Term(Key(1, 2, 0), 0.5), Term(Key(1, 2, 5), -2.0), Term(Key(1, 3, 1), 0.25)]
    view = view_of(net(kind), noise)
    assert [tuple(leaf.parameter.shape) for leaf in view.leaves] == (
        [(64, 1), (128, 1), (3, 1)] if kind == "int8" else [(64, 3), (128, 1), (3, 2)]
    )
    for leaf in view.leaves:
        expected = sum(c * textbook_z(leaf, key) for key, c in terms)
        torch.testing.assert_close(leaf.gradient(terms), expected, rtol=1e-5, atol=1e-6)
        part = leaf.noise(terms, 2, 5)
        assert torch.equal(part, leaf.noise(terms, 0, leaf.parameter.numel())[2:7][: len(part)])


@pytest.mark.parametrize("flattened", [False, True])
@every_kind
@torch.no_grad()
def test_each_example_sees_scales_of_its_own(kind: str, flattened: bool) -> None:
    module = net(kind)
    before, x = weights(module), torch.randn(4, 5, 192, generator=torch.Generator().manual_seed(1))
    expected, view = module(x), view_of(module, Gaussian())
    queries, offsets = torch.tensor([3, 0, 7, 1]), torch.tensor([0.1, -0.1, 0.02, 0.0])
    with view.at(PerExample(Key(1, 2), queries, offsets)):
        probed = module(x.flatten(0, 1) if flattened else x).view(4, 5, 3)
    for i, (query, offset) in enumerate(zip(queries.tolist(), offsets.tolist(), strict=True)):
        twin = copy.deepcopy(module)
        for leaf in view.leaves:
            u, v = coordinates(leaf, Key(1, 2, query))
            factor = (1 + offset * u)[:, None] * (1 if v is None else 1 + offset * v)
            twin.get_parameter(leaf.name).mul_(factor)
        torch.testing.assert_close(probed[i], twin(x[i]), rtol=1e-4, atol=1e-4)
    assert_same(weights(module), before)
    assert torch.equal(module(x), expected)
    with (
        pytest.raises(PerExampleError, match="to hold the 3 examples"),
        view.at(PerExample(Key(1, 2), queries[:3], offsets[:3])),
    ):
        module(x)
    with pytest.raises(RuntimeError), view.at(PerExample(Key(1, 2), queries, offsets)):
        module(x[..., :5])
    assert torch.equal(module(x), expected)


@torch.no_grad()
def textbook(module: nn.Module, items: list[Any], eps: float, lr: float) -> dict[str, Tensor]:
    """Example by example: Δ ← Δ − lr·mean_i g_i z_i, each g_i from two copies of the module."""
    module = copy.deepcopy(module)
    for step, batch in enumerate(items):
        x, y = batch
        leaves = view_of(module, Rademacher()).leaves
        change = {leaf.name: torch.zeros_like(leaf.parameter) for leaf in leaves}
        for i in range(len(x)):
            z = {leaf.name: textbook_z(leaf, Key(7, step, i)) for leaf in leaves}
            losses = []
            for offset in (eps, -eps):
                twin = copy.deepcopy(module)
                for name, value in z.items():
                    twin.get_parameter(name).add_(offset * value)
                losses.append(per_example_mse(twin, (x[i : i + 1], y[i : i + 1])).item())
            for name, value in z.items():
                change[name] += (losses[0] - losses[1]) / (2 * eps) * value / len(x)
        for name, value in change.items():
            module.get_parameter(name).sub_(lr * value)
    return weights(module)


@every_kind
def test_training_follows_the_textbook(kind: str) -> None:
    module = net(kind)
    before, expected = weights(module), textbook(module, data(3), 1e-2, 1e-2)
    trainer = fit(PerExampleTask(module, per_example_mse, lambda p: SGD(p, lr=1e-2)), data(3), EACH)
    assert all(type(leaf) is RowScaleLeaf for leaf in trainer.strategy.view(trainer.optimizers[0]).leaves)  # type: ignore[attr-defined]
    for name, value in weights(module).items():
        if name.endswith("scales"):
            assert (value - expected[name]).norm() < 1e-2 * (expected[name] - before[name]).norm(), name
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("recipe", ["qzo", EACH])
def test_nothing_moves_at_lr_0(recipe: Any) -> None:
    module = net("nf4")
    before = weights(module)
    fit(PerExampleTask(module, per_example_mse, lambda p: SGD(p, lr=0.0)), data(5), ZOStrategy(recipe, eps=0.5))
    assert_same(weights(module), before)


def test_which_leaves_the_recipe_takes() -> None:
    """A direction for each example where there is a loss for each, else one for the batch; beside adapters as asked."""

    def leaves(task: Any, **changes: Any) -> set[type]:
        trainer = fit(task, data(2), ZOStrategy("qzo", **changes))
        return {type(leaf) for leaf in trainer.strategy.view(trainer.optimizers[0]).leaves}  # type: ignore[attr-defined]

    def undivided(module: nn.Module, batch: Any) -> Tensor:
        return mse(module, batch) + 0.0

    assert leaves(Task(net("nf4"))) == {RowScaleLeaf}
    assert leaves(Task(net("nf4"), undivided)) == {RelativeScaleLeaf}
    assert leaves(Task(net("nf4")), structure="dense") == {RelativeScaleLeaf}
    mixed = nn.Sequential(net("nf4"), nn.Linear(3, 3, bias=False))
    assert leaves(Task(mixed), structure="rank1", select="all") == {RowScaleLeaf, Rank1Leaf, DenseLeaf}


@torch.no_grad()
def test_whatever_else_a_quantised_layer_reads_is_probed_too() -> None:
    module, x = net("nf4"), data(1)[0][0]
    view = build_view(module, module.parameters(), Gaussian(), scales="relative")
    assert {"0.bias", "4.bias", "0.scales"} <= {leaf.name for leaf in view.leaves}
    twin = copy.deepcopy(module)
    for leaf in view.leaves:
        twin.get_parameter(leaf.name).copy_(leaf.perturbed([Term(Key(1, 2), 0.1)]))
    with view.along(Key(1, 2), 0.1):
        assert torch.equal(module(x), twin(x))


@every_kind
def test_a_ledger_gives_the_scales_of_any_step(kind: str, tmp_path: Path) -> None:
    task = PerExampleTask(net(kind), per_example_mse, lambda p: SGD(p, lr=1e-2))
    rebuilt = {name: nn.Parameter(p.detach().clone(), requires_grad=False) for name, p in task.named_parameters()}
    quiet_trainer(ZOStrategy("qzo", seed=7, ledger=tmp_path / "ledger.zo")).fit(task, loader(data(6)))
    ledger = read(tmp_path / "ledger.zo")
    assert replay(ledger, rebuilt).step == 6
    assert fingerprint(rebuilt.items()) == fingerprint(task.named_parameters())
