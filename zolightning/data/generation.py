"""Greedy answers of a causal language model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .candidates import contiguous_states, text_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: "PreTrainedTokenizerBase", batch: Mapping[str, Any], max_new_tokens: int = 16
) -> list[str]:
    """Return the model's text after each prompt, decoded greedily, up to the first line break.

    `batch` holds left-padded input_ids and attention_mask (batch, tokens), or is one whose text
    :func:`~.text_cache.encode_text` encoded. A pure function of the weights: no sampling, no state; inside a probe it is
    the answer of the perturbed model.
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
    with contiguous_states(model):
        out = model.generate(prompts, **inputs)
    texts = tokenizer.batch_decode(out[:, prompts.shape[1] :], skip_special_tokens=True)
    return [text.split("\n", 1)[0].strip() for text in texts]


def _line_break(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that is a line break, where the vocabulary has one."""
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return ids[-1] if len(ids) and tokenizer.decode(ids[-1:]) == "\n" else None
