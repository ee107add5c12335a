"""Probes recorded as CUDA graphs: a GPU that waits for Python at each operation is given a forward's all at once.

For small models and batches. A graph is recorded for each shape of batch and kind of probe, at the second that comes, and
replayed from the fourth on:

- the step's key, the batch and per-example queries lie in memory of their own, which a replay fills first;
- operations that make the GPU wait (``.item()``, a copy from the host) cannot be recorded, and are found before it begins;
- a graph is taken only if it gave the bits of the plain forward twice, the second time with another key.

Python code of the forward does not run in a replay: its logs, counters and other inputs than the batch stay.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..noise import CapturedKey
from ..space import Both, DenseLeaf, Rank1Leaf, RowScaleLeaf, View
from ..types import Batch, Forward, PerExample, Point, Shared, StepOutput
from .batches import leaves, map_leaves
from .isolation import Isolation, rng_state, set_rng_state
from .objective import returned_loss

_MOST = 32  # graphs; further shapes run as they are
_RECORDED = (DenseLeaf, Rank1Leaf, RowScaleLeaf)  # their noise depends on nothing but the key, which a replay is given


class Refused(Exception):
    """A forward cannot be recorded; the message says why."""


class Graphs:
    """The forwards of one view's probes.

    Args:
        view: whose probes they are.
        isolation: of the module; a forward that is run for a test leaves no trace.
    """

    def __init__(self, view: View, isolation: Isolation) -> None:
        self._view, self._isolation = view, isolation
        self._device = isolation.device
        self._seen: dict[Hashable, _Graph | None] = {}
        self._pool: Any = None
        self._notices: list[str] = []
        self.refused = ""
        """Why forwards run as they are; "" while they may be recorded."""
        if why := self._why_not():
            self._refuse(why)

    def __call__(self, forward: Forward, batch: Batch) -> StepOutput:
        """``forward(batch)`` at the view's point."""
        point = self._view.point
        form = None if self.refused or point is None else self._form(batch, point)
        if form is None or point is None:
            return forward(batch)
        if form not in self._seen:
            if len(self._seen) < _MOST:
                self._seen[form] = None
            return forward(batch)
        graph = self._seen[form]
        if graph is not None and graph.proved:
            self._view.read |= graph.read
            return graph.replay(batch, point)
        return self._tried(form, graph, forward, batch, point)

    def notices(self) -> list[str]:
        """Findings since the last call, for the log."""
        notices, self._notices = self._notices, []
        return notices

    def release(self) -> None:
        """Give the memory back."""
        self._seen.clear()
        self._pool = None

    def _tried(self, form: Hashable, graph: _Graph | None, forward: Forward, batch: Batch, point: Point | Both) -> StepOutput:
        """The plain forward, with which a replay must agree."""
        start = rng_state(self._device)
        why = ""
        try:
            first = graph is None
            if graph is None:
                with self._isolation.dry(everywhere=False):
                    graph = self._record(forward, batch, point)
            with self._isolation.dry(everywhere=False):
                set_rng_state(start, self._device)
                replayed = graph.replay(batch, point)
        except Exception as error:  # whatever it is, the plain forward works, or says it better
            why = str(error) if isinstance(error, Refused) else repr(error)
        out = forward(batch)
        if not why and not _same(replayed, out):
            why = "a replay gave another loss than the forward"
        if why:
            self._refuse(why)
            return out
        assert graph is not None
        self._seen[form], graph.proved = graph, not first
        if graph.proved and sum(g is not None and g.proved for g in self._seen.values()) == 1:
            self._notices.append("forwards are replayed as CUDA graphs, with the bits of plain ones")
        return out

    def _refuse(self, why: str) -> None:
        self.refused = f"no CUDA graphs: {why}"
        self._notices.append(self.refused)
        self.release()

    def _record(self, forward: Forward, batch: Batch, point: Point | Both) -> _Graph:
        device = self._device
        batch = map_leaves(batch, lambda v: v.clone() if isinstance(v, Tensor) else v)
        if isinstance(point, PerExample):
            point = PerExample(point.key, point.queries.to(device, copy=True), point.offsets.to(device, copy=True))
        held = CapturedKey(point.key, device)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        for checking in (nullcontext(), _refusing_to_wait()):  # the first time fills caches, for which it may wait
            with torch.cuda.stream(side), held.recording(), checking, self._view.probe(point):
                out = forward(batch)
        torch.cuda.current_stream(device).wait_stream(side)
        _check(out, point)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        before = set(self._view.read)
        self._view.read.clear()
        with (
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            held.recording(),
            self._view.probe(point),
        ):
            out = forward(batch)
        read = frozenset(self._view.read)
        self._view.read |= before
        return _Graph(graph, held, point, batch, out, self._view.buffers(), read)

    def _form(self, batch: Batch, point: Point | Both) -> Hashable | None:
        """The properties of a batch that must be equal for a graph to fit; None: none can."""
        kind: tuple[Hashable, ...]
        if isinstance(point, Shared) and len(point.terms) == 1:
            kind = (point.terms[0].coefficient,)
        elif isinstance(point, Both):
            kind = (point.term.coefficient, point.examples)
        elif isinstance(point, PerExample):
            kind = (point.queries.shape,)
        else:
            return None
        form = tuple((v.shape, v.dtype, v.device) if isinstance(v, Tensor) else v for v in leaves(batch))
        try:
            turns = tuple(leaf.active(point.key) for leaf in self._view.leaves if leaf.turn is not None)
            return hash((type(point), kind, form, turns, self._memory()))
        except TypeError:  # something in the batch has no hash
            return None

    def _memory(self) -> int:
        """Where the module's tensors lie, and which of its parts train: a graph knows no others."""
        root = self._view.root
        tensors = [*root.parameters(), *root.buffers()]
        return hash((*(t.data_ptr() for t in tensors), *(m.training for m in root.modules())))

    def _why_not(self) -> str:
        if self._device.type != "cuda":
            return f"the module is on {self._device}"
        if self._view.compiled:
            return "part of the module runs as compiled code"
        if self._view.behind:
            return f"{self._view.behind[0].name!r} is read where a probe does not see it"
        others = {type(leaf).__name__ for leaf in self._view.leaves if type(leaf) not in _RECORDED}
        return f"{', '.join(sorted(others))} cannot be recorded" if others else ""


