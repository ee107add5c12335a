"""Applying an estimate through the user's own optimizer, leaf by leaf: the dense gradient exists for one leaf at most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..methods.optimizers import is_plain_sgd
from ..noise import pieces, stochastic_round_, working_dtype
from ..space import Leaf, descend_, keep_
from ..types import Key, ParamGroup, StateDict, Term

_SAMPLE = 4096  # elements of each leaf that the statistics look at


class UpdateStats(NamedTuple):
    """The changes that an update made. The first two are measured on request, on the first elements of each leaf.

    Args:
        rms: root mean square of the realised change of a trained weight.
        lost: share of the sampled trained weights that did not change.
        negative: scales that the update made zero or negative, and that were set to the smallest one; None without scales.
        saturated: scales that are at the smallest one now; None without scales.
    """

    rms: float | None = None
    lost: float | None = None
    negative: int | None = None
    saturated: int | None = None


class Apply(Protocol):
    """Has a step reach the weights: :func:`apply_update`, or one that lets some of them wait."""

    def __call__(
        self, optimizer: Optimizer, leaves: Sequence[Leaf], terms: Sequence[Term], key: Key, *, measure: bool = False
    ) -> UpdateStats:
        """See :func:`apply_update`."""


class Pull(Protocol):
    """Draws weights back: :class:`~zolightning.engine.anchor.Anchor`."""

    def pull_(self, leaves: Sequence[Leaf], lr: float, key: Key) -> None:
        """Draw the leaves back by a learning rate, in place; ``key`` is the step's."""


@torch.no_grad()
def apply_update(
    optimizer: Optimizer,
    leaves: Sequence[Leaf],
    terms: Sequence[Term],
    key: Key,
    *,
    measure: bool = False,
    anchor: Pull | None = None,
) -> UpdateStats:
    r"""One optimizer step on :math:`\hat g = \sum_k c_k z_k`, with lr and weight decay read from the parameter groups now.

    Plain SGD goes in place, piece by piece, in torch.optim.SGD's arithmetic. Any other optimizer steps one parameter at a
    time, on that parameter's dense gradient: bit-identical to a step on all of them. Low-precision weights are updated
    in float32 and rounded stochastically, so no update is lost on average.

    Args:
        optimizer: the user's; its state is created and kept as usual.
        leaves: the trained weights, of which those whose turn it is are updated; the optimizer's others stay unchanged.
        terms: (key, coefficient) pairs of the estimate.
        key: the step's; it names the rounding bits and says whose turn it is.
        measure: also measure the change of the weights.
        anchor: draws the weights back before the step.
    """
    leaves = [leaf for leaf in leaves if leaf.turn is None or leaf.active(key)]
    by_parameter = {id(leaf.parameter): leaf for leaf in leaves}
    before = [_sample(leaf).clone() for leaf in leaves] if measure else []
    trained = [_trained(leaf, old) for leaf, old in zip(leaves, before, strict=False)]
    for group, members in _members(optimizer, by_parameter):
        if anchor is not None:
            anchor.pull_(members, float(group["lr"]), key)
        _advance(optimizer, group, members, terms, key)
    negative, saturated = _project_(leaves)
    stats = _compare(before, trained, leaves) if measure else UpdateStats()
    return stats._replace(negative=negative, saturated=saturated)


class Change(NamedTuple):
    """One step of one parameter group, to be applied to its leaves one by one, later: nothing of it is read then.

    It gives the bits that :func:`apply_update` gives now.

    Args:
        optimizer: whose rule it is; only its class and settings are used.
        group: the parameter group's settings at the step.
        terms: (key, coefficient) pairs of the estimate.
        key: the step's.
    """

    optimizer: Optimizer
    group: Mapping[str, Any]
    terms: Sequence[Term]
    key: Key

    @torch.no_grad()
    def __call__(self, leaf: Leaf, state: StateDict) -> StateDict:
        """Change the leaf's parameter; returns the optimizer's state of it, which was ``state`` before."""
        alone = self._alone(leaf.parameter, state)
        _advance(alone, alone.param_groups[0], [leaf], self.terms, self.key)
        _project_([leaf])
        return alone.state[leaf.parameter]  # type: ignore[no-any-return]

    def by_elements(self, device: torch.device) -> bool:
        """Whether the optimizer changes each row of a matrix as if there were no other, tried on a small one."""
        if is_plain_sgd(self.optimizer):
            return True
        values = torch.linspace(-1, 1, 24, device=device).view(4, 6)

        def stepped(rows: slice) -> Tensor:
            weight = nn.Parameter(values[rows].clone())
            alone = self._alone(weight, {})
            for step in (1.0, -3.0):
                weight.grad = (step * values[rows]).sin()
                alone.step()
            return weight.detach()

        return torch.allclose(stepped(slice(4)), torch.cat([stepped(slice(1)), stepped(slice(1, 4))]), rtol=1e-5)

    def _alone(self, parameter: nn.Parameter, state: StateDict) -> Optimizer:
        """The optimizer with this parameter, and its state of it."""
        alone = object.__new__(type(self.optimizer))
        alone.__dict__.update(self.optimizer.__dict__)
        alone.__dict__.pop("step", None)  # which schedulers wrap: it is the step of the original
        alone.param_groups, alone.state = [{**self.group, "params": [parameter]}], defaultdict(dict, {parameter: state})
        return alone


