"""The ideas of examples/trials.py are the updates that their equations say."""

from __future__ import annotations

import torch
from helpers import load_example
from torch import nn
from torch.optim import SGD

from zolightning.noise import Rademacher
from zolightning.space.outer_leaf import Rank1Leaf
from zolightning.types import Key, Term

TRIALS = load_example("trials")
BITS, GROUP = TRIALS.BITS, TRIALS.GROUP
STEPS = [[Term(Key(3, step, query), 0.1 * (query - 1.4)) for query in range(4)] for step in range(3)]


def leaf_of(rows: int = 6, columns: int = GROUP) -> Rank1Leaf:
    torch.manual_seed(0)
    return Rank1Leaf("w", 0, nn.Parameter(torch.randn(rows, columns)), Rademacher())


def test_a_polar_factor_is_that_of_the_whole_matrix() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(3, 7), torch.randn(3, 9)
    u, sizes, vt = torch.linalg.svd(left.double().T @ right.double())
    a, b = TRIALS.polar(left, right)
    expected = u[:, :3] @ vt[:3] * (sizes[:3].square().mean().sqrt())
    torch.testing.assert_close((a.T @ b).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_orthogonal_step() -> None:
    leaf = leaf_of()
    before = leaf.parameter.detach().clone()
    u, sizes, vt = torch.linalg.svd(leaf.gradient(STEPS[0]).double())
    TRIALS.Orthogonal([leaf.parameter])(SGD([leaf.parameter], lr=0.5), [leaf], STEPS[0], STEPS[0][0].key)
    expected = before - 0.5 * (u[:, :4] @ vt[:4] * sizes[:4].square().mean().sqrt()).float()
    torch.testing.assert_close(leaf.parameter.detach(), expected, rtol=1e-4, atol=1e-5)


def test_momentum_is_the_sum_over_the_steps_before() -> None:
    leaf = leaf_of()
    expected, buffer = leaf.parameter.detach().clone(), torch.zeros_like(leaf.parameter)
    idea, optimizer = TRIALS.Momentum([leaf.parameter]), SGD([leaf.parameter], lr=0.5)
    for terms in STEPS:
        idea(optimizer, [leaf], terms, terms[0].key)
        buffer = idea.beta * buffer + leaf.gradient(terms)
        expected -= 0.5 * (1 - idea.beta**2) ** 0.5 * buffer
    torch.testing.assert_close(leaf.parameter.detach(), expected, rtol=1e-5, atol=1e-5)


def test_an_anchored_step() -> None:
    leaf = leaf_of()
    first = leaf.parameter.detach().clone()
    idea, optimizer = TRIALS.Anchored([leaf.parameter]), SGD([leaf.parameter], lr=0.01)
    expected = first.clone()
    for terms in STEPS:
        idea(optimizer, [leaf], terms, terms[0].key)
        expected -= 0.01 * leaf.gradient(terms)
        expected -= 0.01 * idea.decay * (expected - first)
    torch.testing.assert_close(leaf.parameter.detach(), expected, rtol=1e-5, atol=1e-6)
    assert idea.drift() > 0


def test_codes_stay_on_their_grid_and_lose_nothing() -> None:
    leaf = leaf_of()
    idea, optimizer = TRIALS.Codes([leaf.parameter]), SGD([leaf.parameter], lr=0.5)
    first = leaf.parameter.detach().clone()
    for terms in STEPS:
        idea(optimizer, [leaf], terms, terms[0].key)
    scales, zeros, lost = idea.grids[id(leaf.parameter)]
    codes = leaf.parameter.detach().view(6, 1, GROUP) / scales + zeros
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.round().min() >= 0
    assert codes.round().max() <= 2**BITS - 1
    whole = first - 0.5 * sum(leaf.gradient(terms) for terms in STEPS)
    torch.testing.assert_close(leaf.parameter.detach() + lost, whole, rtol=1e-5, atol=1e-5)
    assert not torch.equal(leaf.parameter.detach(), first)
