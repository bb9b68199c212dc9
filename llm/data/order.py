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

_NUM_ROUNDS = 8
_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def shuffled(position: int, num_blocks: int, *, seed: int, epoch: int) -> int:
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
    num_bits = max((num_blocks - 1).bit_length(), 2)
    keys = _round_keys(seed, epoch)
    block = _permuted(position, num_bits, keys)
    # Fewer than half of the numbers are too large, so that this ends after two tries on average.
    while block >= num_blocks:
        block = _permuted(block, num_bits, keys)
    return block


def _permuted(number: int, num_bits: int, keys: tuple[int, ...]) -> int:
    """A bijection of the numbers below 2 ** num_bits: the halves are scrambled in turn."""
    low_bits = num_bits // 2
    low_mask = (1 << low_bits) - 1
    high_mask = (1 << (num_bits - low_bits)) - 1
    high, low = number >> low_bits, number & low_mask
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        high ^= _mixed(low ^ first) & high_mask
        low ^= _mixed(high ^ second) & low_mask
    return high << low_bits | low


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    start = _mixed(_mixed(seed + _GOLDEN) + epoch + _GOLDEN)
    return tuple(_mixed(start + number * _GOLDEN) for number in range(1, _NUM_ROUNDS + 1))


def _mixed(word: int) -> int:
    """SplitMix64's finaliser: 64 bits to 64 bits, each of them depending on all."""
    word &= _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31
