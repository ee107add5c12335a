"""A batch of any nesting: how many examples it holds, and the same batch repeated or rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from ..types import Batch


def batch_examples(batch: Batch) -> int | None:
    """The batch's size: dimension 0 of the first tensor in it, or None."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    for value in _children(batch):
        size = batch_examples(value)
        if size is not None:
            return size
    return None


def batch_numel(batch: Batch) -> int:
    """Elements of the batch's largest tensor."""
    if isinstance(batch, Tensor):
        return batch.numel()
    return max(map(batch_numel, _children(batch)), default=0)


def repeat_batch(batch: Batch, examples: int, copies: int) -> Batch:
    """The batch with every tensor, and every list of plain values, of ``examples`` entries repeated ``copies`` times."""
    if copies == 1:
        return batch
    if isinstance(batch, Tensor):
        if batch.dim() == 0 or batch.shape[0] != examples:
            return batch
        return batch.repeat(copies, *([1] * (batch.dim() - 1)))
    if isinstance(batch, (list, tuple)) and not any(isinstance(v, (Tensor, Mapping, list, tuple)) for v in batch):
        return batch * copies if len(batch) == examples else batch
    return _rebuilt(batch, lambda value: repeat_batch(value, examples, copies))


def map_leaves(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """The batch with every value that is no container replaced by the function's."""
    return _rebuilt(batch, lambda value: map_leaves(value, function)) if _is_container(batch) else function(batch)


def leaves(batch: Batch) -> list[Any]:
    """Every value in the batch that is no container, in the order of :func:`map_leaves`."""
    return [leaf for child in _children(batch) for leaf in leaves(child)] if _is_container(batch) else [batch]


def _is_container(batch: Batch) -> bool:
    return isinstance(batch, (Mapping, list, tuple)) or (is_dataclass(batch) and not isinstance(batch, type))


def _rebuilt(batch: Batch, child: Callable[[Any], Any]) -> Batch:
    """A container of the same type with ``child`` of each of its values; anything else as it is."""
    if isinstance(batch, Mapping):
        values = {k: child(v) for k, v in batch.items()}
        return values if type(batch) is dict else type(batch)(values)  # type: ignore[call-arg]
    if isinstance(batch, (list, tuple)):
        items = [child(v) for v in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if _is_container(batch):
        return replace(batch, **{f.name: child(getattr(batch, f.name)) for f in fields(batch)})
    return batch


def _children(batch: Batch) -> list[object]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, (list, tuple)):
        return list(batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, f.name) for f in fields(batch)]
    return []
