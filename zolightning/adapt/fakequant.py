"""ZeroQAT (arXiv:2509.00031): linear layers that round their weights and inputs in the forward, trained by forwards only.

:func:`fake_quantize` puts the rounding in, any :class:`~zolightning.ZOStrategy` trains through it or past it, and
:func:`export_quantized` replaces the layers by ones that hold the codes. Straight after each other the two are plain
post-training quantisation. A state dict is read by a model that was prepared in the same way; ``save_pretrained`` needs
:func:`dequantize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..space import Rounds, Select, compute_with, select
from ..space.scales.layer import KeepsFloat32
from .quantize import compute_by_layers, linear_layers

_LEAST_FACTOR, _LEAST_SCALE = 0.05, 1e-8
_BLOCK = 1 << 18  # weights rounded at once: float32 copies of a whole matrix break up a CPU allocator's memory


class Grid(NamedTuple):
    """Numbers on a grid of 2**bits points: ``(codes − zeros) · scales``.

    Args:
        codes: (…, size), whole numbers 0 … 2**bits − 1 as floats.
        scales: (…, 1), > 0.
        zeros: (…, 1), the codes of 0, whole numbers.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        return (self.codes - self.zeros).mul_(self.scales)


def quantize_to_grid(x: Tensor, bits: int, lower: Tensor, upper: Tensor) -> Grid:
    """Round to the nearest point of a grid that spans from ``lower`` times the least to ``upper`` times the largest value.

    Args:
        x: (…, size), float32; each group along the last dimension has a grid of its own, which holds 0.
        bits: 2 to 8.
        lower: clipping factor, broadcast to (…, 1); 1 clips nothing.
        upper: likewise.
    """
    levels = 2**bits - 1
    low = (x.amin(-1, keepdim=True) * lower).clamp(max=0)
    high = (x.amax(-1, keepdim=True) * upper).clamp(min=0)
    scales = ((high - low) / levels).clamp(min=_LEAST_SCALE)
    zeros = (-low / scales).round()
    return Grid((x / scales).round_().add_(zeros).clamp_(0, levels), scales, zeros)  # in place: half the time


