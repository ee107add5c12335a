"""The subspace that the steps of one optimizer search: found at its first step, from module, settings and first batch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from ..methods.config import ZOConfig
from ..methods.estimators import Estimator
from ..parallel import Ranks
from ..probing.allocation import deal_out
from ..probing.batches import batch_examples
from ..probing.block_reuse import block_reuse
from ..probing.cuda_graphs import Graphs
from ..probing.feature_reuse import feature_reuse
from ..probing.inspection import Examples, inspect_step, takes_both
from ..probing.isolation import Isolation
from ..probing.lockstep import Lockstep, lockstep_of
from ..probing.rehearsal import rehearse
from ..probing.reuse import Reuses
from ..probing.runner import Muted, Runner, opposite
from ..space import (
    GroupLeaf,
    Groups,
    Rank1,
    Select,
    Structure,
    View,
    build_view,
    dominant_block,
    structure_of,
    take_turns,
)
from ..types import Batch, Forward, Key, SkipStep
from .hybrid import Gradients
from .notices import listed

Epoch: TypeAlias = Callable[[], int]
"""Optimizer steps of an epoch."""


def unknown_epoch() -> int:
    """Of a session that nobody told."""
    raise ValueError("`Groups(redraw=Epochs(...))` needs the length of an epoch, which a Trainer knows; give a number of steps")


@dataclass
class Calibration:
    """The values that are measured once, before training begins: a resumed run goes on with them."""

    dominant: str | None = None
    """The selection that 'dominant' stands for."""

    leaves: dict[str, dict[str, float]] = field(default_factory=dict)
    """Settings of the leaves, by name."""

    both: bool | None = None
    """Whether both probes of a shared direction run in one batch, where it is small."""


@dataclass(frozen=True)
class Setting:
    """All that does not change from one optimizer to the next.

    Args:
        module: the whole module, whose code runs in the probes.
        config: the settings.
        estimator: built from them.
        isolation: of the module.
        repeatable: whether the user's step evaluates the batch that it is given.
        muted: context in which the step logs nothing.
        epoch: optimizer steps of an epoch, where somebody knows.
        kept: the parameters that backprop trains.
    """

    module: nn.Module
    config: ZOConfig
    estimator: Estimator
    isolation: Isolation
    repeatable: bool
    muted: Muted
    epoch: Epoch
    kept: Gradients


class Subspace(NamedTuple):
    """The view of an optimizer's parameters, and how its probes are run."""

    optimizer: Optimizer
    runner: Runner
    trainable: tuple[int, ...]
    """Ids of the optimizer's parameters that were trainable."""
    select: Select
    """The selection; the block that 'dominant' stands for."""
    state: int
    """Places at which the module was seen to keep state."""

    @property
    def view(self) -> View:
        return self.runner.view

    def holds(self, batch: Batch) -> bool:
        """Whether nothing was frozen, unfrozen or added since, and the batch can show no more of its examples.

        State that began to change only now may not be that of one forward when the batch is repeated.
        """
        examples, changing = self.runner.examples, len(self.runner.isolation.changing)
        alike = changing == self.state or not (examples.repeats or examples.both or self.runner.lockstep)
        known = examples.shown or (batch_examples(batch) or 0) < 2
        return alike and known and self.trainable == trainable(self.optimizer)

    def release(self) -> None:
        """Give the probes' memory back."""
        self.view.release()
        if self.runner.graphs is not None:
            self.runner.graphs.release()
        if self.runner.lockstep is not None:
            self.runner.lockstep.close()

    def describe(self, estimator: Estimator, weights: int) -> str:
        """One line for the user when training starts."""
        kinds = Counter(re.sub("(?<=.)([A-Z])", r" \1", type(leaf).__name__).lower() for leaf in self.view.leaves)
        leaves = " and ".join(f"{count} {kind.replace('leaf', 'leaves')}" for kind, count in kinds.items())
        examples = self.runner.examples
        direction = "a direction for each example" if examples.losses else "a direction for the batch"
        probes = f", both probes in one batch if it holds at most {examples.largest:,} numbers" if examples.largest else ""
        probes += f", {self.runner.lockstep.sides} forwards in lockstep" if self.runner.lockstep else ""
        turn = self.view.leaves[0].turn
        turns = "" if turn is None else f"; {min(turn.cycle.blocks, turn.of)} of {turn.of} blocks in each step"
        hidden = listed([leaf.name for leaf in self.view.behind])
        behind = f"; {hidden} perturbed in copies, since no function mode sees all that reads them" if hidden else ""
        return (
            f"ZO: {estimator!r}, {direction}{probes}; {leaves}, {self.view.numel:,} of "
            f"{weights:,} weights (select={self.select!r}){turns}{behind}; all other weights are frozen"
        )


