"""Training by rankings: weights, oracles, and both of them in a fit."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import quiet_trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zolightning import ZOConfig, ZOMixin, ZOMonitor, ZOStrategy
from zolightning.engine.session import Session
from zolightning.methods.ranking import EndOfRanking, Ranking, RankingError, Terminal, by_comparison, by_score, ranking_weights
from zolightning.methods.shaping import Ranks


def textbook(order: Sequence[int], top: int, count: int) -> list[Fraction]:
    """ZO-RankSGD, from the pairs: the mean over them of (worse − better)."""
    named = list(order[:top])
    pairs = [(i, j) for r, i in enumerate(named) for j in range(count) if j not in named[: r + 1]]
    weights = [Fraction(0)] * count
    for better, worse in pairs:
        weights[worse] += Fraction(1, len(pairs))
        weights[better] -= Fraction(1, len(pairs))
    return weights


@pytest.mark.parametrize(("count", "top"), [(6, 3), (6, 5), (2, 1), (9, 4)])
def test_weights_are_the_papers_and_sum_to_zero(count: int, top: int) -> None:
    order = torch.randperm(count).tolist()
    weights, pairs = ranking_weights(order[:top], count), top * (top - 1) // 2 + top * (count - top)
    assert weights == [float(w) for w in textbook(order, top, count)]
    assert [weights[i] for i in order[:top]] == [(2 * r - count + 1) / pairs for r in range(top)]
    assert abs(math.fsum(weights)) <= math.ulp(1.0)


def test_equal_candidates_share_a_weight() -> None:
    assert ranking_weights([2, [0, 1]], 4) == [0.0, 0.0, -3 / 5, 3 / 5]
    assert ranking_weights([[0, 1, 2]], 3) == ranking_weights([], 3) == [0.0] * 3
    for bad in ([3], [0, 0], [-1], [[0, 1], 1]):
        with pytest.raises(RankingError, match=r"0 … 2, each once"):
            ranking_weights(bad, 3)


def test_oracles_agree() -> None:
    values = [3.0, 1.0, 2.0, 1.0, 5.0]
    scored = by_score(lambda v: v)(values, 3)
    assert scored == by_comparison(lambda a, b: a - b)(values, 3) == [[1, 3], [2]]
    assert by_score(math.exp)(values, 3) == scored  # its order only
    with pytest.raises(RankingError, match="no order"):
        by_score(lambda v: math.nan)(values, 3)


def test_the_terminal_asks_until_it_gets_a_ranking() -> None:
    lines, said = iter(["", "1 1", "7", "a", "3 1=2", "stop"]), []
    terminal = Terminal(read=lambda prompt: next(lines), write=said.append)
    assert terminal(["x", "y", "z"], 2) == [[2], [0, 1]]
    assert sum("no ranking" in str(line) for line in said) == 3
    assert "[2]\ny" in said
    with pytest.raises(EndOfRanking, match="stopped at the terminal"):
        terminal(["x", "y", "z"], 2)


class Point(ZOMixin, pl.LightningModule):
    """A point, and a hidden one that only the rater knows."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(8))

    def zo_candidate(self, batch: Any) -> Tensor:
        return self.x + 0.0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.4)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


def fit(module: pl.LightningModule, oracle: Any = None, steps: int = 25, strategy: Any = None, **settings: Any) -> None:
    strategy = strategy or ZOStrategy("spsa", estimator=Ranking(oracle, eps=0.2), noise="gaussian", seed=3)
    quiet_trainer(strategy, max_steps=steps, **settings).fit(module, DataLoader([torch.zeros(1)] * steps, None))


def test_rankings_find_what_only_the_rater_knows() -> None:
    target, shown = torch.linspace(-1, 1, 8), []

    def distance(candidate: Tensor) -> float:
        shown.append(candidate)
        return float((candidate - target).square().sum())

    module, twin = Point(), Point()
    fit(module, by_score(distance))
    assert (module.x - target).square().sum() < 0.15 * target.square().sum()
    assert len(shown) == 6 * 25
    fit(twin, by_score(lambda candidate: math.exp(distance(candidate))))
    assert torch.equal(module.x, twin.x)  # nothing but the order counts


