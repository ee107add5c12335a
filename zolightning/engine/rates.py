"""A learning rate from outside the module: its parameter groups and schedules keep their proportions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_OF_GROUPS = {"lr", "initial_lr", "max_lr", "min_lr"}
_OF_SCHEDULERS = {"base_lrs", "max_lrs", "min_lrs", "eta_min", "_last_lr"}


def base_lr(group: Mapping[str, Any]) -> float:
    """The learning rate that a group's schedule is built on: OneCycleLR's highest one, else the first."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def override_lr(optimizer: Optimizer, schedulers: Iterable[LRScheduler], lr: float) -> None:
    """Scale every rate of the optimizer and of its schedulers so that the first group's base rate is ``lr``.

    Raises:
        ValueError: that base rate is 0, and ``lr`` is not.
    """
    base = base_lr(optimizer.param_groups[0])
    if base == 0.0 and lr != 0.0:
        raise ValueError(
            "`ZOStrategy(lr=...)` scales all learning rates by the first group's, which is 0; set them in the module"
        )
    factor = lr / base if base else 0.0
    for group in optimizer.param_groups:
        for name in _OF_GROUPS & set(group):
            group[name] = group[name] * factor
    for scheduler in _flattened(schedulers):
        if scheduler.optimizer is optimizer:
            for name in _OF_SCHEDULERS & set(vars(scheduler)):
                value = getattr(scheduler, name)
                many = isinstance(value, (list, tuple))
                setattr(scheduler, name, [v * factor for v in value] if many else value * factor)


def _flattened(schedulers: Iterable[LRScheduler]) -> Iterator[LRScheduler]:
    """The schedulers, and those inside SequentialLR and ChainedScheduler."""
    for scheduler in schedulers:
        yield scheduler
        yield from _flattened(getattr(scheduler, "_schedulers", ()))
