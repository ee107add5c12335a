"""The methods of the table, and the needs of a step of each: bytes on each tier, bytes that move, products."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from ...adapt.interventions import insert
from ...methods.recipes import REFT
from ...probing.inspection import Examples
from ..bench.workload import Spec, Unavailable
from .footprint import SCALED, Footprint, footprint
from .imagined import Imagined

_POSITIONS = 4  # of vectors
_COPIES = 4  # of QZO's scales, float32


@dataclass(frozen=True)
class Need:
    """Of one method.

    Args:
        device: bytes in the memory of the device that computes, at most.
        host: bytes in the host's memory in addition to it.
        disk: bytes of work files.
        read: bytes of weights that a step brings to the device.
        written: bytes of weights that a step takes from it.
        flops: of a step's products.
        swept: weights that a step perturbs or updates, each time counted.
    """

    device: int
    host: int = 0
    disk: int = 0
    read: int = 0
    written: int = 0
    flops: int = 0
    swept: int = 0

    def on_one_memory(self) -> Need:
        """Where the device's memory is the host's, as on a CPU."""
        return replace(self, device=self.device + self.host, host=0)


@dataclass(frozen=True)
class Row:
    """A method of the table."""

    name: str
    title: str
    trains: str
    need: Callable[[Spec], Need]
    first_order: bool = False


def _forwards(work: Imagined, examples: Examples, points: int = 2) -> tuple[int, int]:
    """(forwards of a step, copies of the batch in each)."""
    _, repeats = examples.of(work.batch_of())
    return (1, points) if repeats else (points, 1)


def _asked(work: Imagined, copies: int, **probed: Any) -> Footprint:
    """A forward without gradient."""

    @torch.no_grad()
    def step() -> None:
        work.loss(work.model)(work.batch_of(copies))

    return footprint(work, step, **probed)


_BOTH = Examples(losses=False, repeats=False, both=True)
_EACH = Examples(losses=True, repeats=True)


def _probed(work: Imagined) -> tuple[Footprint, int]:
    """Of one forward of two-point SPSA on all weights, and how many there are."""
    forwards, copies = _forwards(work, _BOTH)
    return _asked(work, copies, probes=copies), forwards


def resident(spec: Spec) -> Need:
    """Two-point SPSA: weights, scratch of the weight that is read now, activations of one forward."""
    work = Imagined(spec)
    found, forwards = _probed(work)
    return Need(found.peak, flops=forwards * found.flops, swept=3 * work.numel)


def offloaded(spec: Spec, tier: str) -> Need:
    """The same with a pool in the place of the matrices; of two forwards in lockstep, one holds activations while it waits:

    device = resident, or both forwards − matrices + 2·largest
    """
    work = Imagined(spec)
    found, forwards = _probed(work)
    moved = work.moved
    away, pool = sum(moved), 2 * max(moved, default=0)
    disk = tier == "disk"
    return Need(
        device=(found.lockstep if forwards == 2 else found.peak) - away + pool,
        host=0 if disk else away,
        disk=2 * away if disk else 0,
        read=away,
        written=away,
        flops=forwards * found.flops,
        swept=3 * work.numel,
    )


def _linear(model: nn.Module) -> Callable[[nn.Module], bool]:
    """Whether a module is a frozen linear layer that is not the head."""
    head = {id(module) for name, module in model.named_modules() if name.endswith("lm_head")}
    return lambda m: isinstance(m, nn.Linear) and not m.weight.requires_grad and id(m) not in head


def quantised(spec: Spec) -> Need:
    """QZO: NF4 codes, a direction of the scales for each example, one matrix decoded at a time.

    Where a fit looks for state that a step changes, it keeps copies of the scales.
    """
    work = Imagined(spec, lambda model: model.requires_grad_(False))
    forwards, copies = _forwards(work, _EACH)
    coded = _linear(work.model)
    found = _asked(work, copies, coded=coded)
    scales = sum(m.weight.numel() for m in work.model.modules() if isinstance(m, nn.Linear) and coded(m)) // SCALED
    return Need(found.peak + _COPIES * 4 * scales, flops=forwards * found.flops, swept=3 * scales)


def _with_vectors(model: nn.Module, positions: int) -> None:
    width: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
    layers: int = model.config.num_hidden_layers  # type: ignore[union-attr, assignment]
    try:
        insert(model, positions, [(width, 1.0)] * layers)
    except ValueError as error:
        raise Unavailable(str(error)) from error


def vectors(spec: Spec) -> Need:
    """The recipe "reft" without an encoded prefix: directions of vectors for each example, in a frozen model."""
    work = Imagined(spec, partial(_with_vectors, positions=min(_POSITIONS, spec.length)))
    forwards, copies = _forwards(work, _EACH, points=2 * REFT.build_estimator(torch.float32).num_queries)
    found = _asked(work, copies)
    return Need(found.peak, flops=forwards * found.flops)


def _descent(
    work: Imagined, optimizer_type: Callable[..., Optimizer], coded: Callable[[nn.Module], bool] | None = None
) -> Need:
    """Steps of backprop: weights, gradients, the optimizer's state, and the activations that autograd keeps."""

    def steps() -> None:
        optimizer = optimizer_type([p for p in work.model.parameters() if p.requires_grad], lr=1e-3)
        loss = work.loss(work.model)
        for _ in range(2):  # the second has the state that the first makes
            value: Tensor = loss(work.batch_of()).mean()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    found = footprint(work, steps, coded=coded)
    return Need(found.peak, flops=found.flops // 2)


def backprop(spec: Spec, optimizer_type: Callable[..., Optimizer], checkpointed: bool = False) -> Need:
    """All weights."""
    work = Imagined(spec)
    if checkpointed:
        if not getattr(work.model, "supports_gradient_checkpointing", False):
            raise Unavailable(f"{type(work.model).__name__} has no gradient checkpointing")
        work.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        work.model.train()  # the library checkpoints in training mode only
    return _descent(work, optimizer_type)


def lora(spec: Spec, quantised: bool = False) -> Need:
    """Rank-8 adapters, by AdamW, on the weights or on NF4 codes of them."""
    work = Imagined(spec, with_adapters)
    return _descent(work, AdamW, _linear(work.model) if quantised else None)


def with_adapters(model: nn.Module) -> None:
    """Rank-8 adapters on the projections that peft chooses for the architecture.

    Raises:
        Unavailable: peft is not installed, or does not know the architecture.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise Unavailable(f"peft is not installed ({error}); pip install peft") from error
    try:
        inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0), model)
    except ValueError as error:
        raise Unavailable(f"peft knows no adapters for this model: {error}") from error


def exact_vectors(spec: Spec) -> Need:
    """The gradient of the vectors of :func:`vectors` by backprop through the frozen model, by AdamW."""
    return _descent(Imagined(spec, partial(_with_vectors, positions=min(_POSITIONS, spec.length))), AdamW)


ROWS = (
    Row("adamw", "AdamW", "all weights", partial(backprop, optimizer_type=AdamW), True),
    Row("sgd", "SGD", "all weights", partial(backprop, optimizer_type=SGD), True),
    Row("checkpointed", "SGD, checkpointed", "all weights", partial(backprop, optimizer_type=SGD, checkpointed=True), True),
    Row("lora", "LoRA", "adapters", lora, True),
    Row("qlora", "QLoRA", "adapters", partial(lora, quantised=True), True),
    Row("exact-vectors", "backprop on vectors", "vectors", exact_vectors, True),
    Row("zo", "ZO", "all weights", resident),
    Row("zo-cpu", "ZO, offload=cpu", "all weights", partial(offloaded, tier="cpu")),
    Row("zo-disk", "ZO, offload=disk", "all weights", partial(offloaded, tier="disk")),
    Row("qzo", "QZO", "scales", quantised),
    Row("vectors", "ZO on vectors", "vectors", vectors),
)
"""First-order methods first, each group from the most that can be trained to the least."""


def chosen(names: Iterable[str] | None) -> list[Row]:
    """The rows by name; None: all.

    Raises:
        ValueError: there is no such row.
    """
    known = {row.name: row for row in ROWS}
    if names is None:
        return list(ROWS)
    wanted = [name.strip() for name in names]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"`methods`: {', '.join(unknown)} unknown; allowed: {', '.join(known)}")
    return [known[name] for name in wanted]
