"""The dense leaves of a model are small and many: all of them go through one call of the noise kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..noise import perturb_all, sgd_all_
from ..types import Key, Term
from .leaf import DenseLeaf, Leaf

SMALL = 1 << 16  # elements of a vector that is perturbed when a probe begins, with all others


class Vectors:
    """The perturbed dense vectors of a probe, made all at once when it begins: they are small, and many.

    Args:
        leaves: of a view.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._leaves = [
            leaf for leaf in leaves if type(leaf) is DenseLeaf and leaf.parameter.dim() == 1 and leaf.parameter.numel() <= SMALL
        ]
        self._buffers: dict[tuple[int, int], Tensor] = {}

    def perturbed(self, active: Mapping[int, Leaf], terms: Sequence[Term], side: int) -> dict[int, Tensor]:
        """Id of the parameter → W + Σ_k c_k z_k of the active ones, valid until the next call for this side."""
        leaves = [leaf for leaf in self._leaves if id(leaf.parameter) in active]
        if not leaves:
            return {}
        outs = {id(leaf.parameter): self._buffer(leaf.parameter, side) for leaf in leaves}
        stored = [leaf.parameter.detach() for leaf in leaves]
        perturb_all(list(outs.values()), stored, leaves[0].distribution, terms, [leaf.index for leaf in leaves])
        return outs

    @property
    def buffers(self) -> list[Tensor]:
        """The memory that probes have written until now."""
        return list(self._buffers.values())

    def _buffer(self, weight: Tensor, side: int) -> Tensor:
        out = self._buffers.get((id(weight), side))
        if out is None or out.device != weight.device or out.dtype != weight.dtype:
            out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            self._buffers[id(weight), side] = out
        return out

    def release(self) -> None:
        self._buffers.clear()


def descend_(leaves: Sequence[Leaf], terms: Sequence[Term], lr: float, weight_decay: float, key: Key) -> None:
    """:meth:`Leaf.sgd_` of all of them, the dense ones in as few calls as there are dtypes."""
    dense = [leaf for leaf in leaves if type(leaf) is DenseLeaf and leaf.parameter.is_contiguous() and not leaf.first]
    if dense:
        targets, indices = [leaf.parameter.detach().view(-1) for leaf in dense], [leaf.index for leaf in dense]
        sgd_all_(targets, dense[0].distribution, terms, indices, lr, weight_decay, key)
    together = set(map(id, dense))
    for leaf in leaves:
        if id(leaf) not in together:
            leaf.sgd_(terms, lr, weight_decay, key)
