"""Sparse and low-rank leaves, and blocks that take turns: each is its textbook twin, replays, resumes and restores."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from helpers import PLAIN, Resumable, Task, assert_same, batches, dropped, fit, mse, quiet_trainer, weights
from ledgers import Noted, parameters
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from zolightning import LedgerCheckpointIO, ZOConfig, ZOStrategy
from zolightning.engine.updates import apply_update
from zolightning.ledger import LedgerError, read, replay
from zolightning.ledger.format import Method
from zolightning.noise import Distribution, Gaussian, Rademacher, permutation, sample
from zolightning.space import Cycle, DenseLeaf, LowRank, LowRankLeaf, Sparse, SparseLeaf, build_view, take_turns
from zolightning.space.sparse_leaf import measure
from zolightning.types import Key, Term

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
OPTIMIZERS: dict[str, Callable[[list[Any]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=1e-2),
    "decayed": lambda p: SGD(p, lr=1e-2, weight_decay=0.3),
    "nesterov": lambda p: SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=1e-2),
}
KINDS: dict[str, ZOConfig] = {
    "sparse": PLAIN.override(structure=Sparse(0.6)),
    "lowrank": PLAIN.override(structure=LowRank(2, 3)),
    "cyclic": PLAIN.override(cycle=Cycle(every=2)),
    "shuffled": PLAIN.override(structure=Sparse(0.5), cycle=Cycle(2, order="shuffled")),
}
STEPS = 9


def stack() -> nn.Sequential:
    """Three blocks between an input and an output layer."""
    torch.manual_seed(1)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(*blocks), nn.Linear(6, 3))


def typed(precision: str, count: int = STEPS) -> list[Any]:
    return [(x.to(DTYPES[precision]), y.to(DTYPES[precision])) for x, y in batches(count)]


class Twin:
    """What a config's leaves do, in dense tensors."""

    def __init__(self, net: nn.Module, config: ZOConfig) -> None:
        self.config, self.names = config, [name for name, _ in net.named_parameters()]
        self.limits = [self._limit(p) for p in net.parameters()]

    def _limit(self, p: Tensor) -> float:
        if not isinstance(self.config.structure, Sparse):
            return math.inf
        count = max(1, round((1 - self.config.structure.sparsity) * p.numel()))
        h = float(p.detach().abs().flatten().sort().values[count - 1])
        return h if h > 0 else math.inf

    def fixed(self, net: nn.Module) -> list[Tensor]:
        return [p.detach().abs() > h for p, h in zip(net.parameters(), self.limits, strict=True)]

    def _active(self, name: str, key: Key) -> bool:
        cycle = self.config.cycle
        if cycle is None:
            return True
        block = int(name.split(".")[1]) if name.startswith("1.") else 3
        round_, turn = divmod(key.step // cycle.every, math.ceil(4 / cycle.blocks))
        place = permutation(Key(key.seed, round_), 4)[block] if cycle.order == "shuffled" else block
        return turn * cycle.blocks <= place < (turn + 1) * cycle.blocks

    def directions(self, net: nn.Module, key: Key, dist: Distribution) -> list[Tensor | None]:
        zs: list[Tensor | None] = []
        masks = self.fixed(net)
        for i, (name, p, z) in enumerate(zip(self.names, net.parameters(), reference.directions(net, key, dist), strict=True)):
            assert z is not None
            kind = self.config.structure
            if isinstance(kind, LowRank) and p.dim() == 2:
                z = lowrank(dist, key, i, p.shape, kind)
            zs.append(z.masked_fill(masks[i], 0) if self._active(name, key) else None)
        return zs


def lowrank(dist: Distribution, key: Key, leaf: int, shape: torch.Size, kind: LowRank) -> Tensor:
    """U Vᵀ/√r: U are the first elements of the direction's noise, V the next ones of the noise when V was last drawn."""
    (rows, columns), r = shape, kind.rank
    held = Key(key.seed, key.step // kind.hold * kind.hold)
    u = sample(dist, key, leaf, torch.zeros(1, dtype=torch.int64), r * rows)[0].view(r, rows)
    v = sample(dist, held, leaf, torch.tensor([r * rows]), r * columns)[0].view(r, columns)
    return u.T @ v / math.sqrt(r)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_follows_the_textbook(kind: str, optimizer: str, precision: str) -> None:
    """Bit for bit where z is: noise and queries take turns over the product."""
    turn = list(itertools.product(KINDS, OPTIMIZERS, DTYPES)).index((kind, optimizer, precision))
    config = KINDS[kind].override(noise=("rademacher", "gaussian")[turn % 2], num_queries=1 + turn % 3)
    accumulate = 1 + turn % 5 // 4
    net = stack().to(DTYPES[precision])
    twin, start = copy.deepcopy(net), weights(net)
    fit(
        Task(net, optimizer=OPTIMIZERS[optimizer]), typed(precision), config, precision=precision,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    book = Twin(twin, config)
    reference.train(
        twin, typed(precision), mse, OPTIMIZERS[optimizer](list(twin.parameters())), config.build_distribution(), seed=7,
        eps=1e-3, queries=config.num_queries, accumulate=accumulate, directions=book.directions, fixed=book.fixed,
    )  # fmt: skip
    assert any(not torch.equal(value, start[name]) for name, value in weights(net).items())
    # the products of a linear layer's factors with its input round otherwise than a perturbed weight
    assert_same(weights(net), weights(twin), {"32-true": 2e-3, "64-true": 1e-6}[precision] if kind == "lowrank" else None)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_replays_and_resumes(kind: str, optimizer: str, precision: str, tmp_path: Path) -> None:
    """The ledger gives every step's weights; a run resumed in a held V, a block's turn, and with moved weights is the run."""
    turn = list(itertools.product(KINDS, OPTIMIZERS, DTYPES)).index((kind, optimizer, precision))
    config = KINDS[kind].override(noise=("gaussian", "rademacher")[turn % 2], num_queries=1 + turn % 2, normalize=turn % 3 == 0)
    plugins: list[Any] = [LedgerCheckpointIO()] if turn % 2 else []

    def train(name: str, checkpoint: Path | None = None) -> tuple[Task, Noted]:
        torch.manual_seed(5)
        task, noted = Task(stack(), dropped, OPTIMIZERS[optimizer]), Noted()
        saver = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = quiet_trainer(
            ZOStrategy(config, ledger=tmp_path / name / "ledger.zo"), callbacks=[noted, saver], precision=precision,
            enable_checkpointing=True, plugins=plugins,
        )  # fmt: skip
        trainer.fit(task, Resumable(typed(precision)), ckpt_path=checkpoint)
        return task, noted

    whole, noted = train("whole")
    resumed, again = train("resumed", tmp_path / "whole" / "step=4.ckpt")
    assert_same(weights(resumed), weights(whole))
    assert_same(again.weights[6], noted.weights[6])
    for name in ("whole", "resumed"):
        ledger = read(tmp_path / name / "ledger.zo")
        assert ledger.last == STEPS
        for step in (0, 3, STEPS):
            rebuilt = parameters(noted.weights[0])
            replay(ledger, rebuilt, step)
            assert_same(rebuilt, noted.weights[step])  # type: ignore[arg-type]
    assert len({r for r in map(str, read(tmp_path / "whole" / "ledger.zo")) if r.startswith("Method")}) == 1


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("optimizer", ["decayed", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_restore(kind: str, optimizer: str, precision: str) -> None:
    """A step with lr 0, or one whose second probe raises, leaves every bit."""
    calls = itertools.count()

    def failing(net: nn.Module, batch: Any) -> Any:
        if next(calls) == 2 * 3 + 1:
            raise RuntimeError("mid-probe")
        return mse(net, batch)

    def still(p: list[Any]) -> Optimizer:
        chosen = OPTIMIZERS[optimizer](p)
        for group in chosen.param_groups:
            group["lr"] = 0.0
        return chosen

    net = stack().to(DTYPES[precision])
    before = weights(net)
    with pytest.raises(RuntimeError, match="mid-probe"):
        fit(Task(net, failing, still), typed(precision), KINDS[kind], precision=precision)
    assert next(calls) == 8
    assert_same(weights(net), before)


def test_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    """A ledger says how its leaves were made; one that says something impossible is not replayed."""
    net = stack()
    fit(Task(net), batches(2), ZOStrategy(KINDS["shuffled"], ledger=tmp_path / "ledger.zo"))
    (method,) = {str(r): r for r in read(tmp_path / "ledger.zo") if isinstance(r, Method)}.values()
    assert {kind for kind, _, _ in method.leaves.values()} == {"sparse"}
    assert method.settings["net.0.weight"]["sparsity"] == 0.5
    assert method.turns["net.1.2.0.weight"] == (2, 4, 2, 1, "shuffled")
    from test_ledger_replay import Run, forge

    run = Run(tmp_path / "ledger.zo", Task(net), {})
    for change, message in (
        ({"leaves": {n: ("lowrank", i, s) for n, (_, i, s) in method.leaves.items()}}, "Method record .* cannot be applied"),
        ({"settings": {}}, "Method record .* cannot be applied: .*sparsity"),
        ({"turns": {"net.0.weight": (0, 4, 0, 1, "cyclic")}}, r"Method record .* cannot be applied: .*blocks=.* must be >= 1"),
        ({"leaves": {n: ("masked", i, s) for n, (_, i, s) in method.leaves.items()}}, "leaf kind 'masked' is unknown"),
    ):
        base = parameters({f"net.{n}": p for n, p in weights(stack()).items()})
        forged = forge(tmp_path / "forged.zo", run, [Method(**{**vars(method), **change})])
        with pytest.raises(LedgerError, match=message):
            replay(read(forged), base)


# ---- sparse


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.75, 0.8, 0.999])
def test_threshold_is_the_order_statistic(sparsity: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of real weights, whatever their distribution: heavy tails, ties, one-sided, tiny, huge."""
    from zolightning.noise import reference as chunks

    monkeypatch.setattr(chunks, "CHUNK", 100)
    g = torch.Generator().manual_seed(0)
    for weight in (
        torch.randn(37, 11, generator=g) ** 3,
        torch.rand(400, generator=g) + 1,
        torch.randint(1, 4, (50, 3), generator=g),
        torch.randn(301, generator=g) * 1e-30,
        torch.tensor([-2.0]),
        torch.randn(20, 30, generator=g).T[3:],
    ):
        w = weight.to(dtype)
        k = max(1, round((1 - sparsity) * w.numel()))
        h = float(w.abs().flatten().sort().values[k - 1])
        assert measure(w, sparsity) == (h if h > 0 else math.inf)


def test_weights_without_magnitudes_are_trained_whole() -> None:
    """A bias that starts at zero has no small part: it is dense, and stays so when the run is resumed."""
    leaf = SparseLeaf("b", 0, nn.Parameter(torch.zeros(4)), Rademacher(), 0.75)
    assert leaf.threshold == math.inf
    assert leaf.noise([Term(Key(0, 0), 1.0)], 0, 4).abs().tolist() == [1.0] * 4


@pytest.mark.parametrize("shape", [(5,), (40, 7), (4, 3, 2), ()])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_masked_weight_is_the_dense_one_or_the_stored_one(shape: tuple[int, ...], contiguous: bool) -> None:
    torch.manual_seed(0)
    value = torch.randn(shape)
    weight = nn.Parameter(value if contiguous or value.dim() < 2 else value.transpose(0, 1))
    terms = [Term(Key(1, 2, q), 0.1 * (q + 1)) for q in range(3)]
    sparse, dense = SparseLeaf("w", 3, weight, Gaussian(), 0.5), DenseLeaf("w", 3, weight, Gaussian())
    small = weight.detach().abs() <= sparse.threshold
    assert 0 < small.sum() <= max(1, round(weight.numel() / 2))
    expected = torch.where(small, dense.perturbed(terms), weight.detach())
    assert torch.equal(sparse.perturbed(terms), expected)
    assert torch.equal(sparse.gradient(terms), torch.where(small, dense.gradient(terms), torch.zeros(())))
    if weight.dim():
        rows = torch.tensor([[0, -1, 2]])
        assert torch.equal(sparse.rows(rows, terms), expected[rows])
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    sparse.perturb_into(out, terms)
    assert torch.equal(out, expected.bfloat16())


def test_the_mask_follows_the_weights() -> None:
    """Fixed threshold, moving mask: what grows beyond h stops, what shrinks below it starts."""
    weight = nn.Parameter(torch.tensor([0.1, 0.2, 0.9, 1.0]))
    leaf = SparseLeaf("w", 0, weight, Rademacher(), 0.5)
    assert leaf.fixed(0, 4).tolist() == [False, False, True, True]
    weight.data[1], weight.data[2] = 0.5, -0.15
    assert leaf.fixed(0, 4).tolist() == [False, True, False, True]
    assert leaf.fixed(2, 2).tolist() == [False, True]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_large_weights_stay(optimizer: str, dtype: torch.dtype) -> None:
    net = stack().to(dtype)
    view, before = build_view(net, net.parameters(), Gaussian(), structure=Sparse(0.5)), weights(net)
    fixed = {leaf.name: leaf.fixed(0, leaf.parameter.numel()).view(leaf.parameter.shape) for leaf in view.leaves}  # type: ignore[union-attr]
    stats = apply_update(
        OPTIMIZERS[optimizer](list(net.parameters())), view.leaves, [Term(Key(0, 0), 5.0)], Key(0, 0), measure=True
    )
    for name, value in weights(net).items():
        assert torch.equal(value[fixed[name]], before[name][fixed[name]])
        assert (value[~fixed[name]] != before[name][~fixed[name]]).float().mean() > 0.5
    assert stats.lost is not None and stats.lost < 0.3  # of those that are trained


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan")])
def test_bad_sparsity(bad: float) -> None:
    with pytest.raises(ValueError, match=r"`Sparse\(sparsity=...\)` is the share left untrained, in \[0, 1\), got"):
        Sparse(bad)


# ---- low rank


@pytest.mark.parametrize("noise", [Rademacher(), Gaussian()], ids=repr)
def test_subspace_is_held(noise: Distribution) -> None:
    """Directions of one hold share V, those of the next do not; U differs always; elements have variance 1."""
    leaf = LowRankLeaf("w", 0, nn.Parameter(torch.zeros(60, 50)), noise, 3, 4)
    keys = [Key(1, step, query) for step in range(8) for query in range(2)]
    zs = torch.stack([leaf.gradient([Term(key, 1.0)]) for key in keys])
    assert [int(torch.linalg.matrix_rank(z)) for z in zs] == [3] * 16
    assert torch.linalg.matrix_rank(zs[:8].reshape(-1, 50)) == torch.linalg.matrix_rank(zs[8:].reshape(-1, 50)) == 3
    assert torch.linalg.matrix_rank(zs.reshape(-1, 50)) == 6
    assert torch.linalg.matrix_rank(zs[:8].transpose(1, 2).reshape(-1, 60)) == 24
    assert 0.8 < zs.square().mean() < 1.2


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_factors_on_activations_are_the_perturbed_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Embedding(11, 6), nn.Linear(6, 5), nn.Conv1d(5, 4, 2)]).to(dtype)
    view = build_view(net, net.parameters(), Gaussian(), structure=LowRank(2, 5))
    ids, key = torch.tensor([[1, 10, 3, 0]]), Key(9, 7)

    def run(parts: Any) -> Tensor:
        return parts[2](parts[1](parts[0](ids)).transpose(1, 2))

    twin = copy.deepcopy(net)
    for p, leaf in zip(twin.parameters(), view.leaves, strict=True):
        p.data = leaf.perturbed([Term(key, 0.05)])
    with torch.no_grad(), view.along(key, 0.05):
        torch.testing.assert_close(run(net), run(twin), rtol=0, atol=5e-2 if dtype.itemsize == 2 else 1e-6)
        assert torch.equal(net[0](ids), twin[0](ids))


def test_slices_of_a_low_rank_direction() -> None:
    leaf = LowRankLeaf("w", 2, nn.Parameter(torch.zeros(7, 5, 3)), Gaussian(), 2, 3)
    terms = [Term(Key(1, 8, q), c) for q, c in enumerate((0.5, -2.0))]
    whole = leaf.gradient(terms)
    assert torch.equal(leaf.noise(terms, 17, 40), whole.flatten()[17:57])
    assert leaf.perturbed(terms).shape == (7, 5, 3)
    with pytest.raises(ValueError, match=r"needs a matrix, got 'x' of shape \(3,\)"):
        LowRankLeaf("x", 0, nn.Parameter(torch.zeros(3)), Rademacher(), 1, 1)


def test_the_paper_s_estimator_and_step() -> None:
    """g·UVᵀ/r with g from θ ± ε′UVᵀ is this leaf's estimate at ε = √r ε′."""
    shape, kind, key, small = torch.Size((6, 5)), LowRank(3, 4), Key(2, 9), 1e-3
    leaf = LowRankLeaf("w", 0, nn.Parameter(torch.zeros(shape, dtype=torch.float64)), Gaussian(), 3, 4)
    uv = math.sqrt(3) * lowrank(Gaussian(), key, 0, shape, kind).double()
    target = torch.randn(shape, dtype=torch.float64)

    def loss(w: Tensor) -> float:
        return (w - target).pow(4).sum().item()

    paper = (loss(small * uv) - loss(-small * uv)) / (2 * small) * uv / 3
    eps = math.sqrt(3) * small
    g = (loss(leaf.perturbed([Term(key, eps)])) - loss(leaf.perturbed([Term(key, -eps)]))) / (2 * eps)
    torch.testing.assert_close(leaf.gradient([Term(key, g)]), paper, rtol=1e-5, atol=1e-5)


# ---- turns


@pytest.mark.parametrize("cycle", [Cycle(), Cycle(2), Cycle(3, 5), Cycle(2, 2, "shuffled"), Cycle(9)], ids=str)
def test_every_block_has_its_turn(cycle: Cycle) -> None:
    net = stack()
    view = build_view(net, net.parameters(), Rademacher())
    assert take_turns(net, view.leaves, cycle) == 4
    rounds, orders = -(-4 // cycle.blocks), set()
    for lap in range(6):
        seen = []
        for step in range(lap * rounds * cycle.every, (lap + 1) * rounds * cycle.every):
            active = {leaf.turn.block for leaf in view.leaves if leaf.turn and leaf.active(Key(3, step))}
            assert len(active) == cycle.blocks or len(active) == 4 % cycle.blocks
            seen += sorted(active)
        assert sorted(seen) == sorted([0, 1, 2, 3] * cycle.every)
        orders.add(tuple(seen))
    assert (len(orders) > 1) == (cycle.order == "shuffled")


def test_blocks_of_a_cycle() -> None:
    """One for each of the stack, and one for all that is outside."""
    net = stack()
    view = build_view(net, net.parameters(), Rademacher())
    take_turns(net, view.leaves, Cycle())
    assert [leaf.turn.block for leaf in view.leaves if leaf.turn] == [3, 3, *[0] * 4, *[1] * 4, *[2] * 4, 3, 3]
    inner = build_view(net, net.parameters(), Rademacher(), select_spec="last:2")
    assert take_turns(net, inner.leaves, Cycle()) == 2
    single = build_view(net, net.parameters(), Rademacher(), select_spec="first:1")
    with pytest.raises(ValueError, match="needs selected parameters in at least two blocks, found 1"):
        take_turns(net, single.leaves, Cycle())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_who_waits_is_left_alone(optimizer: str) -> None:
    """Neither probed, nor updated, nor decayed, and its state not touched."""
    net = stack()
    view, before = build_view(net, net.parameters(), Rademacher()), weights(net)
    take_turns(net, view.leaves, Cycle())
    key, probed = Key(0, 1), {}
    with torch.no_grad(), view.along(key, 0.1):
        probed = {name: p + 0 for name, p in net.named_parameters()}
    stepper = OPTIMIZERS[optimizer](list(net.parameters()))
    apply_update(stepper, view.leaves, [Term(key, 1.0)], key)
    turn = {f"1.1.{name}" for name, _ in net[1][1].named_parameters()}  # type: ignore[index]
    for name, p in net.named_parameters():
        for value in (probed[name], p.detach()):
            assert torch.equal(value, before[name]) == (name not in turn)
        assert bool(stepper.state.get(p)) == (name in turn and optimizer in ("nesterov", "adamw"))


@pytest.mark.parametrize(("settings", "message"), [
    ({"blocks": 0}, r"`Cycle\(blocks=...\)` must be >= 1, got 0"),
    ({"every": -1}, r"`Cycle\(every=...\)` must be >= 1, got -1"),
    ({"order": "random"}, r"`Cycle\(order=...\)` must be 'cyclic' or 'shuffled', got 'random'"),
])  # fmt: skip
def test_bad_cycles(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cycle(**settings)


def test_permutations() -> None:
    """Each order about equally often."""
    orders = [permutation(Key(5, lap), 3) for lap in range(600)]
    counts = {order: orders.count(order) for order in itertools.permutations(range(3))}
    assert sum(counts.values()) == 600
    assert all(60 < count < 145 for count in counts.values())


def test_training_begins_by_saying_who_takes_turns() -> None:
    strategy = fit(Task(stack()), batches(1), KINDS["shuffled"]).strategy
    assert isinstance(strategy, ZOStrategy)
    (search,) = strategy.session._subspaces.values()
    assert "(select='all'); 2 of 4 blocks in each step; all other weights are frozen" in search.describe(
        strategy.estimator, 213
    )
    assert strategy.config.to_dict()["cycle"] == "Cycle(blocks=2, every=1, order='shuffled')"
    assert strategy.config.to_dict()["structure"] == "Sparse(sparsity=0.5)"