class FakeQuantWeight(KeepsFloat32):
    r"""The rounded weight of a layer: :math:`W \mapsto Q(W \,\mathrm{diag}(s))`.

    Args:
        weight: (out, in).
        bits: 2 to 8.
        group_size: neighbours in a row that share a grid; None: the row.
    """

    def __init__(self, weight: Tensor, bits: int, group_size: int | None) -> None:
        super().__init__()
        out, into = weight.shape
        self.bits, self.size = bits, group_size or into
        clip = torch.ones(out, into // self.size, 1, dtype=torch.float32, device=weight.device)
        self.lower, self.upper = nn.Parameter(clip), nn.Parameter(clip.clone())
        self.smooth = nn.Parameter(torch.ones(into, dtype=torch.float32, device=weight.device))

    def grid(self, weight: Tensor) -> Grid:
        """The weight's grid, of shape (out, groups, size)."""
        return self._grid(weight, _factor(self.smooth), _factor(self.lower), _factor(self.upper))

    def _grid(self, weight: Tensor, smooth: Tensor, lower: Tensor, upper: Tensor) -> Grid:
        smoothed = weight.to(torch.float32) * smooth
        return quantize_to_grid(smoothed.view(len(smoothed), -1, self.size), self.bits, lower, upper)

    def forward(self, weight: Tensor) -> Tensor:
        smooth, lower, upper = _factor(self.smooth), _factor(self.lower), _factor(self.upper)  # each read builds a probe's
        out, rows = torch.empty_like(weight), max(1, _BLOCK // weight.shape[1])
        for first in range(0, len(weight), rows):
            now = slice(first, first + rows)
            out[now] = self._grid(weight[now], smooth, lower[now], upper[now]).values().flatten(1)
        return out


class FakeQuantInput(KeepsFloat32):
    r"""The rounded input of a layer: :math:`x \mapsto Q(x \,\mathrm{diag}(s)^{-1})`, a grid for each token.

    Args:
        bits: 2 to 8; None: no rounding.
        device: The device of the clipping factors.
    """

    def __init__(self, bits: int | None, device: torch.device) -> None:
        super().__init__()
        self.bits = bits
        if bits is not None:
            self.lower = nn.Parameter(torch.ones(1, dtype=torch.float32, device=device))
            self.upper = nn.Parameter(torch.ones(1, dtype=torch.float32, device=device))

    def forward(self, x: Tensor, smooth: Tensor) -> Tensor:
        even = x.to(torch.float32) / _factor(smooth)
        if self.bits is not None:
            even = quantize_to_grid(even, self.bits, _factor(self.lower), _factor(self.upper)).values()
        return even.to(x.dtype)


class FakeQuantLinear(Rounds, nn.Linear):
    """A linear layer that rounds its weight, and if asked its inputs, in the forward.

    A probe of the whole batch perturbs the weight before the rounding. Directions of each example's own act on the
    activations, past the rounding, and their estimate is applied to the weight before it: straight through.

    Args:
        linear: its weight and bias are taken over.
        bits: Bits of the weight, 2 to 8.
        group_size: neighbours in a row that share a grid; None: the row.
        input_bits: Bits of the inputs, 2 to 8; None: they are not rounded.
    """

    def __init__(self, linear: nn.Linear, bits: int, group_size: int | None, input_bits: int | None) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.quantizer = FakeQuantWeight(linear.weight, bits, group_size)
        self.input_quantizer = FakeQuantInput(input_bits, linear.weight.device)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return compute_with(self.weight, x, self._compute, self.bias)

    def _compute(self, weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x, self.quantizer.smooth), self.quantizer(weight), self.bias)


def _factor(stored: Tensor) -> Tensor:
    return stored.to(torch.float32).clamp(min=_LEAST_FACTOR)


class QuantizedLinear(KeepsFloat32):
    """A linear layer that holds codes, scales and zeros: 2 bits in 2, 3 and 4 bits in 4, more in 8.

    Args:
        linear: the fake-quantised layer, whose outputs it has, bit for bit.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    smooth: Tensor
    like: Tensor
    """Empty, of the dtype that the layer computes in: conversions change it as they change a weight's."""

    def __init__(self, linear: FakeQuantLinear) -> None:
        super().__init__()
        quantizer, weight = linear.quantizer, linear.weight
        with torch.no_grad():
            grid = quantizer.grid(weight)
        self.bits, self.shape = quantizer.bits, weight.shape
        self.register_buffer("codes", pack(grid.codes.to(torch.uint8).view(-1), self.bits))
        self.register_buffer("scales", grid.scales)
        self.register_buffer("zeros", grid.zeros.to(torch.uint8))
        self.register_buffer("smooth", quantizer.smooth.detach().clone())
        self.register_buffer("like", weight.new_empty(0), persistent=False)
        self.input_quantizer, self.bias = linear.input_quantizer, linear.bias
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x, self.smooth), self.smoothed().to(self.like.dtype), self.bias)

    def smoothed(self) -> Tensor:
        """The rounded W diag(s), float32."""
        groups = self.scales.shape[:2]
        codes = unpack(self.codes, self.bits)[: self.shape.numel()].view(*groups, -1)
        grid = Grid(codes.to(torch.float32), self.scales.view(*groups, 1), self.zeros.to(torch.float32))
        return grid.values().view(self.shape)

    def dequantized(self) -> nn.Linear:
        """An ordinary layer, frozen, of the rounded weight."""
        linear = nn.Linear(self.shape[1], self.shape[0], self.bias is not None, device="meta")
        with torch.no_grad():
            weight = self.smoothed() / _factor(self.smooth)
        linear.weight, linear.bias = nn.Parameter(weight.to(self.like.dtype), requires_grad=False), self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, bits={self.bits}"


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of shape (n,), uint8 → bytes that hold 4 (2 bits), 2 (3 and 4 bits) or 1 of them; the last one is filled up."""
    width = _width(bits)
    lanes = F.pad(codes, (0, -len(codes) % (8 // width))).view(-1, 8 // width)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
    return (lanes << shifts).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes, and the padding of the last byte."""
    width = _width(bits)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return torch.bitwise_and(packed[:, None] >> shifts, 2**width - 1).view(-1)


def _width(bits: int) -> int:
    return 2 if bits == 2 else 4 if bits <= 4 else 8


