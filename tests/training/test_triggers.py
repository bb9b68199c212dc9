"""What is due after which update."""

from __future__ import annotations

import pytest

from llm.training.triggers import Trigger, all_of, any_of, at_end, before, every, every_epoch


def steps(due: Trigger, num_steps: int = 12) -> list[int]:
    """The updates of a run of 12 after which it is due."""
    return [step for step in range(1, num_steps + 1) if due(step)]


def test_every_when_a_number_is_given_then_counts_finished_updates() -> None:
    assert steps(every(5)) == [5, 10]
    assert steps(every(1)) == list(range(1, 13))


def test_every_when_none_is_given_then_never() -> None:
    assert steps(every(None)) == []


def test_end_when_reached_then_once() -> None:
    assert steps(at_end(7)) == [7]


@pytest.mark.parametrize(
    ("num_blocks", "global_batch", "expected"),
    [
        (8, 4, [2, 4, 6, 8, 10, 12]),  # an epoch is a whole number of updates
        (10, 4, [3, 5, 8, 10]),  # and here it ends inside an update
        (10, 10, list(range(1, 13))),
        (3, 10, list(range(1, 13))),  # several epochs an update
        (48, 4, [12]),
        (49, 4, []),
    ],
)
def test_epoch_when_an_update_reads_its_last_block_then_due(
    num_blocks: int, global_batch: int, expected: list[int]
) -> None:
    assert steps(every_epoch(num_blocks, global_batch)) == expected


def test_any_when_several_meet_then_due_once() -> None:
    assert steps(any_of(every(4), every(6), at_end(11))) == [4, 6, 8, 11, 12]
    assert steps(any_of()) == []


def test_all_when_one_is_not_due_then_is_not() -> None:
    assert steps(all_of(every(4), before(12))) == [4, 8]
    assert steps(all_of(every(4), every(6))) == [12]


def test_before_when_the_last_update_is_reached_then_no_more() -> None:
    assert steps(before(4)) == [1, 2, 3]


def test_epoch_when_its_length_is_not_known_then_never() -> None:
    assert steps(every_epoch(None, 8)) == []
