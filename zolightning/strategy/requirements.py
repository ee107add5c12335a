"""The methods that a module must have for the fit that was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from ..methods.config import ZOConfig
from ..mixin import ZOMixin
from ..offload import OffloadError, stored
from ..space import Rounds
from ._lightning import MisconfigurationException

DRAWS_BATCHES = (
    "training_step(self, dataloader_iter) draws its own batches, so the probes of a step would see different ones; "
    "under ZOStrategy take the batch as the argument"
)

NEEDS_CLOSURE = (
    "manual_backward(loss); opt.step() needs gradients, which ZOStrategy does not have. Give the optimizer the "
    "loss as a function: `opt.step(closure=lambda: loss_fn(batch))` (the closure may call manual_backward)"
)

NEEDS_LOSS = (
    "under ZOStrategy manual optimisation needs the loss as a function: `opt.step(closure=...)`, where the "
    "closure returns the loss or calls self.manual_backward(loss)"
)


def check_fit(module: nn.Module, optimizers: Sequence[Optimizer], config: ZOConfig) -> None:
    """Refuse a module that has nothing to train, or no objective to record."""
    if not all(optimizer.param_groups for optimizer in optimizers):
        raise MisconfigurationException(
            "configure_optimizers returned None, so there is nothing to train; return an optimizer (under ZOStrategy "
            "torch.optim.SGD needs no memory)"
        )
    if config.cuda_graphs and stored(module.parameters()):
        raise OffloadError(
            "a recorded graph reads weights where they were, and offload moves them; leave out cuda_graphs or offload"
        )
    if config.cuda_graphs and not isinstance(module, ZOMixin):
        raise MisconfigurationException(
            f"`cuda_graphs=True` records `zo_objective`, which {type(module).__name__} does not have; derive it from "
            "ZOMixin, or leave cuda_graphs out"
        )


def check_backprop(config: ZOConfig, several: bool, offloads: bool, precision: object) -> None:
    """Refuse backprop beside the probes where nobody has tried it."""
    where = "on several ranks" if several else "with offloaded weights" if offloads else ""
    if not where and str(precision).startswith("16"):
        where = "in float16, whose gradients need a scaler"
    if config.backprop is not None and where:
        raise MisconfigurationException(f"`backprop=...` {where} is not there; leave it out")


def check_layers(module: nn.Module, recipe: str) -> None:
    """Refuse a recipe for layers that the module does not have."""
    if recipe == "zeroqat" and not any(isinstance(m, Rounds) for m in module.modules()):
        raise MisconfigurationException(
            "ZOStrategy('zeroqat') trains through the rounding of fake-quantised layers, and the module has none; call "
            "zolightning.adapt.fakequant.fake_quantize(model) first, or use ZOStrategy() for plain weights"
        )


def check_ranks(several: bool, config: ZOConfig) -> None:
    """Refuse combinations with several processes that nobody has tried."""
    if several and config.cuda_graphs:
        raise MisconfigurationException("`cuda_graphs=True` on several ranks is not there yet; leave it out, or use devices=1")
