"""Per-example losses of a module that returns their mean: the mean is split where PyTorch's loss function takes it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MEANS = (F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
_BINARY = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)


class LossSplitter(TorchFunctionMode):
    r"""Watches for a loss function that averages, and keeps what it averages over.

    The mean of :math:`n` elements (of those whose target is not ignored) is the mean over examples of

    .. math:: \ell_i = \frac{B}{n} \sum_{e \in i} \ell_e,

    so a training step that returns this very mean has a loss for each example, and its code need not change. A step that
    does anything more with it (adds a penalty, averages two losses), also in place, has not, and :meth:`losses` says None.

    Args:
        examples: B, along dimension 0 of the loss's elements, which may be flattened as (B·T,).
    """

    def __init__(self, examples: int) -> None:
        super().__init__()
        self._examples = examples
        self._mean: Tensor | None = None
        self._as_made: tuple[int, Tensor] | None = None
        self._losses: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _MEANS + _BINARY or not _plain_mean(args, kwargs):
            return func(*args, **kwargs)
        elements = func(*args, **{**kwargs, "reduction": "none"})
        kept = elements.numel()
        if func in (F.cross_entropy, F.nll_loss) and not args[1].is_floating_point():
            kept = int((args[1] != kwargs.get("ignore_index", -100)).sum())
        if not elements.dim() or elements.shape[0] % self._examples:
            return func(*args, **kwargs)
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


def _plain_mean(args: Any, kwargs: dict[str, Any]) -> bool:
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
