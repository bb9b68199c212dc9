"""The order of the blocks in an epoch: a permutation of which any entry is computed on its own.

Nothing is stored, whatever the number of blocks, and any position of any epoch is computed directly, so that a run's
position in its data is one integer.

Source: a Feistel network is a permutation whatever its round function (Luby and Rackoff, "How to construct
pseudorandom permutations from pseudorandom functions", 1988); cycle walking restricts it to the first n numbers (Black
and Rogaway, "Ciphers with arbitrary finite domains", 2002); the round function is `llm.system.hashing.mix64`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llm.system.hashing import GOLDEN_GAMMA, mix64, mix64_array

_NUM_ROUNDS = 8
# Positions are requested one after the other: computed 1,024 at a time, each costs a fiftieth.
_POSITIONS_AT_ONCE = 1024


def shuffled_index(position: int, num_blocks: int, *, seed: int, epoch: int) -> int:
    """Return the block at a position of an epoch: a bijection of 0 .. num_blocks - 1 for each (seed, epoch).

    The result must never change between versions: runs resume by it.

    Args:
        position: position in the epoch, from 0.
        num_blocks: blocks of an epoch, at least 1.
        seed: the run's seed.
        epoch: number of the epoch, from 0.

    Raises:
        IndexError: the position is outside the epoch.
    """
    if not 0 <= position < num_blocks:
        raise IndexError(f"position {position} of an epoch of {num_blocks} blocks")
    number, index = divmod(position, _POSITIONS_AT_ONCE)
    return _shuffled_indices(number, num_blocks, seed, epoch)[index]


@lru_cache(maxsize=64)
def _shuffled_indices(number: int, num_blocks: int, seed: int, epoch: int) -> list[int]:
    """The blocks at the positions [number * _POSITIONS_AT_ONCE, ...) of an epoch."""
    num_bits = max((num_blocks - 1).bit_length(), 2)
    keys = _round_keys(seed, epoch)
    end = min((number + 1) * _POSITIONS_AT_ONCE, num_blocks)
    blocks = _permuted(np.arange(number * _POSITIONS_AT_ONCE, end, dtype=np.uint64), num_bits, keys)
    # Cycle walking. Fewer than half of the numbers are too large, so that it ends after two rounds on average.
    while (too_large := np.flatnonzero(blocks >= num_blocks)).size:
        blocks[too_large] = _permuted(blocks[too_large], num_bits, keys)
    return [int(block) for block in blocks]


def seed_of_source(seed: int, number: int) -> int:
    """Return the seed of one text of a mixture, so that texts of equal length have different orders.

    The result must never change between versions: runs resume by it.

    Args:
        seed: the run's seed.
        number: index of the text in the mixture.
    """
    return mix64(mix64(seed + GOLDEN_GAMMA) ^ mix64(number + 1))


def _permuted(numbers: NDArray[np.uint64], num_bits: int, keys: tuple[int, ...]) -> NDArray[np.uint64]:
    """A bijection of the numbers below 2 ** num_bits: a Feistel network, which mixes the two halves in turn."""
    low_bits = np.uint64(num_bits // 2)
    low_mask = np.uint64((1 << num_bits // 2) - 1)
    high_mask = np.uint64((1 << (num_bits - num_bits // 2)) - 1)
    high = numbers >> low_bits
    low = numbers & low_mask
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        high ^= mix64_array(low ^ np.uint64(first)) & high_mask
        low ^= mix64_array(high ^ np.uint64(second)) & low_mask
    return high << low_bits | low


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    start = mix64(mix64(seed + GOLDEN_GAMMA) + epoch + GOLDEN_GAMMA)
    return tuple(mix64(start + number * GOLDEN_GAMMA) for number in range(1, _NUM_ROUNDS + 1))
