"""The SplitMix64 mixing function: 64 bits to 64 bits, a bijection in which every bit depends on all bits of the input.

Seeds and the order of blocks are derived with it. Runs resume by these values: they must never change.

Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014; the shifts and multipliers are
David Stafford's "Mix13".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# The odd integer closest to 2 ** 64 / golden ratio: the increment of SplitMix64's state.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15

_MASK = (1 << 64) - 1
_SHIFTS = (30, 27, 31)
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mix64(word: int) -> int:
    """Return the mixed lowest 64 bits of an integer, in 0 .. 2 ** 64 - 1."""
    word &= _MASK
    word = ((word ^ (word >> _SHIFTS[0])) * _MULTIPLIERS[0]) & _MASK
    word = ((word ^ (word >> _SHIFTS[1])) * _MULTIPLIERS[1]) & _MASK
    return word ^ (word >> _SHIFTS[2])


def mix64_array(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return `mix64` of every element, as a new array.

    Args:
        words: uint64, of any shape; at least one dimension, since NumPy warns when a scalar product overflows.
    """
    # Products of uint64 arrays wrap around at 64 bits, which replaces the mask of `mix64`.
    words = (words ^ words >> np.uint64(_SHIFTS[0])) * np.uint64(_MULTIPLIERS[0])
    words = (words ^ words >> np.uint64(_SHIFTS[1])) * np.uint64(_MULTIPLIERS[1])
    return words ^ words >> np.uint64(_SHIFTS[2])
