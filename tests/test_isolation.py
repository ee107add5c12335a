from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, Metric, RunningSum, SumMetric

from zolightning.probing.isolation import Isolation, rng_state, set_rng_state

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [torch.rand(()).item(), float(np.random.rand()), random.random()]


def test_generators_round_trip_through_a_safe_file(tmp_path: Any) -> None:
    np.random.randn()  # leaves a cached Gaussian behind
    random.gauss(0, 1)
    torch.save(rng_state(CPU), tmp_path / "rng")
    first = [draw(), float(np.random.randn()), random.gauss(0, 1)]
    set_rng_state(torch.load(tmp_path / "rng", weights_only=True), CPU)
    assert [draw(), float(np.random.randn()), random.gauss(0, 1)] == first


class Stateful(nn.Module):
    """Buffers that are written to, replaced, resized and created, and two metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("grown", torch.zeros(0))
        self.register_buffer("late", None)
        self.norm = nn.BatchNorm1d(2)
        self.sum, self.cat = SumMetric(), CatMetric()

    def forward(self) -> list[float]:
        self.written += 1
        self.replaced = self.replaced + 1
        self.grown = torch.cat((self.grown, torch.rand(1)))
        self.late = torch.ones(3)
        self.norm(torch.rand(4, 2))
        self.sum(1.0)
        self.cat.update(torch.rand(1))
        return draw()

    def state(self) -> dict[str, Any]:
        metrics = {"sum": self.sum.compute().item(), "cat": torch.as_tensor(self.cat.compute()).tolist()}
        return {**{k: v.tolist() for k, v in self.named_buffers()}, **metrics, "updates": self.sum.update_count}


@pytest.mark.parametrize("forwards", [1, 2, 5])
def test_many_forwards_are_one(forwards: int) -> None:
    torch.manual_seed(0)
    module, twin = Stateful(), Stateful()
    module()
    twin()
    start = rng_state(CPU)
    twin()
    expected, after = twin.state(), draw()
    set_rng_state(start, CPU)
    module.load_state_dict(module.state_dict())
    isolation = Isolation(module, CPU)
    drawn = []
    seen = []
    with isolation.step() as probes:
        for _ in range(forwards):
            with probes.forward():
                seen.append(len(module.grown))
                drawn.append(module())
    assert probes.count == forwards
    assert len(set(map(tuple, drawn))) == 1
    assert set(seen) == {1}
    ours = module.state()
    assert {k: v for k, v in ours.items() if k not in ("grown", "cat")}.keys() == {
        k: v for k, v in expected.items() if k not in ("grown", "cat")
    }.keys()
    assert (ours["written"], ours["replaced"], ours["late"], ours["sum"], ours["updates"]) == (
        [2.0, 2.0], [2.0, 2.0], [1.0, 1.0, 1.0], 2.0, 2,
    )  # fmt: skip
    assert (len(ours["grown"]), len(ours["cat"]), ours["norm.num_batches_tracked"]) == (2, 2, 2)
    assert draw() == after


def test_exception_in_a_later_forward_leaves_one() -> None:
    module = Stateful()
    module()
    isolation = Isolation(module, CPU)

    def fail_in_the_second() -> None:
        with isolation.step() as probes:
            with probes.forward():
                module()
            with probes.forward():
                module()
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_in_the_second()
    assert module.written.tolist() == [2.0, 2.0]
    assert module.sum.compute() == 2.0


def test_dry_run_leaves_no_trace() -> None:
    module = Stateful()
    module()
    before, random_state = module.state(), rng_state(CPU)
    following = draw()
    set_rng_state(random_state, CPU)
    with Isolation(module, CPU).dry():
        module()
    assert module.state() == before
    assert draw() == following


def test_large_buffers_that_do_not_change_are_not_copied() -> None:
    module = nn.Module()
    module.register_buffer("mask", torch.zeros(1 << 20, dtype=torch.float64))
    module.register_buffer("count", torch.zeros(1 << 20, dtype=torch.float64))
    isolation = Isolation(module, CPU)
    for _ in range(2):
        with isolation.step() as probes:
            for _ in range(2):
                with probes.forward():
                    module.count.add_(1.0)  # type: ignore[union-attr, operator]
    assert len(isolation.snapshot()) == 1
    assert module.count[0] == 2.0  # type: ignore[index]


def test_expanded_buffers() -> None:
    """One element in many places: none of them can be written to, but the buffer can be replaced."""
    module = nn.Module()
    module.register_buffer("mask", torch.ones(1).expand(4))
    module.register_buffer("replaced", torch.ones(1).expand(4))
    isolation = Isolation(module, CPU)
    seen = []
    for _ in range(2):
        with isolation.dry():
            module.replaced = torch.zeros(1).expand(4)
        with isolation.step() as probes:
            for _ in range(3):
                with probes.forward():
                    seen.append(module.replaced.tolist())
                    module.replaced = module.replaced + 1
    assert seen == [[1.0] * 4] * 3 + [[2.0] * 4] * 3
    assert module.mask.stride() == (0,)  # type: ignore[operator, union-attr]
    assert module.replaced.tolist() == [3.0] * 4  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("window", [2, 3])
def test_what_a_wrapped_metric_counts(window: int) -> None:
    module = nn.Module()
    module.metric = RunningSum(window=window)
    isolation = Isolation(module, CPU)
    for step in range(5):
        with isolation.step() as probes:
            for _ in range(2):
                with probes.forward():
                    module.metric.update(float(step))
    assert module.metric.compute() == sum(range(5)[-window:])


class Collected(Metric):
    """A list state beside a tensor state that is written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("items", [], dist_reduce_fx=None)
        self.add_state("total", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        self.items.append(x.clone())
        self.total.add_(x)

    def compute(self) -> tuple[int, float]:
        return len(self.items), float(self.total.sum())


@pytest.mark.parametrize("forward", [True, False])
def test_metric_states(forward: bool) -> None:
    """``metric(x)`` keeps the batch's value, ``metric.update(x)`` does not."""
    module = nn.Module()
    module.metric = Collected()
    isolation = Isolation(module, CPU)
    for _ in range(3):
        with isolation.step() as probes:
            for _ in range(4):
                with probes.forward():
                    (module.metric if forward else module.metric.update)(torch.ones(2))
    assert module.metric.compute() == (3, 6.0)
    assert module.metric.update_count == 3
