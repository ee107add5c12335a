from __future__ import annotations

from statistics import mean

import pytest
import torch
from torch.utils.data import DataLoader

from zolightning.data import SimilarLengths


def sampler(items: int, batch_size: int, window: int = 16, seed: int = 0) -> SimilarLengths:
    lengths = torch.randint(5, 60, (items,), generator=torch.Generator().manual_seed(1)).tolist()
    return SimilarLengths(lengths, batch_size, torch.Generator().manual_seed(seed), window)


@pytest.mark.parametrize(("items", "batch_size", "window"), [(100, 8, 3), (96, 8, 16), (5, 8, 2), (7, 1, 1), (0, 4, 2)])
def test_an_epoch_takes_each_item_once_in_full_batches(items: int, batch_size: int, window: int) -> None:
    batches = list(found := sampler(items, batch_size, window))
    assert len(batches) == len(found) == items // batch_size
    assert {len(batch) for batch in batches} <= {batch_size}
    taken = [item for batch in batches for item in batch]
    assert len(set(taken)) == len(taken)


def test_order_is_the_generators() -> None:
    found = sampler(64, 4)
    first, second = list(found), list(found)
    assert first == list(sampler(64, 4))
    assert first != second
    assert first != list(sampler(64, 4, seed=1))


def test_batches_hold_similar_lengths_in_random_order() -> None:
    def longest(found: SimilarLengths) -> list[int]:
        return [max(found.lengths[item] for item in batch) for batch in found]

    grouped, plain = longest(sampler(512, 16)), longest(sampler(512, 16, window=1))
    assert mean(grouped) < 0.7 * mean(plain)
    assert grouped != sorted(grouped)


def test_loads() -> None:
    found = sampler(20, 4)
    batches = [batch.tolist() for batch in DataLoader(range(20), batch_sampler=found)]  # type: ignore[arg-type]
    assert batches == list(sampler(20, 4))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`SimilarLengths\(window=...\)` must be >= 1, got 0"):
        sampler(4, 2, window=0)
