"""The user's step tried on the first batch, without a trace: its reads and writes that a probe does not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..space import Leaf, View
from ..types import Batch, Candidate, Forward, Key, Shared, SkipStep, StepOutput, Term
from .isolation import Isolation
from .objective import evaluated, loss_value

T = TypeVar("T")
_FAR = 0.05
_TERMS = tuple((Term(Key(0, 0), side),) for side in (_FAR, -_FAR))
_TRIES = 64
"""Forwards that the search for single leaves may take."""


def rehearse(forward: Forward, batch: Batch, view: View, isolation: Isolation) -> list[Leaf]:
    """Try the step: find the state that it keeps, and the leaves that it reads where no function mode sees it.

    One forward for a step that does neither.

    Args:
        forward: batch → the user's output.
        batch: the first micro-batch.
        view: of the weights.
        isolation: of the module; gets to know the state.

    Returns:
        The leaves that are read behind the probes' backs.

    Raises:
        SkipStep: the step returned None.
        RuntimeError: the step writes state that follows the trained weights: an average of them, a teacher; or it reads weights
            that are not in memory where only their placeholder is seen.
    """
    step = _Rehearsal(forward, batch, view, isolation)
    found: list[Leaf] = []
    if view.compiled:  # as in a probe, so that it is compiled once
        step.loss()
    elif step.goes_wrong(view.visible()):
        if step.goes_wrong():  # of a loss that is NaN by itself nothing can be told
            step.refuse_placeholders()
        else:
            found = step.culprits(view.visible(), step.goes_wrong)
        if step.error is not None and not found:  # it came by itself
            raise step.error
    shapes = {leaf.parameter.shape for leaf in view.leaves if leaf.parameter.dim() > 1}
    if step.writes_weights or isolation.holds(shapes):
        step.refuse_averages()
    return found


class _Rehearsal:
    def __init__(self, forward: Forward, batch: Batch, view: View, isolation: Isolation) -> None:
        self._forward, self._batch, self._view, self._isolation = forward, batch, view, isolation
        self._left = _TRIES
        self.error: Exception | None = None
        """The first one that the step raised."""
        self.writes_weights = False
        """The step writes parameters."""

    def loss(self, hidden: Iterable[Leaf] = ()) -> float:
        with self._isolation.rehearsal() as probes:
            point = self._view.at(Shared(_TERMS[0])) if self._view.compiled else self._view.hiding(hidden)
            with point, probes.forward():
                out = evaluated(self._forward, self._batch)
            self.writes_weights = self.writes_weights or bool(probes.written)
        return number(out)

    def goes_wrong(self, hidden: Sequence[Leaf] = ()) -> bool:
        """Whether the loss is NaN, or there is none, while these leaves are hidden."""
        self._left -= 1
        try:
            return not math.isfinite(self.loss(hidden))
        except SkipStep:
            raise
        except Exception as error:  # code that asks whether its numbers are finite
            self.error = self.error or error
            return True

    def culprits(self, suspects: Sequence[T], wrong: Callable[[Sequence[T]], bool]) -> list[T]:
        """Those of the suspects that it goes wrong with; ``wrong`` says so of several at a time."""
        if not suspects or not wrong(suspects):
            return []
        if len(suspects) == 1 or self._left <= 0:
            return list(suspects)
        middle = len(suspects) // 2
        return self.culprits(suspects[:middle], wrong) + self.culprits(suspects[middle:], wrong)

    def refuse_placeholders(self) -> None:
        """Raise RuntimeError where the loss is NaN because it was computed with the placeholders of weights."""
        found = _placeholders(self._view.root)

        def wrong(some: Sequence[str]) -> bool:
            with _filled(p for name, p in found.items() if name not in some):
                return self.goes_wrong()

        if found and not wrong(()):
            names = self.culprits(list(found), wrong)
            raise RuntimeError(
                f"the training step reads {', '.join(map(repr, names))} in a scripted function or in code that is not "
                "PyTorch's, where offloaded weights are not to be had. Leave torch.jit.script out there, or train without "
                "offload"
            )

    def refuse_averages(self) -> None:
        """Raise RuntimeError where a parameter gets other values at other points, or a tensor moves towards a weight."""
        with self._isolation.rehearsal() as probes:
            for terms in _TERMS:
                with self._view.at(Shared(terms)), probes.forward():
                    self._forward(self._batch)
                if probes.count == 1:
                    for name, was, now in probes.moved():
                        self._refuse_average(name, was, now, terms)

    def _refuse_average(self, name: str, was: Tensor, now: Tensor, terms: Sequence[Term]) -> None:
        for leaf in self._view.leaves:
            if leaf.parameter.shape == was.shape and was.dim() > 1 and _moves_towards(was, now, leaf.perturbed(terms)):
                raise RuntimeError(
                    f"the training step moves {name!r} towards the trained weights {leaf.name!r}, which are perturbed there. "
                    "Move the average to `on_train_batch_end`, where they are not"
                )


def _placeholders(module: nn.Module) -> Mapping[str, Tensor]:
    """Name → the one number that is spread over the shape of a Parameter whose weights are elsewhere."""
    found = {}
    for name, parameter in module.named_parameters():
        memory = parameter.untyped_storage()
        if parameter.is_floating_point() and parameter.numel() > 1 and memory.nbytes() == parameter.dtype.itemsize:
            found[name] = torch.empty(0, dtype=parameter.dtype, device=memory.device).set_(memory)
    return found


@contextmanager
def _filled(placeholders: Iterable[Tensor]) -> Iterator[None]:
    """While it lasts, they hold a number that products may come across."""
    before = [(p, p.clone()) for p in placeholders]
    try:
        for placeholder, _ in before:
            placeholder.fill_(_FAR)
        yield
    finally:
        for placeholder, value in before:
            placeholder.copy_(value)


def number(out: StepOutput) -> float:
    """The loss, or NaN where it or the candidate that is ranked in its place holds one."""
    if not isinstance(out, Candidate):
        return loss_value(out)
    return float(out.value.double().sum()) if isinstance(out.value, Tensor) else 0.0


def _moves_towards(was: Tensor, now: Tensor, weight: Tensor) -> bool:
    """Whether now = (1 − b)·was + b·weight for some 0 < b ≤ 1/2. Larger ones belong to state made afresh from weights."""
    change, way = (x.detach().double().flatten() - was.detach().double().flatten() for x in (now, weight))
    share = float(change @ way) / max(float(way @ way), torch.finfo(torch.double).tiny)
    return 0 < share <= 0.5 and float((change - share * way).norm()) <= 0.05 * float(change.norm())