def trainable(optimizer: Optimizer) -> tuple[int, ...]:
    """Ids of the optimizer's parameters that are trainable now."""
    return tuple(id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad)


class Findings(NamedTuple):
    """The findings from trying the step on the first batch: those of one rank hold for all.

    Args:
        structure: of the leaves: its place among :func:`_structures`.
        examples: whether they have losses of their own, and may be repeated.
        behind: names of the leaves that are read behind the probes' backs.
        calibration: the measurements.
    """

    structure: int
    examples: Examples
    behind: frozenset[str]
    calibration: Calibration

    def plain(self) -> list[Any]:
        """Of JSON's types, as ranks send it."""
        return [self.structure, list(self.examples), sorted(self.behind), asdict(self.calibration)]

    @classmethod
    def received(cls, row: Sequence[Any]) -> Findings:
        """From :meth:`plain`."""
        structure, examples, behind, calibration = row
        return cls(structure, Examples(*examples), frozenset(behind), Calibration(**calibration))


def find_subspace(
    setting: Setting, optimizer: Optimizer, forward: Forward, batch: Batch, calibration: Calibration, ranks: Ranks
) -> Subspace:
    """Choose the leaves, and try on the first batch whether its examples have losses of their own.

    Args:
        setting: of the fit.
        optimizer: whose parameters are searched.
        forward: the user's step.
        batch: the first micro-batch.
        calibration: earlier measurements; new ones are added to it.
        ranks: of which the first one does the trying.

    Raises:
        ValueError: there is nothing to train, or not in this way; see :func:`~zolightning.space.build_view`.
    """
    config, isolation = setting.config, setting.isolation
    tried: list[View] = []
    found = Findings.received(ranks.decide(lambda: _try(setting, optimizer, forward, batch, calibration, tried).plain()))
    if tried:
        (view,) = tried
    else:
        calibration.__dict__.update(asdict(found.calibration))
        view = _build(setting, optimizer, calibration, _structures(config)[found.structure], found.behind)
        with setting.muted(), suppress(SkipStep):  # the state that the step keeps here
            rehearse(forward, batch, view, isolation)
    if config.cycle is not None:  # only now: all of them were looked at
        take_turns(setting.module, view.leaves, config.cycle)
    graphs = Graphs(view, isolation) if config.cuda_graphs else None
    lockstep = _lockstep(setting, forward, batch, view, isolation)
    reuse = _reuse(setting, _structures(config)[found.structure], forward, batch, view)
    runner = Runner(view, isolation, found.examples, reuse, graphs, lockstep, setting.muted, setting.kept or None)
    return Subspace(optimizer, runner, trainable(optimizer), _selected(config, calibration), len(isolation.changing))


def _reuse(setting: Setting, structure: Structure, forward: Forward, batch: Batch, view: View) -> Reuses | None:
    """Values that the forwards of a step share."""
    leaf, config = view.leaves[0], setting.config
    if not isinstance(structure, Groups) or not isinstance(leaf, GroupLeaf):
        return block_reuse(view) or None
    if config.num_queries == "weights":
        setting.estimator.num_queries = leaf.queries  # known only now
    with setting.muted():
        return feature_reuse(forward, batch, view, setting.isolation, 0 if config.cuda_graphs else structure.reuse * 2**20)


def _selected(config: ZOConfig, calibration: Calibration) -> Select:
    return calibration.dominant or config.select if config.select == "dominant" else config.select


