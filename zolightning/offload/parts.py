"""Weights that operations read by rows come into memory by rows, and get their updates so.

These are the experts of a mixture, stacked in one tensor, and embeddings. An expert to which no token goes, and words that no
batch holds, cost no bytes until they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..space import block_rows
from ..space.together import SMALL
from .entry import Entry
from .files import pages, shaped, whole_pages


def rows_together(module: nn.Module) -> dict[str, int]:
    """Name → rows that come together, of the parameters that may come in parts."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding) and m.max_norm is None}
    named = dict(module.named_parameters())
    experts = {name: 1 for name, p in named.items() if p.dim() == 3 and p.numel() > SMALL * len(p)}
    return experts | {name: block_rows(p.shape) for name, p in named.items() if id(p) in tables and p.dim() == 2}


def entries_of(name: str, parameter: Tensor, device: torch.device, rows: int | None) -> tuple[Entry, ...]:
    """The entries of a parameter, in the order of its rows.

    Args:
        name: the parameter's.
        parameter: it; only its shape and dtype are looked at.
        device: where operations read it.
        rows: that come together; None: all.
    """
    count, shape = parameter.shape[0], parameter.shape[1:]
    if rows is None or rows >= count:
        return (Entry(name, parameter.shape, parameter.dtype, device),)
    runs = [(start, min(start + rows, count)) for start in range(0, count, rows)]
    return tuple(
        Entry(f"{name}[{a}:{b}]", torch.Size((b - a, *shape)), parameter.dtype, device, a * math.prod(shape)) for a, b in runs
    )


class Parts:
    """Reads a weight that is in several entries.

    Args:
        entries: of its rows, in their order, all of as many rows but the last.
        hold: gives the weights of one, which may go with the next call.
    """

    def __init__(self, entries: Sequence[Entry], hold: Callable[[Entry], Tensor]) -> None:
        self._entries, self._hold = entries, hold
        self._step, self._count = entries[0].shape[0], sum(entry.shape[0] for entry in entries)

    def whole(self) -> Tensor:
        """All rows, in memory of its own."""
        return self._run(0, self._count)

    def at(self, index: object) -> Tensor | None:
        """The weight at this index, if that says which rows; None if it says something else.

        Raises:
            IndexError: there is no such row.
        """
        if isinstance(index, slice) and index.step in (None, 1):
            start, end, _ = index.indices(self._count)
            return self._run(start, max(start, end))
        if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and index.dim():
            return self.gathered(torch.where(index < 0, index + self._count, index))
        if type(index) is int or (isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)):
            row = range(self._count)[int(index)]
            return self._run(row, row + 1)[0]
        return None

    def gathered(self, numbers: Tensor) -> Tensor:
        """The rows of these numbers, in the shape of these and of a row.

        Raises:
            IndexError: there is no such row.
        """
        rows = numbers.reshape(-1).to(self._entries[0].device, torch.int64)
        entry = self._entries[0]
        out = torch.empty(rows.numel(), *entry.shape[1:], dtype=entry.dtype, device=entry.device)  # an activation
        for place in torch.unique(rows // self._step).tolist():
            if not 0 <= place < len(self._entries):
                raise IndexError("index out of range in self")
            first = place * self._step
            mine = (rows >= first) & (rows < first + self._step)
            out[mine] = self._hold(self._entries[place])[rows[mine] - first]
        return out.view(*numbers.shape, *out.shape[1:])

    def _run(self, start: int, end: int) -> Tensor:
        place, first = start // self._step, start // self._step * self._step
        if end <= first + self._step and place < len(self._entries):
            part = self._hold(self._entries[place])
            return part if end - start == len(part) else part[start - first : end - first]
        out = self._memory(end - start)
        at = start
        while at < end:
            place = at // self._step
            piece = self._hold(self._entries[place])[at - place * self._step :][: end - at]
            out[at - start : at - start + len(piece)] = piece
            at += len(piece)
        return out

    def _memory(self, rows: int) -> Tensor:
        entry = self._entries[0]
        shape = (rows, *entry.shape[1:])
        with torch.inference_mode(False):  # a validation's tensors outlive it
            if entry.device.type != "cpu":
                return torch.empty(shape, dtype=entry.dtype, device=entry.device)
            return shaped(pages(whole_pages(math.prod(shape) * entry.dtype.itemsize)), 0, shape, entry.dtype)
