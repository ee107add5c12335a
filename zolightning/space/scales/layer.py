"""A quantised layer whose scales are an ordinary float32 Parameter beside its frozen codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..compute import compute_with

FLOOR = 1e-7
"""Smallest scale (QZO, arXiv:2505.13430): an update never makes one zero or negative."""


class KeepsFloat32(nn.Module):
    """A module whose scales and factors stay float32 when it is converted: in 16 bits they would round away their training."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsFloat32:
        names = [name for name in ("lower", "upper", "smooth", "scales") if hasattr(self, name)]
        exact = {name: getattr(self, name).data for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            converted = getattr(self, name)
            if converted.dtype != value.dtype:
                converted.data = value.to(converted.device)
        return self


class ScaledLayer(KeepsFloat32, ABC):
    """Mixed into the class of a quantised layer that exists: its scales become the float32 Parameter ``scales``.

    The layer's library goes on computing; before each forward it is given the scales by a torch operation on the
    Parameter, so a probe (a torch function mode) hands it the perturbed ones, one layer at a time. Conversions to half,
    moves and copies leave the Parameter in float32 and the library's own reference to it is made anew. State dicts keep
    the library's layout, with the trained scales in it.

    A subclass says for one library where the scales are; its codes are the Parameters named in ``code_names``. Names here
    must not hide attributes of the libraries' layers.
    """

    scale_kind: ClassVar[str]
    code_names: ClassVar[tuple[str, ...]] = ()

    scales: nn.Parameter

    by_rows: ClassVar[bool] = False
    """Whether a Parameter of two dimensions holds a scale for each (output, group of neighbouring inputs)."""

    @classmethod
    @abstractmethod
    def owns(cls, layer: nn.Module) -> bool:
        """Whether the layer is of this kind."""

    @classmethod
    @abstractmethod
    def stored_scales(cls, layer: object) -> Tensor:
        """The layer's scales, in any dtype; ValueError says why they cannot be trained. Changes nothing."""

    def adopt(self) -> None:
        """Once, when the layer has become one of this class: undo settings that assume constant scales."""

    @abstractmethod
    def use_scales(self, scales: Tensor) -> None:
        """Let the library's code read these scales, float32 and of the Parameter's shape."""

    def own_layout(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The layer's part of a state dict in the library's layout → names of this layer's Parameters and buffers."""
        return dict(state)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        compute = lambda scales, x: self.forward_with(scales, x, *args, **kwargs)  # noqa: E731
        return compute_with(self.scales, x, compute, self._parameters.get("bias"))

    def forward_with(self, scales: Tensor, x: Tensor, *args: object, **kwargs: object) -> Any:
        """The library's forward with these scales, which inside a probe are perturbed."""
        self.use_scales(scales.detach())
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            self.link_scales()

    def link_scales(self) -> None:
        """Let the library share the Parameter's memory."""
        with torch._C.DisableTorchFunction():  # also inside a probe
            self.use_scales(self.scales.detach())

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind, stock, *_ = type(self).__bases__
        return _empty, (kind, stock), self.__dict__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScaledLayer:
        super()._apply(fn, recurse)
        self.link_scales()
        return self

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        self.link_scales()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "scales")  # they are there under the library's name

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            found = {prefix + key: value for key, value in self.own_layout(own).items()}
        except (ValueError, KeyError) as error:
            error_msgs.append(f"{prefix.rstrip('.')} ({self.scale_kind}): {error}")
            return
        super()._load_from_state_dict(found, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self.link_scales()


@cache
def with_scales(kind: Any, stock: Any) -> type[nn.Module]:
    """The class of a layer of class ``stock`` whose scales are exposed."""
    return type(f"{stock.__name__}WithScales", (kind, stock), {"__module__": kind.__module__})


def _empty(kind: object, stock: object) -> nn.Module:
    layer: nn.Module = nn.Module.__new__(with_scales(kind, stock))
    return layer


def is_a(layer: nn.Module, package: str, name: str) -> bool:
    """Whether the layer's class, or one that it derives from, is ``package…name``; imports nothing."""
    return any(c.__name__ == name and c.__module__.split(".")[0] == package for c in type(layer).__mro__)
