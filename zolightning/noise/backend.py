"""The operations of a backend that is faster than plain torch: the sweeps on contiguous tensors of one device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..types import Key, Term


class Backend(ABC):
    """The operations of :mod:`.kernels` for tensors that it takes, with the bits of :mod:`.reference`.

    ``kind`` is a distribution's :attr:`~.distributions.Distribution.native`, ``leaf`` the leaf's index, ``start`` the place of
    a tensor's first element in the leaf.
    """

    description: str
    """For the log."""

    dtypes: ClassVar[frozenset[torch.dtype]]
    """Of the contiguous tensors that it reads and writes."""

    @abstractmethod
    def rounds(self, dtype: torch.dtype) -> bool:
        """Whether :meth:`stochastic_round_` takes targets of this type."""

    @abstractmethod
    def updates(self, dtype: torch.dtype) -> bool:
        """Whether :meth:`sgd_` and :meth:`outer_sgd_` take weights of this type."""

    @abstractmethod
    def noise(
        self, kind: int, terms: Sequence[Term], leaf: int, starts: Tensor, length: int, queries: Tensor | None = None
    ) -> Tensor:
        """Σ_k c_k z_k over ``length`` elements from each start: float32 of shape (n, length), where ``starts`` is.

        ``queries``, int64 of shape (n,), stands in the place of the only term's.
        """

    @abstractmethod
    def perturb(self, out: Tensor, source: Tensor, kind: int, terms: Sequence[Term], leaf: int, start: int) -> None:
        """out = source + Σ_k c_k z_k, rounded to nearest."""

    @abstractmethod
    def perturb_all(
        self, outs: Sequence[Tensor], sources: Sequence[Tensor], kind: int, terms: Sequence[Term], leaves: Sequence[int]
    ) -> None:
        """:meth:`perturb` of whole leaves of one dtype."""

    @abstractmethod
    def perturb_both(self, plus: Tensor, minus: Tensor, source: Tensor, kind: int, term: Term, leaf: int, start: int) -> None:
        """plus = source + c z and minus = source − c z, the noise made once."""

    @abstractmethod
    def perturb_rows(self, out: Tensor, source: Tensor, kind: int, terms: Sequence[Term], leaf: int, rows: Tensor) -> None:
        """:meth:`perturb` of some rows of a matrix, which lie one after another in ``source``."""

    @abstractmethod
    def stochastic_round_(self, target: Tensor, value: Tensor, key: Key, leaf: int, start: int) -> None:
        """target = value, float32, rounded by the key's bits."""

    @abstractmethod
    def sgd_(
        self, target: Tensor, kind: int, terms: Sequence[Term], leaf: int, start: int, lr: float, weight_decay: float, key: Key
    ) -> None:
        """target −= lr · (Σ_k c_k z_k + weight_decay · target), stored as :meth:`stochastic_round_` does."""

    @abstractmethod
    def sgd_all_(
        self, targets: Sequence[Tensor], kind: int, terms: Sequence[Term], leaves: Sequence[int],
        lr: float, weight_decay: float, key: Key,
    ) -> None:  # fmt: skip
        """:meth:`sgd_` of whole leaves of one dtype."""

    @abstractmethod
    def outer_sum(self, a: Tensor, b: Tensor) -> Tensor:
        """Σ_k a_k b_kᵀ in the order of k, float32."""

    @abstractmethod
    def outer_sgd_(self, target: Tensor, a: Tensor, b: Tensor, leaf: int, lr: float, weight_decay: float, key: Key) -> None:
        """target −= lr · (Σ_k a_k b_kᵀ + weight_decay · target) of a whole leaf, a and b in float32."""

    @abstractmethod
    def keep_large_(self, out: Tensor, stored: Tensor, limit: float) -> None:
        """out = stored where \\|stored\\| > limit."""

    @abstractmethod
    def mixed_sum(self, words: Tensor, first: int) -> int:
        """The fingerprint of int64 words."""
