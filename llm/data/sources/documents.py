"""Documents on their way to the tokenizer: a stream of parts, so that any length fits in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, TypeAlias

Split: TypeAlias = Literal["train", "validation"]


class TextChunk(NamedTuple):
    """A stretch of one document.

    A document is every part up to, and with, the first whose `ends` is true. That last part may be
    empty, since the end of a running text is known only when something else follows.
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
"""Rows that did not become text: reason -> number of rows."""

TextSource: TypeAlias = Callable[[Skipped], Iterator[TextChunk]]
"""Reads a text from its beginning, each time it is called, and counts what it skips."""


def utf8_length(text: str) -> int:
    """Bytes of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def is_encodable(text: str) -> bool:
    """Whether the text is valid Unicode: a lone surrogate (half of a character) has no UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def rows_to_documents(rows: Iterable[object], skipped: Skipped) -> Iterator[TextChunk]:
    """Joins rows into documents.

    A row is a document, except that a row ending in a newline is a line of a running text (as in
    WikiText): such rows, and the empty ones between them, form one document.
    """
    running = False
    for row in rows:
        reason = _why_not(row)
        if reason is not None:
            skipped[reason] += 1
            continue
        assert isinstance(row, str)
        if row.endswith("\n"):
            running = True
            yield TextChunk(row, ends=False)
            continue
        if running:
            running = False
            yield TextChunk("", ends=True)
        yield TextChunk(row, ends=True)
    if running:
        yield TextChunk("", ends=True)


def _why_not(row: object) -> str | None:
    """The reason for skipping a row, or None if it is text."""
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
    """The counts in words, such as `12 rows (empty: 10, null: 2)`."""
    reasons = ", ".join(f"{reason}: {number}" for reason, number in sorted(skipped.items()))
    return f"{skipped.total()} rows ({reasons})" if reasons else "0 rows"
