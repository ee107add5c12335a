"""MeZO's published step in a Trainer, for comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bench.reference_mezo import ReferenceMeZO
from .module import PromptClassifier


class PublishedMeZO(PromptClassifier):
    """Trains by :class:`~..bench.reference_mezo.ReferenceMeZO`: all weights, eps 1e-3, in the weights' own dtype."""

    def on_train_start(self) -> None:
        self.automatic_optimization = False
        trained = [p for p in self.parameters() if p.requires_grad]
        self._mezo = ReferenceMeZO(trained, eps=1e-3, seed=torch.initial_seed())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        losses: list[float] = []

        def loss() -> float:
            losses.append(self.zo_objective(batch).mean().item())
            return losses[-1]

        optimizer: Any = self.optimizers()
        self._mezo.step(loss, optimizer.param_groups[0]["lr"])
        optimizer.step()  # there are no gradients: this counts the step and nothing else
        return torch.tensor(sum(losses) / len(losses))
