"""JSON arrays, read one item at a time."""

from __future__ import annotations

import json
import random

import pytest

from llm.config.errors import UserError
from llm.data.sources.json_array import iter_items

VALUES = [1, -2.5e3, 'a\\"b\u20ac', None, True, [], [1, [2]], {}, {"a": {"b": "]"}}, 12345]


@pytest.mark.parametrize("size", [1, 2, 5, 17, 1000])
@pytest.mark.parametrize("indent", [None, 3])
def test_iter_items_when_text_is_divided_anywhere_then_the_same_values(size: int, indent: int | None) -> None:
    text = json.dumps(VALUES, indent=indent)
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    assert list(iter_items(chunks, "x")) == VALUES


def test_iter_items_when_array_is_long_then_chunks_are_read_as_needed() -> None:
    drawn = 0

    def chunks():
        nonlocal drawn
        yield "["
        while True:
            drawn += 1
            yield '{"text": "' + "a" * random.Random(drawn).randint(0, 300) + '"},'

    first = [value for value, _ in zip(iter_items(chunks(), "x"), range(50), strict=False)]
    assert len(first) == 50
    assert drawn < 60


def test_iter_items_when_an_early_item_is_broken_then_the_rest_is_not_read() -> None:
    def chunks():
        yield '[{"a": nonsense, "b": "longer than an incomplete token"},'
        pytest.fail("read more text after an error that no more text can fix")

    with pytest.raises(UserError, match="x: broken JSON at line 1"):
        list(iter_items(chunks(), "x"))
