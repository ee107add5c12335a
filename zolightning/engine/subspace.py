"""What the steps of one optimizer search: found at its first step, from the module, the settings and the first batch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from ..methods.config import ZOConfig
from ..methods.estimators import Estimator, PerExampleSPSA
from ..mixin import ZOMixin
from ..probing.block_reuse import BlockReuse, block_reuse
from ..probing.cuda_graphs import Graphs
from ..probing.inspection import Examples, inspect_step, takes_both
from ..probing.isolation import Isolation
from ..space import Rank1, Select, Structure, View, build_view, dominant_block, take_turns


@dataclass
class Calibration:
    """What is measured once, before training begins: a resumed run goes on with it."""

    dominant: str | None = None
    """The selection that 'dominant' stands for."""

    leaves: dict[str, dict[str, float]] = field(default_factory=dict)
    """Settings of the leaves, by name."""

    both: bool | None = None
    """Whether both probes of a shared direction run in one batch, where it is small."""


class Subspace(NamedTuple):
    """The view of an optimizer's parameters, and what a step can say of its examples."""

    optimizer: Optimizer
    view: View
    examples: Examples
    trainable: tuple[int, ...]
    """Ids of the optimizer's parameters that were trainable."""
    select: Select
    """The selection; the block that 'dominant' stands for."""
    blocks: BlockReuse
    """The unperturbed first blocks, which run once a step."""
    graphs: Graphs | None
    """Recorded forwards, where they are asked for."""

    def holds(self, batch: Any) -> bool:
        """Whether nothing was frozen, unfrozen or added since, and the batch can show no more of its examples."""
        return self.trainable == trainable(self.optimizer) and self.examples.hold(batch)

    def release(self) -> None:
        """Give the probes' memory back."""
        self.view.release()
        if self.graphs is not None:
            self.graphs.release()

    def describe(self, estimator: Estimator, weights: int) -> str:
        """One line for the user when training starts."""
        kinds = Counter(re.sub("(?<=.)([A-Z])", r" \1", type(leaf).__name__).lower() for leaf in self.view.leaves)
        leaves = " and ".join(f"{count} {kind.replace('leaf', 'leaves')}" for kind, count in kinds.items())
        direction = "a direction for each example" if self.examples.losses else "a direction for the batch"
        probes = ", both probes in one batch" if self.examples.repeats or self.examples.both else ""
        turn = self.view.leaves[0].turn
        turns = "" if turn is None else f"; {min(turn.cycle.blocks, turn.of)} of {turn.of} blocks in each step"
        return (
            f"ZO: {estimator!r}, {direction}{probes}; {leaves}, {self.view.numel:,} of "
            f"{weights:,} weights (select={self.select!r}){turns}; the rest stay as they are"
        )


def trainable(optimizer: Optimizer) -> tuple[int, ...]:
    """Ids of the optimizer's parameters that are trainable now."""
    return tuple(id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad)


def find_subspace(
    module: nn.Module,
    optimizer: Optimizer,
    config: ZOConfig,
    estimator: Estimator,
    forward: Callable[[Any], Any],
    batch: Any,
    isolation: Isolation,
    muted: Callable[[], AbstractContextManager[Any]],
    calibration: Calibration,
) -> Subspace:
    """Choose the leaves, and try on the first batch whether its examples have losses of their own.

    Args:
        module: the whole LightningModule.
        optimizer: whose parameters are searched.
        config: the settings.
        estimator: built from them.
        forward: batch → what the user's step returns.
        batch: the first micro-batch.
        isolation: of the module.
        muted: context in which the step logs nothing.
        calibration: what was measured before; gets what is measured now.

    Raises:
        ValueError: there is nothing to train, or not in this way; see :func:`~zolightning.space.build_view`.
    """
    selected = config.select
    if selected == "dominant":
        if calibration.dominant is None:
            with muted(), isolation.dry():
                calibration.dominant = dominant_block(module, lambda: forward(batch))
        selected = calibration.dominant

    def build(structure: str | Structure) -> View:
        return build_view(
            module,
            [p for g in optimizer.param_groups for p in g["params"]],
            config.build_distribution(),
            select_spec=selected,
            structure=structure,
            scales=config.scales,
            compiled=getattr(module, "_compiler_ctx", None) is not None,
            before=calibration.leaves,
        )

    view = build("dense" if config.structure == "auto" else config.structure)
    examples = Examples(losses=False, repeats=False)
    repeatable = config.one_batch and isinstance(module, ZOMixin)
    if isinstance(estimator, PerExampleSPSA):
        # vectors too, if the model reads them where an example can have its own
        wanted = [Rank1(), Rank1(vectors=False)] if config.structure == "auto" else [config.structure]
        for structure in wanted:
            try:
                candidate = build(structure)
            except ValueError:  # no linear layers
                continue
            if candidate.per_example and (config.structure != "auto" or candidate.numel >= 0.9 * view.numel):
                with muted():
                    examples = inspect_step(forward, batch, candidate, isolation, repeatable)
                if examples.losses:
                    view = candidate
                    break
    if calibration.both is None:
        with muted():
            calibration.both = not examples.losses and repeatable and takes_both(forward, batch, view, isolation, estimator)
    examples = examples._replace(both=calibration.both and repeatable)
    if config.cycle is not None:  # only now: all of them were looked at
        take_turns(module, view.leaves, config.cycle)
    calibration.leaves.update({leaf.name: leaf.settings for leaf in view.leaves if leaf.settings})
    graphs = Graphs(view, isolation) if config.cuda_graphs else None
    return Subspace(optimizer, view, examples, trainable(optimizer), selected, block_reuse(view), graphs)


def compute_dtype(module: nn.Module, precision: str) -> torch.dtype:
    """The dtype that the forward's matrix products run in, under Lightning's ``precision``."""
    if precision in ("bf16-mixed", "16-mixed"):
        return torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    sizes: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.dtype.is_floating_point:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    largest = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    return largest if largest in (torch.float64, torch.float32, torch.bfloat16, torch.float16) else torch.float32
