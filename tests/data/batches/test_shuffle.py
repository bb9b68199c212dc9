"""The permutation of the blocks of an epoch."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from llm.data.batches.shuffle import shuffled_index


def _order(num_blocks: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return [shuffled_index(i, num_blocks, seed=seed, epoch=epoch) for i in range(num_blocks)]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_shuffled_index_when_any_number_of_blocks_then_a_bijection(seed: int) -> None:
    for num_blocks in [*range(1, 130), 1000, 4096, 4097]:
        assert sorted(_order(num_blocks, seed, epoch=seed % 7)) == list(range(num_blocks))


def test_shuffled_index_when_computed_then_equal_to_recorded_values() -> None:
    assert _order(10, seed=1) == [2, 6, 4, 9, 8, 5, 0, 7, 1, 3]
    assert shuffled_index(123_456_789_012, 10**12, seed=42, epoch=3) == 362_943_963_750


def test_shuffled_index_when_neighbours_are_compared_then_no_fixed_offset() -> None:
    order = _order(10_000)
    offsets = Counter((b - a) % 10_000 for a, b in pairwise(order))
    assert max(offsets.values()) < 12
    # The mean distance of two random places on a line is a third of it.
    mean = sum(abs(b - a) for a, b in pairwise(order)) / 9999
    assert 3200 < mean < 3466


def test_shuffled_index_when_seed_or_epoch_differs_then_another_order() -> None:
    orders = [_order(1000, seed, epoch) for seed in range(4) for epoch in range(4)]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


def test_shuffled_index_when_many_orders_of_few_blocks_then_every_position_is_equally_likely() -> None:
    for num_blocks in (2, 3, 5, 7):
        firsts = Counter(shuffled_index(0, num_blocks, seed=seed, epoch=0) for seed in range(3000))
        expected = 3000 / num_blocks
        assert all(abs(firsts[block] - expected) < 5 * expected**0.5 for block in range(num_blocks))
    orders = Counter(tuple(_order(4, seed)) for seed in range(2400))
    assert len(orders) == 24
    assert min(orders.values()) > 40


@pytest.mark.parametrize("place", [-1, 5])
def test_shuffled_index_when_position_is_outside_then_index_error(place: int) -> None:
    with pytest.raises(IndexError):
        shuffled_index(place, 5, seed=0, epoch=0)
