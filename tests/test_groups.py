"""Directions that are disjoint groups of weights: SPSA at one end, coordinate-wise finite differences at the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers import Task, mlp, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zolightning import ZOStrategy
from zolightning.engine.session import Session
from zolightning.ledger import read, replay
from zolightning.methods.config import ZOConfig
from zolightning.noise import Rademacher, noise_sum, scattering
from zolightning.probing.allocation import grasp
from zolightning.space import DenseLeaf, Epochs, GroupLeaf, Groups, Leaf, arrange, deal
from zolightning.types import Key, Term


def leaf_of(size: int, queries: int, **settings: float) -> GroupLeaf:
    parameter = nn.Parameter(torch.randn(size, dtype=torch.float64))
    return GroupLeaf("w", 3, parameter, Rademacher(), queries, 0.0, queries, **settings)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000, 99_991])
def test_scattering_is_an_order(count: int) -> None:
    step, shift = scattering(Key(5, 6), 2, count)
    assert sorted((e * step + shift) % count for e in range(count)) == list(range(count))
    assert count < 64 or scattering(Key(5, 7), 2, count) != (step, shift)


@pytest.mark.parametrize("queries", [1, 3, 10, 1000])
def test_groups_are_disjoint_even_and_of_unit_variance(queries: int) -> None:
    leaf = leaf_of(1000, queries)
    signs = noise_sum(Rademacher(), [Term(Key(1, 2), 1.0)], 3, 0, 1000, torch.device("cpu")).double()
    each = torch.stack([leaf.noise([Term(Key(1, 2, query), 1.0)], 0, 1000) for query in range(queries)])
    sizes = each.count_nonzero(1)
    assert int(sizes.max() - sizes.min()) <= 1
    torch.testing.assert_close(each.sum(0), math.sqrt(queries) * signs, rtol=1e-15, atol=0)
    assert float(each.square().mean()) == pytest.approx(1)


def test_a_piece_is_that_of_the_whole() -> None:
    leaf = leaf_of(1000, 7, kept=400)
    terms = [Term(Key(1, step, query), 0.1 * query + step) for step in (4, 5) for query in range(7)]
    whole = leaf.noise(terms, 0, 1000)
    torch.testing.assert_close(torch.cat([leaf.noise(terms, at, 100) for at in range(0, 1000, 100)]), whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "queries"), [(1, 1), (2, 1), (30, 30), (1000, 7), (1000, 990)])
def test_a_probe_of_one_direction_is_the_general_one_to_the_bit(size: int, queries: int, dtype: torch.dtype) -> None:
    leaf = GroupLeaf(
        "w", 3, nn.Parameter(torch.randn(size, dtype=dtype)), Rademacher(), queries, 0.0, queries, kept=-(-size * 99 // 100)
    )
    for query in {0, queries // 2, queries - 1}:
        term = Term(Key(1, 2, query), 0.3)
        groups = leaf.groups(term.key, 0, size)
        assert leaf.members(term.key).sort().values.tolist() == (groups == query).nonzero().flatten().tolist()
        out, general = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
        leaf.perturb_into(out, [term])
        Leaf.perturb_into(leaf, general, [term])
        assert torch.equal(out, general)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_sparsity_is_the_one_asked_for(sparsity: float) -> None:
    sizes = (4096, 64, 300, 1)
    leaves = [GroupLeaf(str(i), i, nn.Parameter(torch.zeros(n)), Rademacher()) for i, n in enumerate(sizes)]
    arrange(leaves, 1, deal(round((1 - sparsity) * sum(sizes)), sizes, sizes), sizes)
    moved = sum(int(leaf.noise([Term(Key(0, 0), 1.0)], 0, leaf.parameter.numel()).count_nonzero()) for leaf in leaves)
    assert abs(1 - moved / sum(sizes) - sparsity) < 1e-3


@pytest.mark.parametrize("sparsity", [0.0, 0.4])
@pytest.mark.parametrize("importance", [(1.0, 1.0, 1.0), (9.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1e-9, 1.0, 1e9)])
@pytest.mark.parametrize("queries", [1, 2, 5, 40, 57, 1000])
def test_every_direction_moves_something(queries: int, importance: Sequence[float], sparsity: float) -> None:
    sizes = (50, 6, 1)
    leaves = [GroupLeaf(str(i), i, nn.Parameter(torch.zeros(n)), Rademacher()) for i, n in enumerate(sizes)]
    arrange(leaves, queries, deal(round((1 - sparsity) * sum(sizes)), sizes, importance), importance)
    groups = torch.cat([leaf.groups(Key(0, 0), 0, leaf.parameter.numel()) for leaf in leaves])
    used = min(queries, round((1 - sparsity) * sum(sizes)))
    assert set(groups.tolist()) - {-1} == set(range(used))


def test_one_group_is_spsa_to_the_bit() -> None:
    x, y = torch.randn(16, 8), torch.randn(16, 4)
    weights = []
    for structure in ("dense", "groups"):
        torch.manual_seed(0)
        net = mlp(8, 16, 4)
        session = Session(net, torch.optim.SGD(net.parameters(), lr=1e-2), config("spsa", 1, structure))
        for _ in range(5):
            session.estimate(lambda batch, net=net: (net(batch[0]) - batch[1]).square().mean(), (x, y))
            session.update()
        weights.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def config(estimator: str, queries: int | Literal["weights"], structure: str | Groups) -> ZOConfig:
    return ZOConfig(
        estimator=estimator, num_queries=queries, select="all", structure=structure, normalize=False, seed=1, one_batch=False
    )


@pytest.mark.parametrize("allocate", ["size", "even", "gradient"])
def test_as_many_groups_as_weights_are_finite_differences(allocate: Literal["size", "even", "gradient"]) -> None:
    torch.manual_seed(0)
    net = mlp(3, 5, 2).double()
    x, y = torch.randn(16, 3).double(), torch.randn(16, 2).double()

    def loss(batch: object = None) -> Tensor:
        return (net(x) - y).square().mean()

    count = sum(p.numel() for p in net.parameters())
    start = [p.detach().clone() for p in net.parameters()]
    session = Session(net, torch.optim.SGD(net.parameters(), lr=1.0), config("spsa", count, Groups(allocate)))
    session.estimate(loss, (x, y))
    session.update()
    stepped = [before - p.detach() for p, before in zip(net.parameters(), start, strict=True)]
    for p, before in zip(net.parameters(), start, strict=True):
        p.data.copy_(before)
    reach = session.estimator.eps * math.sqrt(count)
    for parameter, step in zip(net.parameters(), stepped, strict=True):
        for place in range(parameter.numel()):
            flat, sides = parameter.data.view(-1), []
            for side in (reach, -reach):
                flat[place] += side
                sides.append(float(loss()))
                flat[place] -= side
            assert float(step.view(-1)[place]) == pytest.approx((sides[0] - sides[1]) / (2 * reach), rel=1e-9, abs=1e-11)


def test_allocation_lowers_the_error_at_equal_forwards() -> None:
    """Relative squared error of the gradient of an uneven quadratic, q/d = 0.1: SPSA's, groups', allocated groups'."""
    torch.manual_seed(0)
    net = nn.ParameterList([nn.Parameter(torch.randn(40).double()) for _ in range(10)])
    heights = [10.0 ** (-3 * i / 9) for i in range(10)]

    def loss(batch: object = None) -> Tensor:
        return torch.stack([h * p.square().sum() / 2 for h, p in zip(heights, net, strict=True)]).sum()

    exact = torch.cat([h * p.detach() for h, p in zip(heights, net, strict=True)])
    errors = {}
    for name, structure in {"spsa": "dense", "size": Groups(), "gradient": Groups("gradient")}.items():
        session = Session(net, torch.optim.SGD(net.parameters(), lr=0.0), config("spsa", 40, structure))
        squares = []
        for _ in range(5):
            estimate = session.estimate(loss, torch.zeros(1))
            session.update()
            assert estimate is not None
            terms = [Term(t.key, t.coefficient / len(estimate.terms)) for t in estimate.terms]
            found = torch.cat([leaf.gradient(terms) for leaf in session.view().leaves])
            squares.append(float((found - exact).square().sum() / exact.square().sum()))
        errors[name] = math.fsum(squares) / len(squares)
    print(errors)
    assert errors["gradient"] < errors["spsa"] / 3
    assert errors["gradient"] < errors["size"]


