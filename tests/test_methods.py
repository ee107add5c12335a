"""Each published method against its textbook twin, and what all of them have to keep."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from helpers import (
    Task,
    assert_same,
    batches,
    estimated,
    fit,
    lm_loss,
    loader,
    mlp,
    mse,
    quiet_trainer,
    tiny_causal_lm,
    token_batches,
    weights,
)
from ledgers import Noted, parameters
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from zolightning import ZOConfig, ZOStrategy
from zolightning.ledger import read, replay
from zolightning.methods.config import ESTIMATORS
from zolightning.methods.estimators import ForwardGradient
from zolightning.methods.recipes import recipe
from zolightning.noise import DISTRIBUTIONS
from zolightning.space import build_view
from zolightning.types import Key, StepRecord

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
METHODS = ["spsa", "mezo", "meazo", "fzoo", "es", "zo-momentum", "zo-sign", "zo-adam", "zo-conservative", "forward-gradient"]
FORWARDS = {"fzoo": 9, "es": 30, "zo-conservative": 5, "forward-gradient": 1}
"""Of a step; those that are not here take 2."""
PROBES: dict[str, Callable[[int], int]] = {"one_sided": lambda q: q + 1, "population": lambda q: q, "spsa": lambda q: 2 * q}
"""Forward passes for q directions."""


def typed(precision: str, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(DTYPES[precision]), y.to(DTYPES[precision])) for x, y in batches(count)]


def method(name: str, **changes: Any) -> ZOConfig:
    """The recipe on all weights, with a learning rate that moves them."""
    return recipe(name).override(**{"select": "all", "lr": 1e-2, "seed": 7, **changes})


# ---- twins


def central(at: Callable[[float, int], float], queries: int, eps: float) -> list[float]:
    return [(at(eps, k) - at(-eps, k)) / (2 * eps) for k in range(queries)]


def one_sided(at: Callable[[float, int], float], queries: int, eps: float) -> list[float]:
    return [(at(eps, k) - at(0.0, k)) / eps for k in range(queries)]


def population(at: Callable[[float, int], float], queries: int, eps: float) -> list[float]:
    losses = [at(eps, k) for k in range(queries)]
    return [(a - statistics.mean(losses[:k] + losses[k + 1 :])) / eps for k, a in enumerate(losses)]


TWINS = {"spsa": central, "one_sided": one_sided, "population": population}


@pytest.mark.parametrize("queries", [2, 5])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("noise", DISTRIBUTIONS)
@pytest.mark.parametrize("name", TWINS)
def test_estimator(name: str, noise: str, precision: str, queries: int) -> None:
    """The projected gradients from perturbed copies of the module, and the forward passes that they cost."""
    net, eps, dist = mlp().to(DTYPES[precision]), 1e-2, DISTRIBUTIONS[noise]()
    batch = typed(precision, 1)[0]
    before, calls = weights(net), []
    view = build_view(net, net.parameters(), dist)
    estimate = estimated(ESTIMATORS[name](eps, queries), view, lambda b: (calls.append(1), mse(net, b))[1], batch, Key(7, 3))

    def at(offset: float, query: int) -> float:
        zs = reference.directions(net, Key(7, 3, query), dist)
        return reference.loss_at(net, lambda twin: mse(twin, batch), zs, offset)

    assert estimate.coefficients == pytest.approx(TWINS[name](at, queries, eps), rel=1e-9, abs=1e-11)
    assert [t.key for t in estimate.terms] == [Key(7, 3, k) for k in range(queries)]
    assert estimate.forwards == len(calls) == len(estimate.losses) == PROBES[name](queries)
    assert_same(weights(net), before)


def by_running_square(beta: float) -> Callable[[Sequence[float]], list[float]]:
    """MEAZO, whose second moment is of the directions' mean: one direction."""
    v, steps = 0.0, 0

    def shape(gs: Sequence[float]) -> list[float]:
        nonlocal v, steps
        (g,), steps = gs, steps + 1
        v = beta * v + (1 - beta) * g * g
        return [g / math.sqrt(v / (1 - beta**steps))]

    return shape


def by_deviation(gs: Sequence[float]) -> list[float]:
    """FZOO: (ℓ_i − ℓ_0) / std(ℓ); ES: the z-score."""
    return [g / statistics.stdev(gs) for g in gs]


