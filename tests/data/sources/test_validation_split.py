"""Split points, and the splits on their sides."""

from __future__ import annotations

import pytest

from llm.data.sources.documents import TextChunk
from llm.data.sources.validation_split import find_head_split_point, find_split_point, split_at, split_by_hash


def _chunks(*documents: str, size: int = 7) -> list[TextChunk]:
    """Divide the documents into chunks of `size` characters."""
    chunks = []
    for text in documents:
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        chunks += [TextChunk(piece, ends=False) for piece in pieces] + [TextChunk("", ends=True)]
    return chunks


def _split(*documents: str, percentage: float) -> tuple[str, str]:
    chunks = _chunks(*documents)
    split_point = find_split_point(chunks, percentage)
    assert split_point is not None
    split_chunks = list(split_at(chunks, split_point))
    return tuple(
        "".join(chunk.text + ("|" if chunk.ends else "") for split, chunk in split_chunks if split == name)
        for name in ("train", "validation")
    )


@pytest.mark.parametrize("percentage", [0.5, 5, 10, 33.3, 99])
def test_find_split_point_when_one_ascii_document_then_at_the_percentage(percentage: float) -> None:
    text = "abcdefghij" * 31
    position = int(len(text) * (1 - percentage / 100))
    assert _split(text, percentage=percentage) == (text[:position], text[position:] + "|")


def test_split_at_when_split_point_is_inside_a_character_then_before_it() -> None:
    train, validation = _split("ab€€", percentage=50)  # 8 bytes: the fifth is inside the first €
    assert (train, validation) == ("ab", "€€|")


def test_find_split_point_when_many_documents_then_whole_ones_nearest_to_the_percentage() -> None:
    documents = ["x" * 10] * 100
    train, validation = _split(*documents, percentage=7)
    assert (train.count("|"), validation.count("|")) == (93, 7)
    train, validation = _split("a" * 50, "b" * 40, "c" * 10, percentage=29)
    assert validation == "c" * 10 + "|"
    train, validation = _split("a" * 50, "b" * 40, "c" * 10, percentage=31)
    assert validation == "b" * 40 + "|" + "c" * 10 + "|"


def test_find_split_point_when_characters_have_several_bytes_then_bytes_count() -> None:
    _, validation = _split("a" * 60, "b" * 25, "€" * 10, percentage=25)
    assert validation == "€" * 10 + "|"


def test_find_split_point_when_percentage_cannot_be_met_then_one_document_in_each_split() -> None:
    assert _split("a", "b" * 99, percentage=1) == ("a|", "b" * 99 + "|")
    assert _split("a" * 99, "b", percentage=99) == ("a" * 99 + "|", "b|")


def test_find_split_point_when_no_document_then_none() -> None:
    assert find_split_point([], 5) is None


@pytest.mark.parametrize(
    ("documents", "percentage", "num_bytes", "expected"),
    [
        (["0123456789"] * 10, 20, 1000, (2, 0)),  # of 100 bytes
        (["0123456789"] * 10, 20, 50, (1, 0)),  # of the first 50
        (["0123456789"] * 10, 26, 1000, (3, 0)),  # the nearest end
        (["0123456789"] * 10, 5, 1000, (1, 0)),  # ends at twice the size
        (["0123456789"] * 10, 4, 1000, (0, 4)),  # ends after twice the size
        (["0123456789"] * 2, 95, 1000, (1, 0)),  # never all of the text
        (["0123456789"], 60, 1000, (0, 6)),
        (["0123456789"], 10, 1000, (0, 4)),  # never less than a character
        (["0123456789" * 9, "0123456789"], 30, 1000, (0, 30)),
        (["0" * 10, "1" * 90], 40, 1000, (1, 0)),
        (["0" * 10, "1" * 990], 40, 1000, (1, 0)),
        (["0" * 10, "1" * 90], 30, 14, (0, 4)),
    ],
)
def test_find_head_split_point_when_text_has_documents_then_nearest_end_or_inside_a_document(
    documents: list[str], percentage: float, num_bytes: int, expected: tuple[int, int]
) -> None:
    split_point = find_head_split_point(_chunks(*documents), percentage, num_bytes)
    assert split_point is not None
    assert (split_point.document, split_point.byte) == expected


def test_find_head_split_point_when_head_is_read_then_no_more_is_read() -> None:
    def chunks():
        yield from _chunks(*["0123456789"] * 10)
        pytest.fail("read too much")

    assert find_head_split_point(chunks(), 20, 95) is not None
    assert find_head_split_point([], 20, 95) is None


def test_split_by_hash_when_read_in_another_order_then_the_same_documents() -> None:
    documents = [[TextChunk(f"text {i}", False), TextChunk("tail", True)] for i in range(2000)]

    def held_out(order: list[list[TextChunk]]) -> set[str]:
        parts = split_by_hash((part for document in order for part in document), 10)
        found = list(parts)
        assert [part for _, part in found] == [part for document in order for part in document]
        assert all(found[i][0] == found[i + 1][0] for i in range(0, len(found), 2))
        return {part.text for split, part in found if split == "validation" and not part.ends}

    one = held_out(documents)
    assert 140 < len(one) < 260
    assert held_out(documents[::-1]) == one
