"""A size of steps that is free of the scale of weights and loss: ``ZOConfig(lr="auto")``, the default recipe's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from ..space import Leaf
from ..types import Key, StepRecord, Term
from .rates import base_lr

START = 1e-2  # of the RMS of the trained weights; it trains SmolLM2 on the demo's task
_BOUNDS = (3e-3, 1e-1)  # likewise; no more than ten times the start
_EVERY, _FIRST, _LEAST = 10, 20, 5  # a look at every tenth step, at each of the first ones; looks before the first change
_BETA, _CHANGE = 0.9, 1.5  # of the running means; most that a look changes
_SHARE = 0.5  # of Newton's step, whose slope and curvature are uncertain
_FAINT = 0.05  # share of a schedule's height below which steps are too short to look at

Decide = Callable[[Callable[[], dict[str, Any] | None]], dict[str, Any] | None]
Loss = Callable[[Sequence[Term]], float]
"""Terms → the loss at θ + Σ_k c_k z_k on a batch that they were not made from."""


@dataclass
class StepSize:
    r"""The RMS change per weight and step of one optimizer.

    It begins at :data:`START` times the RMS of the trained weights. Some steps are looked at again by the batch that comes
    next, which their direction u (of RMS 1) was not made from, so that the noise of a batch counts as noise. With a the
    size that was applied and θ the weights after it:

    .. math:: s = \frac{L(\theta + 2au) - L(\theta)}{2a}, \qquad \kappa = \frac{L(\theta + 2au) - 2 L(\theta + au) +
              L(\theta)}{a^2}, \qquad \eta \leftarrow \tfrac12\,\frac{\bar s}{\bar\kappa}

    The curvature along a random direction holds what a step loses to being random, so :math:`s/\kappa` is the best size of
    a random step on a quadratic, Nesterov & Spokoiny 2017, and falls by itself where a run has come to the noise. Everything
    is a number of this class, so that a checkpoint holds it; the ledger holds the rates that came of it.
    """

    rms: float
    """Of the trained weights, before training."""
    size: float
    slope: float = 0.0
    curvature: float = 0.0
    looks: int = 0
    steps: int = 0
    applied: float = 0.0
    """RMS change of the last step; 0: there was none."""
    terms: list[tuple[tuple[int, ...], float]] = field(default_factory=list)
    """Of the last step's direction."""

    @classmethod
    def at(cls, leaves: Sequence[Leaf]) -> StepSize | None:
        """The first one, for these weights; None where all are 0."""
        squares = math.fsum(float(leaf.parameter.detach().double().square().sum()) for leaf in leaves)
        rms = math.sqrt(squares / sum(leaf.parameter.numel() for leaf in leaves))
        return cls(rms, START * rms) if rms > 0 else None

    @property
    def due(self) -> bool:
        """Whether the last step is to be looked at."""
        return self.applied > _FAINT * self.size and (self.steps <= _FIRST or self.steps % _EVERY == 0)

    def look(self, loss: Loss) -> list[float]:
        """The losses after, before and beyond the last step."""
        return [loss(self._direction(k * self.applied) if k else []) for k in (0, 1, 2)]

    def choose(self, losses: Sequence[float]) -> None:
        """Choose the size by what :meth:`look` saw."""
        a, (after, before, beyond) = self.applied, losses
        if after == before == beyond:  # a coarse objective, which says nothing here
            return
        if not all(map(math.isfinite, losses)):
            self.size = max(self.size / _CHANGE, _BOUNDS[0] * self.rms)
            return
        self.looks += 1
        self.slope += (1 - _BETA) * ((beyond - after) / (2 * a) - self.slope)
        self.curvature += (1 - _BETA) * ((beyond - 2 * before + after) / a**2 - self.curvature)
        if self.looks >= _LEAST:
            beyond_bounds = math.inf if self.slope > 0 else 0.0
            wanted = _SHARE * self.slope / self.curvature if self.curvature > 0 else beyond_bounds
            wanted = min(max(wanted, self.size / _CHANGE), self.size * _CHANGE)
            self.size = min(max(wanted, _BOUNDS[0] * self.rms), _BOUNDS[1] * self.rms)

    def took(self, record: StepRecord) -> None:
        """Note a step."""
        self.steps += 1
        self.applied = 0.0 if record.skipped else record.lrs[0]
        self.terms = [(tuple(term.key), term.coefficient) for term in record.terms]

    def _direction(self, scale: float) -> list[Term]:
        return [Term(Key(*key), scale * coefficient) for key, coefficient in self.terms]


class StepSizes:
    """The sizes of a fit's optimizers, by place.

    Args:
        wanted: whether they are to be found; else the optimizers' rates stay as they are.
        inform: gets a line on each size that was found.
        decide: gives one of several processes' values.
    """

    def __init__(self, wanted: bool, inform: Callable[[str], None], decide: Decide) -> None:
        self.wanted, self._inform, self._decide = wanted, inform, decide
        self._found: dict[int, StepSize | None] = {}

    @torch.no_grad()
    def look(self, place: int, optimizer: Optimizer, leaves: Sequence[Leaf], loss: Loss) -> list[float]:
        """Begin, or look at the last step where that is due: the losses for :meth:`choose`, each of a forward pass."""
        if not self.wanted:
            return []
        if place not in self._found:
            begun = self._decide(lambda: _plain(StepSize.at(leaves)))
            self._found[place] = found = None if begun is None else StepSize(**begun)
            base = base_lr(optimizer.param_groups[0])
            if found is None:
                self._inform(f"ZO: all trained weights are 0, so steps have the module's learning rate, {base:g}")
            elif base:
                self._inform(
                    f"ZO: steps begin at {found.size:.1e} a weight, {START:.0%} of the RMS of the trained weights, and follow "
                    f"the loss; of the module's learning rate, {base:g}, only its schedule's shape counts (lr='module' takes "
                    "it as it is, lr=... sets another)"
                )
        size = self._found[place]
        upwards = any(group.get("maximize") for group in optimizer.param_groups)
        return size.look(loss) if size is not None and size.due and not upwards else []

    def choose(self, place: int, losses: Sequence[float]) -> None:
        """Choose the size by a look, if there was one."""
        if losses and (size := self._found.get(place)) is not None:
            size.choose(losses)

    @contextmanager
    def applied(self, place: int, optimizer: Optimizer) -> Iterator[None]:
        """The optimizer's rates, scaled so that the first group's base rate is the size; afterwards as they were."""
        size = self._found.get(place)
        if size is None or not (base := base_lr(optimizer.param_groups[0])):
            yield
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        try:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * (size.size / base)
            yield
        finally:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def took(self, place: int, record: StepRecord) -> None:
        """Note a step."""
        if (size := self._found.get(place)) is not None:
            size.took(record)

    def state_dict(self) -> dict[int, dict[str, Any] | None]:
        return {place: _plain(size) for place, size in self._found.items()}

    def load_state_dict(self, state: dict[int, dict[str, Any] | None] | None) -> None:
        """Go on; None: a checkpoint of a version whose steps had the module's rates, which stay."""
        self.wanted = self.wanted and state is not None
        self._found = {place: None if size is None else StepSize(**size) for place, size in (state or {}).items()}


def _plain(size: StepSize | None) -> dict[str, Any] | None:
    return None if size is None else asdict(size)
