"""From a base and a ledger to the weights of any step: the run's updates once more, and no forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from ..engine.anchor import Anchor
from ..engine.updates import apply_update
from ..methods.optimizers import optimizer_type
from ..noise import DISTRIBUTIONS
from ..space import LEAVES, Cycle, Leaf, Turn
from ..space.fingerprint import fingerprint
from ..types import Key, ParamGroup, Term
from .format import DIGEST, Check, LedgerError, Method, Options, Record, Step
from .reader import Ledger


@dataclass
class Replayed:
    """Where a replay has come to.

    Args:
        step: optimizer steps, those before the base included.
        optimizers: place → the optimizer with its state, of which the parameters are those given to :func:`replay`.
        slots: place → name of each trained leaf → its place among the optimizer's parameters.
        checked: the last step whose fingerprint was compared.
    """

    step: int
    optimizers: dict[int, Optimizer] = field(default_factory=dict)
    slots: dict[int, dict[str, int]] = field(default_factory=dict)
    checked: int | None = None


class ApplyMarked(Protocol):
    """Has a recorded step reach weights."""

    def __call__(self, optimizer: Optimizer, leaves: Sequence[Leaf], terms: Sequence[Term], key: Key, mark: bytes) -> object:
        """Take the step that :func:`~zolightning.engine.updates.apply_update` takes, now or later.

        Args:
            optimizer, leaves, terms, key: see there.
            mark: the digest of the step's record, which names it.
        """


def replay(
    ledger: Ledger,
    parameters: Mapping[str, nn.Parameter],
    until: int | None = None,
    apply: ApplyMarked | None = None,
) -> Replayed:
    """Bring the base's weights to those of a step, in place, bit for bit.

    Args:
        ledger: the run.
        parameters: all parameters of the module by name, as the run found them; changed in place.
        until: optimizer steps; None: all there are, of a ledger without damage.
        apply: has the steps reach the weights, which are not compared with the run's then. None: at once.

    Raises:
        LedgerError: the parameters are not the run's base, the step is not in the ledger, the ledger is damaged before it,
            the method cannot be replayed, or the outcome differs from the run's.
    """
    if until is None and ledger.damage:
        raise LedgerError(ledger.damage)
    until = ledger.last if until is None else until
    check_range(ledger, until)
    check_base(ledger, parameters)
    work = Replay(ledger, parameters, apply)
    for record, work.mark in records_until(ledger, until):
        try:
            work.take(record)
        except LedgerError:
            raise
        except Exception as error:  # whatever a forged record leads to
            where = f"the {type(record).__name__} record of {ledger.path} after step {work.state.step}"
            raise LedgerError(f"{where} cannot be applied: {error!r}") from error
    return work.state


class Replay:
    """Takes one record after another; see :func:`replay`, which checks in addition that the base is the run's."""

    def __init__(self, ledger: Ledger, parameters: Mapping[str, nn.Parameter], apply: ApplyMarked | None) -> None:
        self.mark = b""
        self._apply = apply
        self.state = Replayed(ledger.header.start)
        self._ledger, self._parameters = ledger, parameters
        self._leaves: dict[int, list[Leaf]] = {}
        self._unsupported: dict[int, str] = {}
        self._anchor: Anchor | None = None

    def take(self, record: Record) -> None:
        if isinstance(record, Method):
            self._method(record)
        elif isinstance(record, Options):
            self._options(record)
        elif isinstance(record, Step):
            self._step(record)
        elif isinstance(record, Check):
            self.state.step = record.step
            if self._apply is None:
                _compare(self._ledger, record, self._parameters)
                self.state.checked = record.step

    def _method(self, method: Method) -> None:
        place, state = method.optimizer, self.state
        self._unsupported[place] = method.unsupported
        if not method.anchor:
            self._anchor = None
        elif self._apply is not None:
            raise LedgerError("the run had an `anchor`, which offloaded weights do not have; replay it in memory")
        else:
            self._anchor = self._anchor or Anchor(method.anchor)
            self._anchor.decay = method.anchor
        if not method.unsupported:
            self._leaves[place] = _leaves(method, self._parameters)
            state.optimizers[place] = _optimizer(method, self._parameters, state.optimizers.get(place))
            state.slots[place] = {name: slot for name, (_, _, slot) in method.leaves.items()}

    def _options(self, options: Options) -> None:
        optimizer = self.state.optimizers[options.optimizer]
        for group, values in zip(optimizer.param_groups, options.groups, strict=True):
            if unknown := values.keys() - optimizer.defaults.keys() | values.keys() & {"lr"}:
                raise LedgerError(f"the ledger's options {sorted(unknown)} are unknown to torch {torch.__version__}")
            group.update(values)

    def _step(self, step: Step) -> None:
        if reason := self._unsupported[step.optimizer]:  # as the run noted
            raise LedgerError(f"the steps from {step.step} on cannot be replayed: {reason}")
        if step.step < self.state.step:
            raise LedgerError(f"{self._ledger.path} goes back from step {self.state.step} to step {step.step}")
        optimizer = self.state.optimizers[step.optimizer]
        for group, lr in zip(optimizer.param_groups, step.lrs, strict=True):
            group["lr"] = lr
        leaves = [leaf for place, leaf in enumerate(self._leaves[step.optimizer]) if place not in step.unread]
        key = Key(self._ledger.header.seed, step.step)
        if self._anchor is not None:
            self._anchor.begin(self._leaves[step.optimizer], step.step)
        if self._apply is None:
            apply_update(optimizer, leaves, step.terms, key, anchor=self._anchor)
        else:
            self._apply(optimizer, leaves, step.terms, key, self.mark)
        self.state.step = step.step + 1


