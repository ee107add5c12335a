"""A step on tensors without data: the memory that it would hold at most, and the products that it would compute.

PyTorch's fake tensors go through the model's own code, autograd and the optimizer, so nothing here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ...space.leaf import Scratch
from ...space.together import SMALL
from .imagined import Imagined

SCALED = 64
"""Weights that share a scale of NF4."""


class Footprint(NamedTuple):
    """Of one step.

    Args:
        peak: bytes at most, those that were there before included.
        lockstep: bytes at most of two forwards that read each matrix together: one computes while the other waits at one.
        flops: of its products.
    """

    peak: int
    lockstep: int
    flops: int


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are alive, and the operations of products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.recent = self.flops = 0
        """Most bytes, those since somebody set ``recent``, and operations."""
        self._most = 0  # alive, as far as is known: some may have gone since
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def hold(self, tensor: Tensor, size: int | None = None) -> None:
        """Count it until it is gone; once, however many tensors share its memory. ``size``: bytes, where it has others."""
        storage = tensor.untyped_storage()
        place = storage._cdata  # nobody else's as long as a weak reference lasts
        if place not in self._alive:
            size = storage.nbytes() if size is None else size
            self._alive[place] = StorageWeakRef(storage), size  # type: ignore[no-untyped-call]
            self._most += size
            if self._most > self.recent:
                self.recent = max(self.recent, self.now)
                self.peak = max(self.peak, self.recent)

    @property
    def now(self) -> int:
        """Bytes that are alive."""
        for place in [place for place, (reference, _) in self._alive.items() if reference.expired()]:  # type: ignore[no-untyped-call]
            self._most -= self._alive.pop(place)[1]
        return self._most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.hold(value)
        return out


class _Decoded(torch.autograd.Function):
    """A linear layer of codes: each pass decodes the weight, and the graph holds the codes only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, torch.empty_like(weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ torch.empty_like(ctx.weight), None, None


class Reads(TorchFunctionMode):
    """Linear layers as a probe computes them, from blocks of rows; or from codes, one matrix at a time.

    Args:
        live: of the step.
        scratch: that blocks are built in; None: weights are read as they are.
        copies: weights that are built at once.
        coded: whether a weight is one of codes.
    """

    def __init__(self, live: LiveBytes, scratch: Scratch | None, copies: int, coded: frozenset[int]) -> None:
        super().__init__()
        self._live, self._scratch, self._copies, self._coded = live, scratch, copies, coded
        self._shared, self._before, self.lockstep = live.now, 0, 0

    def note(self) -> None:
        """A matrix is about to be read, or the forward has ended: the other one waits here, or at the matrix before."""
        own = self._live.now - self._shared - (0 if self._scratch is None else self._scratch.buffer.nbytes)
        self.lockstep = max(self.lockstep, self._live.recent + max(self._before, own))
        self._before, self._live.recent = own, self._live.now

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = args[1] if func is F.linear and len(args) > 1 else None
        if not isinstance(weight, nn.Parameter):
            return func(*args, **kwargs)
        self.note()
        x, bias = args[0], args[2] if len(args) > 2 else kwargs.get("bias")
        if id(weight) in self._coded:
            return _Decoded.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        if self._scratch is None:
            return func(*args, **kwargs)
        parts = self._take(self._scratch, weight)
        out = F.linear(x.contiguous(), weight, bias)
        return out if parts == self._copies == 1 else torch.cat([out], dim=-1)  # of the parts, beside the parts

    def grow(self, model: nn.Module) -> None:
        """The scratch memory has the size that the largest matrix needs from the second forward on."""
        for module in model.modules():
            if isinstance(module, nn.Linear) and self._scratch is not None:
                self._take(self._scratch, module.weight)

    def _take(self, scratch: Scratch, weight: Tensor) -> int:
        rows = [rows for _, rows in scratch.row_blocks(weight, self._copies)]
        scratch.take(self._copies, max(rows), weight.shape[1], weight.dtype, weight.device)
        return len(rows)


def footprint(
    work: Imagined, step: Callable[[], object], *, probes: int = 0, coded: Callable[[nn.Module], bool] | None = None
) -> Footprint:
    """The needs of a step, the model's weights included.

    Args:
        work: of the step.
        step: one on its model.
        probes: perturbed weights that are built at once in scratch memory; 0: none.
        coded: whether a module's weight is in the form of codes, which each forward decodes; no gradient is made of it.
    """
    live = LiveBytes()
    with work.without_data():
        codes = frozenset(id(m.weight) for m in work.model.modules() if coded is not None and coded(m))
        for tensor in (*work.model.parameters(), *work.model.buffers()):
            live.hold(tensor, tensor.numel() // 2 + 4 * (tensor.numel() // SCALED) if id(tensor) in codes else None)
        scratch = Scratch(work.numel) if probes else None
        with live, Reads(live, scratch, probes, codes) as reads:
            reads.grow(work.model)
            step()
            reads.note()
    vectors = probes * sum(p.nbytes for p in work.model.parameters() if p.dim() == 1 and p.numel() <= SMALL)
    return Footprint(live.peak + vectors, reads.lockstep + 2 * vectors, live.flops)
