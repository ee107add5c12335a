"""Quantising a model's linear layers with bitsandbytes, on CPU or CUDA, into a layout that transformers reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from .._answers import needs
from ..space.adapters import adapter_names
from ..space.scales.layer import is_a
from .matmul import dtype_of_products

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

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

    Their scales are then trained by ``ZOStrategy("qzo")``. Everything else stays as it is. A Hugging Face model, also inside
    the module, notes it in its config, so that its ``save_pretrained`` writes files for plain ``from_pretrained``, trained
    scales included; a part of one, like a block, does not.

    Args:
        module: any module on CPU or CUDA; its ``nn.Linear`` layers, and GPT-2's ``Conv1D``, are quantised.
        kind: 'nf4' or 'fp4', 4 bits with a scale for each 64 weights; 'int8', 8 bits with a scale for each row.
        skip: names, or parts between dots, of submodules to leave out. Weights that several modules share (a head tied
            to the embedding), and those that transformers keeps in float32 (T5's ``wo``), always are.
        double: quantise the scales too ('nf4', 'fp4'), 0.4 bits less a weight; training them undoes it.
        compute_dtype: dtype of the products at 4 bits; None: the weight's, or float32 where that is narrower and this machine
            multiplies it no faster, see :mod:`zolightning.adapt.matmul`.
        backprop: keep the layers ones that gradients come through, for adapters trained by backprop (QLoRA). On CPUs with
            AVX512-BF16 a 4-bit layer repacks its codes at its first forward in eval mode; it is faster then, but no gradient
            comes through any more, and no error says so. Not kept by a saved model: it is for the layers made here.

    Returns:
        The module, or its replacement where it is itself a linear layer.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: unknown kind, nothing to quantise, a layer on another device than CPU or CUDA, or one whose inputs are
            no multiple of 64 ('nf4' and 'fp4' on CPU), a name to skip that nothing has, adapters on the module, or a Hugging
            Face model that is quantised with other settings already.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"`quantize(kind={kind!r})` is unknown; allowed: {', '.join(map(repr, get_args(Kind)))}")
    if kind == "int8" and (double or compute_dtype is not None):
        raise ValueError("`quantize(double=..., compute_dtype=...)` are for 'nf4' and 'fp4'; 'int8' has neither")
    bnb = import_bitsandbytes()
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    configs = [(model, _config(model, kind, double, compute_dtype)) for model in _pretrained(module)]
    kept = {part for model, _ in configs for part in model._keep_in_fp32_modules or ()}  # transformers will not convert them
    found = {n: m for n, m in linear_layers(module, "quantize", skip, _convertible).items() if not skipped(n, kept)}
    if not found:
        raise ValueError(f"`quantize` found no linear layer with a weight of its own outside skip={skip}")
    for name, layer in found.items():
        _check_layer(name, layer, kind)
    for name in list(found):
        new = _quantized(bnb, found.pop(name), kind, double, compute_dtype, backprop)
        if not name:
            return new
        module.set_submodule(name, new)
    compute_by_layers(module)
    for model, config in configs:
        _note(model, config, kind, skip)
    return module


def _check_layer(name: str, layer: Any, kind: Kind) -> None:
    """ValueError where bitsandbytes has no kernel for the layer."""
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


def _note(model: PreTrainedModel, config: BitsAndBytesConfig, kind: Kind, skip: Sequence[str]) -> None:
    """Write the quantisation into a Hugging Face model's config, with the names of the layers that were left out."""
    left = {name for name, layer in model.named_modules() if _convertible(layer)}
    config.llm_int8_skip_modules = sorted(left | ({"lm_head"} & set(skip)))  # the head too that only an outer model has
    model.config.quantization_config = config
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)  # PEFT reads it


def import_bitsandbytes() -> Any:
    """The package; ImportError with the line that installs it."""
    with needs("bitsandbytes", "quantising"):
        import bitsandbytes
    return bitsandbytes


def _convertible(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or is_a(layer, "transformers", "Conv1D")


def linear_layers(
    module: nn.Module, function: str, skip: Sequence[str], convertible: Callable[[nn.Module], bool]
) -> dict[str, Any]:
    """The layers with a weight of their own that ``function`` is to convert, by name.

    Raises:
        ValueError: adapters are on the module, whose linear layers would be converted too, or ``skip`` has a name of nothing.
    """
    adapter = next(adapter_names(module), None)
    if adapter is not None:
        raise ValueError(f"adapters are on the module already ({adapter!r}, …); call `{function}` first, then put them on")
    modules = dict(module.named_modules())
    unknown = [part for part in skip if part != "lm_head" and not any(skipped(name, (part,)) for name in modules)]
    if unknown:
        raise ValueError(
            f"`{function}(skip=...)` has {unknown[0]!r}, which is no submodule's name nor a part of one between dots"
        )
    owners = Counter(id(p) for m in modules.values() for p in m.parameters(recurse=False))
    return {
        name: layer
        for name, layer in modules.items()
        if convertible(layer) and owners[id(layer.weight)] == 1 and not skipped(name, skip)
    }


def compute_by_layers(module: nn.Module) -> None:
    """In eval mode PyTorch's encoder layers hand their linear layers' weights to one kernel, which takes them as they are."""
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # one of the conditions of that kernel
        elif isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False


def skipped(name: str, skip: Iterable[str]) -> bool:
    """Whether a module's name, or a part of it between dots, is one of those."""
    return any(f".{part}." in f".{name}." for part in skip)


def _quantized(
    bnb: ModuleType, layer: Any, kind: Kind, double: bool, compute_dtype: torch.dtype | None, backprop: bool
) -> nn.Module:
    weight = layer.weight.data
    if not isinstance(layer, nn.Linear):
        weight = weight.T.contiguous()  # Conv1D's is (in, out)
    device, (outputs, inputs), bias = weight.device, weight.shape, layer.bias is not None
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False, device="meta")
        new.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    else:
        dtype = compute_dtype or dtype_of_products(weight.dtype)
        new = bnb.nn.Linear4bit(inputs, outputs, bias, dtype, double, kind, device="meta")
        codes = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type=kind, module=new)
        new.weight = codes.to(device)
        new.support_avx512bf16_for_cpu &= not backprop and outputs % 32 == 0  # its kernel takes no others
    new.bias = layer.bias
    return new.train(layer.training)  # type: ignore[no-any-return]


def _pretrained(module: nn.Module) -> list[PreTrainedModel]:
    """The Hugging Face models in it; the outer one where one is a part of another."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in _pretrained(child)]


def _config(model: PreTrainedModel, kind: Kind, double: bool, compute_dtype: torch.dtype | None) -> BitsAndBytesConfig:
    """The quantisation in transformers' terms; ValueError where the model's config says something else already."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=compute_dtype or dtype_of_products(model.dtype),
        )
    present = getattr(model.config, "quantization_config", None)
    if present is not None:
        old, new = present if isinstance(present, dict) else present.to_dict(), config.to_dict()
        other = [key for key in new if key[0] != "_" and key != "llm_int8_skip_modules" and old.get(key) != new[key]]
        if other:
            was, asked = (", ".join(f"{key}={values.get(key)}" for key in other) for values in (old, new))
            raise ValueError(
                f"the model is quantised with {was}, and `quantize` was asked for {asked}; its config holds one quantisation, "
                "so transformers could not read back both: quantise the rest in the same way, or leave it"
            )
    return config
