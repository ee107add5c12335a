"""The estimates are what they claim: on average the gradient, from the probes they count."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import estimated, lm_loss, lm_losses, tiny_causal_lm, token_batches
from torch import Tensor, nn

from zolightning.methods.estimators import SPSA, Estimator, OneSidedSPSA, PerExampleSPSA, Population
from zolightning.noise import Distribution, Gaussian, Rademacher
from zolightning.probing.inspection import Examples
from zolightning.space import View, build_view
from zolightning.types import Estimate, Key


class Losses:
    """A function that gives a loss for each example of a batch; counts its calls."""

    def __init__(self, per_example: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.function, self.x, self.examples = per_example, x, Examples(losses=True, repeats=True)
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.function(x).double()


def asked(estimator: Estimator, losses: Losses, view: View, key: Key) -> Estimate:
    return estimated(estimator, view, losses, losses.x, key, losses.examples)


def quadratic() -> tuple[nn.Linear, Losses]:
    torch.manual_seed(0)
    net = nn.Linear(5, 4, bias=False).double()
    x, y = torch.randn(6, 5).double(), torch.randn(4).double()
    return net, Losses(lambda x: (net(x) - y).square().sum(-1), x)


def transformer() -> tuple[nn.Module, Losses]:
    model = tiny_causal_lm("llama").double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("layers.1.mlp.down_proj.weight"))

    return model, Losses(lambda ids: lm_losses(model, ids), token_batches(1, size=3)[0])


def gradient(view: View, objective: Losses) -> Tensor:
    with torch.enable_grad():
        loss = objective.function(objective.x).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [leaf.parameter for leaf in view.leaves])])


def dense(view: View, estimate: Estimate) -> Tensor:
    terms = [t._replace(coefficient=t.coefficient / len(estimate.terms)) for t in estimate.terms]
    return torch.cat([leaf.gradient(terms).flatten() for leaf in view.leaves])


def assert_unbiased(
    net: nn.Module, objective: Losses, estimator: Estimator, dist: Distribution, structure: Any, n: int
) -> None:
    """The mean of n estimates, along the gradient, lies within 5 standard errors of it, and the error is below 10 %."""
    view = build_view(net, net.parameters(), dist, structure=structure)
    exact = gradient(view, objective)
    with torch.no_grad():
        estimates = torch.stack([dense(view, asked(estimator, objective, view, Key(11, step))) for step in range(n)])
    along = estimates @ exact / exact.square().sum()
    error = along.std().item() / math.sqrt(n)
    assert error < 0.1
    assert abs(along.mean().item() - 1) < 5 * error
    across = torch.randn(len(exact), generator=torch.Generator().manual_seed(1)).double()
    across -= across @ exact / exact.square().sum() * exact
    off = estimates @ across
    assert abs(off.mean().item()) < 5 * off.std().item() / math.sqrt(n)


@pytest.mark.parametrize("noise", [Rademacher(), Gaussian()], ids=repr)
@pytest.mark.parametrize(
    ("estimator", "structure"),
    [
        (SPSA(1e-4, 2), "dense"),
        (OneSidedSPSA(1e-6, 2), "dense"),
        (Population(1e-4, 6), "dense"),
        (SPSA(1e-4, 2), "rank1"),
        (PerExampleSPSA(1e-4), "rank1"),
        (PerExampleSPSA(1e-4, 2), "rank1"),
    ],
)
def test_mean_is_the_gradient_of_a_quadratic(estimator: Estimator, structure: str, noise: Distribution) -> None:
    assert_unbiased(*quadratic(), estimator, noise, structure, 1000)


@pytest.mark.integration
@pytest.mark.parametrize(("estimator", "structure"), [(SPSA(1e-4), "dense"), (PerExampleSPSA(1e-4), "rank1")])
def test_mean_is_the_gradient_of_a_transformer(estimator: Estimator, structure: str) -> None:
    assert_unbiased(*transformer(), estimator, Rademacher(), structure, 400)


@pytest.mark.parametrize("noise", [Rademacher(), Gaussian()], ids=repr)
def test_projected_gradient_is_the_directional_derivative(noise: Distribution) -> None:
    """One direction at a time, central differences on a quadratic are exact."""
    net, objective = quadratic()
    view = build_view(net, net.parameters(), noise)
    exact = gradient(view, objective)
    for step in range(5):
        (term,) = asked(SPSA(1e-3), objective, view, Key(1, step)).terms
        z = torch.cat([leaf.gradient([term._replace(coefficient=1.0)]).flatten() for leaf in view.leaves])
        assert term.coefficient == pytest.approx((z @ exact).item(), rel=1e-6)


def test_tied_transformer_directional_derivative() -> None:
    model = tiny_causal_lm("gpt2").double()
    ids = token_batches(1)[0]
    view = build_view(model, model.parameters(), Gaussian())
    objective = Losses(lambda x: lm_loss(model, x)[None], ids)
    objective.examples = Examples(losses=False, repeats=False)
    exact = gradient(view, objective)
    (term,) = asked(SPSA(1e-4), objective, view, Key(1, 0)).terms
    z = torch.cat([leaf.gradient([term._replace(coefficient=1.0)]).flatten() for leaf in view.leaves])
    assert term.coefficient == pytest.approx((z @ exact).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("estimator", "forwards", "calls"), [(SPSA(1e-3, 3), 6, 3), (OneSidedSPSA(1e-3, 3), 4, 4), (PerExampleSPSA(1e-3, 3), 6, 1)]
)
def test_forward_passes_are_counted(estimator: Estimator, forwards: int, calls: int) -> None:
    net, objective = quadratic()
    view = build_view(net, net.parameters(), Rademacher(), structure="rank1")
    estimate = asked(estimator, objective, view, Key(0, 0))
    assert (estimate.forwards, objective.calls) == (forwards, calls)
    assert len({t.key for t in estimate.terms}) == len(estimate.terms)
    assert estimate.loss == pytest.approx(objective(objective.x).mean().item(), rel=1e-2)


def test_per_example_with_dense_leaves_is_spsa() -> None:
    net, objective = quadratic()
    view = build_view(net, net.parameters(), Rademacher())
    assert asked(PerExampleSPSA(1e-3, 2), objective, view, Key(0, 0)) == asked(SPSA(1e-3, 2), objective, view, Key(0, 0))


def test_rank1_probe_equals_perturbed_weights() -> None:
    """Applied to activations, u vᵀ is the same perturbation that the update applies densely."""
    net, objective = quadratic()
    view = build_view(net, net.parameters(), Gaussian(), structure="rank1")
    twin = copy.deepcopy(net)
    with view.along(Key(2, 3), 0.1):
        probed = net(objective.x)
    twin.weight.data += 0.1 * view.leaves[0].gradient([dense_term(Key(2, 3))])
    torch.testing.assert_close(probed, twin(objective.x), rtol=1e-6, atol=1e-6)


def dense_term(key: Key) -> Any:
    from zolightning.types import Term

    return Term(key, 1.0)


def test_ties_are_counted() -> None:
    net, objective = quadratic()
    view = build_view(net, net.parameters(), Rademacher(), structure="rank1")
    objective.function = lambda x: torch.arange(len(x), dtype=torch.float64) * 0
    assert asked(SPSA(1e-3, 3), objective, view, Key(0, 0)).ties == 3
    assert asked(PerExampleSPSA(1e-3), objective, view, Key(0, 0)).ties == 6


@pytest.mark.parametrize("make", [quadratic, transformer])
@pytest.mark.parametrize("queries", [1, 3])
def test_both_probes_in_one_batch_give_the_estimate_of_two(make: Callable[[], tuple[nn.Module, Losses]], queries: int) -> None:
    net, losses = make()
    view = build_view(net, net.parameters(), Gaussian(), select_spec="all", structure="dense")
    key, estimator = Key(4, 2, 5), SPSA(1e-3, queries)
    together = asked(estimator, losses, view, key)
    assert losses.calls == queries
    losses.examples = Examples(losses=True, repeats=False)
    apart = asked(estimator, losses, view, key)
    assert [t.key for t in together.terms] == [t.key for t in apart.terms]
    assert (together.forwards, len(together.losses)) == (apart.forwards, len(apart.losses)) == (2 * queries, 2 * queries)
    assert together.coefficients == pytest.approx(apart.coefficients, rel=1e-8)
    assert together.losses == pytest.approx(apart.losses, rel=1e-12)
