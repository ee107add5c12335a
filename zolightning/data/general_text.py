"""General English text that no task here trains on, and how likely a model finds it."""

import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from .._answers import needs
from .candidates import evaluating
from .likelihood import answer_log_likelihood


def general_text(most: int = 64) -> list[str]:
    """Paragraphs of prose about measurements, people and plants: scikit-learn's descriptions of its data sets, BSD licence.

    Args:
        most: how many paragraphs, those of at least 20 words.

    Raises:
        ImportError: scikit-learn is missing.
    """
    with needs("sklearn", "`general_text`", "zolightning[demo]"):
        files = sorted(resources.files("sklearn.datasets.descr").iterdir(), key=lambda file: file.name)
    paragraphs = [
        " ".join(part.split()) for file in files if file.name.endswith(".rst") for part in file.read_text().split("\n\n")
    ]
    prose = [text for text in paragraphs if len(text.split()) >= 20 and text[0].isalpha() and not set("=|>") & set(text)]
    return prose[:most]


@torch.no_grad()
def text_perplexity(model: nn.Module, tokenizer: Any, texts: Sequence[str], length: int = 128) -> float:
    r"""Perplexity, :math:`\exp(-\frac1n \sum \log p(t \mid \text{before}))`, over the tokens of the texts but each one's first.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        texts: each is looked at by itself.
        length: tokens of a text at most; the rest is left out.

    Raises:
        ValueError: no text has two tokens.
    """
    ids = [tokenizer(text)["input_ids"][:length] for text in texts]
    ids = [one for one in ids if len(one) > 1]
    if not ids:
        raise ValueError("perplexity needs a text of at least two tokens")
    device = next(model.parameters()).device
    total = tokens = 0.0
    with evaluating(model):
        for one in ids:
            batch: dict[str, Tensor] = {"input_ids": torch.tensor([one], device=device)}
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            answer = torch.tensor([len(one) - 1], device=device)
            total += float(answer_log_likelihood(model, batch, answer)) * (len(one) - 1)
            tokens += len(one) - 1
    return math.exp(-total / tokens)
