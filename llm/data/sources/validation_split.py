"""Where a text without validation data is cut: its end is held out, or its head where it only streams by."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from llm.data.sources.documents import Split, TextChunk, utf8_length

# Bytes of UTF-8: a cut that far inside a document has some text in front of it.
_LONGEST_CHARACTER = 4


class SplitPoint(NamedTuple):
    """Where validation begins: in front of a document, or inside the only one.

    Attributes:
        document: number of the first document with validation text, from 0.
        byte: position of the cut in that document's UTF-8; 0 in front of it.
        num_documents: documents of the whole text.
        share: percentage of the text's bytes behind the cut (inside a document: as asked).
        num_bytes: UTF-8 bytes of the whole text.
    """

    document: int
    byte: int
    num_documents: int
    share: float
    num_bytes: int


def find_split_point(parts: Iterable[TextChunk], percentage: float) -> SplitPoint | None:
    """The cut that holds out a share of a text, None if the text has no document.

    Of several documents the last ones are held out, whole: as many as come nearest to the share, at
    least one, and never all. A single document is cut at that share of its bytes.

    Args:
        parts: the whole text.
        percentage: share of the UTF-8 bytes to hold out, above 0.
    """
    sizes = array("q")
    size = 0
    for part in parts:
        size += utf8_length(part.text)
        if part.ends:
            sizes.append(size)
            size = 0
    if not sizes:
        return None
    if len(sizes) == 1:
        return SplitPoint(0, int(sizes[0] * (1 - percentage / 100)), 1, percentage, sizes[0])
    tails = np.cumsum(np.array(sizes[:0:-1], dtype=np.int64))
    total = int(tails[-1]) + sizes[0]
    num_held_out = int(np.argmin(np.abs(tails - total * percentage / 100))) + 1
    share = 100 * int(tails[num_held_out - 1]) / max(total, 1)
    return SplitPoint(len(sizes) - num_held_out, 0, len(sizes), share, total)


def find_head_split_point(parts: Iterable[TextChunk], percentage: float, num_bytes: int) -> SplitPoint | None:
    """The cut behind the head of a text that is too long to be read once more; None if it has no text.

    The head is so large a share of the first `num_bytes`, or of the whole text where that is less. It ends
    with the document whose end is nearest to that place; inside a document where none ends before twice the
    share, or only the text's last one. Nothing is read behind the first `num_bytes`.

    Args:
        parts: the text.
        percentage: share of those bytes in front of the cut, above 0.
        num_bytes: how much of the text is looked at.
    """
    ends: list[int] = []
    size = 0
    for part in parts:
        size += utf8_length(part.text)
        if part.ends:
            ends.append(size)
        if size >= num_bytes:
            break
    if not size:
        return None
    wanted = max(min(size, num_bytes) * percentage / 100, _LONGEST_CHARACTER)
    inner = [end for end in ends if end < size]
    nearest = min(inner, key=lambda end: abs(end - wanted), default=None)
    if nearest is not None and nearest <= 2 * wanted:
        return SplitPoint(ends.index(nearest) + 1, 0, len(ends), 100 * nearest / size, size)
    document = bisect_right(ends, wanted)
    before = ends[document - 1] if document else 0
    return SplitPoint(document, int(wanted) - before, len(ends), percentage, size)


def split_at(parts: Iterable[TextChunk], cut: SplitPoint) -> Iterator[tuple[Split, TextChunk]]:
    """Says of every part on which side of the cut it lies, and cuts the one that lies on both.

    A cut inside a character moves in front of it.
    """
    document, byte = 0, 0
    for part in parts:
        if document < cut.document:
            yield "train", part
        elif document > cut.document:
            yield "validation", part
        else:
            size = utf8_length(part.text)
            head, tail = _cut_text(part.text, min(max(cut.byte - byte, 0), size))
            byte += size
            if head:
                yield "train", TextChunk(head, ends=False)
            if tail or part.ends:
                yield "validation", TextChunk(tail, part.ends)
        document += part.ends


def split_by_hash(parts: Iterable[TextChunk], percentage: float) -> Iterator[tuple[Split, TextChunk]]:
    """Says of every document in which split it is, from the hash of its first part alone.

    For a text that is too long, or too far away, to be read once more for the place of a cut. A document
    stays on its side whatever comes before it, and so do its copies.

    Args:
        parts: the whole text.
        percentage: share of the documents to hold out.
    """
    split: Split | None = None
    for part in parts:
        if split is None:
            digest = blake2b(part.text.encode(), digest_size=8).digest()
            split = "validation" if int.from_bytes(digest, "big") < percentage / 100 * 2**64 else "train"
        yield split, part
        if part.ends:
            split = None


def _cut_text(text: str, byte: int) -> tuple[str, str]:
    data = text.encode()
    while 0 < byte < len(data) and data[byte] & 0xC0 == 0x80:
        byte -= 1
    return data[:byte].decode(), data[byte:].decode()
