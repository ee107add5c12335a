"""State that user code keeps beside buffers: a step leaves it as one forward does, and none follows perturbed weights."""

from __future__ import annotations

import copy
import itertools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import PLAIN, Task, batches, fit, mlp, weights
from torch import Tensor, nn
from torch.optim import SGD

from zolightning import ZOStrategy
from zolightning.engine.session import Session
from zolightning.methods.config import ZOConfig
from zolightning.methods.recipes import recipe

RECIPES = {"spsa": PLAIN, "default": recipe("default"), "several": PLAIN.override(num_queries=3)}


@dataclass
class Moments:
    """A helper that is no module."""

    decay: float = 0.5
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def update(self, x: Tensor) -> None:
        self.count += 1
        self.sums["x"] = self.sums.get("x", torch.zeros(())) * self.decay + x


class Keeper(nn.Module):
    """A net, and the state that a kind of code keeps in its forward."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.net = kind, mlp()
        self.seen, self.log, self.window, self.names = 0, [], deque(maxlen=3), set()
        self.counts, self.by_kind = Counter(), defaultdict(list)
        self.nested: dict[str, Any] = {"a": [torch.zeros(2), {"n": 0}]}
        self.mean, self.hidden = torch.zeros(4), (torch.zeros(4), torch.zeros(4))
        self.array, self.moments = np.zeros(4), Moments()
        self.table = OrderedDict(first=1)
        self.own = {"torch": torch.Generator(), "numpy": np.random.default_rng(0), "python": random.Random(0)}
        self.old = np.random.RandomState(0)
        self.aside = [nn.BatchNorm1d(4)]  # a module that it does not own
        self.register_buffer("steps", torch.zeros(()))
        self.counter = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        getattr(self, f"do_{self.kind}")(x)
        return self.net(x)

    def do_number(self, x: Tensor) -> None:
        self.seen += 1

    def do_examples(self, x: Tensor) -> None:
        self.seen += len(x)

    def do_sum(self, x: Tensor) -> None:
        self.mean += x.sum(0)

    def do_list(self, x: Tensor) -> None:
        self.log.append(round(x.mean().item(), 5))

    def do_new_list(self, x: Tensor) -> None:
        self.log = [*self.log, len(self.log)]

    def do_deque(self, x: Tensor) -> None:
        self.window.append(x.sum())

    def do_set(self, x: Tensor) -> None:
        self.names.add(len(self.names))

    def do_counter(self, x: Tensor) -> None:
        self.counts["x"] += 1

    def do_by_kind(self, x: Tensor) -> None:
        self.by_kind[len(self.by_kind[0]) % 2].append(x.sum())

    def do_nested(self, x: Tensor) -> None:
        self.nested["a"][0] += 1
        self.nested["a"][1]["n"] += 1

    def do_in_place(self, x: Tensor) -> None:
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)

    def do_replaced(self, x: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)

    def do_hidden(self, x: Tensor) -> None:
        h, c = self.hidden
        self.hidden = torch.tanh(h + x.mean(0)), c + 1

    def do_array(self, x: Tensor) -> None:
        self.array += x.mean(0).numpy()

    def do_helper(self, x: Tensor) -> None:
        self.moments.update(x.sum())

    def do_order(self, x: Tensor) -> None:
        self.table.move_to_end("first")
        self.table[str(len(self.table))] = 2

    def do_generators(self, x: Tensor) -> None:
        torch_, numpy_, python_ = self.own.values()
        self.log.append((torch.rand((), generator=torch_).item(), numpy_.random(), python_.random(), self.old.rand()))

    def do_aside(self, x: Tensor) -> None:
        self.aside[0](x)

    def do_buffer(self, x: Tensor) -> None:
        self.steps += 1

    def do_frozen(self, x: Tensor) -> None:  # a parameter that does not follow the weights
        self.counter.data += 1

    def do_late(self, x: Tensor) -> None:
        self.seen += 1
        if self.seen >= 3:  # made in the third step, counted from then on
            self.extra = {**vars(self).get("extra", {}), self.seen: x.sum(0) * (self.seen > 3)}

    def do_mode(self, x: Tensor) -> None:
        self.net.train(not self.net.training)


KINDS = [name.removeprefix("do_") for name in vars(Keeper) if name.startswith("do_")]


def plain(value: Any) -> Any:
    """A value that can be compared."""
    if isinstance(value, (Tensor, np.ndarray)):  # other kernels may compute a batch of another size
        return np.asarray(value).round(5).tolist()
    if isinstance(value, dict):
        return [(k, plain(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [plain(v) for v in value]
    if isinstance(value, torch.Generator):
        return plain(value.get_state())
    if isinstance(value, nn.Module):
        return {**plain_state(value), "training": value.training}
    if isinstance(value, Moments):
        return plain(vars(value))
    if isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
        return repr(copy.deepcopy(value).random(3) if not isinstance(value, random.Random) else value.getstate())
    return value


def plain_state(module: nn.Module) -> dict[str, Any]:
    skipped = ("_parameters", "_modules")
    own = {name: plain(value) for name, value in vars(module).items() if name not in skipped and "hooks" not in name}
    return {**own, "modes": [m.training for m in module.modules()]}


def loss(module: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: F.mse_loss(module(batch[0]).double(), batch[1].double())


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_the_state_of_one_forward(kind: str, name: str) -> None:
    module, twin = Keeper(kind), Keeper(kind)
    items = batches(count=6)
    session = Session(module, SGD(module.parameters(), lr=1e-3), RECIPES[name].override(seed=1))
    for item in items:
        session.estimate(loss(module), item)
        session.update()
        with torch.no_grad():
            twin(item[0])
        assert plain_state(module) == plain_state(twin)
        assert torch.equal(module.counter, twin.counter)


def test_a_step_pays_for_no_state_that_does_not_change() -> None:
    module = Keeper("number")
    session = Session(module, SGD(module.parameters(), lr=1e-3), PLAIN)
    session.estimate(loss(module), batches(1)[0])
    session.update()
    kept = session._isolation.snapshot()
    assert sorted(map(str, kept)) == ["seen", "steps"]  # small buffers always are


@pytest.mark.parametrize("name", RECIPES)
def test_identity_of_what_is_kept(name: str) -> None:
    """Somebody else may hold the list that a step appends to."""
    module = Keeper("list")
    log = module.log
    session = Session(module, SGD(module.parameters(), lr=1e-3), RECIPES[name])
    for item in batches(3):
        session.estimate(loss(module), item)
        session.update()
    assert module.log is log
    assert len(log) == 3


def test_a_list_that_is_made_anew_each_epoch() -> None:
    module = Keeper("list")
    session = Session(module, SGD(module.parameters(), lr=1e-3), PLAIN)
    for _ in range(3):
        module.log = []
        for item in batches(3):
            session.estimate(loss(module), item)
            session.update()
        assert len(module.log) == 3


class Annealed(Task):
    """Lightning's own way: a counter for the weight of a term, and outputs for the end of the epoch."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.seen, self.outs, self.weights_of_kl = 0, [], []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        self.weights_of_kl.append(min(1.0, self.seen / 10))
        out = self.net(batch[0])
        found = F.mse_loss(out, batch[1]) + self.weights_of_kl[-1] * out.square().mean()
        self.outs.append(found.detach())
        return found

    def on_train_epoch_end(self) -> None:
        self.collected = len(self.outs)
        self.outs.clear()


