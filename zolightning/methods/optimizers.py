"""The optimizers that a recipe may put in the place of the module's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature
from typing import Any, TypeAlias

import torch
from torch.optim import SGD, Adam, Optimizer

MakeOptimizer: TypeAlias = Callable[[list[dict[str, object]]], Optimizer]
"""Parameter groups → optimizer."""

_SHARED = ("params", "weight_decay", "maximize")


class SignSGD(Optimizer):
    r"""Each weight moves by lr, whatever the size of its gradient; no state.

    .. math:: W \leftarrow W - \mathrm{lr}\,(\mathrm{sign}(\hat g) + \mathrm{wd}\,W)

    On a ZO estimate that is the sign of every element of :math:`\sum_k c_k z_k`, not of the coefficients: for Gaussian noise
    or several directions the two differ. ZO-signSGD, Liu et al., ICLR 2019; arXiv:2402.11592.

    Args:
        params: parameters or groups.
        lr: learning rate, >= 0.
        weight_decay: decoupled, >= 0.
        maximize: go up.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, maximize: bool = False) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"`SignSGD({name}=...)` must be >= 0, got {value}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step on the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step = parameter.grad.sign().mul_(-1.0 if group["maximize"] else 1.0)
                    parameter.sub_(step.add_(parameter, alpha=group["weight_decay"]), alpha=group["lr"])
        return loss


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "sign": SignSGD,
    "adam": Adam,
}
"""By name. 'momentum' keeps one float32 number for each trained weight, 'adam' two, the others none."""

_OWN: dict[str, type[Optimizer]] = {"SignSGD": SignSGD}


def optimizer_type(name: str) -> type[Optimizer] | None:
    """The class of that name in torch.optim or here, which a ledger can name; None for any other."""
    found = _OWN.get(name, vars(torch.optim).get(name))
    return found if isinstance(found, type) and issubclass(found, Optimizer) else None


def is_plain_sgd(optimizer: Optimizer) -> bool:
    """Whether a step is W ← W − lr·(g + wd·W), which needs no state."""
    return type(optimizer) is SGD and all(g["momentum"] == 0 for g in optimizer.param_groups)


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether a step evaluates the loss itself, as LBFGS's does."""
    closure = signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


def follow(optimizer: Optimizer, leader: Optimizer) -> None:
    """Take over the parameters, learning rate, weight decay and direction of each of the leader's groups."""
    for index, group in enumerate(leader.param_groups):
        if index == len(optimizer.param_groups):
            optimizer.add_param_group({"params": group["params"]})
        shared = {name: group[name] for name in _SHARED if name in group}
        optimizer.param_groups[index].update(shared, lr=float(group["lr"]))


def in_place_of(leader: Optimizer, make: MakeOptimizer) -> Optimizer:
    """An optimizer for the leader's parameter groups, with settings of its own where :func:`follow` takes over none."""
    optimizer = make([{"params": list(group["params"])} for group in leader.param_groups])
    follow(optimizer, leader)
    return optimizer
