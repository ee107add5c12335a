"""Some parameters by backprop: their gradients are kept from one forward of each micro-batch, for a step beside the probes'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..methods.backprop import Backprop
from ..methods.config import ZOConfig
from ..noise import Rademacher
from ..probing.objective import loss_of
from ..space import DenseLeaf, select
from ..types import Key, StepOutput
from .rates import base_lr
from .updates import step_alone, widened_state


class Gradients:
    """The parameters that backprop trains, and the sum of their gradients since the last step.

    Args:
        module: whose parameters they are.
        optimizer: the module's own, which steps them.
        settings: which, and at which rate. None: none.
        rates: base learning rate of each of its groups, as the module gave them.

    Raises:
        ValueError: the selection names nothing, or not in this module.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, settings: Backprop | None, rates: Sequence[float]) -> None:
        names = {id(p): name for name, p in module.named_parameters()}
        places = {id(p): place for place, p in enumerate(module.parameters())}
        own = {names[id(p)]: p for g in optimizer.param_groups for p in g["params"] if p.requires_grad and id(p) in names}
        self.names: Mapping[str, nn.Parameter] = {} if settings is None else select(module, settings.select, own)
        self.ids = frozenset(map(id, self.names.values()))
        self._module, self._optimizer = module, optimizer
        self._leaves = {id(p): DenseLeaf(name, places[id(p)], p, Rademacher()) for name, p in self.names.items()}
        scale = 1.0 if settings is None or settings.lr is None or not rates[0] else settings.lr / rates[0]
        bases = [base_lr(group) for group in optimizer.param_groups]
        self._factors = [scale * rate / base if base else 0.0 for rate, base in zip(rates, bases, strict=True)]
        self._rates: list[float] = []
        self._sums: dict[int, Tensor] = {}
        self._count = 0

    def __bool__(self) -> bool:
        return bool(self.names)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the forward that is kept: a graph grows from the first of these parameters on, and only theirs."""
        others = [p for p in self._module.parameters() if p.requires_grad and id(p) not in self.ids]
        try:
            for parameter in others:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def keep(self, out: StepOutput) -> StepOutput:
        """Differentiate the forward's loss, and give its output without the graph.

        Raises:
            ValueError: the loss does not depend on these parameters through operations that can be differentiated.
        """
        loss = loss_of(out)
        if loss is None:
            return out
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError(
                f"`backprop=...` needs a loss with a gradient, and this {type(loss).__name__} has none; leave backprop out"
            )
        parameters = list(self.names.values())
        with torch.enable_grad():
            found = torch.autograd.grad(loss.mean(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                before = self._sums.get(id(parameter))
                self._sums[id(parameter)] = gradient if before is None else before.add_(gradient)
        self._count += 1
        return _without_graph(out)

    def note_rates(self) -> None:
        """Learning rate of each group for the next step, by the schedule as it stands."""
        groups = self._optimizer.param_groups
        self._factors += self._factors[-1:] * (len(groups) - len(self._factors))  # a callback may have added some
        self._rates = [float(group["lr"]) * factor for group, factor in zip(groups, self._factors, strict=True)]

    def end(self, key: Key | None) -> None:
        """Step by the mean of the kept gradients, unless the step is skipped and has no key, and leave them."""
        if key is not None:
            self._step(key)
        self._sums.clear()
        self._count = 0

    def _step(self, key: Key) -> None:
        """One step of the module's optimizer on the mean gradient; parameters without one stay."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            before = group["lr"]
            group["lr"] = rate
            try:
                for parameter in group["params"]:
                    if (total := self._sums.get(id(parameter))) is not None:
                        step_alone(self._optimizer, group, self._leaves[id(parameter)], total.div_(self._count), key)
            finally:
                group["lr"] = before

    def finite(self) -> bool:
        """Whether all that was kept is."""
        return all(bool(total.isfinite().all()) for total in self._sums.values())

    def state_dict(self) -> dict[int, Any]:
        """The optimizer's state of these parameters, by their places."""
        mine = [
            place for place, p in enumerate(p for g in self._optimizer.param_groups for p in g["params"]) if id(p) in self.ids
        ]
        return {place: state for place, state in self._optimizer.state_dict()["state"].items() if place in mine}

    def load_state_dict(self, state: Mapping[int, Any]) -> None:
        """Put it back, beside the state of others."""
        if not self:
            return
        whole = self._optimizer.state_dict()
        whole["state"] = {**whole["state"], **state}
        self._optimizer.load_state_dict(whole)
        widened_state(self._optimizer, whole)


def gradients_of(module: nn.Module, optimizers: Sequence[Optimizer], config: ZOConfig, rates: Sequence[float]) -> Gradients:
    """The weights that backprop trains under these settings, which may be none.

    Raises:
        ValueError: settings that nobody has tried together.
    """
    found = {"several optimizers": len(optimizers) > 1, "conservative": config.conservative, "cuda_graphs": config.cuda_graphs}
    wrong = next((name for name, there in {**found, "anchor": config.anchor}.items() if there), "")
    if config.backprop is not None and wrong:
        raise ValueError(f"`backprop=...` together with {wrong} is not there; leave one of them out")
    settings = (
        config.backprop if isinstance(config.backprop, Backprop) or config.backprop is None else Backprop(config.backprop)
    )
    return Gradients(module, optimizers[0], settings, rates)


def _without_graph(out: StepOutput) -> StepOutput:
    """The loss stays the object that it was, by which its examples' own losses are known."""
    if isinstance(out, Tensor):
        return out.detach_()
    if isinstance(out, Mapping):
        return {
            key: value.detach_() if isinstance(value, Tensor) and value.requires_grad else value for key, value in out.items()
        }
    return out
