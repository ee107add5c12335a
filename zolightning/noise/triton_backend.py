"""The GPU's backend: Triton kernels on contiguous tensors of one CUDA device, with the bits of :mod:`.reference`.

Every product and sum is rounded by itself (``enable_fp_fusion=False``). Imported where Triton is installed only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..types import Key, Term
from . import reference
from . import triton_kernels as kernels
from .backend import Backend
from .captured_key import captured_words, keep, key_words
from .constants import floats, integers
from .philox import philox_key, rounding_query

BLOCK = 2048
TILE = (16, 256)  # rows and columns of a program of a matrix: 16 bytes of 8 neighbours a thread, 4 rows each
PIECE = 1 << 15  # elements that a program of a table takes
_NOISE_BLOCK = 128  # of Rademacher noise, the widest: a run that begins with one begins with a block of any other

_FORM = {torch.float32: False, torch.bfloat16: True}  # dtypes, and whether they are read as integers


class TritonBackend(Backend):
    """The kernels on contiguous tensors of one GPU."""

    description = f"Triton {triton.__version__}"

    dtypes = frozenset(_FORM)

    def rounds(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16

    def updates(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16  # how ``torch.add`` rounds wider ones is the device's business

    def noise(
        self, kind: int, terms: Sequence[Term], leaf: int, starts: Tensor, length: int, queries: Tensor | None = None
    ) -> Tensor:
        starts = starts.to(torch.int64).contiguous()
        own = starts if queries is None else queries.to(starts.device, torch.int64).expand(starts.shape).contiguous()
        out = torch.empty(starts.numel(), length, dtype=torch.float32, device=starts.device)
        data = (out, starts, own, *_terms(terms, out.device), len(terms), leaf, length, out.numel())
        _launch(kernels.sample, out.numel(), *data, kind=kind, own_queries=queries is not None)
        return out

    def perturb(self, out: Tensor, source: Tensor, kind: int, terms: Sequence[Term], leaf: int, start: int) -> None:
        data = (_raw(out), _raw(source), *_terms(terms, out.device), len(terms), leaf, start, out.numel())
        forms = {"narrow_in": _FORM[source.dtype], "narrow_out": _FORM[out.dtype]}
        aligned = start % _NOISE_BLOCK == 0
        _launch(kernels.perturb, out.numel(), *data, kind=kind, aligned=aligned, single=aligned and len(terms) == 1, **forms)

    def perturb_both(self, plus: Tensor, minus: Tensor, source: Tensor, kind: int, term: Term, leaf: int, start: int) -> None:
        data = (_raw(plus), _raw(minus), _raw(source), *_terms([term], source.device), leaf, start, source.numel())
        forms = {"narrow_in": _FORM[source.dtype], "narrow_out": _FORM[plus.dtype]}
        _launch(kernels.perturb_both, source.numel(), *data, kind=kind, aligned=start % _NOISE_BLOCK == 0, **forms)

    def perturb_rows(self, out: Tensor, source: Tensor, kind: int, terms: Sequence[Term], leaf: int, rows: Tensor) -> None:
        rows = rows.to(torch.int64).contiguous()
        data = (_raw(out), _raw(source), rows, *_terms(terms, out.device), len(terms), leaf, source.shape[1], out.numel())
        forms = {"narrow_in": _FORM[source.dtype], "narrow_out": _FORM[out.dtype]}
        _launch(kernels.perturb_rows, out.numel(), *data, kind=kind, **forms)

    def perturb_all(
        self, outs: Sequence[Tensor], sources: Sequence[Tensor], kind: int, terms: Sequence[Term], leaves: Sequence[int]
    ) -> None:
        device = sources[0].device
        table = keep(_table(_rows(sources, outs, leaves, [0] * len(outs)), device))
        numbers = (*_terms(terms, device), len(terms))
        forms = {"narrow": _FORM[sources[0].dtype], "aligned": _aligned(sources) and _aligned(outs)}
        _each(kernels.perturb_all, table, *numbers, kind=kind, **forms)

    def sgd_(
        self, target: Tensor, kind: int, terms: Sequence[Term], leaf: int, start: int, lr: float, weight_decay: float, key: Key
    ) -> None:
        self._sgd([target], kind, terms, [leaf], [start], lr, weight_decay, key)

    def sgd_all_(
        self, targets: Sequence[Tensor], kind: int, terms: Sequence[Term], leaves: Sequence[int],
        lr: float, weight_decay: float, key: Key,
    ) -> None:  # fmt: skip
        self._sgd(targets, kind, terms, leaves, [0] * len(targets), lr, weight_decay, key)

    def _sgd(
        self, targets: Sequence[Tensor], kind: int, terms: Sequence[Term], leaves: Sequence[int], starts: Sequence[int],
        lr: float, weight_decay: float, key: Key,
    ) -> None:  # fmt: skip
        device = targets[0].device
        table = _table(_rows(targets, targets, leaves, starts), device)
        numbers = (*_terms(terms, device), len(terms), *philox_key(key), rounding_query(key))
        aligned = _aligned(targets) and all(start % _NOISE_BLOCK == 0 for start in starts)
        forms = {"aligned": aligned, "single": aligned and len(terms) == 1, "decays": weight_decay != 0.0}
        rates = floats([lr, weight_decay], device)
        _each(kernels.sgd_all, table, *numbers, rates, kind=kind, **forms)

    def stochastic_round_(self, target: Tensor, value: Tensor, key: Key, leaf: int, start: int) -> None:
        stream = (*philox_key(key), rounding_query(key))
        data = (_raw(target), value, leaf, start, target.numel(), *stream)
        _launch(kernels.stochastic_round, target.numel(), *data, aligned=start % _NOISE_BLOCK == 0)

    def outer_sum(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        out = torch.empty(a.shape[1], b.shape[1], dtype=torch.float32, device=a.device)
        _launch(kernels.outer_sum, out.numel(), a, b, out, a.shape[0], *out.shape)
        return out

    def outer_sgd_(self, target: Tensor, a: Tensor, b: Tensor, leaf: int, lr: float, weight_decay: float, key: Key) -> None:
        height, columns = target.shape
        if not target.numel():
            return
        rates = floats([lr, weight_decay], target.device)
        data = (_raw(target), a, b, len(a), height, columns, leaf, *philox_key(key), rounding_query(key), rates)
        aligned = target.data_ptr() % 16 == 0 and columns % 8 == 0
        kernels.outer_sgd[(triton.cdiv(height, TILE[0]), triton.cdiv(columns, TILE[1]))](
            *data, aligned=aligned, decays=weight_decay != 0.0, tall=TILE[0], wide=TILE[1], enable_fp_fusion=False
        )

    def keep_large_(self, out: Tensor, stored: Tensor, limit: float) -> None:
        limits = floats([limit], out.device)
        forms = {"narrow_in": _FORM[stored.dtype], "narrow_out": _FORM[out.dtype]}
        _launch(kernels.keep_large, out.numel(), _raw(out), _raw(stored), limits, out.numel(), **forms)

    def mixed_sum(self, words: Tensor, first: int) -> int:
        return reference.mixed_sum(words, first)


def _launch(kernel: Any, length: int, *arguments: Any, **constants: Any) -> None:
    if length:
        kernel[(triton.cdiv(length, BLOCK),)](*arguments, **constants, size=BLOCK, enable_fp_fusion=False)


def _each(kernel: Any, table: Tensor, *arguments: Any, **constants: Any) -> None:
    """A program for each row of the table."""
    if len(table):
        kernel[(len(table),)](table, *arguments, **constants, size=BLOCK, enable_fp_fusion=False)


def _rows(
    sources: Sequence[Tensor], outs: Sequence[Tensor], leaves: Sequence[int], starts: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Source, out, leaf, start, length and bytes an element of each tensor."""
    data = zip(sources, outs, leaves, starts, strict=True)
    return tuple((s.data_ptr(), o.data_ptr(), leaf, start, s.numel(), s.element_size()) for s, o, leaf, start in data)


@lru_cache(maxsize=8)  # a step's tables are those of the step before
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int64 (n, 5): source, out, leaf, start, length of pieces small enough for a program each."""
    whole = torch.tensor(rows, dtype=torch.int64)
    length, wide = whole[:, 4], whole[:, 5]
    pieces = -(-length // PIECE)
    index = torch.repeat_interleave(torch.arange(len(rows)), pieces)
    first = torch.cumsum(pieces, 0) - pieces
    skipped = (torch.arange(len(index)) - first[index]) * PIECE
    table = whole[index, :5]
    table[:, :2] += (skipped * wide[index])[:, None]
    table[:, 3] += skipped
    table[:, 4] = torch.minimum(length[index] - skipped, torch.tensor(PIECE))
    return table.to(device)


def _aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether their memory can be read 16 bytes at a time."""
    return all(t.data_ptr() % 16 == 0 and t.numel() % 16 == 0 for t in tensors)


def _raw(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _terms(terms: Sequence[Term], device: torch.device) -> tuple[Tensor, Tensor]:
    words = tuple(word for key, _ in terms for word in key_words(key)) or (0,)
    held = captured_words(words)
    return (integers(words, device) if held is None else held), floats([c for _, c in terms] or [0.0], device)
