"""Random numbers depend on their position in the run, and not on earlier draws."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product

import pytest
import torch

from llm.training.seeding import derive_seed, seed_micro_batch, seed_weights

CPU = torch.device("cpu")


def draw_after(seed: Callable[[], None]) -> list[float]:
    seed()
    return torch.rand(4).tolist()


def test_derive_seed_when_the_numbers_are_fixed_then_the_seed_is_this() -> None:
    # Recorded once: with another value, dropout of a resumed run would differ from that of an unbroken one.
    assert derive_seed(1337, 1, 2, 3, 4) == 0x38BF7A58BECB7887
    # SplitMix64's first output for the seed 0, without its lowest bit.
    assert derive_seed(0) == 0xE220A8397B1DCDAF >> 1


def test_derive_seed_when_the_numbers_are_small_then_all_differ_and_the_bits_are_even() -> None:
    values = [derive_seed(*numbers) for numbers in product(range(10), repeat=4)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**63 for value in values)
    for bit in range(63):
        share = sum(value >> bit & 1 for value in values) / len(values)
        assert share == pytest.approx(0.5, abs=0.025)  # five standard deviations


def test_derive_seed_when_one_bit_changes_then_half_the_result_does() -> None:
    for index, bit in product(range(3), range(0, 63, 9)):
        numbers = [7, 8, 9]
        numbers[index] ^= 1 << bit
        assert 12 <= (derive_seed(7, 8, 9) ^ derive_seed(*numbers)).bit_count() <= 51


def test_derive_seed_when_the_order_or_the_count_changes_then_so_does_the_result() -> None:
    assert len({derive_seed(*order) for order in permutations((0, 1, 2, 3))}) == 24
    assert len({derive_seed(*[0] * count) for count in range(1, 10)}) == 9


def test_micro_batch_when_seeded_again_then_draws_the_same_after_any_draws() -> None:
    first = draw_after(lambda: seed_micro_batch(1, 2, 3, 4, CPU))
    torch.rand(100)
    assert draw_after(lambda: seed_micro_batch(1, 2, 3, 4, CPU)) == first


def test_micro_batch_when_its_position_differs_then_draws_other_numbers() -> None:
    positions = [(1, 2, 3, 4), (2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (2, 1, 3, 4)]
    draws = [draw_after(lambda position=position: seed_micro_batch(*position, CPU)) for position in positions]  # type: ignore[misc]
    draws.append(draw_after(lambda: seed_weights(1)))
    assert len({tuple(draw) for draw in draws}) == len(draws)


def test_micro_batch_when_the_model_is_on_another_device_then_that_is_seeded_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    seed_micro_batch(1, 2, 3, 4, torch.device("cuda:0"))
    assert seeds == [torch.default_generator.initial_seed()] == [derive_seed(1, 1, 2, 3, 4)]
    seed_micro_batch(1, 2, 3, 5, CPU)
    assert len(seeds) == 1
