"""The objective in the module: anything that can be scored can be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .types import Batch, Prepare


class ZOMixin:
    """In addition to LightningModule, for modules that define the function that probes evaluate.

    ::

        class Classifier(ZOMixin, L.LightningModule):
            def zo_objective(self, batch):
                return F.cross_entropy(self(batch["x"]), batch["y"], reduction="none")   # (B,): a loss per example

    Under :class:`~zolightning.ZOStrategy` the probes call ``zo_objective`` and nothing else,
    on the result of ``zo_prepare``. Under any other strategy the
    mixin's ``training_step`` trains on the mean of ``zo_objective`` by backprop, so one module serves both.
    """

    def zo_objective(self, batch: Batch) -> float | Tensor | np.ndarray[Any, Any] | Sequence[float]:
        """The value that is minimised on a batch. No gradient is needed.

        Before the first step it is called once more than the step needs, to see which weights and which state it touches:
        count on that where one call is expensive.

        Returns:
            A number or a tensor with one element: the batch's score (a loss, an error rate, 1 − F1, …), or a tensor of
            shape (B,): a score per example, along dimension 0 of the batch's tensors, which lets every example have a
            direction of its own. NumPy arrays and lists of numbers count as such tensors.
        """
        raise NotImplementedError(f"{type(self).__name__} inherits ZOMixin, so it must define zo_objective(self, batch)")

    def zo_candidate(self, batch: Batch) -> object:
        """The object that is ranked under ``ZOStrategy(estimator=Ranking(oracle))``: a picture, a text, any object but None."""
        raise NotImplementedError(
            f"`estimator=Ranking(...)` needs candidates: {type(self).__name__} must define zo_candidate(self, batch)"
        )

    def zo_prepare(self, batch: Batch) -> object:
        """The part of a step that is computed once, before its probes, because no trained weight takes part in it.

        A frozen encoder's features, the keys and values of a prompt: all probes share them, and cost that much less. Reading
        a trained weight here is an error. It counts as one forward pass, whatever it returns but None.

        Returns:
            The value that ``zo_objective`` gets in place of the batch, examples along dimension 0 of its tensors too; the
            batch itself where the result is kept elsewhere. None: there was nothing to compute, and it gets the batch.
        """
        return None

    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        """The mean of ``zo_objective``, for training by backprop."""
        with torch.no_grad():
            prepared = self.zo_prepare(batch)
        loss = self.zo_objective(batch if prepared is None else prepared)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise TypeError(
                f"{type(self).__name__}.zo_objective returned {type(loss).__name__} without a graph, which backprop cannot "
                "train on; use Trainer(strategy=ZOStrategy())"
            )
        return loss.mean()


def prepare_of(module: ZOMixin) -> Prepare | None:
    """The module's ``zo_prepare``; None where it defines none."""
    return None if type(module).zo_prepare is ZOMixin.zo_prepare else module.zo_prepare
