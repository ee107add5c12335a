"""The strategy against the textbook: the same trajectory over 20 steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import (
    PLAIN,
    PerExampleTask,
    Task,
    assert_same,
    batches,
    fit,
    lm_loss,
    mlp,
    mse,
    per_example_mse,
    tiny_causal_lm,
    token_batches,
    weights,
)
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from zolightning import ZOConfig
from zolightning.engine.step import finish
from zolightning.methods.shaping import Chain
from zolightning.noise import Gaussian, Rademacher
from zolightning.parallel import merge
from zolightning.types import Estimate, Key, Term


class Tied(nn.Module):
    """One matrix is both embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding((x.abs().sum(-1) * 3).long() % 7)))[:, :3]


def frozen() -> nn.Module:
    net = mlp()
    net[0].requires_grad_(False)
    return net


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


def batch_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 3))


def decayed(parameters: list[Any]) -> Optimizer:
    return SGD(parameters, lr=1e-2, weight_decay=0.3)


def maximizing(parameters: list[Any]) -> Optimizer:
    return SGD(parameters, lr=1e-2, weight_decay=0.1, maximize=True)


def grouped(parameters: list[Any]) -> Optimizer:
    return SGD([{"params": parameters[:2], "lr": 3e-2}, {"params": parameters[2:], "weight_decay": 0.2}], lr=1e-2)


def follow(
    net: nn.Module,
    config: ZOConfig = PLAIN,
    *,
    optimizer: Callable[[list[Any]], Optimizer] = lambda p: SGD(p, lr=1e-2),
    scheduler: Callable[[Optimizer], Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] = mse,
    items: list[Any] | None = None,
    accumulate: int = 1,
    shape: Callable[[float], float] = lambda g: g,
    tolerance: float | None = None,
    **settings: Any,
) -> None:
    """Train one copy by the strategy and one by the reference, and compare the weights."""
    items = batches() if items is None else items
    twin = copy.deepcopy(net)
    start = weights(net)
    fit(Task(net, loss, optimizer, scheduler), items, config, accumulate_grad_batches=accumulate, **settings)
    stepper = optimizer(list(twin.parameters()))
    reference.train(
        twin,
        items,
        loss,
        stepper,
        config.build_distribution(),
        seed=config.seed,  # type: ignore[arg-type]
        eps=config.eps,  # type: ignore[arg-type]
        queries=config.num_queries,
        accumulate=accumulate,
        shape=shape,
        scheduler=scheduler(stepper) if scheduler else None,
    )
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    assert all(not torch.equal(start[n], weights(net)[n]) for n in trained)
    assert all(torch.equal(start[n], weights(net)[n]) for n in start if n not in trained)
    assert_same(weights(net), weights(twin), tolerance)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("net", [mlp, Tied, frozen, normed, batch_normed], ids=lambda f: f.__name__)
def test_follows_the_textbook(net: Callable[[], nn.Module], noise: str) -> None:
    follow(net(), replace(PLAIN, noise=noise))


@pytest.mark.parametrize("optimizer", [decayed, maximizing, grouped])
def test_follows_the_textbook_with(optimizer: Callable[[list[Any]], Optimizer]) -> None:
    follow(mlp(), optimizer=optimizer)


def test_equals_the_formula() -> None:
    """θ ← θ − lr·(g·z + wd·θ), written out; the fused kernels may round the last bit otherwise."""
    net, lr, decay = mlp(), 1e-2, 0.3
    twin, dist = copy.deepcopy(net), Rademacher()
    fit(Task(net, optimizer=decayed), batches())
    for number, item in enumerate(batches()):
        zs = reference.directions(twin, Key(7, number), dist)
        g = reference.projected_gradient(twin, lambda n, item=item: mse(n, item), zs, 1e-3)
        for p, z in zip(twin.parameters(), zs, strict=True):
            p.data = p.data - lr * (g * z + decay * p.data)  # type: ignore[operator]
    assert_same(weights(net), weights(twin), tolerance=1e-5)


def test_schedule() -> None:
    follow(mlp(), scheduler=lambda o: LambdaLR(o, lambda step: 0.8**step))


def test_queries() -> None:
    follow(mlp(), replace(PLAIN, num_queries=3))


def test_float64() -> None:
    follow(mlp().double(), items=[(x.double(), y.double()) for x, y in batches()], precision="64-true")


def test_accumulation_is_the_mean_over_one_direction() -> None:
    follow(mlp(), accumulate=4)


def test_short_last_window() -> None:
    follow(mlp(), items=batches(10), accumulate=4)


