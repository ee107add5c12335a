"""Scores of generated text: each between 0 and 1, the best over the references; and the errors 1 − score to minimise."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TextScore = Callable[[str, Sequence[str]], float]
"""(prediction, references) → how good, 1 being perfect."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """SQuAD's normal form, arXiv:1606.05250: lower case, no punctuation, no articles, single spaces."""
    without = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(without.split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction equals a reference in normal form, else 0."""
    return float(any(normalize_answer(prediction) == normalize_answer(reference) for reference in references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    r"""SQuAD's F1 over the multisets of words in normal form: :math:`2|P \cap R| / (|P| + |R|)`.

    Where one of the two has no words, 1 if the other has none either, else 0.
    """
    return max((_f1(normalize_answer(prediction).split(), normalize_answer(r).split()) for r in references), default=0.0)


def _f1(predicted: list[str], wanted: list[str]) -> float:
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = (Counter(predicted) & Counter(wanted)).total()
    return 2 * common / (len(predicted) + len(wanted))


def chrf(prediction: str, references: Sequence[str]) -> float:
    """chrF, the F-score of character n-grams up to 6: the counterpart of a corpus's BLEU for a single text; by torchmetrics."""
    from torchmetrics.functional.text import chrf_score

    return chrf_score([prediction], [list(references)], n_word_order=0).item()  # type: ignore[union-attr]


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of ROUGE-L, the longest common subsequence of words (letters and digits of any script); by torchmetrics."""
    from torchmetrics.functional.text.rouge import rouge_score

    found = rouge_score([prediction], [list(references)], accumulate="best", normalizer=_words, rouge_keys="rougeL")
    return found["rougeL_fmeasure"].item()


def _words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower())  # torchmetrics' own way keeps ASCII only


def text_errors(predictions: Sequence[str], references: Sequence[Sequence[str]], score: TextScore = token_f1) -> Tensor:
    r"""A loss per example: :math:`\ell_i = 1 - \mathrm{score}(\mathrm{prediction}_i, \mathrm{references}_i)`.

    Args:
        predictions: B texts.
        references: B lists of accepted texts.
        score: of one prediction, 1 being perfect.

    Returns:
        (B,) float32.
    """
    if any(isinstance(r, str) for r in references):
        raise TypeError("`text_errors(references=...)` takes a list of accepted texts for each prediction, got one text")
    errors = [1 - score(p, r) for p, r in zip(predictions, references, strict=True)]
    return torch.tensor(errors, dtype=torch.float32)  # said, because in half-precision runs the default is another