RULES: dict[str, tuple[str, Callable[[], Callable[[Sequence[float]], list[float]]]]] = {
    "mezo": ("spsa", lambda: list),
    "meazo": ("spsa", lambda: by_running_square(0.99)),
    "fzoo": ("one_sided", lambda: by_deviation),
    "es": ("population", lambda: by_deviation),
}
"""Recipe → its estimator and what becomes of a step's projected gradients."""


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("noise", DISTRIBUTIONS)
@pytest.mark.parametrize("name", RULES)
def test_training(name: str, noise: str, accumulate: int) -> None:
    """θ ← θ − lr·mean_k(c_k z_k), projected gradients averaged over a window's micro-batches before they are shaped."""
    config = method(name, noise=noise, eps=1e-3)
    estimator, make = RULES[name]
    net, shape, items = mlp(), make(), batches(12)
    twin, dist, queries = copy.deepcopy(net), DISTRIBUTIONS[noise](), config.num_queries
    fit(Task(net), items, config, accumulate_grad_batches=accumulate)
    optimizer = SGD(twin.parameters(), lr=1e-2)
    for number, start in enumerate(range(0, len(items), accumulate)):
        zs = [reference.directions(twin, Key(7, number, k), dist) for k in range(queries)]

        def gradients(batch: Any, zs: Any = zs) -> list[float]:
            def at(offset: float, query: int) -> float:
                return reference.loss_at(twin, lambda net: mse(net, batch), zs[query], offset)

            return TWINS[estimator](at, queries, 1e-3)

        window = [gradients(batch) for batch in items[start : start + accumulate]]
        coefficients = shape([statistics.mean(gs) for gs in zip(*window, strict=True)])
        reference.step(twin, optimizer, [(c / queries, z) for c, z in zip(coefficients, zs, strict=True)])
    assert_same(weights(net), weights(twin), 1e-6)


