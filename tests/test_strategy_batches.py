"""Per-example directions: batches of every shape are repeated, and hopeless cases say so."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import PerExampleTask, Task, assert_same, batches, fit, mlp, per_example_mse, weights
from torch import Tensor, nn
from torch.optim import SGD
from transformers import BatchEncoding

from zolightning import ZOStrategy
from zolightning.methods.estimators import SPSA, PerExampleSPSA
from zolightning.probing.batches import batch_examples, repeat_batch
from zolightning.space import DenseLeaf, Leaf, Rank1Leaf


@dataclass
class Pair:
    x: Tensor
    y: Tensor
    name: str = "pair"


class Named(NamedTuple):
    x: Tensor
    y: Tensor


def fields(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (dict, BatchEncoding)):
        return batch["x"], batch["y"]
    return (batch.x, batch.y) if hasattr(batch, "x") else (batch[0], batch[1])


SHAPES = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"x": x, "y": y, "scale": torch.tensor(1.0), "names": list("abcde")},
    "named tuple": lambda x, y: Named(x, y),
    "dataclass": Pair,
    "batch encoding": lambda x, y: BatchEncoding({"x": x, "y": y}),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_batches_are_repeated(kind: str) -> None:
    sizes: list[int] = []

    def loss(net: nn.Module, batch: Any) -> Tensor:
        x, y = fields(batch)
        sizes.append(len(x))
        if isinstance(batch, dict):
            assert len(batch["names"]) == len(x)
            assert batch["scale"].dim() == 0
        assert type(batch) is type(SHAPES[kind](x, y))
        return per_example_mse(net, (x, y))

    strategy = ZOStrategy(lr="module", select="all", eps=1e-2, seed=1)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    fit(PerExampleTask(net, loss, lambda p: SGD(p, lr=1e-3)), [SHAPES[kind](x, y) for x, y in batches(3)], strategy)
    assert sizes == [5] * 3 + [10] * 4  # a rehearsal, three looks, then both probes of a step in one forward
    assert len(strategy.last_record.terms) == 5  # type: ignore[union-attr]


def test_two_forwards_on_request() -> None:
    sizes: list[int] = []

    def loss(net: nn.Module, batch: Any) -> Tensor:
        sizes.append(len(batch[0]))
        return per_example_mse(net, batch)

    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    fit(PerExampleTask(net, loss), batches(1), ZOStrategy(lr="module", select="all", eps=1e-2, one_batch=False))
    assert sizes == [5] * 5


def test_repetition_goes_example_by_example() -> None:
    batch = {"x": torch.arange(2), "y": [torch.eye(2)], "text": ["a", "b"], "other": ("p", "q", "r"), "n": 2}
    assert batch_examples(batch) == 2
    twice = repeat_batch(batch, 2, 2)
    assert twice["x"].tolist() == [0, 1, 0, 1]
    assert torch.equal(twice["y"][0], torch.eye(2).repeat(2, 1))
    assert twice["text"] == ["a", "b", "a", "b"]
    assert twice["other"] == ("p", "q", "r")
    assert twice["n"] == 2
    assert batch_examples(["a", "b"]) is None
    assert batch_examples(torch.tensor(1.0)) is None


class Odd(nn.Linear):
    """A layer whose bias stands beside nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + 2 * self.bias


