"""The scales of a quantised layer as leaves: absolute or relative noise, and positive after every update."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Sequence

import torch
from torch import Tensor

from ..noise import noise_sum, outer_sum, working_dtype
from ..types import Key, Term
from .compute import Compute
from .leaf import Leaf
from .outer_leaf import PerExampleLeaf
from .scales import FLOOR


class ScaleLeaf(Leaf, ABC):
    """Scales Δ with z of their shape. Updates end at :data:`~zolightning.space.scales.FLOOR`."""

    floor = FLOOR


class AbsoluteScaleLeaf(ScaleLeaf):
    """Probed at Δ + εz, as QZO does (arXiv:2505.13430)."""

    def noise(self, terms: Sequence[Term], start: int, length: int) -> Tensor:
        scales = self.parameter
        total = noise_sum(self.distribution, terms, self.index, start, length, scales.device)
        return total.to(working_dtype(scales.dtype))


class RelativeScaleLeaf(ScaleLeaf):
    r"""Probed at :math:`\Delta(1 + \epsilon z)`, so that blocks of small weights are not overrun.

    The update is relative too, :math:`\Delta \leftarrow \Delta\,(1 - \mathrm{lr}\,g z)`.
    """

    def noise(self, terms: Sequence[Term], start: int, length: int) -> Tensor:
        scales = self.parameter.detach().reshape(-1)[start : start + length]
        total = noise_sum(self.distribution, terms, self.index, start, length, scales.device)
        return total.to(working_dtype(scales.dtype)) * scales


class RowScaleLeaf(ScaleLeaf, PerExampleLeaf):
    r"""Scales of shape (outputs, groups of inputs) with relative noise that acts on activations:

    .. math:: z_{og} = \Delta_{og}\,(u_o + v_g) / \sqrt 2, \qquad
              y = (1 + \tfrac{\epsilon}{\sqrt 2} u) \odot W\bigl((1 + \tfrac{\epsilon}{\sqrt 2} v) \odot x\bigr)

    which is the layer at :math:`\Delta + \epsilon z` up to :math:`\epsilon^2`, the same on both sides of a central difference.
    The layer's kernel runs as it is, and every example of a batch can have a direction of its own. With one group
    :math:`z_o = \Delta_o u_o`.
    """

    def _split(self, coordinates: Tensor) -> tuple[Tensor, Tensor | None]:
        """u and v, both divided by √2, or only u."""
        outputs, groups = self.parameter.shape
        if groups == 1:
            return coordinates, None
        coordinates = coordinates * math.sqrt(0.5)
        return coordinates[..., :outputs], coordinates[..., outputs:]

    @property
    def _length(self) -> int:
        outputs, groups = self.parameter.shape
        return outputs + groups if groups > 1 else outputs

    def noise(self, terms: Sequence[Term], start: int, length: int) -> Tensor:
        z, coefficients = self.drawn(terms, self._length)
        u, v = self._split(outer_sum(z, coefficients)[:, 0])
        total = u[:, None] if v is None else u[:, None] + v
        return (total * self.parameter.detach()).view(-1)[start : start + length]

    def compute_each(
        self, x: Tensor, compute: Compute, bias: Tensor | None, key: Key, queries: Tensor, offsets: Tensor
    ) -> Tensor:
        by_example = self.by_example(x, queries.numel())
        z = self.coordinates(key, queries.to(x.device), self._length) * offsets.to(x.device)[:, None]
        u, v = self._split(z)
        if v is not None:
            grouped = by_example.view(*by_example.shape[:2], v.shape[1], -1)
            x = torch.addcmul(grouped, grouped, v.to(x.dtype)[:, None, :, None]).view(x.shape)
        out = compute(self.parameter.detach(), x)
        product = out if bias is None else out - bias.to(out.dtype)
        shape = (len(z), -1, out.shape[-1])
        return torch.addcmul(out.view(shape), product.view(shape), u.to(out.dtype)[:, None]).view(out.shape)
