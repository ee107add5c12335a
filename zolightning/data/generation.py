"""Greedy answers of a causal language model."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .candidates import contiguous_states, text_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_written = 0


def tokens_written() -> int:
    """Return how many tokens :func:`generate_answers` has written in this process, ends of answers included.

    A count for logs: probes restore what a module counts, so that it cannot keep this itself.
    """
    return _written


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    batch: Mapping[str, Any],
    max_new_tokens: int = 16,
    adjust: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[str]:
    """Return the model's text after each prompt, decoded greedily, up to the first line break.

    `batch` holds left-padded input_ids and attention_mask (batch, tokens), or is one whose text
    :func:`~.text_cache.encode_text` encoded. A pure function of the weights: no sampling, no state; inside a probe it is
    the answer of the perturbed model. ``adjust`` takes the tokens that are written so far (batch, n) and the logits of the
    next one (batch, vocabulary), and gives the logits that choose it.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[i for i in (tokenizer.eos_token_id, _line_break(tokenizer)) if i is not None],
    )
    prompts, mask = batch["input_ids"], batch["attention_mask"]
    inputs: dict[str, Any] = {"attention_mask": mask, "generation_config": config}
    if "text" in batch:  # whose tokens count, but are not looked at again
        prompts = F.pad(prompts, (mask.shape[1] - prompts.shape[1], 0))
        inputs["past_key_values"] = text_cache(batch)
    if adjust is not None:
        begin = prompts.shape[1]
        inputs["logits_processor"] = [lambda tokens, logits: adjust(tokens[:, begin:], logits)]
    with contiguous_states(model):
        out = model.generate(prompts, **inputs)
    answers = out[:, prompts.shape[1] :]
    _count(answers, config.eos_token_id)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.split("\n", 1)[0].strip() for text in texts]


def _count(answers: Tensor, ends: list[int]) -> None:
    global _written
    ended = torch.isin(answers, torch.tensor(ends, device=answers.device)).int().cumsum(1)
    before = torch.cat((ended.new_zeros(len(ended), 1), ended[:, :-1]), 1)
    _written += int((before == 0).sum())  # a row's own end counts, the padding behind it does not


def _line_break(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that is a line break, where the vocabulary has one."""
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return ids[-1] if len(ids) and tokenizer.decode(ids[-1:]) == "\n" else None