def fake_quantize(
    module: nn.Module,
    bits: int = 4,
    *,
    group_size: int | None = 64,
    input_bits: int | None = None,
    train: Select = "all",
    skip: Sequence[str] = ("lm_head",),
) -> nn.Module:
    """Let linear layers compute with rounded weights and inputs, in place, with trainable clipping and smoothing.

    Args:
        module: its ``nn.Linear`` layers are treated, but for those whose weight other modules share.
        bits: Bits of the weights, 2 to 8.
        group_size: weights in a row that share a scale; None: the whole row.
        input_bits: Bits of the layers' inputs, 2 to 8, a scale for each token; None: they are not rounded.
        train: The layers whose weights stay trainable, in the words of ``ZOStrategy(select=...)``. The others are quantised now
            and frozen: the light variant, in the memory of the codes.
        skip: names, or parts between dots, of submodules to leave out.

    Returns:
        The module.

    Raises:
        ValueError: bits out of range, a group size that does not divide a layer's inputs, a layer without values on the meta
            device, no layer, a name to skip that nothing has, or adapters on the module.
    """
    for name, value in (("bits", bits), ("input_bits", input_bits)):
        if value is not None and value not in range(2, 9):
            raise ValueError(f"`fake_quantize({name}=...)` must be a whole number from 2 to 8, got {value!r}")
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    layers = linear_layers(module, "fake_quantize", skip, lambda layer: layer is not module and type(layer) is nn.Linear)
    if not layers:
        raise ValueError(
            f"`fake_quantize` found no linear layer inside the module with a weight of its own outside skip={skip}; it treats "
            "nn.Linear, no layers that are quantised and no Conv1D of GPT-2"
        )
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(f"{name!r} is on the meta device, without values; load its weights before `fake_quantize`")
        if group_size is not None and (not isinstance(group_size, int) or group_size < 1 or layer.in_features % group_size):
            raise ValueError(
                f"`fake_quantize(group_size={group_size})` must be a whole number that divides the {layer.in_features} inputs "
                f"of {name!r}; None gives each row one scale"
            )
    trained = select(module, train, {f"{name}.weight": layer.weight for name, layer in layers.items()})
    for name, layer in layers.items():
        fake = FakeQuantLinear(layer, bits, group_size, input_bits)
        module.set_submodule(name, fake if f"{name}.weight" in trained else QuantizedLinear(fake))
    compute_by_layers(module)
    for model in module.modules():
        if hasattr(model, "save_pretrained"):
            setattr(model, "save_pretrained", _refuse_to_save)  # noqa: B010
    return module


def export_quantized(module: nn.Module) -> nn.Module:
    """Replace every fake-quantised layer by a :class:`QuantizedLinear`, in place; the outputs stay the same bit for bit.

    Raises:
        ValueError: there is no such layer.
    """
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, FakeQuantLinear)]
    if not layers:
        raise ValueError("there is no fake-quantised layer to export; `fake_quantize(module, bits)` makes them")
    for name, layer in layers:
        module.set_submodule(name, QuantizedLinear(layer))
    return module


def dequantize(module: nn.Module) -> nn.Module:
    r"""Replace fake-quantised and exported layers by ordinary ones of the rounded weight, in place.

    .. math:: Q(W \,\mathrm{diag}(s))\,\mathrm{diag}(s)^{-1}

    Any library saves and reads the module then, in the memory of the weights. The outputs are the same bit for bit where the
    smoothing s was not trained, and else up to the rounding of the weights' dtype.

    Raises:
        ValueError: there is no such layer, or one rounds its inputs, which ordinary layers do not.
    """
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, (FakeQuantLinear, QuantizedLinear))]
    if not layers:
        raise ValueError("there is no layer to dequantise; `fake_quantize(module, bits)` makes them")
    for name, layer in layers:
        if layer.input_quantizer.bits is not None:
            raise ValueError(
                f"{name!r} rounds its inputs to {layer.input_quantizer.bits} bits, which an ordinary layer does not; keep the "
                "state_dict of this module, or train with input_bits=None"
            )
    for name, layer in layers:
        module.set_submodule(name, (QuantizedLinear(layer) if isinstance(layer, FakeQuantLinear) else layer).dequantized())
    for model in module.modules():
        vars(model).pop("save_pretrained", None)
    return module


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    """In the place of a Hugging Face model's own, which would write a file that ``from_pretrained`` takes for another model."""
    raise ValueError(
        "`save_pretrained` cannot write fake-quantised layers. `zolightning.adapt.fakequant.dequantize(model)` first makes "
        "them ordinary ones of the rounded weights; or torch.save(model.state_dict(), path), for a model prepared the same way"
    )