def check_range(ledger: Ledger, until: int) -> None:
    """Refuse a step that the ledger does not reach."""
    if ledger.header.start <= until <= ledger.last:
        return
    raise LedgerError(
        f"step {until} is not in {ledger.path}, which holds the weights after {ledger.header.start} … {ledger.last} steps"
        + (f"; {ledger.damage}" if ledger.damage else "")
    )


def check_base(ledger: Ledger, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse weights that are not those the run started from; say where they differ, as far as names and shapes tell."""
    expected, found = ledger.header.parameters, describe(parameters)
    if missing := sorted(expected.keys() - found.keys()):
        raise LedgerError(f"the base lacks {_some(missing)}, which the run of {ledger.path} had: it is another model")
    if extra := sorted(found.keys() - expected.keys()):
        raise LedgerError(f"the base has {_some(extra)}, which the run of {ledger.path} did not have: it is another model")
    for name, (dtype, shape) in expected.items():
        if found[name] != (dtype, tuple(shape)):
            raise LedgerError(
                f"{name!r} is {found[name][0]} {list(found[name][1])} in the base, it was {dtype} {list(shape)} in the run"
            )
    if (actual := fingerprint(parameters.items())) != ledger.header.base:
        raise LedgerError(
            f"these are not the weights that the run of {ledger.path} started from (fingerprint {actual}, the run's "
            f"{ledger.header.base}); give its base, as base-{ledger.header.base}.safetensors beside the ledger if it is there"
        )


def records_until(ledger: Ledger, until: int) -> Iterator[tuple[Record, bytes]]:
    """The records that lead to the weights after ``until`` steps, checks of these weights included, and their digests."""
    for record, (_, end) in zip(ledger, ledger.spans, strict=True):
        if isinstance(record, Step) and record.step >= until:
            return
        if isinstance(record, Check) and record.step > until:
            return
        yield record, ledger.data[end - DIGEST : end]


def describe(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape)."""
    return {n: (str(p.dtype).removeprefix("torch."), tuple(p.shape)) for n, p in parameters.items()}


def optimizer_class(rule: str) -> Callable[[list[ParamGroup]], Optimizer]:
    """The class of that name in torch.optim or zolightning; nothing else is ever constructed for a file."""
    found = optimizer_type(rule)
    if found is None:
        raise LedgerError(f"the ledger names an optimizer {rule!r}, which torch.optim of torch {torch.__version__} lacks")
    return found


def _leaves(method: Method, parameters: Mapping[str, nn.Parameter]) -> list[Leaf]:
    if method.distribution not in DISTRIBUTIONS:
        raise LedgerError(f"the ledger's noise {method.distribution!r} is unknown; there are {', '.join(DISTRIBUTIONS)}")
    noise = DISTRIBUTIONS[method.distribution]()
    leaves = []
    for name, (kind, index, _) in method.leaves.items():
        if kind not in LEAVES:
            raise LedgerError(f"the ledger's leaf kind {kind!r} is unknown; there are {', '.join(LEAVES)}")
        leaf = LEAVES[kind](name, index, parameters[name], noise, **method.settings.get(name, {}))
        if name in method.turns:
            block, of, *cycle = method.turns[name]
            leaf.turn = Turn(block, of, Cycle(*cycle))  # type: ignore[arg-type]
        leaves.append(leaf)
    return leaves


def _optimizer(method: Method, parameters: Mapping[str, nn.Parameter], before: Optimizer | None) -> Optimizer:
    """A new optimizer with the state of the one before it."""
    groups: list[ParamGroup] = [{"params": [parameters[name] for name in names], "lr": 0.0} for names in method.groups]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer: Optimizer = optimizer_class(method.rule)(groups)
    if before is not None:
        optimizer.state.update({p: s for p, s in before.state.items() if s})
    return optimizer


def _compare(ledger: Ledger, check: Check, parameters: Mapping[str, nn.Parameter]) -> None:
    actual = fingerprint(parameters.items())
    if actual != check.fingerprint:
        raise LedgerError(
            f"the weights after step {check.step} differ from the run's (fingerprint {actual}, the run's {check.fingerprint}): "
            "they were changed by something else than the optimizer, or this device computes other bits than the run's "
            f"({ledger.header.device})"
        )


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
