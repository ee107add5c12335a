"""A probe point: while it is active, all code that reads a trained weight reads it perturbed. The weight is never written.

A probe is a torch function mode. Every torch operation that takes a leaf's Parameter as an argument, wherever in the
user's code it is called from, gets the perturbed tensor instead: layers, functional calls, slices of a tied head,
parametrizations. So restoring is exact by construction, also when a probe raises, and no model code is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard, cast

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..types import Key, Operation, PerExample, PerExampleError, Point, Shared, Tangent, Term
from .compute import Compute, compute_with
from .leaf import DenseLeaf, Leaf, Scratch
from .linked import DIFFERENTIATES, linked
from .operations import METADATA, Args, Kwargs, Types, write_targets
from .outer_leaf import PerExampleLeaf
from .together import Vectors


class Both(NamedTuple):
    """Two shared points in one batch: the first half of the examples sees θ + c z, the second half θ − c z."""

    term: Term
    examples: int
    """In both halves together."""

    @property
    def key(self) -> Key:
        return self.term.key


class Watch(Protocol):
    """Makes the calls of some functions, which read no leaf, while a probe is active."""

    @property
    def functions(self) -> frozenset[Operation]: ...

    def call(self, func: Operation, args: Args, kwargs: Kwargs) -> object: ...


_T = torch.Tensor
_ELEMENTWISE: frozenset[object] = frozenset(
    [getattr(owner, name) for owner in (torch, _T) for name in ("add", "sub", "mul", "multiply", "subtract")]
    + [getattr(_T, f"__{reflected}{name}__") for reflected in ("", "r") for name in ("add", "sub", "mul")]
)
"""Where a vector stands beside activations, along their last dimension."""

_BY_EXAMPLE: frozenset[object] = _ELEMENTWISE | {
    F.linear, F.embedding, F.layer_norm, F.rms_norm, F.group_norm, F.conv1d, F.conv2d, F.conv3d, torch.addmm, compute_with
}  # fmt: skip
"""Operations that treat the examples along dimension 0 of their input one by one."""


class Probe(TorchFunctionMode):
    """Substitutes perturbed tensors for the leaves' parameters at one point.

    Args:
        leaves: id of a Parameter → its leaf.
        point: where the probe is.
        scratch: buffer for the weight of the operation that runs now.
        vectors: buffers for the small ones.
        read: gets the ids of the parameters that are read.
        side: which of the buffers.
        watch: makes the calls of some functions.
    """

    def __init__(
        self,
        leaves: Mapping[int, Leaf],
        point: Point | Both,
        scratch: Scratch,
        vectors: Vectors,
        read: set[int],
        side: int = 0,
        watch: Watch | None = None,
    ) -> None:
        super().__init__()
        self.point = point
        self.resting = False
        """Another probe inside of this one is at work."""
        self._leaves, self._scratch, self._vectors, self._side = leaves, scratch, vectors, side
        self._read, self._watch = read, watch
        self._ready: Mapping[int, Tensor] = {}
        self._sides: tuple[Probe, ...] = ()
        if isinstance(point, Both):
            (key, offset), _ = point
            points = (Shared((Term(key, offset),)), Shared((Term(key, -offset),)))
            self._sides = tuple(Probe(leaves, p, scratch, vectors, read, side) for side, p in enumerate(points))

    def fill(self) -> None:
        """Make the small tensors that it gives, all at once, in memory that it shares with other probes."""
        if isinstance(self.point, Shared) and self.point.terms:
            self._ready = self._vectors.perturbed(self._leaves, self.point.terms, self._side)
        for side in self._sides:
            side.fill()

    def __torch_function__(self, func: Operation, types: Types, args: Args = (), kwargs: Kwargs | None = None) -> object:
        if self.resting:
            return func(*args, **kwargs or {})
        if func is compute_with and not self._sides:
            return self._compute(*args)
        if func is F.linear and not kwargs and len(args) > 1 and id(args[1]) in self._leaves:  # most common of all
            return self._linear_both(*args) if self._sides else self._linear(*args)
        if not reads(self._leaves, args) and not (kwargs and reads(self._leaves, kwargs.values())):
            if self._watch is not None and func in self._watch.functions:
                return self._watch.call(func, args, kwargs or {})
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if func in METADATA:
            return func(*args, **kwargs)
        if self._sides:
            return self._both(func, types, args, kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.embedding:
            return self._embedding(*args, **kwargs)
        if func in DIFFERENTIATES and isinstance(self.point, Shared):
            return func(*args, **kwargs)
        refuse_write(self._leaves, func, args, kwargs)
        if isinstance(self.point, PerExample):
            if func in _ELEMENTWISE:
                return self._elementwise(func, args, kwargs)
            if func is F.layer_norm or func is F.rms_norm:
                return self._norm(func, *args, **kwargs)
        elif isinstance(self.point, Shared) and func is _T.__getitem__ and not torch.is_grad_enabled():
            leaf, index = self._leaf(args[0]), args[1]
            if leaf is not None and type(index) is int and args[0].dim() > 1:  # an expert of a mixture, for one
                index = torch.tensor(index)
            if leaf is not None and _is_row_index(index):
                return leaf.rows(index, self.point.terms)
        return self._elsewhere(func, args, kwargs)

    def _both(self, func: Operation, types: Types, args: Args, kwargs: Kwargs) -> Tensor:
        """The halves of the examples, each by the probe of its side."""
        assert isinstance(self.point, Both)
        refuse_write(self._leaves, func, args, kwargs)
        place = next((i for i, a in enumerate(args) if isinstance(a, Tensor) and id(a) not in self._leaves), None)
        examples = self.point.examples
        shared = func is F.embedding and place == 0 and args[0].shape[:1] == (1,)  # positions, for all alike
        if (
            place is None
            or func not in _BY_EXAMPLE
            or args[place].dim() < 2
            or args[place].shape[0] % (1 if shared else examples)
        ):
            raise PerExampleError(
                f"both probes in one batch need the {examples} examples along dimension 0 wherever a weight is read, which "
                f"`{getattr(func, '__name__', func)}` does not show; use ZOStrategy(one_batch=False)"
            )
        halves = (args[0], args[0]) if shared else args[place].chunk(2)
        outs = [
            cast(Tensor, side.__torch_function__(func, types, (*args[:place], half, *args[place + 1 :]), kwargs))
            for side, half in zip(self._sides, halves, strict=True)
        ]
        if shared:
            outs = [out.expand(examples // 2, *out.shape[1:]) for out in outs]
        return torch.cat(outs)

    def _linear_both(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """With both weights built in one go, where the leaf can."""
        assert isinstance(self.point, Both)
        leaf, by_example = self._leaf(weight), input.dim() >= 2 and input.shape[0] % self.point.examples == 0
        plain = weight.dim() == 2 and weight.is_contiguous() and id(input) not in self._leaves
        if type(leaf) is DenseLeaf and plain and by_example and not torch.is_grad_enabled():
            plus, minus = (side._substitute(bias) for side in self._sides)
            return leaf.linear_both(input, plus, minus, self.point.term, self._scratch)
        return self._both(F.linear, (), (input, weight, bias), {})

    def _elsewhere(self, func: Operation, args: Args, kwargs: Kwargs) -> object:
        """Give the perturbed tensor in the place of each parameter."""
        return func(*self._substitute(args), **{k: self._substitute(v) for k, v in kwargs.items()})

    def _leaf(self, value: object) -> Leaf | None:
        """The leaf whose parameter the value is, which counts as read."""
        leaf = self._leaves.get(id(value))
        if leaf is not None:
            self._read.add(id(value))
        return leaf

    def _substitute(self, value: Any) -> Any:
        leaf = self._leaf(value)
        if leaf is not None:
            if isinstance(self.point, Shared):
                ready = self._ready.get(id(value))
                moved = leaf.perturbed(self.point.terms) if ready is None else ready
                return linked(value, moved) if torch.is_grad_enabled() else moved
            if isinstance(self.point, Tangent):
                tangent = leaf.gradient([Term(self.point.key, 1.0)])
                return fwAD.make_dual(leaf.parameter.detach(), tangent.to(leaf.parameter.dtype))  # type: ignore[no-untyped-call]
            raise PerExampleError(
                f"per-example directions reach a matrix through a linear layer and a vector beside activations, but "
                f"{leaf.name!r} is read in another way; leave it out with ZOStrategy(select=...), or use "
                "ZOStrategy(estimator='spsa')"
            )
        return substituted(value, self._leaves, self._substitute)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(self.point, PerExample) and id(bias) in self._leaves:
            out = self._linear(input, weight) if id(weight) in self._leaves else F.linear(input, weight)
            return out + self._vector(bias, out).to(out.dtype)
        leaf = self._leaf(weight)
        if leaf is None or weight.dim() != 2 or not weight.numel() or isinstance(self.point, Tangent):
            return F.linear(*[self._substitute(value) for value in (input, weight, bias)])
        input, bias = self._substitute(input), self._substitute(bias)
        if isinstance(self.point, Shared):
            if torch.is_grad_enabled():  # autograd would keep the scratch
                return F.linear(input, linked(weight, leaf.perturbed(self.point.terms)), bias)
            return leaf.linear(input, bias, self.point.terms, self._scratch)
        if not isinstance(leaf, PerExampleLeaf):
            return self._substitute(weight)  # type: ignore[no-any-return]  # which says why not
        return leaf.compute_each(input, lambda w, x: F.linear(x, w, bias), bias, *self.point)

    def _compute(self, parameter: Tensor, x: Tensor, compute: Compute, bias: Tensor | None) -> Tensor:
        def inside(value: Tensor, x: Tensor) -> Tensor:
            with self:  # for the layer's other reads
                return compute(value, x)

        leaf = self._leaf(parameter)
        if not isinstance(self.point, PerExample) or not isinstance(leaf, PerExampleLeaf):
            return inside(self._substitute(parameter), x)
        bias = self._vector(bias, x) if id(bias) in self._leaves else bias
        return leaf.compute_each(x, inside, bias, *self.point)

    def _elementwise(self, func: Operation, args: Args, kwargs: Kwargs) -> object:
        beside = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and id(a) not in self._leaves), None)
        args = [self._vector(a, beside) if id(a) in self._leaves else a for a in args]
        return func(*args, **{k: self._vector(v, beside) if id(v) in self._leaves else v for k, v in kwargs.items()})

    def _norm(self, func: Any, input: Tensor, normalized_shape: Any, weight: Any = None, *rest: Any, **named: Any) -> Any:
        """The plain normalisation, then the weight and the bias that each example reads."""
        bias = named.pop("bias", None)
        if func is F.layer_norm and rest:
            bias, *rest = rest  # type: ignore[assignment]
        out = func(input, normalized_shape, None, *([None] if func is F.layer_norm else []), *rest, **named)
        for vector, apply in ((weight, torch.mul), (bias, torch.add)):
            if vector is not None:
                out = apply(out, self._vector(vector, out) if id(vector) in self._leaves else vector)
        return out

    def _vector(self, parameter: object, beside: Tensor | None) -> Tensor:
        """The perturbed vector of each example, in a shape that broadcasts over the activations beside it."""
        assert isinstance(self.point, PerExample)
        leaf, count = self._leaf(parameter), self.point.queries.numel()
        if isinstance(leaf, DenseLeaf) and leaf.per_example and beside is not None and beside.dim() >= 2:
            each = leaf.each(*self.point)
            if beside.shape[0] == count:
                return each.view(count, *[1] * (beside.dim() - 2), -1)
            if beside.dim() == 2 and beside.shape[0] % count == 0:  # the model has flattened its examples' tokens
                return each.repeat_interleave(beside.shape[0] // count, 0)
        return self._substitute(parameter)  # type: ignore[no-any-return]  # which says why not

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        leaf = self._leaf(weight)
        whole = max_norm is not None or torch.is_grad_enabled()
        if leaf is None or whole or not isinstance(self.point, Shared) or _outside(input, weight.shape[0]):
            return self._elsewhere(F.embedding, (input, weight, padding_idx, max_norm, *args), kwargs)
        return leaf.rows(input, self.point.terms)  # the other arguments matter only to the backward pass


class Unread(TorchFunctionMode):
    """While it is active, reading a leaf's parameter is an error.

    Args:
        leaves: id of a Parameter → its leaf.
    """

    def __init__(self, leaves: Mapping[int, Leaf]) -> None:
        super().__init__()
        self._leaves = leaves

    def __torch_function__(self, func: Operation, types: Types, args: Args = (), kwargs: Kwargs | None = None) -> object:
        kwargs = kwargs or {}
        if func not in METADATA and (leaf := _first_read(self._leaves, (*args, *kwargs.values()))) is not None:
            raise RuntimeError(
                f"`zo_prepare` reads the trained parameter {leaf.name!r}, but its result is the same for all probes of "
                "a step: leave this part to `zo_objective`, or the parameter out with ZOStrategy(select=...)"
            )
        return func(*args, **kwargs)


def reads(leaves: Mapping[int, object], values: Iterable[object]) -> bool:
    """Whether a leaf's Parameter is among the values, or in lists among them."""
    for value in values:  # noqa: SIM110  a generator would take twice as long, at every operation of the model
        if id(value) in leaves or (isinstance(value, (list, tuple)) and reads(leaves, value)):
            return True
    return False


