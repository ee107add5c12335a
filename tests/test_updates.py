"""Updates leaf by leaf against a full step of the torch optimizer, and stochastic rounding against plain."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Task, assert_same, batches, estimated, loader, mlp, quiet_trainer, weights
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from zolightning import ZOStrategy
from zolightning.engine.updates import apply_update
from zolightning.methods.estimators import SPSA, Estimator, PerExampleSPSA
from zolightning.methods.optimizers import SignSGD
from zolightning.noise import Distribution, Gaussian, Rademacher, stochastic_round_
from zolightning.probing.inspection import Examples
from zolightning.space import View, build_view
from zolightning.types import Key, Term

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": partial(SGD, lr=1e-2, weight_decay=0.1),
    "nesterov": partial(SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "adamw": partial(AdamW, lr=1e-2),
    "amsgrad": partial(Adam, lr=1e-2, amsgrad=True, maximize=True),
    "rmsprop": partial(RMSprop, lr=1e-2, momentum=0.5),
    "adagrad": partial(Adagrad, lr=1e-2),
    "sign": partial(SignSGD, lr=1e-2, weight_decay=0.1),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def quadratic(net: nn.Module) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """|net(x)|² of each example, and a fixed batch."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(next(net.parameters()).dtype)
    return lambda x: net(x).double().square().mean(-1), x


def make_view(net: nn.Module, dist: Distribution, structure: Any) -> View:
    return build_view(net, net.parameters(), dist, structure=structure)


