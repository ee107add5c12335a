"""The records that a run writes into its ledger, step by step."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from .._version import __version__
from ..methods.optimizers import is_plain_sgd, optimizer_type
from ..noise import DISTRIBUTIONS
from ..space import LEAVES, Leaf
from ..space.fingerprint import combined, mixed
from ..types import StepRecord
from .base import base_path, save_base, share_base
from .format import Check, Header, LedgerError, Method, Options, Step, opening
from .reader import Ledger, locate
from .replay import describe
from .writer import Claim, LedgerWriter

CHECK_EVERY = 256
"""Steps between fingerprints of the weights, from the first step on: other code that changes them shows early."""

_KINDS = {leaf_type: kind for kind, leaf_type in LEAVES.items()}


class Position(NamedTuple):
    """A place in a ledger, as a checkpoint keeps it.

    Args:
        path: the ledger's file when the checkpoint was made.
        digest: of the last record, hexadecimal: it names the place whatever the file is called now.
        weights: fingerprint of the weights there.
    """

    path: str
    digest: str
    weights: str


class Recorder:
    """Writes a run's ledger, from the weights of now on.

    Args:
        claim: the file.
        module: whose parameters are the run's.
        seed: of the perturbations.
        step: optimizer steps taken so far.
        settings: the recipe, for information.
        resumed: where the checkpoint stands that the run goes on from. When its ledger is still there and the weights are
            that step's, the new ledger begins with a copy of the records so far.
        checkpoint: that file; the ledger may have been moved along with it.
        keep_base: have the base's weights beside the ledger.

    Raises:
        OSError: the file or the base cannot be written.
    """

    def __init__(
        self,
        claim: Claim,
        module: nn.Module,
        *,
        seed: int,
        step: int,
        settings: Mapping[str, Any],
        resumed: Position | None = None,
        checkpoint: Path = Path(),
        keep_base: bool = False,
    ) -> None:
        self.path = claim.path
        self._parameters = dict(module.named_parameters())
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._methods: dict[int, Method] = {}
        self._options: dict[int, Options] = {}
        self._described: dict[int, tuple[object, Method]] = {}  # the facts that a method says, and the method
        self._primed: dict[int, str] = {}
        self._unsupported = self._meddled = ""
        self._step = step
        self._found = mixed(self._parameters.items())
        self._moved: set[str] = set()  # by the steps since then
        self._checked = self._due = step
        now = combined(self._found)
        before = _continued(resumed, checkpoint, now, seed, keep_base) if resumed is not None else None
        self._continues = before is not None
        self.base_at_hand = True
        """Whether a replay finds the weights that the ledger starts from: beside it, or where a pretrained model came from."""
        if before is None:
            self._start, header = step, header_of(module, seed, step, settings, now)
            if keep_base:
                save_base(self.path.parent, now, self._parameters)
            self.base_at_hand = keep_base or bool(header.pretrained and header.pretrained["source"])
            self._writer = LedgerWriter(claim, seed, opening(header))
        else:
            self._start = before.header.start
            share_base(before.path.parent, self.path.parent, before.header.base)
            self._writer = LedgerWriter(claim, seed, before.data[: before.end])
        self._applying = False

    def step(self, place: int, optimizer: Optimizer, leaves: Sequence[Leaf], record: StepRecord) -> None:
        """Write a step that is about to be applied.

        Args:
            place: of the optimizer among the module's.
            optimizer: the one that will apply it, with the parameter groups that it will read.
            leaves: that it trains.
            record: the step.
        """
        if self._methods and not self._moved:  # looked at since the last step, before other code had its turn
            self.check()
        if place not in self._methods:
            self._primed[place] = "" if self._continues or is_plain_sgd(optimizer) else _primed(optimizer, leaves)
        options = options_of(place, optimizer)
        method = self._method(place, optimizer, leaves, options, record)
        if method != self._methods.get(place):
            self._writer.append(method)
            self._methods[place] = method
            self._options.pop(place, None)
            self._unsupported = self._unsupported or method.unsupported
        if not method.unsupported and options != self._options.get(place):
            self._writer.append(options)
            self._options[place] = options
        self._writer.append(Step(record.step, place, record.terms, record.lrs, record.loss, record.unread))
        self._step, self._applying = record.step + 1, True
        self._moved.update(method.leaves, record.backprop)

    @property
    def mark(self) -> bytes:
        """Names the last record, and with it all before it."""
        return self._writer.digest

    def applied(self) -> None:
        """The step has been applied in full."""
        self._applying = False
        if self._step >= self._due:
            self.check()

    def skipped(self, step: int) -> None:
        """This step left the weights as they are."""
        self._step = step + 1

    def check(self) -> str:
        """Note the fingerprint of the weights as they are now, between two steps, and bring all to the disk."""
        found = mixed(self._parameters.items())
        if strange := [name for name, value in found.items() if value != self._found[name] and name not in self._moved]:
            self._meddled = f"{strange[0]!r} was changed after step {self._checked} by something else than the optimizer"
        self._found, self._moved, self._due = found, set(), self._step + CHECK_EVERY
        now = combined(found)
        if self._checked != self._step:
            self._writer.append(Check(self._step, now))
            self._checked = self._step
        self._writer.sync()
        return now

    def position(self) -> Position:
        """Where the ledger stands, on the disk.

        Raises:
            LedgerError: the weights of now cannot be had from it; says why.
        """
        if self._applying:
            raise LedgerError("a step was interrupted, so the weights are no step's")
        found = self.check()
        if reason := self._meddled or self._unsupported:
            raise LedgerError(reason)
        if self._writer.trouble:
            raise LedgerError(f"the ledger {self.path} lacks the last records: {self._writer.trouble}")
        return Position(str(self.path.absolute()), self._writer.digest.hex(), found)

    def slots(self) -> dict[int, list[int]]:
        """Optimizer → the places of those of its parameters whose state a replay rebuilds."""
        return {place: [slot for _, _, slot in method.leaves.values()] for place, method in self._methods.items()}

    def end(self) -> None:
        """Note the weights after the last step, if that was not done yet."""
        if not self._applying and self._checked != self._step:
            self.check()

    def close(self) -> None:
        """End with a fingerprint."""
        try:
            self.end()
        finally:
            self._writer.close()

    def _method(self, place: int, optimizer: Optimizer, leaves: Sequence[Leaf], options: Options, record: StepRecord) -> Method:
        trained = [[(id(p), p.requires_grad) for p in g["params"]] for g in optimizer.param_groups]
        facts = (optimizer, tuple(leaves), trained, self._meddled)
        if place not in self._described or self._described[place][0] != facts:
            self._described[place] = facts, self._describe(place, optimizer, leaves)
        method = self._described[place][1]
        names, (decay, since) = ", ".join(record.backprop[:2]), record.anchor or (0.0, self._start)
        hybrid = f"backprop trains {names}, …, and a ledger holds no gradients" if names else ""
        early = f"weights are drawn to those before step {since}, and the ledger begins at step {self._start}"
        reason = hybrid or early * (since < self._start) or method.unsupported or unplain(optimizer, options)
        return replace(method, anchor=decay, unsupported=reason)

    def _describe(self, place: int, optimizer: Optimizer, leaves: Sequence[Leaf]) -> Method:
        method = method_of(self._names, place, optimizer, leaves)
        return replace(method, unsupported=self._meddled or self._primed[place] or method.unsupported)


def header_of(module: nn.Module, seed: int, step: int, settings: Mapping[str, Any], base: str) -> Header:
    """Of a run that starts from the weights of now, whose fingerprint is ``base``; for the others see :class:`Recorder`."""
    parameters = dict(module.named_parameters())
    return Header(
        seed=seed,
        start=step,
        base=base,
        parameters=describe(parameters),
        buffers=_persistent_buffers(module),
        device=next((p.device.type for p in parameters.values()), "cpu"),
        versions={"zolightning": __version__, "torch": str(torch.__version__)},
        settings=dict(settings),
        pretrained=pretrained(module),
    )


def method_of(names: Mapping[int, str], place: int, optimizer: Optimizer, leaves: Sequence[Leaf]) -> Method:
    """The way in which an optimizer steps these leaves; ``names`` has the parameters' by their id."""
    slots = {id(p): slot for slot, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    mine = [leaf for leaf in leaves if id(leaf.parameter) in slots]
    trained = {id(leaf.parameter) for leaf in mine if leaf.parameter.requires_grad}
    kinds = {leaf.name: (_KINDS.get(type(leaf), ""), leaf.index, slots[id(leaf.parameter)]) for leaf in mine}
    return Method(
        optimizer=place,
        rule=type(optimizer).__name__,
        distribution=leaves[0].distribution.name,
        groups=tuple(tuple(names[id(p)] for p in g["params"] if id(p) in trained) for g in optimizer.param_groups),
        leaves=kinds,
        settings={leaf.name: leaf.settings for leaf in mine if leaf.settings},
        turns={leaf.name: (*leaf.turn[:2], *astuple(leaf.turn.cycle)) for leaf in mine if leaf.turn},
        unsupported=_unsupported(optimizer, mine),
    )


def options_of(place: int, optimizer: Optimizer) -> Options:
    """The settings of its parameter groups, except the learning rates."""
    return Options(place, tuple(_options(group, optimizer) for group in optimizer.param_groups))


def _persistent_buffers(module: nn.Module) -> tuple[str, ...]:
    owners = (
        (path, part, name) for path, part in module.named_modules() for name, _ in part.named_buffers(recurse=False)
    )  # TorchScript's modules too
    return tuple(f"{path}.{name}".lstrip(".") for path, part, name in owners if name not in part._non_persistent_buffers_set)


def _continued(position: Position, checkpoint: Path, now: str, seed: int, keep_base: bool) -> Ledger | None:
    """The records that led to the weights of now, when they can be had."""
    try:
        before = locate(Path(position.path), bytes.fromhex(position.digest), checkpoint)
    except LedgerError as error:
        reason = str(error)
    else:
        kept = base_path(before.path.parent, before.header.base)
        if (position.weights, before.header.seed) != (now, seed):
            reason = "the weights are not those of the checkpoint"
        elif keep_base and not kept.exists():
            reason = f"{kept} is not there"
        else:
            return before
    warnings.warn(
        f"this run's ledger starts from the weights of now, not from the first run's base: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _unsupported(optimizer: Optimizer, leaves: Sequence[Leaf]) -> str:
    """Why a replay does not know how to take the steps; "" when it does."""
    kind = type(optimizer)
    if optimizer_type(kind.__name__) is not kind:
        return f"{kind.__module__}.{kind.__qualname__} is not one of torch.optim's optimizers"
    for leaf in leaves:
        if DISTRIBUTIONS.get(leaf.distribution.name) is not type(leaf.distribution):
            return f"{type(leaf.distribution).__qualname__} is not one of zolightning's distributions"
        if type(leaf) not in _KINDS:
            return f"{type(leaf).__qualname__} is not one of zolightning's leaves"
    return ""


def unplain(optimizer: Optimizer, options: Options) -> str:
    """The setting that a ledger cannot hold; "" when there is none."""
    for group, values in zip(optimizer.param_groups, options.groups, strict=True):
        if isinstance(group["lr"], torch.Tensor) and not is_plain_sgd(optimizer):  # another arithmetic than a number's
            return "the optimizer's lr is a Tensor; give it as a number"
        for name, value in values.items():
            if not _plain_value(value):
                return f"the optimizer's {name} is a {type(value).__name__}"
    return ""


def _primed(optimizer: Optimizer, leaves: Sequence[Leaf]) -> str:
    """Why the state that an optimizer begins with is not the one its class makes; "" when it is."""
    values = [value for leaf in leaves for value in optimizer.state.get(leaf.parameter, {}).values() if value is not None]
    if any(bool(torch.as_tensor(value).count_nonzero()) for value in values):
        return f"{type(optimizer).__name__} has state from before the first step that the ledger holds"
    return ""


def _options(group: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The settings that a step reads, except the learning rate."""
    names = ("momentum", "weight_decay", "maximize") if is_plain_sgd(optimizer) else optimizer.defaults
    return {name: group[name] for name in names if name in group and name != "lr"}


def _plain_value(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain_value, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def pretrained(module: nn.Module) -> dict[str, Any] | None:
    """The outermost Hugging Face model inside a module: where it sits, its class, where it came from and its configuration."""
    models = sys.modules.get("transformers.modeling_utils")  # which a model of it has imported
    if models is None:
        return None
    for prefix, part in module.named_modules():
        if isinstance(part, models.PreTrainedModel):
            return {
                "prefix": f"{prefix}." if prefix else "",
                "class": type(part).__name__,
                "source": part.name_or_path,
                "config": part.config.to_dict(),
            }
    return None
