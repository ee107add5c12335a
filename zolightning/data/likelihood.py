"""Log-likelihoods of answers, without the logits of the whole vocabulary at every position."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .candidates import accepts, contiguous_states, model_inputs, rows_suffice

CHUNK = 1 << 24  # logits that exist at once, 64 MB in float32


def answer_log_likelihood(model: nn.Module, batch: Mapping[str, Tensor], lengths: Tensor) -> Tensor:
    r"""Return (sequences,) float32: the mean of :math:`\log p(t \mid \text{before})` over each sequence's last tokens.

    `model` is a Hugging Face causal language model; `batch` holds left-padded input_ids and attention_mask
    (sequences, tokens) on its device, `lengths` (sequences,) how many tokens at the end are the answer; where it
    is 0 the result is 0. The output embedding sees the answers' positions only, a few at a time. A model that does
    more than that (scaled or capped logits) computes them itself, at these positions where it can.
    """
    longest = int(lengths.max())
    ids = batch["input_ids"]
    if not 0 < longest < ids.shape[1]:
        raise ValueError(f"answers of up to {longest} tokens do not fit sequences of {ids.shape[1]} with a prompt before them")
    targets = ids[:, -longest:]
    kept = torch.arange(longest, device=ids.device) >= longest - lengths[:, None]
    if rows_suffice(model, batch, targets.flatten()):
        scores = _by_head(model, batch, targets)
    else:
        scores = _log_probs(_own_logits(model, batch, longest), targets)
    return (scores * kept).sum(-1) / lengths.clamp(min=1)


def _by_head(model: Any, batch: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    body, head = model.get_decoder(), model.get_output_embeddings()
    hidden = body(**model_inputs(body, batch)).last_hidden_state[:, -targets.shape[1] - 1 : -1]
    # all sequences together, so that dimension 0 stays that of the examples
    width = max(1, CHUNK // (hidden.shape[0] * head.weight.shape[0]))
    parts = zip(torch.split(hidden, width, 1), torch.split(targets, width, 1), strict=True)
    with contiguous_states(model):
        return torch.cat([_log_probs(head(states.to(head.weight.dtype)), ids) for states, ids in parts], 1)


def _own_logits(model: nn.Module, batch: Mapping[str, Tensor], longest: int) -> Tensor:
    last_only = {"logits_to_keep": longest + 1} if accepts(model, "logits_to_keep") else {}
    with contiguous_states(model):
        logits: Tensor = model(**model_inputs(model, batch), **last_only).logits
    return logits[:, -longest - 1 : -1]


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
