"""Per-example losses of a module that returns their mean: the mean is split where PyTorch's loss function takes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Operation

_MEANS = (F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
_BINARY = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)


class LossSplitter:
    r"""A probe's :class:`~zolightning.space.probe.Watch` for loss functions that average: it keeps the terms of the mean.

    The mean of :math:`n` elements (of those whose target is not ignored) is the mean over examples of

    .. math:: \ell_i = \frac{B}{n} \sum_{e \in i} \ell_e,

    so a training step that returns this very mean has a loss for each example, and its code need not change. A step that
    does anything more with it (adds a penalty, averages two losses), also in place, has not, and :meth:`losses` says None.

    Args:
        examples: B, along dimension 0 of the loss's elements, which may be flattened as (B·T,).
    """

    functions: ClassVar[frozenset[Operation]] = frozenset(_MEANS + _BINARY)

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self._mean: Tensor | None = None
        self._as_made: tuple[int, Tensor] | None = None
        self._losses: Tensor | None = None

    def call(self, func: Operation, args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor:
        """``func(*args, **kwargs)``, the mean made from its elements where it is a plain one."""
        if not _plain_mean(args, kwargs):
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        elements: Tensor = func(*args, **{**kwargs, "reduction": "none"})
        kept, target = elements.numel(), args[1]
        if func in (F.cross_entropy, F.nll_loss) and isinstance(target, Tensor) and not target.is_floating_point():
            kept = int(target.ne(kwargs.get("ignore_index", -100)).sum())  # type: ignore[call-overload]
        if not elements.dim() or elements.shape[0] % self._examples:
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        sums = elements.double().reshape(self._examples, -1).sum(1)
        self._losses = sums * (self._examples / kept if kept else math.nan)
        self._mean = (sums.sum() / (kept or math.nan)).to(elements.dtype)
        self._as_made = _version(self._mean), self._mean.detach().clone()
        return self._mean

    def losses(self, loss: object) -> Tensor | None:
        """float64 of shape (B,) when ``loss`` is the mean that was split, and nothing has changed it since; else None."""
        if not isinstance(loss, Tensor) or loss is not self._mean or self._as_made is None:
            return None
        version, value = self._as_made
        same = version == _version(loss) and torch.equal(loss.detach().nan_to_num(), value.nan_to_num())
        return self._losses if same else None


def _version(tensor: Tensor) -> int:
    """How often it was written in place, as far as PyTorch counts: not under inference mode, nor through ``.data``."""
    return 0 if tensor.is_inference() else tensor._version


def _plain_mean(args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """An unweighted mean over (input, target), its options given by name as PyTorch's loss modules do."""
    deprecated = kwargs.get("size_average") is not None or kwargs.get("reduce") is not None
    return (
        len(args) == 2
        and all(isinstance(a, torch.Tensor) for a in args)
        and kwargs.get("reduction", "mean") == "mean"
        and kwargs.get("weight") is None
        and kwargs.get("pos_weight") is None
        and not deprecated
    )
