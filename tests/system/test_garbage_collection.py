"""Garbage collection skips frozen objects, collects newer ones, and can include all again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from llm.system.garbage_collection import freeze_heap, unfreeze_heap


class _Cycle:
    """An object in a reference cycle, which only the garbage collector frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    yield
    unfreeze_heap()


def test_freeze_heap_when_called_then_collects_garbage_and_skips_the_rest_later() -> None:
    garbage, kept = weakref.ref(_Cycle()), _Cycle()
    freeze_heap()
    assert garbage() is None and kept.itself is kept
    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < 1_000 and not any(item is kept for item in gc.get_objects())
    later = weakref.ref(_Cycle())
    gc.collect()
    assert later() is None


def test_freeze_heap_when_called_again_then_collects_what_became_garbage_since() -> None:
    kept = _Cycle()
    reference = weakref.ref(kept)
    freeze_heap()
    del kept
    gc.collect()
    assert reference() is not None  # frozen
    freeze_heap()
    assert reference() is None


def test_unfreeze_heap_when_called_then_all_objects_are_collected_again() -> None:
    kept = _Cycle()
    reference = weakref.ref(kept)
    freeze_heap()
    unfreeze_heap()
    del kept
    gc.collect()
    assert gc.get_freeze_count() == 0 and reference() is None