@pytest.mark.parametrize("estimator", ["per_example", PerExampleSPSA(1e-2)], ids=str)
@pytest.mark.parametrize(("last", "leaves"), [(nn.Linear, [Rank1Leaf, DenseLeaf]), (Odd, [Rank1Leaf])])
def test_rank1_where_linear_layers_hold_nearly_all(estimator: Any, last: type[nn.Linear], leaves: list[type[Leaf]]) -> None:
    """Biases take part where each example can read its own, and stay as they are where not: they are under a tenth here."""
    net = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), last(40, 3))
    strategy = ZOStrategy(lr="module", estimator=estimator, select="re:2", eps=1e-2)
    fit(PerExampleTask(net, per_example_mse, lambda p: SGD(p, lr=1e-3)), batches(1), strategy)
    view = strategy.view(strategy.optimizers[0])
    assert [type(leaf) for leaf in view.leaves] == leaves


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (nn.Sequential(nn.Conv1d(5, 5, 1), nn.Linear(4, 3)), "half of the weights are no matrix"),
        (nn.Conv1d(5, 5, 1), "no linear layer"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_dense_otherwise(net: nn.Module, why: str) -> None:
    strategy = ZOStrategy(lr="module", select="all", eps=1e-2)

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return net(batch[0]).square().mean(-1)

    fit(PerExampleTask(net, loss), batches(2), strategy)
    assert {type(leaf) for leaf in strategy.view(strategy.optimizers[0]).leaves} == {DenseLeaf}
    assert len(strategy.last_record.terms) == 1  # type: ignore[union-attr]


def test_spsa_takes_the_mean_of_per_example_losses() -> None:
    strategy = ZOStrategy(lr="module", estimator=SPSA(1e-2), select="all", normalize=False)
    fit(PerExampleTask(mlp(), per_example_mse), batches(1), strategy)
    assert strategy.last_record.forwards == 2  # type: ignore[union-attr]
    assert strategy.estimator.eps == 1e-2


def test_compiled_layers_get_one_direction() -> None:
    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    net[0].compile(backend="eager")
    strategy = ZOStrategy(lr="module", select="all", eps=1e-2)
    fit(PerExampleTask(net, per_example_mse), batches(1), strategy)
    assert len(strategy.last_record.terms) == 1  # type: ignore[union-attr]


def flat(net: nn.Module, batch: Any) -> Tensor:
    """The layer sees no dimension of examples."""
    x, y = batch
    return (net(x.reshape(2, -1, 4)).reshape(-1, 3) - y).square().mean(-1)


def regularised(net: nn.Module, batch: Any) -> Tensor:
    """The weight is read outside its layer."""
    return per_example_mse(net, batch) + net[0].weight.norm()  # type: ignore[index]


def normalised(net: nn.Module, batch: Any) -> Tensor:
    """Batch normalisation: every example moves the others."""
    x, y = batch
    return (nn.functional.batch_norm(net(x), None, None, training=True) - y).square().mean(-1)


@pytest.mark.parametrize("loss", [flat, regularised, normalised])
def test_steps_that_cannot_have_a_direction_for_each_example_get_one(loss: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    strategy = ZOStrategy(lr="module", select="all", eps=1e-2)
    fit(PerExampleTask(net, loss), batches(2, size=4), strategy)
    assert len(strategy.last_record.terms) == 1  # type: ignore[union-attr]


def mixing(net: nn.Module, batch: Any) -> Tensor:
    """Every example moves the others; of one example it cannot be seen."""
    x, y = batch
    out = net(x)
    return (out + out.mean(0) - y).square().mean(-1)


@pytest.mark.parametrize(("loss", "terms"), [(mixing, 1), (per_example_mse, 4)])
@pytest.mark.parametrize("first", ["one example", "not a number"])
def test_a_first_batch_that_shows_nothing_does_not_decide(first: str, loss: Any, terms: int) -> None:
    (start,) = batches(1, size=1) if first == "one example" else [(torch.full((4, 4), math.nan), torch.ones(4, 3))]
    strategy = ZOStrategy(lr="module", select="all", eps=1e-2)
    fit(PerExampleTask(nn.Sequential(nn.Linear(4, 3, bias=False)), loss), [start, *batches(2, size=4)], strategy)
    assert len(strategy.last_record.terms) == terms  # type: ignore[union-attr]


def test_a_last_batch_of_one_example_is_standardised_as_the_one_before() -> None:
    strategy = ZOStrategy(lr="module", select="all", eps=1e-2, normalize="std")
    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    fit(PerExampleTask(net, per_example_mse), [*batches(2, size=4), *batches(1, size=1)], strategy)
    record = strategy.last_record
    assert record is not None
    assert [t.coefficient for t in record.terms] == [record.raw[0] / strategy.session.state_dict()["shaping"][0]["0.std"]]


def test_batches_of_one_example_are_looked_at_once() -> None:
    calls: list[int] = []

    def counted(net: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        return per_example_mse(net, batch)

    fit(
        PerExampleTask(nn.Sequential(nn.Linear(4, 3, bias=False)), counted),
        batches(4, size=1),
        ZOStrategy(lr="module", select="all"),
    )
    assert calls == [1, 1, 1, 2] + [2] * 4


def test_objective_that_does_not_take_a_repeated_batch() -> None:
    """Two forwards of the batch as it is, instead of one of its repetition."""
    sizes: list[int] = []

    def fixed(net: nn.Module, batch: Any) -> Tensor:
        sizes.append(len(batch[0]))
        return per_example_mse(net, batch)[:5]

    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    strategy = ZOStrategy(lr="module", select="all", eps=1e-2)
    fit(PerExampleTask(net, fixed), batches(1), strategy)
    assert sizes == [5, 5, 5, 10, 5, 5]
    assert len(strategy.last_record.terms) == 5  # type: ignore[union-attr]


@pytest.mark.parametrize("estimator", ["per_example", "spsa"])
@pytest.mark.parametrize(("size", "entries"), [(1, 1), (3, 3)])
def test_what_has_as_many_entries_as_examples_by_chance(size: int, entries: int, estimator: str) -> None:
    """Such a batch runs in two forwards, and nothing is lost."""

    def scaled(net: nn.Module, batch: Any) -> Tensor:
        x, y, scale = batch
        assert scale.shape == (entries,)
        return (net(x) * scale - y).square().mean(-1)

    items = [(x, y, torch.full((entries,), 2.0)) for x, y in (*batches(2, size=4), *batches(1, size=size), *batches(1, size=4))]
    module, twin = (PerExampleTask(nn.Sequential(nn.Linear(4, 3)), scaled) for _ in range(2))
    twin.load_state_dict(module.state_dict())
    strategy = ZOStrategy(lr="module", select="all", eps=1e-2, estimator=estimator, seed=1)
    with pytest.warns(UserWarning, match=f"a batch of {size} ran in two forwards, since doubling it failed: AssertionError"):
        fit(module, items, strategy)
    assert strategy.zo_step == 4
    fit(twin, items, ZOStrategy(lr="module", select="all", eps=1e-2, estimator=estimator, seed=1, one_batch=False))
    assert_same(weights(module), weights(twin), tolerance=1e-5)


def test_objective_that_changes_its_mind() -> None:
    calls: list[int] = []

    def moody(net: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        losses = per_example_mse(net, batch)
        return losses if len(calls) < 4 else losses.sum()

    net = nn.Sequential(nn.Linear(4, 3, bias=False))
    with pytest.raises(ValueError, match=r"a loss for each example at first.*ZOStrategy\(estimator='spsa'\)"):
        fit(PerExampleTask(net, moody), batches(3), ZOStrategy(lr="module", select="all", eps=1e-2))


def test_skipped_first_batch() -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor | None:
        return None if batch[0] is first[0] else per_example_mse(net, batch)

    items = batches(2)
    first = items[0]
    strategy = ZOStrategy(lr="module", select="all", eps=1e-2)
    fit(PerExampleTask(nn.Sequential(nn.Linear(4, 3, bias=False)), loss), items, strategy)
    assert strategy.zo_step == 2
    assert not strategy.last_record.skipped  # type: ignore[union-attr]


def test_sequences() -> None:
    """(B, T, d) inputs: a direction for an example, not for a token."""
    net = nn.Sequential(nn.Linear(4, 3, bias=False))

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return F.softplus(net(batch)).mean((1, 2))

    strategy = ZOStrategy(lr="module", select="all", eps=1e-2)
    fit(PerExampleTask(net, loss), [torch.randn(3, 7, 4)], strategy)
    assert len(strategy.last_record.terms) == 3  # type: ignore[union-attr]


def mean_mse(net: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(net(batch[0]).double(), batch[1].double())


def tokens(net: nn.Module, batch: Any) -> Tensor:
    """As OPT does: layers see the tokens of all examples in one long row."""
    x, y = batch
    return nn.functional.mse_loss(net(x.reshape(-1, 4)).view(*x.shape[:2], 3).double(), y.double())


@pytest.mark.parametrize("kind", ["examples", "tokens"])
def test_unchanged_module_gets_a_direction_for_each_example(kind: str) -> None:
    """Its mean loss is split, in two forwards; the trajectory is that of a module that gives the losses itself."""
    torch.manual_seed(0)
    shape = (5,) if kind == "examples" else (5, 6)
    items = [(torch.randn(*shape, 4), torch.randn(*shape, 3)) for _ in range(6)]
    ours = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    twin = copy.deepcopy(ours)
    strategy = ZOStrategy(lr="module", select="all", eps=1e-2, seed=1)
    fit(Task(ours, mean_mse if kind == "examples" else tokens, lambda p: SGD(p, lr=1e-2)), items, strategy)
    assert len(strategy.last_record.terms) == 5  # type: ignore[union-attr]
    assert strategy.last_record.forwards == 2  # type: ignore[union-attr]

    def losses(net: nn.Module, batch: Any) -> Tensor:
        return (net(batch[0]).double() - batch[1].double()).square().flatten(1).mean(-1)

    fit(PerExampleTask(twin, losses, lambda p: SGD(p, lr=1e-2)), items, ZOStrategy(lr="module", select="all", eps=1e-2, seed=1))
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def classes(net: nn.Module, batch: Any) -> Tensor:
    """The mean that PyTorch takes, over the targets that are not ignored."""
    return F.cross_entropy(net(batch["x"]), batch["y"])


def test_a_batch_of_ignored_targets_or_of_nothing_is_skipped() -> None:
    def batch(size: int, target: int) -> dict[str, Tensor]:
        return {"x": torch.ones(size, 4), "y": torch.full((size,), target)}

    for odd in (batch(8, -100), batch(0, 1)):
        task = Task(mlp(), classes)
        trainer = fit(task, [batch(8, 1), odd, batch(8, 1)], ZOStrategy(lr=1e-2))
        assert trainer.global_step == 3
        assert all(p.isfinite().all() for p in task.parameters())


def test_a_batch_in_a_mapping_of_another_kind() -> None:
    batch = defaultdict(list, x=torch.ones(8, 4), y=torch.ones(8, dtype=torch.int64))
    task = Task(mlp(), classes)
    before = weights(task)
    fit(task, [batch, batch], ZOStrategy(lr=1e-2))
    assert any(not torch.equal(value, before[name]) for name, value in weights(task).items())


def test_a_trial_that_gives_no_loss_is_not_taken() -> None:
    """A step may return None where it finds no finite loss, at the points that the conservative step tries as well."""
    calls = 0

    def sometimes(net: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return None if calls % 5 == 0 else per_example_mse(net, batch).mean()

    task = Task(mlp(), sometimes)
    fit(task, batches(2), ZOStrategy("mezo", lr=1e-2, conservative=True, ledger=False))
    assert calls == 1 + 2 * 5  # the first is a rehearsal


def test_complex_weights_are_refused() -> None:
    task = Task(mlp())
    task.net.register_parameter("phase", nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    with pytest.raises(ValueError, match=r"'net.phase' is torch.complex64; perturbations are real"):
        fit(task, batches(1))