def _try(
    setting: Setting, optimizer: Optimizer, forward: Forward, batch: Batch, calibration: Calibration, tried: list[View]
) -> Findings:
    module, config, isolation = setting.module, setting.config, setting.isolation
    if config.select == "dominant" and calibration.dominant is None:
        with setting.muted(), isolation.dry():
            calibration.dominant = dominant_block(module, lambda: forward(batch))
    structures, structure = _structures(config), 0
    view, examples = _build(setting, optimizer, calibration, structures[0]), Examples(losses=False, repeats=False)
    with setting.muted():
        behind = frozenset(leaf.name for leaf in rehearse(forward, batch, view, isolation))
    view.swap(leaf for leaf in view.leaves if leaf.name in behind)
    repeatable = config.one_batch and setting.repeatable
    if setting.estimator.per_example:
        for place in range(1, len(structures)) if config.structure == "auto" else (0,):
            try:
                candidate = _build(setting, optimizer, calibration, structures[place], behind)
            except ValueError:  # no linear layers
                continue
            if candidate.per_example and (config.structure != "auto" or candidate.numel >= 0.9 * view.numel):
                with setting.muted():
                    examples = inspect_step(forward, batch, candidate, isolation, repeatable)
                if examples.losses:
                    view, structure = candidate, place
                    break
    if calibration.both is None:
        paired = _asks_for_pairs(setting.estimator) and not examples.losses and not view.grouped and repeatable
        with setting.muted():
            calibration.both = paired and takes_both(forward, batch, view, isolation)
    groups = structures[structure]
    if isinstance(groups, Groups) and not all(leaf.name in calibration.leaves for leaf in view.leaves):
        _deal(groups, setting, forward, batch, view)
    calibration.leaves.update({leaf.name: leaf.settings for leaf in view.leaves if leaf.settings})
    tried.append(view)
    return Findings(structure, examples._replace(both=calibration.both and repeatable), behind, calibration)


def _structures(config: ZOConfig) -> list[Structure]:
    """The plain one, then those for examples with directions of their own: vectors too, if the model reads them that way."""
    if config.structure != "auto":
        return [structure_of(config.structure)]
    return [structure_of("dense"), Rank1(), Rank1(vectors=False)]


def _build(
    setting: Setting,
    optimizer: Optimizer,
    calibration: Calibration,
    structure: Structure,
    behind: Collection[str] = (),
) -> View:
    config = setting.config
    view = build_view(
        setting.module,
        [p for g in optimizer.param_groups for p in g["params"] if id(p) not in setting.kept.ids],
        config.build_distribution(),
        select_spec=_selected(config, calibration),
        structure=structure,
        scales=config.scales,
        compiled=getattr(setting.module, "_compiler_ctx", None) is not None,
        before=calibration.leaves,
    )
    view.swap(leaf for leaf in view.leaves if leaf.name in behind)
    return view


def _lockstep(setting: Setting, forward: Forward, batch: Batch, view: View, isolation: Isolation) -> Lockstep | None:
    lockstep = lockstep_of(view, isolation, setting.muted)
    if lockstep is None or not lockstep.takes(setting.estimator.ask(Key(0, 0))):
        return None
    with suppress(SkipStep):  # on a rank that has no loss here
        return lockstep if lockstep.agrees(forward, batch, isolation) else None
    return None


def _deal(structure: Groups, setting: Setting, forward: Forward, batch: Batch, view: View) -> None:
    """Deal the step's directions out to the leaves."""
    queries = None if setting.config.num_queries == "weights" else setting.estimator.num_queries
    with setting.muted():
        deal_out(structure, queries, forward, batch, view, setting.isolation, setting.estimator.eps or 1e-3)
    redraw = structure.redraw if isinstance(structure.redraw, int) else structure.redraw.count * setting.epoch()
    for leaf in view.leaves:
        if isinstance(leaf, GroupLeaf):
            leaf.redraw = redraw


def _asks_for_pairs(estimator: Estimator) -> bool:
    points = estimator.ask(Key(0, 0))
    return any(opposite(*pair) for pair in pairwise(points))


def compute_dtype(module: nn.Module, precision: str = "") -> torch.dtype:
    """The dtype that the forward's matrix products run in, under Lightning's ``precision``."""
    if precision in ("bf16-mixed", "16-mixed"):
        return torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    sizes: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.dtype.is_floating_point:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    largest = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    return largest if largest in (torch.float64, torch.float32, torch.bfloat16, torch.float16) else torch.float32
