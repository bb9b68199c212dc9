"""The order of the blocks in an epoch: a permutation computed one place at a time.

Nothing is stored, whatever the number of blocks, and any place of any epoch is found at once, so
that a run's position in its data is one integer.

Source: a Feistel network is a permutation whatever its round function (Luby and Rackoff, "How to
construct pseudorandom permutations from pseudorandom functions", 1988); cycle walking restricts it
to the first n numbers (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002); the round
function is SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014, with Stafford's 13th set of constants).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llm.system.hashing import GOLDEN_GAMMA, mix64, mix64_array

_NUM_ROUNDS = 8
# Places are asked for one after the other: computed so many at a time, each costs a fiftieth.
_STRETCH = 1024


def shuffled_index(position: int, num_blocks: int, *, seed: int, epoch: int) -> int:
    """The block at a place of an epoch: a bijection of 0 .. num_blocks - 1 for each (seed, epoch).

    It never changes from one version to the next: runs are resumed by it.

    Args:
        position: place in the epoch, from 0.
        num_blocks: blocks of an epoch, at least 1.
        seed: the run's seed.
        epoch: number of the epoch, from 0.

    Raises:
        IndexError: there is no such place.
    """
    if not 0 <= position < num_blocks:
        raise IndexError(f"place {position} of an epoch of {num_blocks} blocks")
    number, place = divmod(position, _STRETCH)
    return _stretch(number, num_blocks, seed, epoch)[place]


@lru_cache(maxsize=64)
def _stretch(number: int, num_blocks: int, seed: int, epoch: int) -> list[int]:
    """The blocks at the places [number * _STRETCH, ...) of an epoch."""
    num_bits = max((num_blocks - 1).bit_length(), 2)
    keys = _round_keys(seed, epoch)
    end = min((number + 1) * _STRETCH, num_blocks)
    blocks = _permuted(np.arange(number * _STRETCH, end, dtype=np.uint64), num_bits, keys)
    # Fewer than half of the numbers are too large, so that this ends after two tries on average.
    while (beyond := np.flatnonzero(blocks >= num_blocks)).size:
        blocks[beyond] = _permuted(blocks[beyond], num_bits, keys)
    return [int(block) for block in blocks]


def seed_of_source(seed: int, number: int) -> int:
    """The seed of one of several texts that are mixed, so that equally long ones have different orders.

    It never changes from one version to the next: runs are resumed by it.
    """
    return mix64(mix64(seed + GOLDEN_GAMMA) ^ mix64(number + 1))


def _permuted(numbers: NDArray[np.uint64], num_bits: int, keys: tuple[int, ...]) -> NDArray[np.uint64]:
    """A bijection of the numbers below 2 ** num_bits: the halves are scrambled in turn."""
    low_bits = np.uint64(num_bits // 2)
    low_mask = np.uint64((1 << num_bits // 2) - 1)
    high_mask = np.uint64((1 << (num_bits - num_bits // 2)) - 1)
    high, low = numbers >> low_bits, numbers & low_mask
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        high ^= mix64_array(low ^ np.uint64(first)) & high_mask
        low ^= mix64_array(high ^ np.uint64(second)) & low_mask
    return high << low_bits | low


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    start = mix64(mix64(seed + GOLDEN_GAMMA) + epoch + GOLDEN_GAMMA)
    return tuple(mix64(start + number * GOLDEN_GAMMA) for number in range(1, _NUM_ROUNDS + 1))
