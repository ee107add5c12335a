"""The objective in the module: anything that can be scored can be trained on."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class ZOMixin:
    """Beside LightningModule, for modules that say themselves what the probes evaluate.

    ::

        class Classifier(ZOMixin, L.LightningModule):
            def zo_objective(self, batch):
                return F.cross_entropy(self(batch["x"]), batch["y"], reduction="none")   # (B,): a loss per example

    Under :class:`~zolightning.ZOStrategy` the probes call ``zo_objective`` and nothing else. Under any other strategy the
    mixin's ``training_step`` trains on the mean of ``zo_objective`` by backprop, so one module serves both.
    """

    def zo_objective(self, batch: Any) -> float | Tensor:
        """What is minimised on a batch. No gradient is needed.

        Returns:
            A number or a tensor with one element: the batch's score (a loss, an error rate, 1 − F1, …), or a tensor of
            shape (B,): a score per example, along dimension 0 of the batch's tensors, which lets every example have a
            direction of its own.
        """
        raise NotImplementedError(f"{type(self).__name__} inherits ZOMixin, so it must define zo_objective(self, batch)")

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """The mean of ``zo_objective``, for training by backprop."""
        loss = self.zo_objective(batch)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise TypeError(
                f"{type(self).__name__}.zo_objective returned {type(loss).__name__} without a graph, which backprop cannot "
                "train on; use Trainer(strategy=ZOStrategy())"
            )
        return loss.mean()
