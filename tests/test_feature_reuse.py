"""A probe that runs only the modules which its group of weights reaches changes no bit, and is left off where it could."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, weights
from torch import Tensor, nn

from zolightning.engine.session import Session
from zolightning.methods.config import ZOConfig
from zolightning.probing.feature_reuse import FeatureReuse
from zolightning.space import Groups
from zolightning.types import Estimate

X, Y = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


class Residual(nn.Module):
    """As ResNet's: a branch, a shortcut, ReLUs that write in place."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inside, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.first(x))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class Net(nn.Module):
    """Stages of residual blocks, functions between them, and a weight that no module owns."""

    def __init__(self, early: Callable[[Tensor], Tensor] = lambda x: x, late: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.early, self.late = early, late
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.stages = nn.Sequential(Residual(4, 4, 1), Residual(4, 8, 2), Residual(8, 8, 1))
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(F.relu(self.stem(x)))
        x = self.late(self.stages(x).mean((2, 3)) * self.scale)
        return F.cross_entropy(self.head(x), Y)


class Tied(Net):
    """The head reads the stem too, after the stages."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.stem.weight.square().mean()


class Again(Net):
    """Runs one stage twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.stages[0](x.expand(-1, 4, -1, -1)).square().mean()


def fitted(
    net: nn.Module, reuse: float, estimator: str = "one_sided", steps: int = 2, inform: Any = print
) -> tuple[list[Any], Session, int]:
    """The losses and coefficients of a few steps, and the convolutions of the last one."""
    torch.manual_seed(4)
    random.seed(4)
    config = ZOConfig(
        estimator=estimator, num_queries=10, select="all", structure=Groups("even", reuse=reuse), normalize=False, seed=1
    )
    session = Session(net, torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9), config, repeatable=False, inform=inform)
    found: list[Any] = []
    for _ in range(steps):
        with patch.object(nn.Conv2d, "_conv_forward", autospec=True, side_effect=nn.Conv2d._conv_forward) as convolutions:
            estimate = session.estimate(net, X)
        assert isinstance(estimate, Estimate)
        found.append((estimate.terms, estimate.losses, estimate.forwards))
        session.update()
    return found, session, convolutions.call_count


def reuse_of(session: Session) -> FeatureReuse:
    reuse = session._subspaces[id(session.optimizers[0])].runner.reuse
    assert isinstance(reuse, FeatureReuse)
    return reuse


@pytest.mark.parametrize(("kind", "estimator"), [(Net, "spsa"), (Net, "one_sided"), (Tied, "one_sided"), (Again, "one_sided")])
def test_estimates_and_weights_are_those_of_full_forwards(kind: type[Net], estimator: str) -> None:
    net, twin = kind(), kind()
    expected, _, full = fitted(twin, 0.0, estimator)
    said: list[str] = []
    found, session, fewer = fitted(net, 1.0, estimator, inform=said.append)
    assert found == expected
    assert_same(net.state_dict(), twin.state_dict())  # BatchNorm's statistics too
    reuse = reuse_of(session)
    assert all(reuse.proved.values())
    assert len(reuse.proved) > 3
    assert fewer < (0.8 if kind is not Again else 1.0) * full
    assert sum("a probe runs only the modules" in line for line in said) == 1


def test_dropout_behind_is_no_obstacle_and_before_it_is() -> None:
    for where, saves in (("late", True), ("early", False)):
        net, twin = (Net(**{where: lambda x: F.dropout(x, 0.5)}) for _ in range(2))
        expected, _, full = fitted(twin, 0.0)
        found, _, fewer = fitted(net, 1.0)
        assert found == expected
        assert (fewer < 0.8 * full) or not saves


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale * random.uniform(0.5, 1.5)


def test_a_module_that_draws_runs_each_time() -> None:
    drawing, twin = Net(early=Drawing()), Net(early=Drawing())
    expected, _, full = fitted(twin, 0.0)
    found, session, fewer = fitted(drawing, 1.0)
    assert found == expected
    assert fewer < full
    assert drawing.early not in [unit.module for unit in reuse_of(session).units] or all(reuse_of(session).proved.values())


def halved(x: Tensor) -> Tensor:
    return x.mul_(0.5)


def halved_behind_torch(x: Tensor) -> Tensor:
    x.numpy()[...] *= 0.5  # PyTorch does not count such writes
    return x


@pytest.mark.parametrize("write", [halved, halved_behind_torch])
def test_code_that_writes_into_a_kept_output_gets_copies(write: Callable[[Tensor], Tensor]) -> None:
    class Writes(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = write(self.stages[0](F.relu(self.stem(x))))
            x = self.stages[2](self.stages[1](x)).mean((2, 3))
            return F.cross_entropy(self.head(x * self.scale), Y)

    expected, _, full = fitted(Writes(), 0.0, steps=3)
    net = Writes()
    found, session, fewer = fitted(net, 1.0, steps=3)
    assert found == expected
    assert fewer < full
    reuse = reuse_of(session)
    assert net.stages[0] in [reuse.units[place].module for place in reuse.written]
    assert net.stem not in [reuse.units[place].module for place in reuse.written]


def test_room_bounds_the_memory() -> None:
    expected, _, full = fitted(Net(), 0.0)
    found, session, some = fitted(Net(), 0.02)
    _, roomy, least = fitted(Net(), 1.0)
    assert found == expected
    assert least < some < full
    assert reuse_of(session).kept <= 0.02 * 2**20 < reuse_of(roomy).kept


def test_other_inputs_run_everything() -> None:
    draws = iter(range(1000))
    net, twin = Net(), Net()
    found, session, _ = fitted(net, 1.0)
    changing = lambda x: net(x + next(draws))  # noqa: E731
    session.estimate(changing, X)
    losses = session.update().loss
    expected, plain, _ = fitted(twin, 0.0)
    draws = iter(range(1000))
    plain.estimate(lambda x: twin(x + next(draws)), X)
    assert found == expected
    assert plain.update().loss == losses


def test_another_loss_turns_it_off() -> None:
    """A hidden side channel: what a module does besides its output is found by the loss of the full forward."""

    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []
            self.weight = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x.mean())
            return x * self.weight

    class Peeks(Net):
        def __init__(self) -> None:
            super().__init__(early=Side())

        def forward(self, x: Tensor) -> Tensor:
            self.early.seen.clear()  # type: ignore[attr-defined]
            return super().forward(x) + sum(self.early.seen, torch.zeros(()))  # type: ignore[attr-defined]

    expected, _, full = fitted(Peeks(), 0.0)
    said: list[str] = []
    found, session, same = fitted(Peeks(), 1.0, inform=said.append)
    assert found == expected
    assert same == full
    assert not all(reuse_of(session).proved.values())
    assert any("the loss was another one" in line for line in said)


def test_an_exception_leaves_the_modules_as_they_were() -> None:
    net = Net()
    _, session, _ = fitted(net, 1.0, steps=1)
    before, calls = weights(net), iter(range(100))

    def forward(x: Tensor) -> Tensor:
        if next(calls) == 5:
            raise RuntimeError("in the sixth forward")
        return net(x)  # type: ignore[no-any-return]

    with pytest.raises(RuntimeError, match="sixth forward"):
        session.estimate(forward, X)
    assert all("forward" not in module.__dict__ for module in net.modules())
    assert_same(weights(net), before)
