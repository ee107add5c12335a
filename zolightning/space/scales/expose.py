"""Finding the quantised layers of a module, and refusing those that cannot be trained."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .bitsandbytes import Scaled4bit, Scaled8bit
from .hqq import ScaledHQQ
from .layer import FLOOR, ScaledLayer, with_scales
from .packed import ScaledAQLM, ScaledGrid, ScaledPacked
from .torchao import ScaledTorchAO

KINDS: tuple[type[ScaledLayer], ...] = (Scaled4bit, Scaled8bit, ScaledTorchAO, ScaledHQQ, ScaledPacked, ScaledAQLM, ScaledGrid)


def expose_scales(module: nn.Module) -> list[str]:
    """Make the scales of all quantised layers trainable float32 Parameters, in place; harmless when they are already.

    ``ZOStrategy("qzo")`` does it when a run starts. Do it yourself before loading a state dict that holds trained scales.

    Args:
        module: holds layers of bitsandbytes, torchao, HQQ, GPTQ, AWQ or AQLM.

    Returns:
        The names of the scales' Parameters.

    Raises:
        ValueError: no quantised layer, one of an unknown kind, on the meta device, not quantised yet, or whose scales are
            not positive.
    """
    strangers = {n: m for n, m in module.named_modules() if _kind(m) is None and _looks_quantised(m)}
    if strangers:
        name, layer = next(iter(strangers.items()))
        weights = {type(p) for p in layer.parameters(recurse=False)} - {nn.Parameter}
        kinds = " with ".join(f"{c.__module__}.{c.__qualname__}" for c in (type(layer), *weights))
        raise ValueError(
            f"{len(strangers)} quantised layers are of a kind that is not known: {name!r} is a {kinds}; scales can be "
            f"trained of {', '.join(kind.scale_kind for kind in KINDS)} layers"
        )
    for name, layer in module.named_modules():
        kind = _kind(layer)
        if kind is not None and not isinstance(layer, ScaledLayer):
            _expose(layer, name, kind)
    names = [f"{name}.scales".lstrip(".") for name, _ in scaled_layers(module)]
    if not names:
        raise ValueError(
            "there is no quantised layer to train the scales of; quantise the model with `zolightning.quantize(model, 'nf4')`, "
            "load it with a quantization_config, or export fake-quantised layers"
        )
    return names


def scaled_layers(module: nn.Module) -> Iterator[tuple[str, ScaledLayer]]:
    """(name, layer) of those whose scales are exposed."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, ScaledLayer))


def refuse_codes(module: nn.Module, trained: Container[str]) -> None:
    """ValueError when a Parameter in ``trained`` holds a quantised layer's codes: they are no numbers to be perturbed."""
    for path, layer in module.named_modules():
        kind = _kind(layer)
        names = [f"{path}.{code}".lstrip(".") for code in kind.code_names] if kind is not None else []
        for name in names:
            if name in trained:
                raise ValueError(
                    f"{name!r} holds the codes of a quantised layer ({type(layer).__name__}), which cannot be trained; set "
                    "requires_grad_(False) on it and train the scales with ZOStrategy('qzo')"
                )


def _kind(layer: nn.Module) -> type[ScaledLayer] | None:
    return next((kind for kind in KINDS if kind.owns(layer)), None)


def _looks_quantised(layer: nn.Module) -> bool:
    """Whether the layer itself has the attributes that only quantised layers have."""
    if type(layer).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        return True
    parameters = layer.parameters(recurse=False)
    if any(p.dtype.itemsize == 1 or not p.is_floating_point() or is_traceable_wrapper_subclass(p) for p in parameters):
        return True
    small = (torch.uint8, torch.int8, torch.int16, torch.int32)
    return any(b.dtype in small and b.dim() > 1 for b in layer.buffers(recurse=False))


def _expose(layer: nn.Module, name: str, kind: type[ScaledLayer]) -> None:
    def refuse(why: str) -> ValueError:
        return ValueError(f"the scales of {name!r} ({kind.scale_kind}) cannot be trained: {why}")

    devices = {t.device.type for t in (*layer.parameters(), *layer.buffers())}
    if "meta" in devices:
        raise refuse("it is on the meta device, without values; load its weights first")
    if "forward" in vars(layer):
        raise refuse(
            "its forward was replaced, as offloading by accelerate does; load the model on one device with "
            "device_map={'': 'cpu'} or {'': 0}"
        )
    try:
        stored = kind.stored_scales(layer)
    except ValueError as error:
        raise refuse(str(error)) from None
    scales = stored.detach().to(torch.float32, copy=True)
    if any(scales.device != p.device for p in layer.parameters()):
        raise refuse(f"they are on {scales.device}, its codes on {next(layer.parameters()).device}; move the whole module")
    if not torch.isfinite(scales).all() or (scales < 0).any():
        raise refuse("some are negative or not finite; the checkpoint is damaged")
    stock: Any = type(layer)
    layer.__class__ = with_scales(kind, stock)
    assert isinstance(layer, ScaledLayer)
    layer.adopt()
    layer.register_parameter("scales", nn.Parameter(scales.clamp_(min=FLOOR)))  # a block of zeros has the scale 0
    layer.link_scales()
