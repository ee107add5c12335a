"""Quantising a model's linear layers with bitsandbytes, on CPU or CUDA, into a layout that transformers reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from .space.scales.layer import is_a

Kind = Literal["nf4", "fp4", "int8"]
_DEVICES = ("cpu", "cuda", "xpu")
_BLOCK = 64  # weights that share a scale


def quantize(
    module: nn.Module,
    kind: Kind = "nf4",
    *,
    skip: Sequence[str] = ("lm_head",),
    double: bool = False,
    compute_dtype: torch.dtype | None = None,
    backprop: bool = False,
) -> nn.Module:
    """Replace linear layers by bitsandbytes' quantised ones, in place, one at a time.

    Their scales are then trained by ``ZOStrategy("qzo")``. Everything else stays as it is. A Hugging Face model notes it in
    its config, so that its ``save_pretrained`` writes what plain ``from_pretrained`` reads, trained scales included.

    Args:
        module: any module on CPU or CUDA; its ``nn.Linear`` layers, and GPT-2's ``Conv1D``, are quantised.
        kind: 'nf4' or 'fp4', 4 bits with a scale for each 64 weights; 'int8', 8 bits with a scale for each row.
        skip: names, or parts between dots, of submodules to leave alone. Weights that several modules share (a head tied
            to the embedding) always are.
        double: quantise the scales too ('nf4', 'fp4'), 0.4 bits less a weight; training them undoes it.
        compute_dtype: dtype of the products at 4 bits; None: the weight's.
        backprop: keep the layers ones that gradients come through, for adapters trained by backprop (QLoRA). On CPUs with
            AVX512-BF16 a 4-bit layer repacks its codes at its first forward in eval mode; it is faster then, but no gradient
            comes through any more, and no error says so. Not kept by a saved model: it is for the layers made here.

    Returns:
        The module, or its replacement where it is itself a linear layer.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: unknown kind, nothing to quantise, a layer on another device than CPU or CUDA, or one whose inputs are
            no multiple of 64 ('nf4' and 'fp4' on CPU).
    """
    if kind not in get_args(Kind):
        raise ValueError(f"`quantize(kind={kind!r})` is unknown; allowed: {', '.join(map(repr, get_args(Kind)))}")
    if kind == "int8" and (double or compute_dtype is not None):
        raise ValueError("`quantize(double=..., compute_dtype=...)` are for 'nf4' and 'fp4'; 'int8' has neither")
    bnb = import_bitsandbytes()
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    owners = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
    found = {
        name: layer
        for name, layer in module.named_modules()
        if _convertible(layer) and owners[id(layer.weight)] == 1 and not skipped(name, skip)
    }
    if not found:
        raise ValueError(f"`quantize` found no linear layer with a weight of its own outside skip={skip}")
    for name, layer in found.items():
        device, inputs = layer.weight.device, layer.weight.shape[isinstance(layer, nn.Linear)]
        if device.type not in _DEVICES:
            raise ValueError(
                f"`quantize` works on {', '.join(_DEVICES)}, but {name!r} is on {device}; load or move the module first"
            )
        if kind != "int8" and device.type == "cpu" and inputs % _BLOCK:
            raise ValueError(
                f"{name!r} has {inputs} inputs, no multiple of {_BLOCK}: bitsandbytes' CPU kernel reads wrong scales then; add "
                "it to `quantize(skip=...)`, or use 'int8' or CUDA"
            )
    for name in list(found):
        new = _quantized(bnb, found.pop(name), kind, double, compute_dtype, backprop)
        if not name:
            return new
        module.set_submodule(name, new)
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        module.config.quantization_config = _config(module, kind, double, compute_dtype)
        setattr(module, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)  # what PEFT asks
    return module


def import_bitsandbytes() -> Any:
    """The package; ImportError with the line that installs it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError("quantising needs bitsandbytes: pip install 'bitsandbytes>=0.50' 'accelerate>=1.0'") from error
    return bitsandbytes


def _convertible(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or is_a(layer, "transformers", "Conv1D")


def skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether a module's name, or a part of it between dots, is one of those."""
    return any(f".{part}." in f".{name}." for part in skip)


def _quantized(bnb: Any, layer: Any, kind: Kind, double: bool, compute_dtype: torch.dtype | None, backprop: bool) -> nn.Module:
    weight = layer.weight.data
    if not isinstance(layer, nn.Linear):
        weight = weight.T.contiguous()  # Conv1D's is (in, out)
    device, (outputs, inputs), bias = weight.device, weight.shape, layer.bias is not None
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False, device="meta")
        new.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    else:
        new = bnb.nn.Linear4bit(inputs, outputs, bias, compute_dtype or weight.dtype, double, kind, device="meta")
        codes = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type=kind, module=new)
        new.weight = codes.to(device)
        new.support_avx512bf16_for_cpu &= not backprop and outputs % 32 == 0  # its kernel takes no others
    new.bias = layer.bias
    return new.train(layer.training)  # type: ignore[no-any-return]


def _config(model: Any, kind: Kind, double: bool, compute_dtype: torch.dtype | None) -> Any:
    """What was done, in transformers' terms: layers that it would convert and that were not are listed to be skipped."""
    from transformers import BitsAndBytesConfig

    kept = [name for name, layer in model.named_modules() if _convertible(layer)] or None
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute_dtype or model.dtype,
        llm_int8_skip_modules=kept,
    )
