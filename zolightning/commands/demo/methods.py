"""The ways to fine-tune that the demo compares: each is a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW

from ...adapt.peft import lora
from ...adapt.quantize import quantize
from ...methods.recipes import RECIPES
from ...strategy.strategy import ZOStrategy
from ..console import pick
from .module import MakeOptimizer, PromptClassifier
from .published import PublishedMeZO


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    name: str
    """Short name, for options and run names."""

    title: str
    """As the table shows it."""

    recipe: str | None = None
    """ZO recipe, or None for backprop."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of :class:`~zolightning.ZOConfig` that replace the recipe's."""

    lr: float | None = None
    """Learning rate; for ZO None is the recipe's own."""

    steps: int = 0
    """Optimizer steps; 0 evaluates the model as it is."""

    batch_size: int = 16
    """Examples a step."""

    seeds: int = 1
    """Runs, each with a seed of its own."""

    decay: bool = False
    """Whether the learning rate falls to zero along a cosine."""

    lora: bool = False
    """Train rank-8 adapters on the attention's query and value projections, and nothing else."""

    interventions: bool = False
    """Train vectors at the prompt's fixed end in a frozen model, see :mod:`~zolightning.adapt.interventions`."""

    engine: bool = False
    """Train such vectors inside llama.cpp, in the demo's own 4-bit file, see :mod:`~zolightning.commands.demo.engine`."""

    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""

    nf4: bool = False
    """Hold the frozen linear layers in bitsandbytes' NF4 codes: with ``lora``, QLoRA."""

    probe: bool = False
    """Fit a linear classifier to the frozen model's hidden states, see :mod:`~zolightning.commands.demo.probe`."""

    published: bool = False
    """Take MeZO's published in-place steps, see :class:`~zolightning.commands.bench.reference_mezo.ReferenceMeZO`."""

    @property
    def zeroth_order(self) -> bool:
        return self.recipe is not None

    @property
    def narrow(self) -> bool:
        """Whether the model is held in the dtype of its products, instead of in float32 under the Trainer's precision."""
        return self.encodes_once or self.nf4 or self.probe

    @property
    def encodes_once(self) -> bool:
        """Whether the probes of a step share the text's keys and values."""
        return self.interventions or self.engine

    def trainer_precision(self, asked: str) -> str:
        """Trainer(precision=...) where the task asks for ``asked``: nothing is left to narrow in a :attr:`narrow` model."""
        return "32-true" if self.narrow else asked

    @property
    def module_type(self) -> type[PromptClassifier]:
        if self.probe:
            from .probe import LinearProbe  # scikit-learn is imported by the run that fits one, whose memory counts

            return LinearProbe
        return PublishedMeZO if self.published else PromptClassifier

    def strategy(self) -> Any:
        """For Trainer(strategy=...)."""
        own = {} if self.lr is None else {"lr": self.lr}
        return ZOStrategy(self.recipe, **{**own, **self.overrides}) if self.recipe is not None else "auto"

    def make_optimizer(self) -> MakeOptimizer:
        """SGD for ZO, whose recipes bring any other; AdamW for backprop."""
        own = RECIPES[self.recipe].own_lr if self.recipe is not None else None
        lr = self.lr or own or 0.0
        return partial(SGD, lr=lr) if self.zeroth_order or self.published else partial(AdamW, lr=lr, weight_decay=0.0)

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The model in the ``dtype`` of its products where it is :attr:`narrow`, with adapters or checkpointing switched on."""
        model.train()
        if self.narrow:
            model.to(dtype)
        if self.nf4:
            quantize(model, "nf4", backprop=not self.zeroth_order)
        if self.lora:
            model = lora(model)
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """The model that is tested after training."""
        return model


ZERO_SHOT = Method("zero-shot", "zero-shot")
ZO = Method("zo", "ZO (default recipe)", recipe="default", lr=2e-3, decay=True)
SPSA = Method("spsa", "ZO (dense SPSA)", recipe="spsa", lr=1e-3, decay=True)
REFT = Method("reft", "ZO (ReFT vectors)", recipe="reft", interventions=True, decay=True)
GGUF = Method(
    "gguf",
    "ZO in llama.cpp (4-bit file)",
    recipe="reft",
    overrides={"num_queries": 16, "one_batch": False},
    lr=3.5e-2,
    engine=True,
    decay=True,
)
MEZO = Method("mezo", "ZO (MeZO, paper recipe)", recipe="mezo")
ADAMW = Method("adamw", "backprop AdamW", lr=2e-5)
CHECKPOINTED = Method("checkpointed", "backprop AdamW, checkpointed", lr=2e-5, checkpointing=True)
LORA = Method("lora", "backprop AdamW on LoRA", lr=5e-4, lora=True)
QLORA = Method("qlora", "backprop AdamW on LoRA, NF4 base (QLoRA)", lr=5e-4, lora=True, nf4=True)
VECTORS = Method("vectors", "backprop AdamW on the same vectors", lr=3e-3, interventions=True, decay=True)
PROBE = Method("probe", "linear probe (scikit-learn)", probe=True)


@dataclass(frozen=True)
class Profile:
    """How long the demo runs."""

    methods: tuple[Method, ...]
    """The compared methods, in the order of the table."""

    validation: int
    """Validation examples; looked at while training runs."""

    test: int
    """Test examples; looked at once, at the end."""

    validations: int
    """How often a run looks at the validation examples."""


def _methods(zo: int, reft: int, gguf: int, other_zo: int, backprop: int, batch_size: int, seeds: int) -> tuple[Method, ...]:
    return (
        ZERO_SHOT,
        replace(ZO, steps=zo, batch_size=batch_size, seeds=seeds),
        replace(REFT, steps=reft, batch_size=32, seeds=seeds),
        replace(GGUF, steps=gguf, seeds=seeds),
        replace(SPSA, steps=other_zo, batch_size=batch_size),
        replace(MEZO, steps=other_zo),
        *(replace(m, steps=backprop) for m in (ADAMW, CHECKPOINTED, LORA, QLORA)),
        replace(VECTORS, steps=30),
        replace(PROBE, steps=10),
    )


PROFILES = {
    "quick": Profile(
        _methods(zo=80, reft=30, gguf=15, other_zo=15, backprop=12, batch_size=16, seeds=1),
        validation=64,
        test=200,
        validations=3,
    ),
    "full": Profile(
        _methods(zo=200, reft=200, gguf=40, other_zo=100, backprop=40, batch_size=32, seeds=3),
        validation=200,
        test=1000,
        validations=5,
    ),
}


def select_methods(profile: Profile, names: list[str] | str | None) -> tuple[Method, ...]:
    """The profile's methods of those names; ValueError for an unknown one."""
    known = {m.name: m for m in profile.methods}
    return tuple(known[name] for name in pick(names, known) or known)
