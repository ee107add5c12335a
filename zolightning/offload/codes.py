"""Files of models that bitsandbytes quantised to 4 bits: their codes stream, and their scales are in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..space.scales.bitsandbytes import linear_of_codes
from .disk import DiskTier
from .files import OffloadError, Source

T = TypeVar("T")

_STATE = re.compile(r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)")


def refuse_other_codes(settings: Any, source: object) -> None:
    """OffloadError where the model's configuration says that its files hold codes of another form."""
    found = getattr(settings, "quantization_config", None)
    if found is None:
        return
    said = found if isinstance(found, dict) else found.to_dict()
    if said.get("quant_method") != "bitsandbytes" or not said.get("load_in_4bit"):
        method = "bitsandbytes' 8-bit" if said.get("load_in_8bit") else said.get("quant_method", "unknown")
        raise OffloadError(
            f"offload streams bitsandbytes' 4-bit codes, but {source} holds {method} ones; give it the model's plain weights, "
            'which quantize(from_pretrained(...), "nf4") quantises matrix by matrix'
        )


def without_states(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors that are no part of how codes are decoded."""
    return {key: value for key, value in tensors.items() if _STATE.fullmatch(key) is None}


def take_codes(model: Any, tensors: Mapping[str, Source], transformers: ModuleType) -> None:
    """Replace the linear layers whose codes the files hold by bitsandbytes' ones; their codes have no memory yet.

    Args:
        model: whose parameters are on the meta device.
        tensors: of the files, by name.
        transformers: the package.

    Raises:
        OffloadError: the files lack the codes of some scales, or hold them in another type than bytes.
        ImportError: there are codes, and bitsandbytes is not installed.
    """
    by_weight: dict[str, dict[str, Tensor]] = {}
    states = {key: found for key in tensors if (found := _STATE.fullmatch(key))}
    tier = DiskTier({key: tensors[key] for key in states})
    for key, found in states.items():
        by_weight.setdefault(found[1], {})[found[2]] = tier.read(key).clone()
    tier.close()
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    for weight, state in by_weight.items():
        codes, layer = tensors.get(weight), weight.rpartition(".")[0]
        if codes is None or codes.runs[0].dtype != torch.uint8:
            raise OffloadError(
                f"the files hold the scales of {weight!r}, and its codes not as bytes; save the model again with "
                "bnb_4bit_quant_storage=torch.uint8"
            )
        name = next((n for n in (layer, layer.removeprefix(prefix), prefix + layer) if n in modules), None)
        if name is not None:  # else of a part that this class does not have
            settings = transformers.BitsAndBytesConfig.from_dict(model.config.quantization_config)
            model.set_submodule(name, linear_of_codes(modules[name], codes.shape, state, settings.bnb_4bit_compute_dtype))
            model.is_loaded_in_4bit = True  # PEFT reads it
