"""Greedy answers of a causal language model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: "PreTrainedTokenizerBase", batch: Mapping[str, Tensor], max_new_tokens: int = 16
) -> list[str]:
    """Return what `model` says after each prompt, decoded greedily, up to the first line break.

    `batch` holds left-padded input_ids and attention_mask (batch, tokens). A pure function of the weights: no
    sampling, no state; inside a probe it is the answer of the perturbed model.
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
    prompts = batch["input_ids"]
    out = model.generate(prompts, attention_mask=batch["attention_mask"], generation_config=config)
    texts = tokenizer.batch_decode(out[:, prompts.shape[1] :], skip_special_tokens=True)
    return [text.split("\n", 1)[0].strip() for text in texts]


def _line_break(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that is a line break, where the vocabulary has one."""
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return ids[-1] if len(ids) and tokenizer.decode(ids[-1:]) == "\n" else None