@pytest.mark.parametrize("name", ["spsa", "default"])
def test_annealing_and_outputs_of_an_epoch(name: str) -> None:
    module = Annealed()
    fit(module, batches(5), ZOStrategy(name, seed=1))
    assert (module.seen, module.collected, module.weights_of_kl) == (5, 5, [0.1, 0.2, 0.3, 0.4, 0.5])


class Follower(Task):
    """Averages of the trained weights, moved inside the training step."""

    def __init__(self, kind: str, start: int = 0) -> None:
        super().__init__(mlp())
        self.kind, self.start, self.calls = kind, start, itertools.count()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.aside = [copy.deepcopy(self.net)]
        self.average = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.average_list = [p.detach().clone() for p in self.net.parameters()]
        self.register_buffer("copied", self.net[0].weight.detach().clone())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx >= self.start:
            with torch.no_grad():
                getattr(self, f"move_{self.kind}")(0.99)
        return self.loss(self.net, batch)

    def move_teacher(self, m: float) -> None:
        for t, s in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            t.mul_(m).add_(s, alpha=1 - m)

    def move_teacher_data(self, m: float) -> None:
        for t, s in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            t.data = t.data * m + s.data * (1 - m)

    def move_teacher_foreach(self, m: float) -> None:
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.net.parameters()), 1 - m)

    def move_aside(self, m: float) -> None:
        for t, s in zip(self.aside[0].parameters(), self.net.parameters(), strict=True):
            t.detach().lerp_(s.detach(), 1 - m)

    def move_dict(self, m: float) -> None:
        for name, s in self.net.named_parameters():
            self.average[name].mul_(m).add_(s, alpha=1 - m)

    def move_new_dict(self, m: float) -> None:
        self.average = {name: m * self.average[name] + (1 - m) * s.detach() for name, s in self.net.named_parameters()}

    def move_list(self, m: float) -> None:
        for t, s in zip(self.average_list, self.net.parameters(), strict=True):
            t.copy_(m * t + (1 - m) * s)

    def move_buffer(self, m: float) -> None:
        self.copied.mul_(m).add_(self.net[0].weight, alpha=1 - m)


