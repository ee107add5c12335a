"""GPTQ, AWQ and AQLM layers, and our own, that read a tensor ``scales`` in every forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...types import StateDict
from .layer import ScaledLayer, is_a

_READ_EACH_TIME = {  # (package, module, class)
    ("auto_gptq", "qlinear_cuda", "QuantLinear"),
    ("auto_gptq", "qlinear_cuda_old", "QuantLinear"),
    ("auto_gptq", "qlinear_triton", "QuantLinear"),
    ("gptqmodel", "torch", "TorchLinear"),
    ("awq", "gemm", "WQLinear_GEMM"),
}


class ScaledPacked(ScaledLayer):
    """A packed layer: its buffer or Parameter ``scales`` is read in its own dtype, and trained in float32.

    Layers that copy or repack their scales when they are loaded (ExLlama, Marlin) are of no known kind.
    """

    scale_kind = "GPTQ or AWQ"

    @classmethod
    def owns(cls, layer: nn.Module) -> bool:
        paths = [(c.__module__.split("."), c.__name__) for c in type(layer).__mro__]
        return any((path[0], path[-1], name) in _READ_EACH_TIME for path, name in paths)

    @classmethod
    def stored_scales(cls, layer: Any) -> Tensor:
        return layer.scales  # type: ignore[no-any-return]

    def adopt(self) -> None:
        self.scales_dtype, self.scales_shape = self.scales.dtype, self.scales.shape
        self._buffers.pop("scales", None)
        self._parameters.pop("scales", None)

    def use_scales(self, scales: Tensor) -> None:
        """The forward hands them over."""

    def forward_with(self, scales: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        trained: Any = self._parameters["scales"]
        self._parameters["scales"] = self._as_stored(scales)  # type: ignore[assignment]
        try:
            return super(ScaledLayer, self).forward(x, *args, **kwargs)
        finally:
            self._parameters["scales"] = trained

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        super(ScaledLayer, self)._save_to_state_dict(destination, prefix, keep_vars)
        with torch.no_grad():
            destination[prefix + "scales"] = self._as_stored(self.scales)

    def _as_stored(self, scales: Tensor) -> Tensor:
        dtype: Any = self.scales_dtype
        shape: Any = self.scales_shape
        return scales.detach().to(dtype).view(shape)


class ScaledAQLM(ScaledPacked):
    """AQLM's QuantizedLinear. Its first forward on CPU swaps two dimensions of the codes; state dicts have them as stored."""

    scale_kind = "AQLM"
    code_names = ("codes",)

    @classmethod
    def owns(cls, layer: nn.Module) -> bool:
        return is_a(layer, "aqlm", "QuantizedLinear")

    def own_layout(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._swapped(dict(state), "codes")

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._swapped(destination, prefix + "codes")

    def _swapped(self, state: StateDict, key: str) -> StateDict:
        codes: Any = self.codes
        if key in state and self.gemv_op is not None and self.codebook_size == 256 and codes.device.type == "cpu":
            state[key] = state[key].transpose(0, 1).contiguous()
        return state


class ScaledGrid(ScaledPacked):
    """The codes of :func:`zolightning.adapt.fakequant.export_quantized`, at 2 to 8 bits: a scale for each group of a row."""

    scale_kind = "zolightning.adapt.fakequant"
    by_rows = True

    @classmethod
    def owns(cls, layer: nn.Module) -> bool:
        return is_a(layer, "zolightning", "QuantizedLinear")

    @classmethod
    def stored_scales(cls, layer: Any) -> Tensor:
        return layer.scales.flatten(1)  # type: ignore[no-any-return]

    def own_layout(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.flatten(1) if name == "scales" else value for name, value in state.items()}
