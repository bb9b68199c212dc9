"""Documents as a stream of text chunks, so that a document of any length fits in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

Split: TypeAlias = Literal["train", "validation"]


class TextChunk(NamedTuple):
    """A contiguous part of one document.

    A document consists of all chunks up to and including the first chunk whose `ends` is true. The text of this
    last chunk may be empty, because the end of a running text is known only when the next document begins.

    Attributes:
        text: the text.
        ends: whether the document ends with this chunk.
    """

    text: str
    ends: bool


class Piece(NamedTuple):
    """A document, or a part of a long document, that the tokenizer encodes by one call.

    Attributes:
        split: the split that the text belongs to.
        text: the text.
        begins: whether the document begins with this piece.
        ends: whether the document ends with this piece.
    """

    split: Split
    text: str
    begins: bool
    ends: bool


Skipped: TypeAlias = Counter[str]
"""Number of rows that hold no text, by reason."""

TextSource: TypeAlias = Callable[[Skipped], Iterator[TextChunk]]
"""Reads a text from its beginning each time it is called, and counts the rows that it skips."""


@dataclass(frozen=True)
class RowSource:
    """A `TextSource` over rows.

    Attributes:
        read_rows: yields the values of the text column from the first row on, each time it is called.
    """

    read_rows: Callable[[], Iterable[object]]

    def __call__(self, skipped: Skipped) -> Iterator[TextChunk]:
        """Yield the documents that the rows form; see `rows_to_documents`."""
        return rows_to_documents(self.read_rows(), skipped)


def utf8_length(text: str) -> int:
    """Return the number of bytes of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def is_encodable(text: str) -> bool:
    """Return whether the text is valid Unicode: a lone surrogate (half of a character) has no UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def rows_to_documents(rows: Iterable[object], skipped: Skipped) -> Iterator[TextChunk]:
    """Join rows into documents.

    A row is one document. Exception: a row that ends in a newline is a line of a running text (as in WikiText);
    such rows, and the empty rows between them, form one document.

    Args:
        rows: the values of the text column.
        skipped: counts the rows that hold no text.
    """
    is_running = False
    for row in rows:
        reason = skip_reason(row)
        if reason is not None:
            skipped[reason] += 1
            continue
        assert isinstance(row, str)
        if row.endswith("\n"):
            is_running = True
            yield TextChunk(row, ends=False)
            continue
        if is_running:
            is_running = False
            yield TextChunk("", ends=True)
        yield TextChunk(row, ends=True)
    if is_running:
        yield TextChunk("", ends=True)


def skip_reason(row: object) -> str | None:
    """Return the reason for skipping a row, such as `empty`, or None if the row is text."""
    if row is None:
        return "null"
    if isinstance(row, bytes):
        return "bytes, not valid UTF-8 text"
    if not isinstance(row, str):
        return "not text"
    if not row:
        return "empty"
    return None if is_encodable(row) else "lone surrogate"


def format_skipped(skipped: Skipped) -> str:
    """Format the counts, such as `12 rows (empty: 10, null: 2)`."""
    reasons = ", ".join(f"{reason}: {number}" for reason, number in sorted(skipped.items()))
    return f"{skipped.total()} rows ({reasons})" if reasons else "0 rows"
