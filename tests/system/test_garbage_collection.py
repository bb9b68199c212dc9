"""Searches for garbage see what was made lately, and nothing is lost to them for good."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from llm.system.garbage_collection import freeze_heap, unfreeze_heap


class _Circle:
    """Freed by a search alone."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    yield
    unfreeze_heap()


def test_freeze_when_called_then_garbage_goes_and_the_rest_is_no_longer_searched() -> None:
    garbage, kept = weakref.ref(_Circle()), _Circle()
    freeze_heap()
    assert garbage() is None and kept.itself is kept
    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < 1_000 and not any(each is kept for each in gc.get_objects())
    later = weakref.ref(_Circle())
    gc.collect()
    assert later() is None


def test_freeze_when_called_again_then_what_became_garbage_since_goes() -> None:
    kept = _Circle()
    seen = weakref.ref(kept)
    freeze_heap()
    del kept
    gc.collect()
    assert seen() is not None  # frozen
    freeze_heap()
    assert seen() is None


def test_thaw_when_called_then_searches_see_everything() -> None:
    kept = _Circle()
    seen = weakref.ref(kept)
    freeze_heap()
    unfreeze_heap()
    del kept
    gc.collect()
    assert gc.get_freeze_count() == 0 and seen() is None