def changes(
    optimizer: Optimizer, leaves: Sequence[Leaf], terms: Sequence[Term], key: Key
) -> Iterator[tuple[Change, list[Leaf]]]:
    """The step that :func:`apply_update` would take now: of each parameter group with leaves whose turn it is."""
    by_parameter = {id(leaf.parameter): leaf for leaf in leaves if leaf.active(key)}
    for group, members in _members(optimizer, by_parameter):
        if members:
            settings = {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
            yield Change(optimizer, settings, tuple(terms), key), members


def _members(optimizer: Optimizer, by_parameter: Mapping[int, Leaf]) -> Iterator[tuple[ParamGroup, list[Leaf]]]:
    """Each parameter group with its leaves."""
    for group in optimizer.param_groups:
        yield group, [by_parameter[id(p)] for p in group["params"] if p.requires_grad and id(p) in by_parameter]


def _advance(optimizer: Optimizer, group: ParamGroup, members: Sequence[Leaf], terms: Sequence[Term], key: Key) -> None:
    """The optimizer's step of some leaves of a group."""
    if is_plain_sgd(optimizer):
        if group.get("maximize"):
            terms = [Term(t.key, -t.coefficient) for t in terms]
        descend_(members, terms, float(group["lr"]), float(group.get("weight_decay", 0.0)), key)
    else:
        for leaf in members:
            step_alone(optimizer, group, leaf, partial(leaf.gradient, terms), key)


def _project_(leaves: Sequence[Leaf]) -> tuple[int | None, int | None]:
    """Move weights below their leaf's floor up to it; how many were zero or negative, and how many are at it now."""
    bounded = [(leaf.parameter.detach(), leaf.floor) for leaf in leaves if leaf.floor is not None and leaf.parameter.numel()]
    if not bounded:
        return None, None
    above = [values.amin() > floor for values, floor in bounded]  # one look at each, and one wait for all
    negative = saturated = 0
    for (values, floor), fine in zip(bounded, torch.stack([a.to(above[0].device) for a in above]).tolist(), strict=True):
        if not fine:
            negative += int((values <= 0).sum())
            values.clamp_(min=floor)
            saturated += int((values <= floor).sum())
    return negative, saturated


def step_alone(optimizer: Optimizer, group: ParamGroup, leaf: Leaf, gradient: Callable[[], Tensor] | Tensor, key: Key) -> None:
    """The optimizer's step of one parameter on a gradient, low-precision weights in float32 and rounded by the key."""
    parameter = leaf.parameter
    stored = parameter.data
    wide = working_dtype(stored.dtype)
    fixed = leaf.fixed(0, stored.numel())
    before = None if fixed is None else stored.clone()
    try:
        if wide != stored.dtype:
            parameter.data = stored.to(wide)  # the optimizer's state for it is created, and stays, in float32
            _widen(optimizer.state.get(parameter, {}), stored.dtype)
        parameter.grad = (gradient if isinstance(gradient, Tensor) else gradient()).to(wide)
        with _only(optimizer, group, parameter):
            optimizer.step()
        updated = parameter.data
    finally:
        parameter.grad, parameter.data = None, stored
    if wide != stored.dtype:
        stochastic_round_(stored, updated, key, leaf.index, leaf.first)
    if fixed is not None and before is not None:
        keep_(stored, before, fixed)


@contextmanager
def _only(optimizer: Optimizer, group: ParamGroup, parameter: Tensor) -> Iterator[None]:
    """The optimizer with a single group that holds a single parameter."""
    groups, members = optimizer.param_groups, group["params"]
    group["params"], optimizer.param_groups = [parameter], [group]
    try:
        yield
    finally:
        group["params"], optimizer.param_groups = members, groups


def _widen(state: StateDict, narrow: torch.dtype) -> None:
    """State that an optimizer makes in its constructor (Adagrad) has the dtype of the stored weights."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dtype == narrow:
            state[name] = value.to(working_dtype(narrow))


def state_of(optimizer: Optimizer, stepper: Optimizer) -> StateDict:
    """The groups of ``optimizer``, and the state of ``stepper``, which applies its steps."""
    groups = optimizer.state_dict()
    return groups if stepper is optimizer else {**groups, "state": stepper.state_dict()["state"]}


def load_state(optimizer: Optimizer, stepper: Optimizer, saved: StateDict) -> None:
    """Put back the state that :func:`state_of` gave; state of low-precision weights stays float32."""
    if stepper is not optimizer:
        optimizer.load_state_dict({**saved, "state": {}})
        stepper.load_state_dict({**stepper.state_dict(), "state": saved["state"]})
    else:
        optimizer.load_state_dict(saved)
    widened_state(stepper, saved)


def widened_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Undo the cast of Optimizer.load_state_dict: state of low-precision parameters is float32 here."""
    ids = [i for g in saved["param_groups"] for i in g["params"]]
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for index, parameter in zip(ids, parameters, strict=True):
        if index in saved["state"] and parameter.dtype in (torch.bfloat16, torch.float16):
            for name, value in saved["state"][index].items():
                if isinstance(value, Tensor) and value.dtype == torch.float32 and name != "step":
                    optimizer.state[parameter][name] = value.to(parameter.device, copy=True)


def _sample(leaf: Leaf) -> Tensor:
    weight = leaf.parameter.detach()
    wide = working_dtype(weight.dtype)
    for _, first in pieces(weight):
        return first.reshape(-1)[:_SAMPLE].to(wide)
    return weight.reshape(-1).to(wide)  # empty


def _trained(leaf: Leaf, sample: Tensor) -> Tensor:
    """Which elements of the sample the coming update may change."""
    fixed = leaf.fixed(0, sample.numel())
    return torch.ones_like(sample, dtype=torch.bool) if fixed is None else ~fixed


def _compare(before: Sequence[Tensor], trained: Sequence[Tensor], leaves: Sequence[Leaf]) -> UpdateStats:
    moves = [(_sample(leaf) - old)[mask] for leaf, old, mask in zip(leaves, before, trained, strict=True)]
    change = torch.cat(moves).double()
    return UpdateStats(change.square().mean().sqrt().item(), (change == 0).double().mean().item())