def test_a_run_replays_and_resumes(tmp_path: Path) -> None:
    def fit(steps: int, ckpt: str | None = None, ledger: Path | bool = False) -> nn.Module:
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(32, 8), torch.randn(32, 4))
        module = Task(mlp(8, 16, 4), lambda net, batch: (net(batch[0]) - batch[1]).square().mean())
        strategy = ZOStrategy(config("one_sided", 9, Groups("gradient", sparsity=0.3, redraw=2)), lr=1e-2, ledger=ledger)
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = quiet_trainer(strategy, max_steps=steps, max_epochs=-1, callbacks=[keep], enable_checkpointing=True)
        trainer.fit(module, DataLoader(data, batch_size=8), ckpt_path=ckpt)
        return module

    whole = fit(8, ledger=tmp_path / "ledger.zo")
    resumed = fit(8, str(tmp_path / "step=4.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    torch.manual_seed(0)
    torch.randn(32, 8), torch.randn(32, 4)
    start = Task(mlp(8, 16, 4), lambda net, batch: net(batch[0]).sum())
    replay(read(tmp_path / "ledger.zo"), dict(start.named_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), start.parameters(), strict=True))


def test_gaussian_noise_is_refused() -> None:
    net = mlp(3, 5, 2)
    session = Session(net, torch.optim.SGD(net.parameters(), lr=1.0), ZOConfig(structure="groups", noise="gaussian"))
    with pytest.raises(ValueError, match="use noise='rademacher'"):
        session.estimate(lambda batch: net(batch).sum(), torch.zeros(2, 3))


@pytest.mark.parametrize("ratios", ["size", "magnitude", "grasp"])
def test_masks_by_ratios(ratios: Literal["size", "magnitude", "grasp"]) -> None:
    """The realised share, and a direction for each kept weight; 'magnitude' keeps what a sort of all weights gives."""
    torch.manual_seed(0)
    net = mlp(20, 30, 10)
    net[0].weight.data.mul_(3)  # type: ignore[union-attr, operator]
    before = [p.detach().clone() for p in net.parameters()]
    session = Session(
        net, torch.optim.SGD(net.parameters(), lr=0.0), config("coordinatewise", "weights", Groups(sparsity=0.9, ratios=ratios))
    )
    session.estimate(lambda batch: net(batch).square().mean(), torch.randn(16, 20))
    session.update()
    leaves = [leaf for leaf in session.view().leaves if isinstance(leaf, GroupLeaf)]
    counts = [leaf.kept for leaf in leaves]
    total = round(0.1 * sum(p.numel() for p in before))
    assert sum(counts) == total == session.estimator.num_queries == leaves[-1].end
    moved = [int((leaf.groups(Key(1, 0), 0, leaf.parameter.numel()) >= 0).sum()) for leaf in leaves]
    assert moved == counts
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    if ratios == "magnitude":
        limit = torch.cat([p.abs().flatten() for p in before]).topk(total).values[-1]
        assert counts == [int((p.abs() >= limit).sum()) for p in before]


def test_grasp_scores_are_those_of_the_curvature() -> None:
    """On a quadratic, ½ Σ h w², the Hessian times the gradient is h² w: all directions together find the order of h² w²."""
    heights = torch.tensor([1.0, 3.0, 0.1, 2.0]).double()
    net = nn.ParameterList([nn.Parameter(torch.ones(50).double() * (1 + i)) for i in range(4)])

    def loss(terms: Sequence[Term]) -> float:
        moved = [leaf.perturbed(terms) for leaf in leaves]
        return float(torch.stack([h * p.square().sum() / 2 for h, p in zip(heights, moved, strict=True)]).sum())

    leaves = [DenseLeaf(str(i), i, p, Rademacher()) for i, p in enumerate(net)]
    scores = [float(score.mean()) for score in grasp(loss, leaves, 1e-3)]
    exact = [float(h * h * p[0] * p[0]) for h, p in zip(heights, net, strict=True)]
    assert sorted(range(4), key=scores.__getitem__) == sorted(range(4), key=exact.__getitem__)


def test_coordinatewise_is_the_derivative_of_each_weight() -> None:
    torch.manual_seed(0)
    net = mlp(3, 5, 2).double()
    x = torch.randn(16, 3).double()
    net(x).square().mean().backward()
    exact = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    settings = config("coordinatewise", "weights", "groups").override(eps=1e-6)
    session = Session(net, torch.optim.SGD(net.parameters(), lr=0.0), settings)
    estimate = session.estimate(lambda batch: net(batch).square().mean(), x)
    assert estimate is not None
    assert estimate.forwards == 1 + exact.numel()
    terms = [Term(t.key, t.coefficient / exact.numel()) for t in estimate.terms]
    found = torch.cat([leaf.gradient(terms).flatten() for leaf in session.view().leaves])
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


def test_deepzero_as_its_recipe_says(tmp_path: Path) -> None:
    """Masks stay for five epochs of a Trainer, and the ledger holds the rule that a replay needs."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 8), torch.randn(32, 4))
    module = Task(mlp(8, 16, 4), lambda net, batch: (net(batch[0]) - batch[1]).square().mean())
    start = [p.detach().clone() for p in module.parameters()]
    strategy = ZOStrategy("deepzero", ledger=tmp_path / "ledger.zo", seed=1)
    trainer = quiet_trainer(strategy, max_epochs=1, accumulate_grad_batches=2)
    trainer.fit(module, DataLoader(data, batch_size=8))
    (leaf, *_) = strategy.session.view().leaves
    assert isinstance(leaf, GroupLeaf)
    assert leaf.redraw == 5 * 2
    assert leaf.queries == round(0.1 * sum(p.numel() for p in start)) == strategy.estimator.num_queries
    trained = [p.detach().clone() for p in module.parameters()]
    for p, before in zip(module.parameters(), start, strict=True):
        p.data.copy_(before)
    replay(read(tmp_path / "ledger.zo"), dict(module.named_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(trained, module.parameters(), strict=True))


def test_epochs_need_a_trainer() -> None:
    net = mlp(3, 5, 2)
    session = Session(net, torch.optim.SGD(net.parameters(), lr=1.0), config("spsa", 2, Groups(redraw=Epochs(2))))
    with pytest.raises(ValueError, match="which a Trainer knows"):
        session.estimate(lambda batch: net(batch).sum(), torch.zeros(2, 3))


@pytest.mark.parametrize("settings", [{"estimator": "coordinatewise"}, {"num_queries": "weights"}])
def test_coordinates_need_groups(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs `structure='groups'`"):
        ZOConfig(structure="dense", **settings)


@pytest.mark.parametrize(
    "wrong",
    [{"allocate": "best"}, {"sparsity": 1.0}, {"redraw": 0}, {"ratios": "best"}, {"reuse": -1.0}],
)
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"Groups\("):
        Groups(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be >= 1"):
        Epochs(0)
