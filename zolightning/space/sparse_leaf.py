"""A leaf of which only the small weights are perturbed and trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..noise import Distribution, keep_large_, pieces, sgd_, working_dtype
from ..types import Key, Term
from .leaf import DenseLeaf, Leaf


class SparseLeaf(DenseLeaf):
    r"""Dense z, but zero at large weights, which no update changes, weight decay and momentum included:

    .. math:: z_i \leftarrow z_i\,[\,|\theta_i| \le h\,]

    h is fixed before training. The mask is that of the weights as they stand between two updates: all probes of a step and
    its update see the same one. It is computed where it is needed and never stored. Sparse-MeZO, arXiv:2402.15751.

    Args:
        name, index, parameter, distribution: see :class:`~zolightning.space.Leaf`.
        sparsity: share of the weights that h leaves out, in [0, 1).
        threshold: h; None: measured now, exactly.
    """

    def __init__(
        self,
        name: str,
        index: int,
        parameter: nn.Parameter,
        distribution: Distribution,
        sparsity: float,
        threshold: float | None = None,
    ) -> None:
        super().__init__(name, index, parameter, distribution)
        self.sparsity = float(sparsity)
        self.threshold = measure(parameter, self.sparsity) if threshold is None else float(threshold)

    @property
    def per_example(self) -> bool:
        return False

    @property
    def settings(self) -> dict[str, float]:
        return {"sparsity": self.sparsity, "threshold": self.threshold}

    def fixed(self, start: int, length: int) -> Tensor:
        return self.parameter.detach().reshape(-1)[start : start + length].abs() > self.threshold

    def noise(self, terms: Sequence[Term], start: int, length: int) -> Tensor:
        return super().noise(terms, start, length).masked_fill_(self.fixed(start - self.first, length), 0.0)

    def perturb_into(self, out: Tensor, terms: Sequence[Term], first_row: int = 0) -> None:
        super().perturb_into(out, terms, first_row)
        keep_large_(out, self.stored(out.shape, first_row), self.threshold)

    def moved_rows(self, stored: Tensor, rows: Tensor, terms: Sequence[Term]) -> Tensor:
        out = super().moved_rows(stored, rows, terms)
        keep_large_(out, stored, self.threshold)
        return out

    def sgd_(self, terms: Sequence[Term], lr: float, weight_decay: float, key: Key) -> None:
        weight = self.parameter.detach()
        if not weight.is_contiguous():
            Leaf.sgd_(self, terms, lr, weight_decay, key)
            return
        for start, piece in pieces(weight.view(-1)):
            before = piece.clone()
            sgd_(piece, self.distribution, terms, self.index, self.first + start, lr, weight_decay, key)
            keep_large_(piece, before, self.threshold)


@torch.no_grad()
def measure(weight: Tensor, sparsity: float) -> float:
    """h: the k-th smallest magnitude, k = (1 - sparsity) · numel rounded, at least 1.

    Where that is 0 (a bias that starts at zero, an adapter's second matrix) no magnitude tells weights apart, and h is inf.
    By counting the bits of magnitudes, which sort as whole numbers do: exact, on any device, and without a copy.
    """
    dtype = working_dtype(weight.dtype)
    integers, width = (torch.int64, 64) if dtype == torch.float64 else (torch.int32, 32)
    left, found = max(1, round((1 - sparsity) * weight.numel())), 0
    for shift in range(width - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=weight.device)
        for _, piece in pieces(weight):
            bits = piece.to(dtype).abs().contiguous().view(-1).view(integers)
            if shift < width - 16:
                bits = bits[bits >> (shift + 16) == found]
            counts += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)
        sums = counts.cumsum(0)
        digit = int(torch.searchsorted(sums, left))
        left -= int(sums[digit] - counts[digit])
        found = found << 16 | digit
    value = torch.tensor(found, dtype=torch.int64).to(integers).view(dtype).item()
    return value if value > 0 else math.inf
