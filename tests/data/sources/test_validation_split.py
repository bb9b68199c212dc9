"""Where a text is cut for validation."""

from __future__ import annotations

import pytest

from llm.data.sources.documents import TextChunk
from llm.data.sources.validation_split import find_head_split_point, find_split_point, split_at


def _parts(*documents: str, size: int = 7) -> list[TextChunk]:
    """The documents in parts of `size` characters."""
    parts = []
    for text in documents:
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        parts += [TextChunk(piece, ends=False) for piece in pieces] + [TextChunk("", ends=True)]
    return parts


def _sides(*documents: str, percentage: float) -> tuple[str, str]:
    parts = _parts(*documents)
    cut = find_split_point(parts, percentage)
    assert cut is not None
    divided = list(split_at(parts, cut))
    return tuple(
        "".join(part.text + "|" * part.ends for split, part in divided if split == side)
        for side in ("train", "validation")
    )


@pytest.mark.parametrize("percentage", [0.5, 5, 10, 33.3, 99])
def test_cut_when_one_ascii_document_then_at_that_byte(percentage: float) -> None:
    text = "abcdefghij" * 31
    place = int(len(text) * (1 - percentage / 100))
    assert _sides(text, percentage=percentage) == (text[:place], text[place:] + "|")


def test_cut_when_inside_a_character_then_in_front_of_it() -> None:
    train, validation = _sides("ab€€", percentage=50)  # 8 bytes: the fifth is inside the first €
    assert (train, validation) == ("ab", "€€|")


def test_cut_when_many_documents_then_whole_ones_nearest_to_the_share() -> None:
    documents = ["x" * 10] * 100
    train, validation = _sides(*documents, percentage=7)
    assert (train.count("|"), validation.count("|")) == (93, 7)
    train, validation = _sides("a" * 50, "b" * 40, "c" * 10, percentage=29)
    assert validation == "c" * 10 + "|"
    train, validation = _sides("a" * 50, "b" * 40, "c" * 10, percentage=31)
    assert validation == "b" * 40 + "|" + "c" * 10 + "|"


def test_cut_when_share_counts_bytes_then_not_characters() -> None:
    _, validation = _sides("a" * 60, "b" * 25, "€" * 10, percentage=25)
    assert validation == "€" * 10 + "|"


def test_cut_when_share_is_less_or_more_than_documents_allow_then_one_on_each_side() -> None:
    assert _sides("a", "b" * 99, percentage=1) == ("a|", "b" * 99 + "|")
    assert _sides("a" * 99, "b", percentage=99) == ("a" * 99 + "|", "b|")


def test_cut_when_no_document_then_none() -> None:
    assert find_split_point([], 5) is None


@pytest.mark.parametrize(
    ("documents", "percentage", "num_bytes", "place"),
    [
        (["0123456789"] * 10, 20, 1000, (2, 0)),  # of 100 bytes
        (["0123456789"] * 10, 20, 50, (1, 0)),  # of the first 50
        (["0123456789"] * 10, 26, 1000, (3, 0)),  # the nearest end
        (["0123456789"] * 10, 5, 1000, (1, 0)),  # ends at twice the share
        (["0123456789"] * 10, 4, 1000, (0, 4)),  # ends beyond it
        (["0123456789"] * 2, 95, 1000, (1, 0)),  # never all of the text
        (["0123456789"], 60, 1000, (0, 6)),
        (["0123456789"], 10, 1000, (0, 4)),  # never less than a character
        (["0123456789" * 9, "0123456789"], 30, 1000, (0, 30)),
        (["0" * 10, "1" * 90], 40, 1000, (1, 0)),
        (["0" * 10, "1" * 990], 40, 1000, (1, 0)),
        (["0" * 10, "1" * 90], 30, 14, (0, 4)),
    ],
)
def test_head_when_found_then_is_about_the_share_and_ends_with_a_document_if_one_does(
    documents: list[str], percentage: float, num_bytes: int, place: tuple[int, int]
) -> None:
    cut = find_head_split_point(_parts(*documents), percentage, num_bytes)
    assert cut is not None
    assert (cut.document, cut.byte) == place


def test_head_when_it_is_found_then_nothing_behind_it_is_read() -> None:
    def parts():
        yield from _parts(*["0123456789"] * 10)
        pytest.fail("read on")

    assert find_head_split_point(parts(), 20, 95) is not None
    assert find_head_split_point([], 20, 95) is None
