"""The textbook estimators in dense tensors: perturbed deep copies of the whole module, and a torch optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zolightning.noise import Distribution, sample
from zolightning.types import Key


def directions(module: nn.Module, key: Key, dist: Distribution) -> list[Tensor | None]:
    """z for each parameter, None for a frozen one. Noise and its multiples are float32, whatever the weights are."""
    first = torch.zeros(1, dtype=torch.int64)
    return [
        sample(dist, key, i, first, p.numel())[0].view(p.shape) if p.requires_grad else None
        for i, p in enumerate(module.parameters())
    ]


@torch.no_grad()
def loss_at(module: nn.Module, loss: Callable[[nn.Module], Tensor], zs: Sequence[Tensor | None], offset: float) -> float:
    """The loss at θ + offset·z, on a copy."""
    twin = copy.deepcopy(module)
    for p, z in zip(twin.parameters(), zs, strict=True):
        if z is not None:
            p.copy_(p.to(torch.promote_types(p.dtype, z.dtype)) + offset * z)
    return float(loss(twin))


def projected_gradient(
    module: nn.Module, loss: Callable[[nn.Module], Tensor], zs: Sequence[Tensor | None], eps: float
) -> float:
    """(L(θ + εz) − L(θ − εz)) / 2ε."""
    return (loss_at(module, loss, zs, eps) - loss_at(module, loss, zs, -eps)) / (2 * eps)


@torch.no_grad()
def step(module: nn.Module, optimizer: Optimizer, terms: Sequence[tuple[float, Sequence[Tensor | None]]]) -> None:
    """The optimizer's step on the dense gradient Σ c z, which parameters without z have no part in."""
    for i, p in enumerate(module.parameters()):
        if p.requires_grad and terms[0][1][i] is not None:
            p.grad = sum((zs[i] * c for c, zs in terms[1:]), terms[0][1][i] * terms[0][0]).to(p.dtype)  # type: ignore[union-attr, operator]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train(
    module: nn.Module,
    items: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    optimizer: Optimizer,
    dist: Distribution,
    *,
    seed: int,
    eps: float,
    queries: int = 1,
    accumulate: int = 1,
    shape: Callable[[float], float] = lambda g: g,
    scheduler: Any = None,
    directions: Callable[[nn.Module, Key, Distribution], list[Tensor | None]] = directions,
    fixed: Callable[[nn.Module], list[Tensor]] | None = None,
) -> None:
    """θ ← θ − lr·(mean_q shape(mean_batches g)·z + wd·θ) over the items, where the optimizer says what − means.

    ``fixed``: masks of what a step leaves as it was, from the weights before it.
    """
    for number, start in enumerate(range(0, len(items), accumulate)):
        window = items[start : start + accumulate]
        terms = []
        for query in range(queries):
            zs = directions(module, Key(seed, number, query), dist)
            gs = [projected_gradient(module, lambda net, item=item: loss(net, item), zs, eps) for item in window]
            terms.append((shape(sum(gs) / len(gs)) / queries, zs))
        kept = [(mask, p.detach()[mask]) for mask, p in zip(fixed(module), module.parameters(), strict=True)] if fixed else []
        step(module, optimizer, terms)
        for (mask, values), p in zip(kept, module.parameters(), strict=bool(kept)):
            p.data[mask] = values
        if scheduler is not None:
            scheduler.step()


@torch.no_grad()
def rank1_step(
    weight: Tensor, losses: Callable[[Tensor], Tensor], examples: int, dist: Distribution, key: Key, leaf: int, eps: float
) -> Tensor:
    """mean_i g_i u_i v_iᵀ, where example i alone is run at W ± ε u_i v_iᵀ; ``losses(W)`` gives all examples' losses."""
    total = torch.zeros_like(weight)
    out, into = weight.shape
    for i in range(examples):
        both = sample(dist, key._replace(query=i), leaf, torch.zeros(1, dtype=torch.int64), out + into)[0]
        z = torch.outer(both[:out], both[out:])
        g = (losses(weight + eps * z)[i] - losses(weight - eps * z)[i]).item() / (2 * eps)
        total += g / examples * z
    return total
