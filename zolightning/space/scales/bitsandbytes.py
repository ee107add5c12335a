"""bitsandbytes: Linear4bit (NF4, FP4, with and without double quantisation) and Linear8bitLt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..._answers import needs
from .layer import ScaledLayer, is_a


class Scaled4bit(ScaledLayer):
    """Linear4bit: one scale, the largest magnitude, for each block of 64 weights."""

    scale_kind = "bitsandbytes 4-bit"
    by_rows = True
    code_names = ("weight",)

    @classmethod
    def owns(cls, layer: nn.Module) -> bool:
        return is_a(layer, "bitsandbytes", "Linear4bit")

    @classmethod
    def stored_scales(cls, layer: Any) -> Any:
        state = layer.weight.quant_state
        if state is None:
            raise ValueError("it is not quantised yet, which moving it to a device does: module.to('cpu') or .to('cuda')")
        if layer.weight.device.type == "cpu" and state.shape[1] % state.blocksize:
            raise ValueError(
                f"it has {state.shape[1]} inputs, no multiple of {state.blocksize}: bitsandbytes' CPU kernel reads wrong "
                "scales then; leave it unquantised, or use 8 bits or CUDA"
            )
        scales = state.absmax.T if _repacked(state) else _flat(state)
        whole = state.shape[1] % state.blocksize == 0  # no block goes over the end of a row
        return scales.contiguous().view(state.shape[0], -1) if whole else scales

    def adopt(self) -> None:
        weight: Any = self.weight
        if _repacked(weight.quant_state):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
        weight.quant_state.nested = weight.compress_statistics = False
        weight.quant_state.state2 = weight.quant_state.offset = None
        self.support_avx512bf16_for_cpu = False  # or a forward in eval mode would repack it (again)
        layer: Any = self
        if layer.bias is not None and layer.compute_dtype is not None:
            layer.bias.data = layer.bias.data.to(layer.compute_dtype)  # as its first forward would
        self._load_state_dict_pre_hooks.clear()  # Lightning's precision plugin would quantise loaded weights once more

    def use_scales(self, scales: Tensor) -> None:
        weight: Any = self.weight
        weight.quant_state.absmax = scales.view(-1)

    def own_layout(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from bitsandbytes.functional import QuantState

        parts = {key: value for key, value in state.items() if key.startswith("weight.")}
        found = {key: value for key, value in state.items() if key not in parts}
        if parts:
            weight: Any = self.weight
            saved, own = QuantState.from_dict(parts, self.scales.device), weight.quant_state
            for name in ("quant_type", "blocksize", "shape"):
                if getattr(saved, name) != getattr(own, name):
                    raise ValueError(f"the checkpoint has {name} {getattr(saved, name)}, the module {getattr(own, name)}")
            found["scales"] = _flat(saved).view(self.scales.shape)
        return found


def linear_of_codes(linear: nn.Module, codes: Sequence[int], state: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A Linear4bit in the place of a linear layer, whose codes have no memory yet.

    Args:
        linear: its bias is taken over.
        codes: their shape; they are bytes.
        state: decodes them, as bitsandbytes saves it.
        dtype: of the products.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    with needs("bitsandbytes", "reading quantised weights"):
        import bitsandbytes as bnb
    empty = torch.zeros((), dtype=torch.uint8).expand(tuple(codes))
    weight = bnb.nn.Params4bit.from_prequantized(empty, state, device="cpu")
    outputs, inputs = weight.quant_state.shape
    new = bnb.nn.Linear4bit(inputs, outputs, False, dtype, device="meta")
    new.weight, new.quant_state, weight.module = weight, weight.quant_state, new
    new.bias = linear.bias
    new.support_avx512bf16_for_cpu = False  # its kernel wants codes in another order, and these are only read
    return new.train(linear.training)  # type: ignore[no-any-return]


def _flat(state: Any) -> Any:
    """The scales, whether or not they are themselves quantised."""
    if not state.nested:
        return state.absmax
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(state.absmax, state.state2) + state.offset


def _repacked(state: Any) -> bool:
    """Whether a forward in eval mode has repacked the layer, as it does on CPUs with AVX512-BF16.

    The scales are rounded to bfloat16 then, and turned around; bitsandbytes does not turn them back.
    """
    return getattr(state, "packing_format_for_cpu", False)


class Scaled8bit(ScaledLayer):
    """Linear8bitLt: one scale, the largest magnitude, for each row of the weight.

    With ``threshold`` > 0 (transformers' default is 6) the columns of the input that hold an outlier are multiplied in 16 bits.
    Their weights are made from the same scales in every forward, so the output stays linear in the scales.
    """

    scale_kind = "bitsandbytes 8-bit"
    by_rows = True
    code_names = ("weight",)

    @classmethod
    def owns(cls, layer: nn.Module) -> bool:
        return is_a(layer, "bitsandbytes", "Linear8bitLt")

    @classmethod
    def stored_scales(cls, layer: Any) -> Any:
        state, weight = layer.state, layer.weight
        if state.has_fp16_weights:
            raise ValueError("has_fp16_weights=True keeps float16 weights, which have no scales; make it with False")
        scales = weight.SCB if weight.SCB is not None else state.SCB
        if scales is None:
            raise ValueError("it is not quantised yet, which moving it to a device does: module.to('cpu') or .to('cuda')")
        return scales.to(weight.device).view(-1, 1)  # moving the module leaves them behind

    def adopt(self) -> None:
        self._load_state_dict_pre_hooks.clear()

    def use_scales(self, scales: Tensor) -> None:
        weight: Any = self.weight
        state: Any = self.state
        state.CB, state.SCB = weight.data, scales.view(-1)
        weight.CB = weight.SCB = None  # else the first forward takes them from there

    def own_layout(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {key: value for key, value in state.items() if key not in ("SCB", "weight_format")}
        return found | ({"scales": state["SCB"].view(-1, 1)} if "SCB" in state else {})
