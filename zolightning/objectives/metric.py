"""Any torchmetrics metric as the loss of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric


class MetricLoss:
    r"""The loss :math:`L = \mathrm{best} - M` of a metric M that is better when higher, else :math:`L = M`.

    The metric is reset before and after, so that no probe sees another one's data. Keep a metric of its own for the
    loss: its accumulated state is lost. ::

        self.loss = MetricLoss(MulticlassF1Score(3, average="macro"))
        ...
        def zo_objective(self, batch):
            return self.loss(self(batch), batch["labels"])   # a float: one direction for the batch

    ``MetricLoss(BLEUScore())`` is the one for BLEU, which is of a corpus and mostly 0 for a single text.

    Args:
        metric: computes a tensor with one element.
        best: the metric's best value, where higher is better.
        higher_is_better: None: as the metric says.

    Raises:
        ValueError: nobody says which way is better.
    """

    def __init__(self, metric: Metric, best: float = 1.0, higher_is_better: bool | None = None) -> None:
        higher = metric.higher_is_better if higher_is_better is None else higher_is_better
        if higher is None:
            raise ValueError(
                f"{type(metric).__name__} does not say whether higher is better; say `MetricLoss(metric, higher_is_better=...)`"
            )
        self.metric, self.best, self.higher_is_better = metric, best, higher

    def __call__(self, *args: object, **kwargs: object) -> float:
        """The loss of this batch only, on the device of its tensors; the arguments are those of the metric's ``update``."""
        device = next((a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), self.metric.device)
        if device != self.metric.device:
            self.metric.to(device)
        self.metric.reset()
        try:
            self.metric.update(*args, **kwargs)
            value: Any = self.metric.compute()
        finally:
            self.metric.reset()
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(
                f"{type(self.metric).__name__} computes {type(value).__name__}, not a tensor with one element; average it "
                "(average='macro') or write a function that picks the number you mean"
            )
        return self.best - value.item() if self.higher_is_better else float(value.item())
