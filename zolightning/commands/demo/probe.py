"""A linear probe: logistic regression on a frozen model's hidden states, a baseline that needs forwards only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from ...data.candidates import last_states
from ...types import Batch
from .module import MakeOptimizer, PromptClassifier

C = 0.01
"""scikit-learn's inverse strength of the L2 penalty, for states of unit variance; chosen on validation examples."""


class LinearProbe(PromptClassifier):
    r"""Logits :math:`W h + b`, where h is the frozen model's last hidden state at the end of the prompt.

    A step costs one forward of its examples. It keeps their states, and fits W and b again to those of all steps so far.
    """

    def __init__(self, model: nn.Module, candidate_ids: Tensor, make_optimizer: MakeOptimizer, decay_steps: int = 0) -> None:
        super().__init__(model.requires_grad_(False), candidate_ids, make_optimizer, decay_steps)
        self.automatic_optimization = False
        self.head = nn.Linear(_width(model), len(candidate_ids))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, batch: Batch) -> Tensor:
        logits: Tensor = self.head(last_states(self.model, batch).float())
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        with torch.no_grad():
            self._seen.append((last_states(self.model, batch).float(), batch["labels"]))
        states, labels = (torch.cat(part) for part in zip(*self._seen, strict=True))
        if len(set(labels.tolist())) == len(self.candidate_ids):  # a label that was never seen has no row of W yet
            self._fit(states, labels)
        optimizer: Any = self.optimizers()
        optimizer.step()  # there are no gradients: this counts the step and nothing else
        return F.cross_entropy(self.head(states), labels).detach()

    @torch.no_grad()
    def _fit(self, states: Tensor, labels: Tensor) -> None:
        scaler = StandardScaler()
        scaled = scaler.fit_transform(states.numpy(force=True))
        found = LogisticRegression(C=C, max_iter=1000).fit(scaled, labels.numpy(force=True))
        weight = torch.as_tensor(found.coef_ / scaler.scale_)
        bias = torch.as_tensor(found.intercept_) - weight @ torch.as_tensor(scaler.mean_, dtype=weight.dtype)
        if len(weight) == 1:  # of two labels, scikit-learn keeps the difference
            weight, bias = torch.cat((-weight, weight)) / 2, torch.cat((-bias, bias)) / 2
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)


def _width(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[1])