FOLLOWERS = [name.removeprefix("move_") for name in vars(Follower) if name.startswith("move_")]


@pytest.mark.parametrize("name", ["spsa", "default"])
@pytest.mark.parametrize("kind", FOLLOWERS)
def test_what_follows_perturbed_weights_is_refused_before_anything_changes(kind: str, name: str) -> None:
    module = Follower(kind)
    before = copy.deepcopy(module.state_dict()), copy.deepcopy(module.average), copy.deepcopy(module.average_list)
    aside = weights(module.aside[0])
    with pytest.raises(RuntimeError, match="on_train_batch_end"):
        fit(module, batches(3), ZOStrategy(name, seed=1))
    after = module.state_dict(), module.average, module.average_list
    assert plain(before) == plain(after)
    assert plain(aside) == plain(weights(module.aside[0]))


@pytest.mark.parametrize("kind", ["teacher", "teacher_data", "teacher_foreach", "aside"])
def test_a_teacher_that_starts_to_move_later_is_refused(kind: str) -> None:
    module = Follower(kind, start=3)
    with pytest.raises(RuntimeError, match="on_train_batch_end"):
        fit(module, batches(9), PLAIN)


def test_a_teacher_moved_after_the_step_is_fine() -> None:
    module = Follower("teacher", start=99)
    module.on_train_batch_end = lambda *args: module.move_teacher(0.9)  # type: ignore[method-assign]
    fit(module, batches(3), PLAIN)
    assert not torch.equal(module.teacher[0].weight, mlp()[0].weight)


class Normalised(nn.Module):
    """What is made afresh from weights, or follows activations, is no average of weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        linear = nn.Linear(4, 4)
        with torch.no_grad():
            linear.weight.mul_(0.1)
        wrap = {"spectral": nn.utils.spectral_norm, "weight": nn.utils.weight_norm}.get(kind, lambda layer: layer)
        self.kind, self.layer, self.norm, self.head = kind, wrap(linear), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.copied = torch.zeros(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "copy":
            self.copied = self.layer.weight.detach().clone()
        h = self.norm(self.layer(x))
        if self.kind == "activations":  # of the shape of a weight
            self.copied = 0.9 * self.copied + 0.1 * h[:4].detach()
        return self.head(h)


@pytest.mark.parametrize("kind", ["spectral", "weight", "copy", "activations", "bias"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_what_is_no_average_of_weights_is_not_refused(kind: str) -> None:
    module = Normalised(kind)
    if kind == "bias":  # batch statistics follow a trained bias exactly
        module.requires_grad_(False)
        module.layer.bias.requires_grad_(True)
    session = Session(module, SGD(module.parameters(), lr=1e-3), PLAIN)
    for item in batches(3):
        assert session.estimate(loss(module), item) is not None
        session.update()
    assert module.norm.num_batches_tracked == 3


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "old_spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_set_up_leaves_no_trace(wrap: str, name: str) -> None:
    """Reading a weight under spectral norm moves its power iteration."""
    net = nn.Sequential(WRAPPERS[wrap](nn.Linear(4, 4)), nn.Dropout(0.5), nn.BatchNorm1d(4), WRAPPERS[wrap](nn.Linear(4, 3)))
    before, generator = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    session = Session(net, SGD(net.parameters(), lr=1e-3), RECIPES[name].override(seed=1))
    item = batches(1)[0]
    session.subspace(loss(net), item)
    assert plain(dict(net.state_dict())) == plain(dict(before))
    assert torch.equal(torch.get_rng_state(), generator)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin(item[0])
    session.estimate(loss(net), item)
    for (key, ours), theirs in zip(net.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=0.3), key  # as one forward leaves them, at perturbed weights
    assert torch.equal(torch.rand(3), torch.rand(3, generator=None)) is False


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_lightning_sets_up_without_a_trace(wrap: str) -> None:
    module = Task(nn.Sequential(WRAPPERS[wrap](nn.Linear(4, 4)), WRAPPERS[wrap](nn.Linear(4, 3))))
    before = copy.deepcopy(dict(module.named_buffers()))
    seen: list[Any] = []
    module.on_train_batch_start = lambda *args: seen.append(copy.deepcopy(dict(module.named_buffers())))  # type: ignore
    fit(module, batches(2), ZOConfig(estimator="spsa", seed=1), max_steps=1)
    assert plain(seen[0]) == plain(before)


def test_preparing_is_tried_without_a_trace() -> None:
    module = Keeper("number")
    session = Session(module, SGD(module.parameters(), lr=1e-3), PLAIN)

    def prepare(batch: Any) -> Any:
        module.steps += 1
        return batch

    for item in batches(2):
        session.estimate(lambda batch: F.mse_loss(module.net(batch[0]), batch[1]), item, prepare=prepare)
        session.update()
    assert module.steps == 2
