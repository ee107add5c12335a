"""A language model that classifies by the word it would say next, trainable by forward passes or by backprop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from ...adapt.interventions import idle, intervene, interventions
from ...data import Encoded, SimilarLengths, candidate_logits, collate, common_ending, encode_text
from ...mixin import ZOMixin
from ...strategy._lightning import pl
from ...types import Batch

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


class PromptClassifier(ZOMixin, pl.LightningModule):
    """Cross-entropy over the verbalizers' logits at the last position of the prompt.

    Args:
        model: a causal language model.
        candidate_ids: token id of each label's verbalizer.
        make_optimizer: trainable parameters → optimizer.
        decay_steps: steps in which the learning rate falls to zero along a cosine; 0: it stays.
    """

    outside = 0
    """Bytes of the model that are in no tensor of this module."""

    perplexity: Callable[..., float] | None = None
    """:func:`~zolightning.data.text_perplexity` by the model's tokenizer; None: it is not for this kind of model."""

    def __init__(self, model: nn.Module, candidate_ids: Tensor, make_optimizer: MakeOptimizer, decay_steps: int = 0) -> None:
        super().__init__()
        self.candidate_ids: Tensor
        self.model = model
        self.make_optimizer, self.decay_steps = make_optimizer, decay_steps
        self.register_buffer("candidate_ids", candidate_ids, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, labels), float32."""
        return candidate_logits(self.model, batch, self.candidate_ids)

    def zo_prepare(self, batch: dict[str, Tensor]) -> Batch | None:
        """Where the model has interventions and is frozen else: the text before them encoded, once for all probes."""
        made = interventions(self.model)
        vectors = {id(one.vectors) for one in made}
        if not made or any(p.requires_grad and id(p) not in vectors for p in self.model.parameters()):
            return None
        with idle(made):
            return encode_text(self.model, batch, made[0].positions)

    def zo_objective(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self(batch), batch["labels"], reduction="none")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._score(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._score(batch, "test")

    def _score(self, batch: dict[str, Tensor], stage: str) -> None:
        logits, labels = self(batch), batch["labels"]
        values = {
            f"{stage}/loss": F.cross_entropy(logits, labels),
            f"{stage}/accuracy": (logits.argmax(-1) == labels).float().mean(),
        }
        self.log_dict(values, batch_size=len(labels), on_epoch=True, prog_bar=stage == "val")

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if not self.decay_steps:
            return optimizer
        schedule = CosineAnnealingLR(optimizer, self.decay_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def intervene_at_ending(model: nn.Module, prompts: Sequence[Encoded], pad_id: int) -> None:
    """Train vectors at the tokens that all prompts end with, and nothing else; the first prompts tell their scale."""
    some = collate(prompts[:32], pad_id)
    intervene(model, common_ending(prompts), {name: some[name] for name in ("input_ids", "attention_mask")})


class PromptData(pl.LightningDataModule):
    """Encoded prompts: shuffled into batches of similar length for training, sorted by length for evaluation.

    Args:
        train: training prompts; they repeat for as long as training runs.
        validation: for choosing.
        test: for reporting.
        pad_id: token id of the padding.
        batch_size: examples a training step.
        seed: The seed of the shuffling.
    """

    def __init__(
        self,
        train: Sequence[Encoded],
        validation: Sequence[Encoded],
        test: Sequence[Encoded],
        pad_id: int,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._train, self._validation, self._test = list(train), list(validation), list(test)
        self.pad_id, self.batch_size, self.seed = pad_id, batch_size, seed

    def _collate(self, items: Sequence[Encoded]) -> dict[str, Tensor]:
        return collate(items, self.pad_id)

    def train_dataloader(self) -> DataLoader[object]:
        lengths = [len(item.input_ids) for item in self._train]
        batches = SimilarLengths(lengths, self.batch_size, torch.Generator().manual_seed(self.seed))
        return DataLoader(self._train, batch_sampler=batches, collate_fn=self._collate)  # type: ignore[arg-type]

    def _evaluation(self, items: list[Encoded]) -> DataLoader[object]:
        by_length = sorted(items, key=lambda item: len(item.input_ids))
        return DataLoader(by_length, 32, collate_fn=self._collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[object]:
        return self._evaluation(self._validation)

    def test_dataloader(self) -> DataLoader[object]:
        return self._evaluation(self._test)