# ---- what every method keeps


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_exact_restore(name: str, precision: str) -> None:
    """With lr 0 in the module's own optimizer, and after an exception in any probe."""
    config = method(name, lr=None, optimizer="module")
    module = Task(mlp().to(DTYPES[precision]), optimizer=lambda p: SGD(p, lr=0.0))
    before = weights(module)
    fit(module, typed(precision), config, precision=precision)
    assert_same(weights(module), before)

    forwards = FORWARDS.get(name, 2)
    for fatal in sorted({1, 2, min(3, 1 + forwards), 1 + forwards}):  # a rehearsal, probes
        calls: list[int] = []

        def loss(net: nn.Module, batch: Any, calls: list[int] = calls, fatal: int = fatal) -> Tensor:
            calls.append(1)
            if len(calls) == fatal:
                raise RuntimeError("boom")
            return mse(net, batch)

        with pytest.raises(RuntimeError, match="boom"):
            fit(Task(module.net, loss), typed(precision), method(name), precision=precision)
        assert_same(weights(module), before)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_replay_is_training(name: str, precision: str, accumulate: int, tmp_path: Path) -> None:
    noted, module = Noted(), Task(mlp())
    trainer = quiet_trainer(
        ZOStrategy(method(name), ledger=tmp_path / "ledger.zo"),
        callbacks=[noted],
        precision=precision,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, loader(typed(precision)))
    ledger = read(tmp_path / "ledger.zo")
    assert sorted(noted.weights) == list(range(4 // accumulate + 1))
    for step, expected in noted.weights.items():
        replay(ledger, rebuilt := parameters(noted.weights[0]), max(step, ledger.header.start))  # its first may change nothing
        assert_same(rebuilt, expected)  # type: ignore[arg-type]
    assert not torch.equal(noted.weights[0]["net.0.weight"], module.net[0].weight)  # type: ignore[index]


def records(loss: Callable[[nn.Module, Any], Any], config: ZOConfig, count: int = 3, **settings: Any) -> list[StepRecord]:
    """Of the steps of a run, whose weights stay finite, and as they are where every step is skipped."""
    found: list[StepRecord] = []
    module = Task(mlp(), loss)

    def note(*_: Any) -> None:
        record = module.trainer.strategy.last_record  # type: ignore[attr-defined]
        if record is not None and record not in found[-1:]:
            found.append(record)

    module.on_train_batch_end = note  # type: ignore[assignment]
    before = weights(module)
    fit(module, batches(count), config, **settings)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    if all(record.skipped for record in found):
        assert_same(weights(module), before)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_forwards_of_a_step(name: str) -> None:
    calls: list[int] = []

    def loss(net: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return mse(net, batch)

    config = method(name)
    found = records(loss, config, 4, accumulate_grad_batches=2)
    expected = FORWARDS.get(name, 2)
    assert [r.forwards for r in found] == [2 * expected] * 2
    assert len(calls) == 1 + 4 * expected  # the first is a rehearsal


@pytest.mark.parametrize("name", METHODS)
def test_ties_are_skipped_and_counted(name: str) -> None:
    """And there may be any number of them in a row."""
    config = method(name, max_skips=2)
    found = records(lambda net, batch: 0.1 + 0.0 * mse(net, batch), config, 5)  # which forward differentiation gets through
    assert [r.skipped for r in found] == ["all probes gave the same loss"] * 5
    assert [r.ties for r in found] == [config.num_queries] * 5


def test_equal_losses_beside_another_are_skipped() -> None:
    """One-sided: the probes agree with each other, not with the weights as they are, and the deviation is 0."""
    losses = iter([0.5] + ([0.4] + [0.9] * 8) * 3)  # a rehearsal; unperturbed, probes
    found = records(lambda net, batch: next(losses), method("fzoo"))
    assert [r.skipped for r in found] == ["all probes gave the same loss"] * 3
    assert [r.ties for r in found] == [0] * 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", METHODS)
def test_losses_that_are_not_finite_are_skipped(name: str, value: float) -> None:
    found = records(lambda net, batch: mse(net, batch) * value, method(name))
    assert all("non-finite" in r.skipped for r in found)


@pytest.mark.parametrize("name", METHODS)
def test_one_bad_probe_skips_the_step(name: str) -> None:
    calls: list[int] = []
    bad = 1 + min(2, FORWARDS.get(name, 2))  # after a rehearsal

    def loss(net: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return mse(net, batch) * (math.inf if len(calls) == bad else 1.0)

    first, *others = records(loss, method(name))
    assert "non-finite" in first.skipped
    assert not any(r.skipped for r in others)


def test_standardising_wants_several_directions() -> None:
    with pytest.raises(ValueError, match="`num_queries` >= 2, got 1"):
        method("fzoo", num_queries=1)
    with pytest.raises(ValueError, match=r"Population\(num_queries=...\)` must be a whole number >= 2, got 1"):
        method("es", num_queries=1, normalize=True)
    total = Task(mlp(), lambda net, batch: mse(net, batch) + 1)  # its examples have no losses of their own
    with pytest.raises(ValueError, match=r"needs 2 or more, got 1; raise num_queries"):
        fit(total, batches(1), ZOConfig(normalize="std", select="all"))


# ---- conservative


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("noise", DISTRIBUTIONS)
@pytest.mark.parametrize("lr", [1e-2, 1.0])
def test_conservative(lr: float, noise: str, accumulate: int) -> None:
    """The best of θ, θ − lr·g·z and θ + lr·g·z on the window's batches, with the schedule's lr; each is taken at some time."""
    net, items, dist = mlp(), batches(60), DISTRIBUTIONS[noise]()
    twin = copy.deepcopy(net)
    module = Task(net, optimizer=lambda p: SGD(p, lr=lr), scheduler=lambda o: StepLR(o, 5, 0.8))
    config = method("zo-conservative", noise=noise, lr=None, eps=1.0)  # so large that g often points the wrong way
    fit(module, items, config, accumulate_grad_batches=accumulate)
    taken = []
    for number, start in enumerate(range(0, len(items), accumulate)):
        window, rate = items[start : start + accumulate], lr * 0.8 ** (number // 5)
        zs = reference.directions(twin, Key(7, number), dist)

        def loss_at(offset: float, zs: Any = zs, window: Any = window) -> float:
            return statistics.mean(reference.loss_at(twin, lambda net, b=b: mse(net, b), zs, offset) for b in window)

        g = (loss_at(1.0) - loss_at(-1.0)) / 2.0
        side = min((0.0, 1.0, -1.0), key=lambda side: loss_at(-side * rate * g))
        taken.append(side)
        if side:
            reference.step(twin, SGD(twin.parameters(), lr=rate), [(side * g, zs)])
    assert len(set(taken)) >= 2
    assert_same(weights(net), weights(twin), 1e-5)


def test_conservative_logs_once_and_sees_one_dropout() -> None:
    seen: list[Tensor] = []

    def loss(net: nn.Module, batch: Any) -> Tensor:
        module.log("loss", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        seen.append(nn.functional.dropout(torch.ones(64), 0.5))
        return mse(net, batch)

    module = Task(mlp(), loss)
    trainer = fit(module, batches(3), method("zo-conservative"))
    assert trainer.callback_metrics["loss"] == 3.0
    for step in range(3):
        probes, trials = seen[5 * step + 1 : 5 * step + 3], seen[5 * step + 3 : 5 * step + 6]  # after a rehearsal
        assert torch.equal(probes[0], probes[1])
        assert all(torch.equal(trials[0], t) for t in trials)


def test_conservative_refuses() -> None:
    config = method("zo-conservative", lr=None)
    for optimizer, kind in (("adam", SGD), ("sgd", lambda p, lr: SGD(p, lr=lr, maximize=True))):
        with pytest.raises(ValueError, match="tries the step of plain SGD that minimises"):
            fit(Task(mlp(), optimizer=lambda p, kind=kind: kind(p, lr=1e-2)), batches(1), config.override(optimizer=optimizer))
    module = Task(mlp(), optimizer=lambda p: SGD([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=1e-2))
    before = weights(module)
    with pytest.raises(ValueError, match="needs one learning rate for all parameter groups, got"):
        fit(module, batches(1), config)
    assert_same(weights(module), before)


# ---- forward gradient


@pytest.mark.parametrize("noise", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("kind", "structure"), [("gpt2", "dense"), *(("llama", s) for s in ("dense", "rank1", "sparse", "lowrank"))]
)
def test_forward_gradient_is_autograd_s(kind: str, noise: str, structure: str) -> None:
    """z·∇L by backprop, in a transformer with a tied head, embeddings, norms and attention."""
    model = tiny_causal_lm(kind).double()
    ids = token_batches(1)[0]
    before = weights(model)
    view = build_view(model, model.parameters(), DISTRIBUTIONS[noise](), structure=structure)
    estimate = estimated(ForwardGradient(3), view, lambda x: lm_loss(model, x), ids, Key(7, 3))
    loss = lm_loss(model, ids)
    gradients = torch.autograd.grad(loss, [leaf.parameter for leaf in view.leaves])
    assert estimate.forwards == 3
    assert estimate.losses == pytest.approx([loss.item()] * 3)
    for term in estimate.terms:
        zs = [leaf.gradient([term._replace(coefficient=1.0)]) for leaf in view.leaves]
        expected = sum((z.double() * g).sum().item() for z, g in zip(zs, gradients, strict=True))
        assert term.coefficient == pytest.approx(expected, rel=1e-5)
    assert_same(weights(model), before)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("queries", [1, 3])
def test_forward_gradient_trains(queries: int, precision: str) -> None:
    """θ ← θ − lr·mean_k (z_k·∇L) z_k, with ∇L by backprop."""
    net, items, config = mlp(), typed("64-true" if precision == "64-true" else "32-true", 6), method("forward-gradient")
    if precision == "64-true":
        net = net.double()
    twin, dist = copy.deepcopy(net), config.build_distribution()
    fit(Task(net), items, config.override(num_queries=queries), precision=precision, accumulate_grad_batches=2)
    optimizer = SGD(twin.parameters(), lr=1e-2)
    for number in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = sum(mse(twin, batch) for batch in items[2 * number : 2 * number + 2]) / 2
        gradients = torch.autograd.grad(loss, list(twin.parameters()))  # type: ignore[arg-type]
        terms = []
        for k in range(queries):
            zs = reference.directions(twin, Key(7, number, k), dist)
            g = sum((z.to(d.dtype) * d).sum().item() for z, d in zip(zs, gradients, strict=True))  # type: ignore[union-attr]
            terms.append((g / queries, zs))
        reference.step(twin, optimizer, terms)
    assert_same(weights(net), weights(twin), 2e-2 if precision == "bf16-mixed" else 1e-5)


class Rounded(nn.Module):
    """An operation of one's own, of which torch knows no forward derivative."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    def forward(self, x: Tensor) -> Tensor:
        return self.Function.apply(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("loss", [lambda net, batch: 0.3, lambda net, batch: net(batch[0]).argmax(-1).double().mean()])
def test_forward_gradient_wants_a_differentiable_loss(loss: Any) -> None:
    module = Task(mlp(), loss)
    before = weights(module)
    with pytest.raises(ValueError, match=r"this one carries no derivative\. Use estimator='spsa'"):
        fit(module, batches(1), method("forward-gradient"))
    assert_same(weights(module), before)


def test_forward_gradient_refuses_what_it_cannot_see_through() -> None:
    with pytest.raises(NotImplementedError, match="needs a forward derivative of every operation; use estimator='spsa'"):
        fit(Task(nn.Sequential(mlp(), Rounded())), batches(1), method("forward-gradient"))
    net = mlp()
    net[0] = torch.compile(net[0], backend="eager")  # type: ignore[assignment]
    with pytest.raises(ValueError, match="does not pass through compiled code"):
        fit(Task(net), batches(1), method("forward-gradient"))
