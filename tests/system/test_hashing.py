"""SplitMix64, against published outputs of the generator."""

from __future__ import annotations

import numpy as np
import pytest

from llm.system.hashing import GOLDEN_GAMMA, mix64, mix64_array

# The first outputs by seed. Sources: 0, Vigna's https://prng.di.unimi.it/splitmix64.c; 1234567, Rosetta Code,
# "Pseudo-random numbers/Splitmix64".
PUBLISHED = {
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B],
    1234567: [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ],
}


@pytest.mark.parametrize("seed", PUBLISHED)
def test_mix64_when_applied_to_the_states_of_splitmix64_then_gives_its_published_outputs(seed: int) -> None:
    states = [seed + number * GOLDEN_GAMMA for number in range(1, 6)]
    assert [mix64(state) for state in states] == PUBLISHED[seed]


@pytest.mark.parametrize("seed", PUBLISHED)
def test_mix64_array_when_applied_to_the_states_of_splitmix64_then_gives_its_published_outputs(seed: int) -> None:
    states = np.uint64(seed) + np.arange(1, 6, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
    mixed = mix64_array(states)
    assert mixed.dtype == np.uint64
    assert mixed.tolist() == PUBLISHED[seed]


def test_mix64_array_when_given_any_shape_then_equals_mix64_and_keeps_its_input() -> None:
    words = np.random.default_rng(0).integers(0, 2**64, size=(50, 20), dtype=np.uint64)
    before = words.copy()
    mixed = mix64_array(words)
    assert mixed.tolist() == [[mix64(word) for word in row] for row in words.tolist()]
    assert np.array_equal(words, before)


@pytest.mark.parametrize(("word", "same"), [(2**64 + 5, 5), (-1, 2**64 - 1)])
def test_mix64_when_an_integer_has_other_than_64_bits_then_the_lowest_64_count(word: int, same: int) -> None:
    assert mix64(word) == mix64(same)
