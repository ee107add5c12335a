"""Score a few candidate next tokens without computing the logits of the whole vocabulary."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..types import Batch

# Per model: whether candidate rows of the output embedding give the model's own logits.
_rows_suffice: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def candidate_logits(model: nn.Module, batch: Batch, candidate_ids: Tensor) -> Tensor:
    """Return float32 logits (batch, candidates) of `candidate_ids` as the token after each prompt.

    `model` is a Hugging Face causal language model; `batch` holds left-padded input_ids and
    attention_mask on its device. Only the candidates' rows of the output embedding are applied, at the
    last position. A model that does more there (scaled or capped logits, an adapter), noticed by comparing
    with its own logits on its first batch, is run in full instead.
    """
    score = _row_logits if rows_suffice(model, batch, candidate_ids) else _full_logits
    return score(model, batch, candidate_ids)


def rows_suffice(model: nn.Module, batch: Batch, candidate_ids: Tensor) -> bool:
    """Return whether the output embedding, applied to the body's last states, gives the model's own logits.

    Compared on the first batch's first sequence, at `candidate_ids`, and remembered.
    """
    if model not in _rows_suffice:
        probe = {key: batch[key][:1] for key in ("input_ids", "attention_mask")}
        _rows_suffice[model] = _has_plain_head(model) and _agrees(model, probe, candidate_ids)
    # The head is looked at each time, as an adapter may have been put on it since.
    return _rows_suffice[model] and _has_plain_head(model)


def last_states(model: nn.Module, batch: Batch) -> Tensor:
    """Return the hidden states (batch, width) at the end of each prompt that the output embedding is applied to."""
    body = _body(model)
    states: Tensor = body(**model_inputs(body, batch)).last_hidden_state
    return states[:, -1]


def _row_logits(model: nn.Module, batch: Batch, candidate_ids: Tensor) -> Tensor:
    last = last_states(model, batch)
    head = _head(model)
    rows = candidate_ids.to(head.weight.device)
    bias = None if head.bias is None else head.bias[rows].float()
    with torch.autocast(last.device.type, enabled=False):  # a few rows in full precision: bfloat16 logits of 16 step by 1/8
        return F.linear(last.float(), head.weight[rows].float(), bias)


def _full_logits(model: nn.Module, batch: Batch, candidate_ids: Tensor) -> Tensor:
    last_only = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    with contiguous_states(model):
        logits: Tensor = model(**model_inputs(model, batch), **last_only).logits
    return logits[:, -1, candidate_ids.to(logits.device)].float()


# Any: a wrapper such as a PEFT model forwards these methods without declaring them.
def _body(model: Any) -> Any:
    return model.get_decoder()


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def model_inputs(module: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the arguments of `module` for a left-padded batch, or one whose text :func:`~.text_cache.encode_text` encoded."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if accepts(module, "position_ids"):  # counted over real tokens, so that left padding shifts nothing
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if "text" in batch:
        inputs |= {"past_key_values": text_cache(batch), "use_cache": True}
    return inputs


def text_cache(batch: Batch) -> Any:
    """Return a new cache of the keys and values of an encoded text: a forward adds the last tokens to it."""
    from transformers import DynamicCache

    if "beginning" in batch:
        return batch["beginning"].cache(batch["text"])
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(batch["text"]):
        cache.update(keys, values, layer)
    return cache


def accepts(module: nn.Module, argument: str) -> bool:
    """Return whether the module's forward takes an argument of that name."""
    return argument in inspect.signature(module.forward).parameters


def _has_plain_head(model: nn.Module) -> bool:
    head = _head(model)
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward


@torch.no_grad()
def _agrees(model: nn.Module, batch: Batch, candidate_ids: Tensor) -> bool:
    # a function mode that is active now, such as a probe of perturbed weights, is not the model's doing
    with evaluating(model), torch._C.DisableTorchFunction():
        try:
            rows = _row_logits(model, batch, candidate_ids)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False
        full = _full_logits(model, batch, candidate_ids)
    tolerance = max(2 * torch.finfo(_head(model).weight.dtype).eps, 1e-4) * float(full.abs().max())
    return float((rows - full).abs().max()) <= tolerance


@contextmanager
def contiguous_states(model: Any) -> Iterator[None]:
    """Give the output embedding contiguous states.

    PyTorch multiplies the last positions of more, a strided view, with a frozen matrix by copying it for each sequence; that
    of a single sequence counts as contiguous, so only a copy has plain strides.
    """
    plain = torch.contiguous_format
    head = model.get_output_embeddings()
    handle = head and head.register_forward_pre_hook(lambda _, args: args[0].clone(memory_format=plain))
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode and put each module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
