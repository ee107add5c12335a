"""A size of steps that is free of the scale of weights and loss: ``ZOConfig(lr="auto")``, the default recipe's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from ..methods.optimizers import is_plain_sgd
from ..space import Leaf
from ..types import Key, StepRecord, Term
from .rates import base_lr

START = 1e-2  # of the RMS of the trained weights; it trains SmolLM2 on the demo's task
_BOUNDS = (1e-3, 1.0)  # likewise
_STATEFUL = 3e-2  # likewise the most where an optimizer takes other ways than the one that is looked at
_SEARCH = (0.0, 1.0, 2.0, 4.0)  # multiples of a way: the best one for the first few steps is too long for later ones
_LOOK = (0.0, 1.0, 2.0)
_FIRST, _EVERY = 5, 10  # steps of the way that is searched, and of those that are looked at
_TRIES = 3  # searches, where the first ones come to nothing
_CHANGE = 1.25  # most that a look changes: the slope over a few random steps is uncertain

Decide = Callable[[Callable[[], dict[str, Any] | None]], dict[str, Any] | None]
Loss = Callable[[Sequence[Term]], float]
"""Terms → the loss at θ + Σ_k c_k z_k on a batch that they were not made from."""


@dataclass
class StepSize:
    r"""The RMS change per weight and step of one optimizer.

    It begins at :data:`START` times the RMS of the trained weights. Every few steps, the way D that they took from θ is looked
    at by the batch that comes next, which D was not made from, so that the noise of a batch counts as noise:

    .. math:: \ell(m) = L(\theta + m D)

    The slopes and the curvatures of random steps add up, so that on a quadratic m times the way is where steps of m times the
    size would have come to; their best size is Nesterov & Spokoiny's, 2017. The first look is a search: the size is multiplied
    by the best m of 1, 2 and 4. Each later one follows a parabola, a bit at a time, and the size falls by itself where a
    run has come to the noise:

    .. math:: m^* = 1 + \frac{\ell(0) - \ell(2)}{2\,(\ell(0) - 2 \ell(1) + \ell(2))}, \qquad
              \eta \leftarrow \eta \min(\max(m^*, \tfrac45), \tfrac54)

    An optimizer with state, such as AdamW, moves the weights another way than D, which says less about it: its size stays below
    3 % of the RMS.

    Everything is a number of this class, so that a checkpoint holds it; the ledger holds the rates that came of it.
    """

    rms: float
    """Of the trained weights, before training."""
    size: float
    searches: int = 0
    found: bool = False
    """A search found a longer step to be better."""
    alone: bool = False
    """Blocks take turns: a way is that of one step, since a probe is at the leaves of one step."""
    steps: int = 0
    """Taken since the last look."""
    way: float = 0.0
    """Their sizes, added up."""
    applied: float = 0.0
    """Likewise, as a schedule left them."""
    terms: list[tuple[tuple[int, ...], float]] = field(default_factory=list)
    """-D, at full size."""
    most: float = _BOUNDS[1]
    """The largest size, as a share of the RMS."""

    @classmethod
    def at(cls, leaves: Sequence[Leaf], plain: bool = True) -> StepSize | None:
        """The first one, for these weights under plain SGD or an optimizer with state; None where all are 0."""
        squares = math.fsum(float(leaf.parameter.detach().double().square().sum()) for leaf in leaves)
        rms = math.sqrt(squares / sum(leaf.parameter.numel() for leaf in leaves))
        return cls(rms, START * rms, most=_BOUNDS[1] if plain else _STATEFUL) if rms > 0 else None

    @property
    def searching(self) -> bool:
        return not self.found and self.searches < _TRIES

    @property
    def due(self) -> bool:
        """Whether the last steps are to be looked at."""
        return self.applied > 0 and self.steps >= (_FIRST if self.searching else _EVERY)

    def look(self, loss: Loss) -> list[float]:
        """The losses at multiples of the way over the last steps."""
        here = self.applied / self.way
        return [loss(self._back(here - m)) for m in (_SEARCH if self.searching else _LOOK)]

    def choose(self, losses: Sequence[float]) -> None:
        """Choose the size by the losses that :meth:`look` saw."""
        searched, self.steps = self.searching, 0
        self.searches += searched
        if len(set(losses)) == 1:  # a coarse objective, which says nothing here
            return
        if searched:
            best = _SEARCH[min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)]
            self.found = best > 1
            self.size *= best or 0.5
        else:
            self.size *= min(max(_lowest(*losses), 1 / _CHANGE), _CHANGE)
        self.size = min(max(self.size, _BOUNDS[0] * self.rms), self.most * self.rms)

    def took(self, record: StepRecord) -> None:
        """Note a step."""
        if self.steps == 0 or self.alone:
            self.way, self.applied, self.terms = 0.0, 0.0, []
        if not record.skipped:
            self.steps += 1
            self.way += self.size
            self.applied += record.lrs[0]
            self.terms += [(tuple(term.key), self.size * term.coefficient) for term in record.terms]

    def _back(self, share: float) -> list[Term]:
        if abs(share) < 1e-9:  # but for rounding, where the weights are
            return []
        return [Term(Key(*key), share * coefficient) for key, coefficient in self.terms]


def _lowest(before: float, now: float, beyond: float) -> float:
    """Where the parabola through the losses at 0, 1 and 2 is lowest."""
    curvature = before - 2 * now + beyond
    if not math.isfinite(curvature):
        return 0.0
    return 1 + (before - beyond) / (2 * curvature) if curvature > 0 else math.inf if beyond < before else 0.0


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
    def look(
        self, place: int, optimizer: Optimizer, leaves: Sequence[Leaf], loss: Loss, stepper: Optimizer | None = None
    ) -> list[float]:
        """Begin, or look at the last step where that is due: the losses for :meth:`choose`, each of a forward pass.

        Args:
            place: of the optimizer.
            optimizer: whose rates are scaled.
            leaves: its trained weights.
            loss: of terms, see :data:`Loss`.
            stepper: applies its steps in its place, see :meth:`~zolightning.Session.stepper`.
        """
        if not self.wanted:
            return []
        if place not in self._found:
            begun = self._decide(lambda: _plain(StepSize.at(leaves, is_plain_sgd(stepper or optimizer))))
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
        if (size := self._found[place]) is not None:
            size.alone = any(leaf.turn is not None for leaf in leaves)
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
        self._found = {place: None if size is None else _loaded(size) for place, size in (state or {}).items()}


def _loaded(state: dict[str, Any]) -> StepSize:
    if "searches" not in state:  # a version of before followed single steps: only their size is left
        return StepSize(state["rms"], state["size"], found=True)
    return StepSize(**state)


def _plain(size: StepSize | None) -> dict[str, Any] | None:
    return None if size is None else asdict(size)