@pytest.mark.parametrize("algorithm", ["value", "norm"])
def test_trainer_clips_the_projected_gradient(algorithm: str) -> None:
    """One query: both algorithms bound |g|. The norm's epsilon (1e-6) moves the last digits."""
    follow(
        mlp(),
        shape=lambda g: max(-0.05, min(0.05, g)),
        gradient_clip_val=0.05,
        gradient_clip_algorithm=algorithm,
        tolerance=0.0 if algorithm == "value" else 1e-5,
    )


def test_norm_clip_spans_the_queries() -> None:
    module = Task(mlp())
    strategy = fit(module, batches(1), replace(PLAIN, num_queries=4), gradient_clip_val=1e-3).strategy
    applied = torch.tensor([4 * term.coefficient for term in strategy.last_record.terms])  # type: ignore[attr-defined]
    raw = torch.tensor(strategy.last_record.raw)  # type: ignore[attr-defined]
    torch.testing.assert_close(applied, raw * (1e-3 / raw.norm()), rtol=1e-2, atol=0)
    assert strategy.last_record.clipped == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_tiny_transformers(kind: str, noise: str) -> None:
    follow(
        tiny_causal_lm(kind),
        replace(PLAIN, noise=noise),
        loss=lm_loss,
        items=token_batches(),
        optimizer=lambda p: SGD(p, lr=1e-3),
    )


@pytest.mark.parametrize("noise", [Rademacher(), Gaussian()], ids=repr)
def test_per_example_follows_the_textbook(noise: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    weight = net[0].weight.detach().clone()
    items = batches()
    config = ZOConfig(estimator="per_example", eps=1e-2, noise=noise, select="all", normalize=False, seed=7)
    module = PerExampleTask(net, per_example_mse, lambda p: SGD(p, lr=1e-2))
    trainer = fit(module, items, config)
    assert len(trainer.strategy.last_record.terms) == 5  # type: ignore[attr-defined]
    assert trainer.strategy.last_record.forwards == 2  # type: ignore[attr-defined]
    for number, (x, y) in enumerate(items):

        def losses(w: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            return (F.linear(x, w).double() - y).square().mean(-1)

        weight -= 1e-2 * reference.rank1_step(weight, losses, 5, noise, Key(7, number), 0, 1e-2)
    torch.testing.assert_close(net[0].weight.detach(), weight, rtol=0, atol=1e-4)


def test_per_example_directions_of_a_window_differ() -> None:
    """Micro-batches have examples of their own, so their directions are listed one after another."""
    config = ZOConfig(estimator="per_example", num_queries=2, eps=1e-2, select="all", seed=7)
    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    trainer = fit(PerExampleTask(net, per_example_mse), batches(3), config, accumulate_grad_batches=3)
    assert [t.key for t in trainer.strategy.last_record.terms] == [Key(7, 0, q) for q in range(30)]  # type: ignore[attr-defined]


def test_merge_averages_shared_keys_and_lists_others() -> None:
    key, other = Key(0, 0, 0), Key(0, 0, 1)
    window = [Estimate((Term(key, 1.0),), (0.1, 0.2), 2), Estimate((Term(key, 3.0), Term(other, 5.0)), (0.3,), 1)]
    assert merge(window) == Estimate((Term(key, 2.0), Term(other, 5.0)), (0.1, 0.2, 0.3), 3)


def test_a_direction_ties_when_it_does_in_every_micro_batch() -> None:
    a, b = Key(0, 0, 0), Key(0, 0, 1)
    window = [Estimate((Term(a, 0.0), Term(b, g)), (0.1,), 4, ties) for g, ties in ((0.0, 2), (0.0, 2), (3.0, 1))]
    assert merge(window) == Estimate((Term(a, 0.0), Term(b, 1.0)), (0.1, 0.1, 0.1), 12, 1)


def test_finish_divides_by_the_number_of_terms() -> None:
    estimate = Estimate((Term(Key(0, 0, 0), 1.0), Term(Key(0, 0, 1), 3.0)), (0.5, 0.7), 2)
    record, _ = finish(estimate, lambda raw: [1.0, 2.0], Chain(), {}, [0.1], 4)
    assert [t.coefficient for t in record.terms] == [0.5, 1.0]
    assert record.raw == (1.0, 3.0)
    assert record.loss == pytest.approx(0.6)
    assert (record.step, record.clipped, record.lrs) == (4, 1, (0.1,))
    assert record.projected_grad == pytest.approx(5**0.5)
