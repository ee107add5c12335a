"""The kinds of silently wrong training, with layers of bitsandbytes: the right value, or a refusal before any change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import PerExampleTask, Task, assert_same, batches, fit, per_example_mse, weights
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD

from zolightning import ZOConfig, recipes
from zolightning.adapt.quantize import quantize
from zolightning.engine.session import Session
from zolightning.space import expose_scales

bnb = pytest.importorskip("bitsandbytes", reason="pip install 'bitsandbytes>=0.50'")

RECIPES = {
    "spsa on scales": ZOConfig(
        estimator="spsa", eps=1e-2, select="scales", structure="dense", scales="relative", normalize=False, lr=1e-1, seed=7
    ),
    "qzo": recipes.QZO.override(lr=1e-2, seed=7),
    "floats beside codes": recipes.DEFAULT.override(lr=1e-2, select="all", seed=7),
}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"kind": "nf4"},
    "fp4": {"kind": "fp4"},
    "nf4, scales quantised": {"kind": "nf4", "double": True},
    "fp4, scales quantised": {"kind": "fp4", "double": True},
    "nf4, blocks of 128": {"kind": "nf4"},
    "fp4, blocks of 32": {"kind": "fp4"},
    "int8": {"kind": "int8"},
}


def over(*names: str) -> pytest.MarkDecorator:
    """These recipes on two kinds of layers, and the first of them on all others."""
    pairs = [(kind, name) for kind in KINDS for name in names if kind in ("nf4", "int8") or name == names[0]]
    return pytest.mark.parametrize(("kind", "name"), pairs)


over_all = over("qzo", "spsa on scales", "floats beside codes")


def net(kind: str) -> nn.Sequential:
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.Tanh(), nn.Linear(128, 128), nn.Linear(128, 3))
    if "blocks" not in kind:
        return quantize(plain, skip=["4"], **KINDS[kind])  # type: ignore[return-value]
    for place in ("0", "3"):  # as bitsandbytes makes them by itself
        layer, block = plain.get_submodule(place), int(kind.split()[-1])
        code = KINDS[kind]["kind"]
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type=code)
        new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, blocksize=block, quant_type=code)
        new.bias = layer.bias
        plain.set_submodule(place, new.to("cpu"))
    return plain


def data(count: int = 2) -> list[Any]:
    return batches(count, inputs=128)


def penalty(module: nn.Module) -> Tensor:
    floats = [p for p in module.parameters() if p.is_floating_point()]
    return torch.stack([p.double().square().mean() for p in floats]).sum()


def added(module: nn.Module, loss: Tensor) -> Tensor:
    loss += penalty(module)
    return loss


def negated(module: nn.Module, loss: Tensor) -> Tensor:
    loss *= -1
    return loss


CHANGED: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "+=": (added, lambda module, loss: loss + penalty(module)),
    "*= -1": (negated, lambda module, loss: -loss),
}


@over_all
@pytest.mark.parametrize("change", CHANGED)
def test_a_loss_changed_in_place_is_the_loss(change: str, kind: str, name: str) -> None:
    ended = []
    for make in CHANGED[change]:
        task = Task(net(kind), lambda module, b, make=make: make(module, F.mse_loss(module(b[0]).double(), b[1].double())))
        fit(task, data(), RECIPES[name])
        ended.append(weights(task))
    assert_same(*ended)


class Towers(nn.Module):
    """Its second tower is never read."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.image, self.text = net(kind), net(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.image(x)  # type: ignore[no-any-return]


@over_all
def test_what_no_probe_reads_stays(kind: str, name: str) -> None:
    task = Task(Towers(kind))
    fit(task, data(1), RECIPES[name].override(lr=0.0))  # scales are Parameters from now on
    before = weights(task)
    fit(task, data(), RECIPES[name])
    moved = {key for key, value in weights(task).items() if not torch.equal(value, before[key])}
    assert moved
    assert not any("text" in key for key in moved)