def dense_step(view: View, optimizer: Optimizer, terms: list[Term]) -> None:
    """A full step on the dense gradient."""
    for leaf in view.leaves:
        leaf.parameter.grad = leaf.gradient(terms).to(leaf.parameter.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("estimator", [SPSA(1e-2, 2), PerExampleSPSA(1e-2, 2)], ids=repr)
@pytest.mark.parametrize("structure", ["dense", "rank1"])
@pytest.mark.parametrize("noise", [Rademacher(), Gaussian()], ids=repr)
def test_every_combination(
    noise: Distribution, structure: str, estimator: Estimator, optimizer: str, dtype: torch.dtype
) -> None:
    """float32, float64: a step of the torch optimizer, bit for bit. Less: that step in float32, rounded stochastically."""
    net = mlp().to(dtype)
    wide = copy.deepcopy(net).to(dtype if dtype == torch.float64 else torch.float32)
    view, full = make_view(net, noise, structure), make_view(wide, noise, structure)
    ours, theirs = OPTIMIZERS[optimizer](list(net.parameters())), OPTIMIZERS[optimizer](list(wide.parameters()))
    for step in range(4):
        key = Key(5, step)
        terms = list(estimated(estimator, view, *quadratic(net), key, Examples(losses=True, repeats=True)).terms)
        before = weights(net)
        apply_update(ours, view.leaves, terms, key)
        dense_step(full, theirs, terms)
        if wide[0].weight.dtype == dtype:
            assert_same(weights(net), weights(wide))
            continue
        for leaf, exact in zip(view.leaves, full.leaves, strict=True):
            rounded = torch.empty_like(leaf.parameter)
            stochastic_round_(rounded.view(-1), exact.parameter.detach().view(-1), key, leaf.index, 0)
            torch.testing.assert_close(leaf.parameter.detach(), rounded, rtol=0.0, atol=0.0)
            exact.parameter.data.copy_(rounded)
        assert any(not torch.equal(value, weights(net)[name]) for name, value in before.items())
    assert all(leaf.parameter.grad is None for leaf in view.leaves)
    state = [v for leaf in view.leaves for v in ours.state.get(leaf.parameter, {}).values() if torch.is_tensor(v)]
    assert all(value.dtype in (torch.float32, torch.float64) for value in state)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_small_bfloat16_updates_arrive_on_average(optimizer: str) -> None:
    """Updates of 1/20 of the spacing: rounding to nearest loses all of them, ours keeps their mean within 4 standard errors."""
    weight = nn.Parameter(torch.full((20_000,), 0.02, dtype=torch.bfloat16))
    net = nn.ParameterList([weight])
    spacing = 2.0**-13  # between neighbours in [2**-6, 2**-5)
    start, step = weight.detach().float(), spacing / 20
    make = partial(SGD, lr=step) if optimizer == "sgd" else partial(AdamW, lr=step, weight_decay=0.0)
    view = make_view(net, Rademacher(), "dense")
    terms = [Term(Key(3, 0), 1.0)]
    z = view.leaves[0].gradient(terms)
    apply_update(make([weight]), view.leaves, terms, Key(3, 0))
    realised = ((weight.detach().float() - start) / (-step * z)).mean().item()
    error = (20 - 1) ** 0.5 / 20_000**0.5  # of the mean of 20 · Bernoulli(1/20)
    assert abs(realised - 1) < 4 * error
    plain = start.bfloat16() - (step * z).bfloat16()
    assert torch.equal(plain, start.bfloat16())


def test_groups_keep_their_own_settings_and_outsiders_their_weights() -> None:
    net = mlp()
    view = build_view(net, net[0].parameters(), Rademacher())
    optimizer = SGD([{"params": list(net[0].parameters()), "lr": 0.5}, {"params": list(net[2].parameters())}], lr=0.1)
    before = weights(net)
    terms = [Term(Key(0, 0), 2.0)]
    z = view.leaves[0].gradient([Term(Key(0, 0), 1.0)])
    apply_update(optimizer, view.leaves, terms, Key(0, 0))
    torch.testing.assert_close(net[0].weight.detach(), before["0.weight"] - 0.5 * 2.0 * z)
    assert torch.equal(net[2].weight, before["2.weight"])
    assert len(optimizer.param_groups) == 2
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optimizer", ["nesterov", "amsgrad", "rmsprop"])
def test_optimizer_state_survives_a_checkpoint(optimizer: str, dtype: torch.dtype, tmp_path: Any) -> None:
    """Optimizer.load_state_dict would round a bfloat16 weight's float32 state to bfloat16."""
    module = Task(mlp(), optimizer=OPTIMIZERS[optimizer])
    precision = {torch.bfloat16: "bf16-true", torch.float16: "16-true", torch.float64: "64-true"}.get(dtype, "32-true")

    def items() -> list[Any]:
        return [(x.to(dtype), y.to(dtype)) for x, y in batches(4)]

    trainer = quiet_trainer(ZOStrategy("mezo", optimizer="module", seed=1), precision=precision)
    trainer.fit(module, loader(items()))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
    again = Task(mlp(), optimizer=OPTIMIZERS[optimizer])
    loaded = quiet_trainer(ZOStrategy("mezo", optimizer="module", seed=1), precision=precision)
    loaded.fit(again, loader(items()), ckpt_path=tmp_path / "x.ckpt")
    restored = loaded.optimizers[0].state_dict()["state"]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert saved
    assert restored.keys() == saved.keys()
    for index, values in saved.items():
        for name, value in values.items():
            if torch.is_tensor(value):
                assert torch.equal(restored[index][name], value)
                assert restored[index][name].dtype == (torch.float32 if name == "step" else expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_odd_layouts(optimizer: str, dtype: torch.dtype) -> None:
    """Elements are numbered in row-major order whatever the memory layout."""
    shapes = {
        "transposed": torch.randn(4, 6).T,
        "sliced": torch.randn(6, 8)[:, ::2],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(0.5),
        "empty": torch.empty(0, 3),
    }
    net, flat = nn.Module(), nn.Module()
    for name, value in shapes.items():
        net.register_parameter(name, nn.Parameter(torch.empty_strided(value.shape, value.stride(), dtype=dtype).copy_(value)))
        flat.register_parameter(name, nn.Parameter(value.to(dtype).clone(memory_format=torch.contiguous_format)))
    assert not net.sliced.is_contiguous()  # type: ignore[union-attr, operator]
    for module in (net, flat):
        apply_update(
            OPTIMIZERS[optimizer](list(module.parameters())),
            make_view(module, Rademacher(), "dense").leaves,
            [Term(Key(1, 1), 0.7)],
            Key(1, 1),
            measure=True,
        )
    assert_same(weights(net), weights(flat))
    assert not torch.equal(net.sliced, shapes["sliced"].to(dtype))  # type: ignore[arg-type]


def test_statistics_of_an_update() -> None:
    net = nn.ParameterList([nn.Parameter(torch.full((100,), 1.0)), nn.Parameter(torch.full((100,), 1e6))])
    stats = apply_update(
        SGD(net.parameters(), lr=1e-3),
        make_view(net, Rademacher(), "dense").leaves,
        [Term(Key(0, 0), 1.0)],
        Key(0, 0),
        measure=True,
    )
    assert stats is not None
    assert stats.lost == 0.5  # 1e-3 is below the spacing of float32 at 1e6
    assert stats.rms == pytest.approx(1e-3 / 2**0.5, rel=1e-3)


def test_failing_optimizer_leaves_weights_and_groups() -> None:
    class Failing(AdamW):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("boom")

    net = mlp().bfloat16()
    optimizer = Failing(net.parameters())
    before = weights(net)
    with pytest.raises(RuntimeError, match="boom"):
        apply_update(optimizer, make_view(net, Rademacher(), "dense").leaves, [Term(Key(0, 0), 1.0)], Key(0, 0))
    assert_same(weights(net), before)
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in net.parameters())


def test_state_dict_round_trip_outside_lightning() -> None:
    net = mlp().bfloat16()
    optimizer = OPTIMIZERS["adamw"](list(net.parameters()))
    apply_update(optimizer, make_view(net, Rademacher(), "dense").leaves, [Term(Key(0, 0), 1.0)], Key(0, 0))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert all(s["exp_avg"].dtype == torch.float32 for s in saved["state"].values())
