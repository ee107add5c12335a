"""Settings and optimizers that do not go together: refused where no step would be right, else reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..methods.config import ZOConfig
from ..methods.estimators import Estimator
from ..methods.optimizers import is_plain_sgd, needs_closure
from .rates import base_lr, override_lr


def take_over(
    config: ZOConfig,
    estimator: Estimator,
    optimizers: Sequence[Optimizer],
    schedulers: Iterable[LRScheduler],
    stepper: Callable[[Optimizer], Optimizer],
    warn: Callable[[str], None],
) -> None:
    """Give the optimizers the method's learning rate; refuse those that no step can go through, and report others.

    Args:
        config: the settings.
        estimator: built from them.
        optimizers: the module's.
        schedulers: of their rates.
        stepper: gives the one that applies an optimizer's steps.
        warn: gets the reports.

    Raises:
        ValueError: see :func:`check_optimizer`; or several optimizers, where the directions of one are counted by its weights.
    """
    if config.num_queries == "weights" and len(optimizers) > 1:
        raise ValueError(f"`num_queries='weights'` is for one optimizer, and there are {len(optimizers)}; give a number")
    for optimizer in optimizers:
        if (lr := config.own_lr) is not None:
            override_lr(optimizer, schedulers, lr)
        check_optimizer(config, optimizer, stepper(optimizer))
        for line in advice(config, estimator, optimizer, stepper(optimizer)):
            warn(line)


def check_optimizer(config: ZOConfig, optimizer: Optimizer, stepper: Optimizer) -> None:
    """Refuse an optimizer that a zeroth-order step cannot go through.

    Args:
        config: the settings.
        optimizer: the module's.
        stepper: the one that applies its steps.

    Raises:
        ValueError: it needs a closure, or is not plain SGD under ``conservative=True``.
    """
    if needs_closure(stepper):
        raise ValueError(
            f"{type(stepper).__name__} evaluates the loss again within a step, which a zeroth-order step cannot do; use an "
            "optimizer whose step() needs no closure, as torch.optim.SGD or Adam"
        )
    if config.conservative and not (is_plain_sgd(stepper) and not any(g.get("maximize") for g in optimizer.param_groups)):
        raise ValueError(
            "`conservative=True` tries the step of plain SGD that minimises; use it with optimizer='sgd', without maximize"
        )


def advice(config: ZOConfig, estimator: Estimator, optimizer: Optimizer, stepper: Optimizer) -> Iterator[str]:
    """The warnings for an optimizer that costs memory, or whose learning rate will hardly train.

    Args:
        config: the settings.
        estimator: built from them.
        optimizer: the module's.
        stepper: the one that applies its steps.
    """
    plain = is_plain_sgd(stepper)
    if config.make_optimizer is None and not plain:
        yield (
            f"ZOStrategy steps through the module's {type(optimizer).__name__}, which keeps state for every trained "
            "weight; ZOStrategy(optimizer='sgd') keeps none and needs the memory of inference"
        )
    lr = base_lr(optimizer.param_groups[0])
    most = max(1e-2, 5 * estimator.eps)  # weights that bear large probes bear large steps
    if config.normalize and not config.finds_lr and plain and not 1e-5 <= lr <= most and lr != 0 and _pretrained(optimizer):
        yield (
            f"with normalised steps the learning rate is the RMS change per weight and step; lr={lr:g} is far from the rates "
            "that train (3e-4 to 3e-3 for a pretrained model). Set it with ZOStrategy(lr=...)"
        )


def _pretrained(optimizer: Optimizer) -> bool:
    """Whether there is a weight that is not 0; vectors that begin at 0 have the scale that their module gives them."""
    return any(bool(p.detach().any()) for group in optimizer.param_groups for p in group["params"])