def test_a_rater_who_stops_or_fails_loses_nothing() -> None:
    target, asked = torch.ones(8), []

    def oracle(candidates: Sequence[Tensor], top: int) -> Any:
        asked.append(1)
        if len(asked) == 4:
            raise EndOfRanking("enough")
        return by_score(lambda c: float((c - target).square().sum()))(candidates, top)

    module, other = Point(), Point()
    with pytest.raises(EndOfRanking, match="enough"):
        fit(module, oracle)
    asked.clear()
    asked += [1] * 10
    fit(other, oracle, 3)
    assert torch.equal(module.x, other.x)  # three rankings' worth
    wrong = Point()
    with pytest.raises(RankingError, match="each once"):
        fit(wrong, lambda candidates, top: [9])
    assert torch.equal(wrong.x, torch.zeros(8))
    equal = Point()
    fit(equal, lambda candidates, top: [range(len(candidates))], 3)
    assert torch.equal(equal.x, torch.zeros(8))


@pytest.mark.parametrize("eps", [0.2, 1e-3])
@pytest.mark.parametrize("ranked", [True, False])
def test_rankings_log_no_loss_and_get_no_advice(ranked: bool, eps: float, tmp_path: Path) -> None:
    """Nor do vectors that begin at 0, as control vectors: a learning rate of 0.4 is not far from theirs."""
    oracle, module, logger = by_score(lambda c: float((c - 1.0).square().sum())), Point(), CSVLogger(tmp_path)
    module.zo_objective = lambda batch: (module.x - 1.0).square().sum()  # type: ignore[method-assign]
    strategy = ZOStrategy("spsa", estimator=Ranking(oracle, eps=eps)) if ranked else ZOStrategy("spsa", eps=eps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, steps=2, strategy=strategy, logger=logger, callbacks=[ZOMonitor(min_seconds=0)])
    assert not [w for w in caught if "far from the rates" in str(w.message)]
    first, *_ = csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines())
    assert float(first["zo/projected_grad"]) > 0
    assert ("train/loss" in first) == (not ranked)


def test_bad_settings_are_refused() -> None:
    oracle = by_score(float)
    for settings, message in (
        ({"candidates": 1}, "whole number >= 2, got 1"), ({"top": 6}, r"in 1 … 5, got 6"), ({"eps": 0.0}, "finite number > 0")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Ranking(oracle, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be a function of candidates, got 'score'"):
        Ranking("score")  # type: ignore[arg-type]

    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(8))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.x.sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(TypeError, match="derive the module from ZOMixin"):
        fit(Plain(), oracle)

    class Without(ZOMixin, Plain):
        pass

    with pytest.raises(NotImplementedError, match=r"must define zo_candidate\(self, batch\)"):
        fit(Without(), oracle)
    module = Point()
    session = Session(module, torch.optim.SGD(module.parameters(), lr=0.1), ZOConfig(estimator=Ranking(oracle)))
    with pytest.raises(TypeError, match="needs candidates"):
        session.estimate(lambda _: (module.x + 0.0).sum())


@pytest.mark.parametrize("estimator", ["population", "one_sided"])
def test_normalize_rank_sees_the_order_of_the_losses_only(estimator: str) -> None:
    found = []
    for transform in (lambda loss: loss, torch.exp, lambda loss: (loss / 50).tanh()):
        module = Point()
        config = ZOConfig(estimator=estimator, eps=0.2, num_queries=6, normalize="rank", noise="gaussian", seed=1)
        session = Session(module, torch.optim.SGD(module.parameters(), lr=0.1), config, warn=lambda _: None)
        for _ in range(15):
            session.estimate(lambda _, f=transform, m=module: f((m.x - 1.0).double().square().sum()))
            session.update()
        found.append(module.x.detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert (found[0] - 1).square().sum() < 6


def test_ranks_have_the_size_of_normalised_steps() -> None:
    shaped = Ranks()([5.0, -1.0, 3.0, 3.0], {}).values
    assert shaped[2] == shaped[3]
    assert sum(shaped) == 0.0
    assert math.isclose(sum(v * v for v in Ranks()([5.0, -1.0, 3.0, 4.0], {}).values), 16)
    assert Ranks()([2.0, 2.0], {}).values == [0.0, 0.0]
    with pytest.raises(ValueError, match="needs 2 or more, got 1"):
        Ranks()([1.0], {})
    with pytest.raises(ValueError, match="`normalize='rank'` compares the directions"):
        ZOConfig(estimator="spsa", normalize="rank")
