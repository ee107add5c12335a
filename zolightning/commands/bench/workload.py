"""The workload of every method: one model, one batch, one loss."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapt.quantize import Kind, quantize
from .models import build_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Loss = Callable[[Any], Tensor]

_NONE = -100  # the label of a position that has no next token


@dataclass(frozen=True)
class Spec:
    """Enough to make the workload again in another process."""

    model: str
    """A named architecture, a Hugging Face id, or a folder."""

    batch: int
    """Examples a step."""

    length: int
    """Tokens of an example."""

    dtype: str
    """The dtype of the forward's matrix products, a name of :data:`DTYPES`."""

    master: Literal["fp32"] | None
    """Dtype of the stored weights where it is another than ``dtype``; the forward then runs under autocast."""

    logits: Literal["last", "full"]
    """'last': cross-entropy at the last position only. 'full': the language model's loss at every position."""

    device: str
    """'cpu' or 'cuda'."""

    threads: int
    """CPU threads."""

    seed: int = 0
    """Of weights, batch and perturbations."""

    def __post_init__(self) -> None:
        for name in ("batch", "length", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}")
        if self.logits == "full" and self.length < 2:
            raise ValueError("`length=1` has no next token to predict; allowed with `logits=full`: 2 or more")
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype={self.dtype!r}` is unknown; allowed: {', '.join(DTYPES)}")
        if self.master and self.dtype == "fp32":
            raise ValueError("`master=fp32` with `dtype=fp32` is fp32 throughout: leave `master` out, or choose dtype=bf16")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("`device=cuda`: PyTorch finds no CUDA device here; use device=cpu, or a PyTorch built for CUDA")

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def stored_dtype(self) -> torch.dtype:
        return DTYPES[self.master or self.dtype]

    @property
    def plain(self) -> Spec:
        """The same with the weights stored in the compute dtype."""
        return replace(self, master=None)


class Unavailable(Exception):
    """A method cannot run on this model or with these packages; the message says why."""


class Workload:
    """The model, the batch and the loss of a :class:`Spec`.

    Every method gets a module of its own by :meth:`shell`, so that none sees another's gradients, adapters or flags, on
    the one set of weights, so that all of them fit.

    Args:
        spec: The workload to make.
        kind: quantise the linear layers so, see :func:`~zolightning.quantize`; such a workload is for one method only.

    Raises:
        Unavailable: bitsandbytes is not installed, or cannot quantise this model.
    """

    def __init__(self, spec: Spec, kind: Kind | None = None) -> None:
        self.spec, self.device, self.kind = spec, torch.device(spec.device), kind
        self.model = build_model(spec.model, spec.stored_dtype, self.device, spec.length, spec.seed)
        if kind is not None:
            try:
                quantize(self.model, kind)
            except (ImportError, ValueError) as error:
                raise Unavailable(str(error)) from error
        if spec.logits == "last" and "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            raise ValueError(f"`logits=last`: {type(self.model).__name__} cannot leave out logits; use logits=full")
        generator = torch.Generator().manual_seed(spec.seed + 1)
        vocabulary: int = self.model.config.vocab_size  # type: ignore[union-attr, assignment]
        ids = torch.randint(0, vocabulary, (spec.batch, spec.length), generator=generator)
        labels = torch.randint(0, vocabulary, (spec.batch,), generator=generator)
        self.batch = {"input_ids": ids.to(self.device), "labels": labels.to(self.device)}

    @property
    def numel(self) -> int:
        """Weights of the model, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    def shell(self) -> nn.Module:
        """A module whose Parameters are new objects on the workload's own memory, ties kept; a quantised one itself."""
        if self.kind is not None:
            return self.model
        shared: dict[int, Any] = {id(p): nn.Parameter(p.detach()) for p in self.model.parameters()}
        return copy.deepcopy(self.model, shared)

    def loss(self, model: nn.Module) -> Loss:
        """batch → cross-entropy of each example, (B,), in float32 whatever the weights' dtype."""
        last = self.spec.logits == "last"
        options: dict[str, Any] = {"use_cache": False}
        if last:  # an index gives the head contiguous rows; of a slice and a frozen head, PyTorch copies the head B times
            options["logits_to_keep"] = torch.tensor([self.spec.length - 1], device=self.device)

        def loss(batch: dict[str, Tensor]) -> Tensor:
            ids = batch["input_ids"]
            with self.autocast():
                logits = model(input_ids=ids, attention_mask=batch.get("attention_mask"), **options).logits
            if last:
                return F.cross_entropy(logits[:, -1].float(), batch["labels"], reduction="none")
            following = F.pad(ids[:, 1:], (0, 1), value=_NONE)  # a slice or a transpose of the logits would be a copy of them
            each = F.cross_entropy(logits.float().flatten(0, 1), following.flatten(), reduction="none", ignore_index=_NONE)
            return each.view_as(ids).sum(1) / (ids.shape[1] - 1)

        return loss

    def autocast(self) -> AbstractContextManager[object]:
        """The forward's context: compute in the narrow dtype where the weights are fp32 masters."""
        if self.spec.master is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.spec.compute_dtype)

    def __repr__(self) -> str:
        return f"Workload({self.spec.model}, {self.numel:,} weights, {self.spec.batch}×{self.spec.length})"
