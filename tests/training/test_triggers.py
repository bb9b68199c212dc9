"""After which updates a trigger is true."""

from __future__ import annotations

import pytest

from llm.training.triggers import Trigger, all_of, any_of, at_end, before, every, every_epoch


def steps(trigger: Trigger, num_steps: int = 12) -> list[int]:
    """Return the updates of a run of 12 after which the trigger is true."""
    return [step for step in range(1, num_steps + 1) if trigger(step)]


def test_every_when_there_is_an_interval_then_counts_finished_updates() -> None:
    assert steps(every(5)) == [5, 10]
    assert steps(every(1)) == list(range(1, 13))


def test_every_when_there_is_no_interval_then_is_never_true() -> None:
    assert steps(every(None)) == []


def test_at_end_when_the_last_update_is_reached_then_is_true_once() -> None:
    assert steps(at_end(7)) == [7]


@pytest.mark.parametrize(
    ("num_blocks", "global_batch", "expected"),
    [
        (8, 4, [2, 4, 6, 8, 10, 12]),  # an epoch ends with an update
        (10, 4, [3, 5, 8, 10]),  # an epoch ends inside an update
        (10, 10, list(range(1, 13))),
        (3, 10, list(range(1, 13))),  # several epochs end in an update
        (48, 4, [12]),
        (49, 4, []),
    ],
)
def test_every_epoch_when_an_update_reads_the_last_block_of_an_epoch_then_is_true(
    num_blocks: int, global_batch: int, expected: list[int]
) -> None:
    assert steps(every_epoch(num_blocks, global_batch)) == expected


def test_any_of_when_several_are_true_then_is_true() -> None:
    assert steps(any_of(every(4), every(6), at_end(11))) == [4, 6, 8, 11, 12]
    assert steps(any_of()) == []


def test_all_of_when_one_is_false_then_is_false() -> None:
    assert steps(all_of(every(4), before(12))) == [4, 8]
    assert steps(all_of(every(4), every(6))) == [12]


def test_before_when_the_last_update_is_reached_then_is_false() -> None:
    assert steps(before(4)) == [1, 2, 3]


def test_every_epoch_when_the_length_of_an_epoch_is_unknown_then_is_never_true() -> None:
    assert steps(every_epoch(None, 8)) == []