@dataclass
class _Graph:
    """A recorded forward, and the memory that it reads and writes."""

    graph: Any
    key: CapturedKey
    point: Point | Both
    batch: Batch
    out: Any
    buffers: list[Tensor]
    read: frozenset[int]
    """Ids of the parameters that the forward reads."""
    proved: bool = False

    def replay(self, batch: Batch, point: Point | Both) -> StepOutput:
        for own, value in zip(leaves(self.batch), leaves(batch), strict=True):
            if isinstance(own, Tensor):
                own.copy_(value)
        if isinstance(self.point, PerExample) and isinstance(point, PerExample):
            self.point.queries.copy_(point.queries)
            self.point.offsets.copy_(point.offsets)
        self.key.set(point.key)
        self.graph.replay()
        return map_leaves(self.out, lambda v: v.clone() if isinstance(v, Tensor) else v)


def _check(out: StepOutput, point: Point | Both) -> None:
    """A mean that is split afterwards, or a number made on the host, is nothing that a replay could give."""
    loss = returned_loss(out)
    if not isinstance(loss, Tensor):
        raise Refused(f"the loss is no tensor but {type(loss).__name__}")
    examples = point.examples if isinstance(point, Both) else point.queries.numel() if isinstance(point, PerExample) else None
    if examples is not None and loss.shape != (examples,):
        raise Refused(f"`zo_objective` must return the losses of the {examples} examples, got shape {tuple(loss.shape)}")


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Operations that wait for the GPU raise an error; code that asks gets the answers of a recording."""
    before, asked = torch.cuda.get_sync_debug_mode(), torch.cuda.is_current_stream_capturing
    torch.cuda.set_sync_debug_mode("error")
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise Refused(f"the forward waits for the GPU ({error}), as `.item()` and copies from the host do") from error
    finally:
        torch.cuda.is_current_stream_capturing = asked
        torch.cuda.set_sync_debug_mode(before)


def _same(a: Any, b: Any) -> bool:
    """Equal in every bit of every tensor, one NaN being as good as another."""
    found, others = leaves(a), leaves(b)
    return len(found) == len(others) and all(
        torch.equal(x.nan_to_num(), y.nan_to_num()) if isinstance(x, Tensor) and isinstance(y, Tensor) else bool(x == y)
        for x, y in zip(found, others, strict=True)
    )
