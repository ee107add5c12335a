"""Scores of class predictions: from logits and labels to a number per example, or one for the batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def zero_one(logits: Tensor, labels: Tensor) -> Tensor:
    r"""The error rate, one example at a time: :math:`\ell_i = [\arg\max_c s_{ic} \ne y_i]`.

    Its mean is 1 − accuracy. Most examples tie under a small perturbation: use a large eps (1e-2 and more), large batches.

    Args:
        logits: (B, C).
        labels: (B,) class numbers.

    Returns:
        (B,) float32, each 0 or 1, or NaN where a logit is. Equal logits are an error unless the label's comes first.
    """
    return (logits.argmax(-1) != labels).float().masked_fill(logits.isnan().any(-1), torch.nan)


def soft_zero_one(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    r"""A smooth error rate: :math:`\ell_i = \sigma(-m_i / \tau)` of the margin :math:`m_i = s_{iy} - \max_{c \ne y} s_{ic}`.

    Tends to :func:`zero_one` as τ → 0, never ties, and unlike cross-entropy is bounded: a hopeless example weighs little.

    Args:
        logits: (B, C), C >= 2.
        labels: (B,) class numbers.
        temperature: τ > 0, in units of logits.
    """
    if not temperature > 0:
        raise ValueError(f"`soft_zero_one(temperature=...)` must be > 0, got {temperature}")
    return torch.sigmoid(-margins(logits, labels) / temperature)


def hinge(logits: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    r"""The margin's shortfall: :math:`\ell_i = \max(0, \mu - m_i)`; arguments as :func:`soft_zero_one`, μ > 0."""
    if not margin > 0:
        raise ValueError(f"`hinge(margin=...)` must be > 0, got {margin}")
    return (margin - margins(logits, labels)).clamp(min=0)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) float32: how far each label's logit is above the largest other one; negative where the prediction is wrong."""
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be of shape (examples, classes) with at least 2 classes, got {tuple(logits.shape)}")
    scores, chosen = logits.float(), labels[:, None]
    others = scores.scatter(1, chosen, -torch.inf).amax(1)
    return scores.gather(1, chosen)[:, 0] - others


def f1_error(logits: Tensor, labels: Tensor, average: Literal["macro", "micro"] = "macro") -> float:
    r"""1 − F1 of the batch's predictions, :math:`F_1 = 2\,TP / (2\,TP + FP + FN)`: a number for the batch as a whole, NaN where
    a logit is.

    Args:
        logits: (B, C).
        labels: (B,) class numbers.
        average: 'macro': the mean over the classes that occur among labels or predictions; 'micro': of the summed counts,
            which is the accuracy where each example has one class.
    """
    if average not in ("macro", "micro"):
        raise ValueError(f"`f1_error(average=...)` must be 'macro' or 'micro', got {average!r}")
    if logits.isnan().any():
        return torch.nan
    from torchmetrics.functional.classification import multiclass_f1_score

    return 1 - multiclass_f1_score(logits.argmax(-1), labels, num_classes=logits.shape[1], average=average).item()
