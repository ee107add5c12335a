"""Encode the part of a prompt that no trained weight touches once, for all forwards of a step."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .beginning import keys_and_values, tolerance
from .candidates import candidate_logits, evaluating

# Per model: whether its answers from keys and values of the text are those of a whole forward.
_agrees: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def encode_text(model: nn.Module, batch: Mapping[str, Tensor], last: int) -> dict[str, Any] | None:
    """Return the batch with all but its ``last`` tokens replaced by the keys and values that attention has of them.

    Forwards of the result run the last tokens only. `model` is a Hugging Face causal language model, `batch` holds
    left-padded input_ids and attention_mask, or goes on from a :class:`~.beginning.Beginning`. None for a model whose
    attention does not take this (noticed by comparing answers on its first batch), or a batch with no token before the
    last ones.
    """
    if batch["input_ids"].shape[1] <= last or not _agrees.get(model, True):
        return None
    encoded = _encode(model, batch, last)
    if model not in _agrees:
        _agrees[model] = encoded is not None and _same_answers(model, batch, encoded)
    return encoded if _agrees[model] else None


@torch.no_grad()
def _encode(model: nn.Module, batch: Mapping[str, Tensor], last: int) -> dict[str, Any] | None:
    text = {**batch, "input_ids": batch["input_ids"][:, :-last], "attention_mask": batch["attention_mask"][:, :-last]}
    try:
        layers = keys_and_values(model, text)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    return {**batch, "input_ids": batch["input_ids"][:, -last:], "text": layers}


@torch.no_grad()
def _same_answers(model: nn.Module, batch: Mapping[str, Tensor], encoded: Mapping[str, object]) -> bool:
    some = torch.arange(2, device=batch["input_ids"].device)
    with evaluating(model):
        whole, short = candidate_logits(model, batch, some), candidate_logits(model, encoded, some)
    allowed = tolerance(next(model.parameters()).dtype) * whole.abs().max().clamp(min=1)
    return bool(((whole - short).abs() <= allowed).all())
