"""Encode the part of a prompt that no trained weight touches once, for all forwards of a step."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .candidates import candidate_logits, evaluating, model_inputs

# Per model: whether its answers from keys and values of the text are those of a whole forward.
_agrees: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def encode_text(model: nn.Module, batch: Mapping[str, Tensor], last: int) -> dict[str, Any] | None:
    """Return the batch with all but its ``last`` tokens replaced by the keys and values that attention has of them.

    Forwards of the result run the last tokens only. `model` is a Hugging Face causal language model, `batch` holds
    left-padded input_ids and attention_mask, or goes on from a :class:`Beginning`. None for a model whose attention does not
    take this (noticed by comparing answers on its first batch), or a batch with no token before the last ones.
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
        layers = _keys_and_values(model, text)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    return {**batch, "input_ids": batch["input_ids"][:, -last:], "text": layers}


class Beginning:
    """The keys and values of the tokens that all prompts begin with: instructions, answered examples. Computed once.

    Args:
        model: a Hugging Face causal language model, of which no weight that is trained takes part here.
        tokens: their ids, at least one.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, tokens: Sequence[int]) -> None:
        ids = torch.tensor([tokens], device=next(model.parameters()).device)
        self._layers = _keys_and_values(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        self._length = len(tokens)

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the batch, left-padded input_ids and attention_mask of the prompts' other tokens, going on from here."""
        mask, rows = batch["attention_mask"], len(batch["input_ids"])
        layers = tuple((k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in self._layers)
        return {**batch, "attention_mask": torch.cat((mask.new_ones(rows, self._length), mask), 1), "text": layers}


def _keys_and_values(model: Any, batch: Mapping[str, Any]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Of all tokens of the batch, layer by layer."""
    from transformers import DynamicCache

    body = model.get_decoder()
    inputs = {"past_key_values": DynamicCache()} | model_inputs(body, batch) | {"use_cache": True}
    body(**inputs)
    return tuple((keys, values) for keys, values, *_ in inputs["past_key_values"])


@torch.no_grad()
def _same_answers(model: nn.Module, batch: Mapping[str, Tensor], encoded: Mapping[str, object]) -> bool:
    some = torch.arange(2, device=batch["input_ids"].device)
    with evaluating(model):
        whole, short = candidate_logits(model, batch, some), candidate_logits(model, encoded, some)
    tolerance = max(8 * torch.finfo(next(model.parameters()).dtype).eps, 1e-4)  # 30 blocks in float32 differ by 2e-6
    return bool(((whole - short).abs() <= tolerance * whole.abs().max().clamp(min=1)).all())
