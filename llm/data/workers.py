"""Work done by several threads, in order and not too far ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_in_threads(function: Callable[[Given], Made], items: Iterable[Given], num_workers: int) -> Iterator[Made]:
    """What the function makes of each item, in the order of the items.

    For a function that lets go of the interpreter, as encoders and hashes do: then threads take as
    little time as processes, copy nothing, die with the process and raise what the function raises.
    At most `num_workers + 1` items are worked on or wait; with one worker, there is no thread.
    """
    if num_workers <= 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="encode")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
