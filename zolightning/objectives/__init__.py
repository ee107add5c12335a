"""Anything that can be scored can be trained on: objectives for ``zo_objective``."""

from .classification import f1_error, hinge, margins, soft_zero_one, zero_one
from .external import CommandScorer, ExternalScorer, HttpScorer
from .metric import MetricLoss
from .text import chrf, exact_match, normalize_answer, rouge_l, text_errors, token_f1
from .transport import AnswerError

__all__ = [
    "AnswerError",
    "CommandScorer",
    "ExternalScorer",
    "HttpScorer",
    "MetricLoss",
    "chrf",
    "exact_match",
    "f1_error",
    "hinge",
    "margins",
    "normalize_answer",
    "rouge_l",
    "soft_zero_one",
    "text_errors",
    "token_f1",
    "zero_one",
]