class Elsewhere(nn.Module):
    """Runs its first layers in another thread, which no function mode reaches."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.pool = net(kind), ThreadPoolExecutor(1)

    def forward(self, x: Tensor) -> Tensor:
        def first() -> Tensor:
            with torch.no_grad():
                return self.net[:2](x)  # type: ignore[no-any-return]

        return self.net[2:](self.pool.submit(first).result())  # type: ignore[no-any-return]


@over("spsa on scales", "floats beside codes")
def test_layers_that_run_in_another_thread_count(kind: str, name: str) -> None:
    """As if they ran in this one; the default recipe then shares a direction, as where examples have no losses."""
    gs = []
    config = RECIPES[name].override(estimator="spsa", structure="dense", lr=0.0)
    for make in (Elsewhere, lambda kind: Elsewhere(kind).net):
        module = make(kind)
        task = Task(module)
        gs.append(fit(task, data(1), config.override(select="scales" if config.scales != "frozen" else "all")).strategy)
    raw = [strategy.last_record.raw[0] for strategy in gs]  # type: ignore[attr-defined]
    assert raw[0] == pytest.approx(raw[1], rel=1e-4)


class Counting(Task):
    """Keeps a counter, a list and a running mean beside its layers."""

    def __init__(self, kind: str) -> None:
        super().__init__(net(kind))
        self.seen, self.outputs, self.mean = 0, list[float](), torch.zeros(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        out = self.net(batch[0])
        self.outputs.append(float(out.double().mean()))
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0).float()
        return F.mse_loss(out.double(), batch[1].double()) * min(1.0, self.seen / 4)


@over_all
def test_state_ends_as_one_forward_leaves_it(kind: str, name: str) -> None:
    task = Counting(kind)
    losses = fit(task, data(4), RECIPES[name].override(lr=0.0)).strategy.last_record  # type: ignore[attr-defined]
    assert task.seen == len(task.outputs) == 4
    twin = Counting(kind)
    with torch.no_grad():
        plain = [float(twin.training_step(batch, 0)) for batch in data(4)]
    assert losses.loss == pytest.approx(plain[-1], rel=0.05)  # of its fourth step's weight, not of the eighth forward's
    assert float((task.mean - twin.mean).abs().max()) < 0.1


@over("qzo", "floats beside codes")
def test_losses_that_depend_on_the_batch_s_size_are_not_doubled(kind: str, name: str) -> None:
    gs = []
    for one_batch in (True, False):
        task = PerExampleTask(net(kind), lambda module, b: per_example_mse(module, b) / b[0].shape[0])
        record = fit(task, data(1), RECIPES[name].override(one_batch=one_batch, lr=0.0)).strategy.last_record  # type: ignore[attr-defined]
        gs.append(record.raw)
    assert gs[0] == pytest.approx(gs[1], rel=1e-3)


@over_all
def test_a_wrong_number_of_losses_is_refused(kind: str, name: str) -> None:
    task = PerExampleTask(net(kind), lambda module, b: per_example_mse(module, b)[:3])
    fit(Task(task.net), data(1), RECIPES[name].override(lr=0.0))
    before = weights(task)
    with pytest.raises(ValueError, match="returned 3 losses for a batch of 5 examples; return one loss for each example"):
        fit(task, data(1), RECIPES[name])
    assert_same(weights(task), before)


@over_all
def test_set_up_leaves_no_trace(kind: str, name: str) -> None:
    """No code, no scale, no buffer, no power iteration and no generator moves."""
    module = nn.Sequential(net(kind), nn.BatchNorm1d(3), spectral_norm(nn.Linear(3, 3)))
    if RECIPES[name].scales != "frozen":
        expose_scales(module)
    session = Session(module, SGD([p for p in module.parameters() if p.requires_grad], lr=1e-2), RECIPES[name])
    x, y = data(1)[0]
    before, generator = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    session.subspace(lambda b: F.mse_loss(module(b[0]).double(), b[1].double()), (x, y))
    assert_same(module.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), generator)