def _first_read(leaves: Mapping[int, Any], values: Sequence[Any]) -> Any:
    """A leaf whose Parameter is among the values, or None."""
    return next((leaf for key, leaf in leaves.items() if reads({key: leaf}, values)), None) if reads(leaves, values) else None


def substituted(value: Any, leaves: Mapping[int, Any], weight: Callable[[Any], Tensor]) -> Any:
    """The value, or list of values, with ``weight`` of each Parameter in its place."""
    if id(value) in leaves:
        return weight(value)
    if isinstance(value, (list, tuple)) and reads(leaves, value):
        items = [substituted(v, leaves, weight) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def refuse_write(leaves: Mapping[int, Any], func: Operation, args: Args, kwargs: Kwargs) -> None:
    """Raise RuntimeError when the operation writes into a leaf's Parameter."""
    if (written := _first_read(leaves, write_targets(func, args, kwargs))) is not None:
        raise RuntimeError(
            f"`{getattr(func, '__name__', func)}` writes to the trained parameter {written.name!r} inside the training step; a "
            "ZO probe evaluates the loss at perturbed weights, which are read-only. Move the write out of training_step, or "
            "leave this parameter out with ZOStrategy(select=...). Where the model itself rescales its weights between train() "
            "and eval(), switch that off in its configuration (RWKV: config.rescale_every = 0)."
        )


def _is_row_index(index: object) -> TypeGuard[Tensor]:
    return isinstance(index, Tensor) and index.dtype == torch.int64


def _outside(indices: Tensor, rows: int) -> bool:
    """Whether an index is out of range: F.embedding shall say so. Not asked on a device that it would stall."""
    if indices.device.type != "cpu" or not indices.numel():
        return False
    low, high = indices.aminmax()
    return bool(low < 0) or bool(high >= rows)
