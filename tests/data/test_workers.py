"""Work of several threads comes back in order."""

from __future__ import annotations

import threading
import time

import pytest

from llm.data.workers import map_in_threads, usable_cores


def test_map_in_threads_when_later_items_are_quicker_then_order_of_the_items() -> None:
    def slow(number: int) -> int:
        time.sleep(0.002 * (5 - number % 5))
        return number

    assert list(map_in_threads(slow, range(30), 4)) == list(range(30))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_map_in_threads_when_function_fails_then_its_error_and_no_thread_left(num_workers: int) -> None:
    class OwnError(Exception):
        pass

    def fail(number: int) -> int:
        if number == 3:
            raise OwnError("at 3")
        return number

    found = []
    with pytest.raises(OwnError, match="at 3"):
        found.extend(map_in_threads(fail, range(100), num_workers))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encode")]


def test_map_in_threads_when_results_wait_then_reads_no_further_ahead() -> None:
    read = []

    def items():
        for number in range(100):
            read.append(number)
            yield number

    made = map_in_threads(lambda number: number, items(), 2)
    assert [next(made) for _ in range(5)] == list(range(5))
    assert len(read) <= 5 + 2 + 1
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encode")]


def test_usable_cores_when_asked_then_one_or_more() -> None:
    assert usable_cores() >= 1
