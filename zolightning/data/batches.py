"""Batches of texts of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class SimilarLengths(Sampler[list[int]]):
    """Shuffled batches with little padding, for DataLoader(batch_sampler=...).

    An epoch is a random order of the items, without the rest that fills no batch; windows of it are sorted by length, cut into
    batches, and those are taken in random order.

    Args:
        lengths: of each item, in any unit.
        batch_size: items a batch, >= 1.
        generator: The generator of the random order.
        window: batches that are sorted together, >= 1; 1 is plain shuffling.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, generator: torch.Generator, window: int = 16) -> None:
        for name, value in (("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ValueError(f"`SimilarLengths({name}=...)` must be >= 1, got {value}")
        self.lengths, self.batch_size, self.generator, self.window = list(lengths), batch_size, generator, window

    def __len__(self) -> int:
        return len(self.lengths) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.lengths), generator=self.generator).tolist()[: len(self) * self.batch_size]
        size = self.window * self.batch_size
        for start in range(0, len(order), size):
            items = sorted(order[start : start + size], key=self.lengths.__getitem__)
            for batch in torch.randperm(len(items) // self.batch_size, generator=self.generator).tolist():
                yield items[batch * self.batch_size : (batch + 1) * self.batch_size]
