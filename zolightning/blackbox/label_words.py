"""The words by which a model that nobody has prompted for a task tells its labels apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .llamacpp import LlamaContext, LlamaModel

Numbers = npt.NDArray[Any]


def label_words(
    model: LlamaModel,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[int],
    *,
    words: int = 16,
    likely: int = 2000,
    threads: int = 1,
) -> list[list[int]]:
    r"""For each label the next tokens whose log-probability p tells its prompts from the others best, by Student's t:

    .. math:: t_c(w) = \frac{\overline{\log p_c(w)} - \overline{\log p_{\ne c}(w)}}{s(w)}

    The mean of their logits is then the label's score: with no training, better than words that a person thinks of. After
    automatic label words, LM-BFF, arXiv:2012.15723. Each prompt runs once.

    Args:
        model: the GGUF file.
        prompts: token ids of some training examples, a few hundred.
        labels: of the prompts, 0 … C − 1, each of them at least twice.
        words: tokens for each label, >= 1.
        likely: candidates: the tokens that are likeliest on average, >= C·``words``.
        threads: of llama.cpp.

    Returns:
        C lists of token ids; no token stands for two labels.

    Raises:
        ValueError: an argument out of range, or labels that do not fit the prompts.
    """
    own = np.asarray(labels)
    counts = np.bincount(own) if len(own) and own.min() >= 0 else np.zeros(0, np.int64)
    if len(own) != len(prompts) or len(counts) < 2 or counts.min() < 2:
        raise ValueError(
            f"`label_words(labels=...)` must give each of {len(prompts)} prompts a label of 0 … C - 1, C >= 2, and each label "
            f"must come twice or more; got {len(own)} labels, of each kind {counts.tolist()}"
        )
    if words < 1 or min(likely, model.words) < len(counts) * words:
        raise ValueError(f"`label_words` cannot choose {words} tokens for each of {len(counts)} labels out of {likely}")
    context = LlamaContext(model, 1, max(map(len, prompts)), threads)
    sums, squares = np.zeros((2, len(counts), model.words))  # of log p, by label: all rows at once would take more memory
    for label, prompt in zip(own, prompts, strict=True):
        logits = context.decode([(0, 0, prompt)], logits=True)[0].astype(np.float64)
        chances = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        sums[label] += chances
        squares[label] += np.square(chances)
        context.forget(0)
    candidates = np.argsort(-sums.sum(0), kind="stable")[:likely]
    return _best(_student(counts, sums[:, candidates], squares[:, candidates]), candidates, words)


def _student(counts: Numbers, sums: Numbers, squares: Numbers) -> Numbers:
    """(labels, tokens): t of each label against the others."""
    here, there = counts[:, None], (counts.sum() - counts)[:, None]
    mean, rest = sums / here, (sums.sum(0) - sums) / there
    spread = (squares / here - mean**2) + ((squares.sum(0) - squares) / there - rest**2)
    t: Numbers = (mean - rest) / np.sqrt(np.maximum(spread / 2, 1e-12))
    return t


def _best(scores: Numbers, candidates: Numbers, words: int) -> list[list[int]]:
    """The tokens of each label's highest scores; the labels take turns, so that none gets only those that another has left."""
    orders, found, taken = [iter(np.argsort(-row, kind="stable")) for row in scores], [list[int]() for _ in scores], set[int]()
    for _ in range(words):
        for order, own in zip(orders, found, strict=True):
            column = next(int(n) for n in order if int(n) not in taken)
            taken.add(column)
            own.append(int(candidates[column]))
    return found
