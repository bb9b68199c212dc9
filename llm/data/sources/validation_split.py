"""How a text without validation data is split: the end is held out, or the head of a text that is streamed."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from llm.data.sources.documents import Split, TextChunk, utf8_length

# UTF-8 bytes. A split point this far inside a document has at least one character before it.
_LONGEST_CHARACTER = 4


class SplitPoint(NamedTuple):
    """The position where one split ends and the other begins: before a document, or inside a document.

    Attributes:
        document: index (from 0) of the document that begins at the split point or contains it.
        byte: position of the split point in the UTF-8 bytes of that document; 0 before the document.
        num_documents: documents of the whole text.
        share: percentage of the text's bytes that is held out (inside a document: the requested percentage).
        num_bytes: UTF-8 bytes of the whole text.
    """

    document: int
    byte: int
    num_documents: int
    share: float
    num_bytes: int


def find_split_point(chunks: Iterable[TextChunk], percentage: float) -> SplitPoint | None:
    """Return the split point that holds out the end of a text; None if the text has no document.

    If there are several documents, the last ones are held out whole: as many as come nearest to the percentage, at
    least one, and never all. A single document is split at that share of its bytes.

    Args:
        chunks: the whole text.
        percentage: share of the UTF-8 bytes to hold out, above 0.
    """
    sizes = array("q")
    size = 0
    for chunk in chunks:
        size += utf8_length(chunk.text)
        if chunk.ends:
            sizes.append(size)
            size = 0
    if not sizes:
        return None
    if len(sizes) == 1:
        return SplitPoint(
            document=0,
            byte=int(sizes[0] * (1 - percentage / 100)),
            num_documents=1,
            share=percentage,
            num_bytes=sizes[0],
        )
    tails = np.cumsum(np.array(sizes[:0:-1], dtype=np.int64))
    total = int(tails[-1]) + sizes[0]
    num_held_out = int(np.argmin(np.abs(tails - total * percentage / 100))) + 1
    return SplitPoint(
        document=len(sizes) - num_held_out,
        byte=0,
        num_documents=len(sizes),
        share=100 * int(tails[num_held_out - 1]) / max(total, 1),
        num_bytes=total,
    )


def find_head_split_point(chunks: Iterable[TextChunk], percentage: float, num_bytes: int) -> SplitPoint | None:
    """Return the split point after the head of a text that is too long to be read twice; None without text.

    The head is the given percentage of the first `num_bytes`, or of the whole text if that is shorter. The head
    ends with the document whose end is nearest to this size. It ends inside a document if no document ends within
    twice this size, or if only the text's last document does. Nothing after the first `num_bytes` is read.

    Args:
        chunks: the text.
        percentage: share of these bytes before the split point, above 0.
        num_bytes: number of UTF-8 bytes of the text to read.
    """
    ends: list[int] = []
    size = 0
    for chunk in chunks:
        size += utf8_length(chunk.text)
        if chunk.ends:
            ends.append(size)
        if size >= num_bytes:
            break
    if not size:
        return None
    target = max(min(size, num_bytes) * percentage / 100, _LONGEST_CHARACTER)
    inner_ends = [end for end in ends if end < size]
    nearest = min(inner_ends, key=lambda end: abs(end - target), default=None)
    if nearest is not None and nearest <= 2 * target:
        return SplitPoint(
            document=ends.index(nearest) + 1,
            byte=0,
            num_documents=len(ends),
            share=100 * nearest / size,
            num_bytes=size,
        )
    document = bisect_right(ends, target)
    start = ends[document - 1] if document else 0
    return SplitPoint(
        document=document,
        byte=int(target) - start,
        num_documents=len(ends),
        share=percentage,
        num_bytes=size,
    )


def split_at(chunks: Iterable[TextChunk], split_point: SplitPoint) -> Iterator[tuple[Split, TextChunk]]:
    """Yield each chunk with its split: `train` before the split point, `validation` after it.

    The chunk that contains the split point is divided. A split point inside a character moves before the character.
    """
    document = 0
    byte = 0
    for chunk in chunks:
        if document < split_point.document:
            yield "train", chunk
        elif document > split_point.document:
            yield "validation", chunk
        else:
            size = utf8_length(chunk.text)
            head, tail = _split_text(chunk.text, min(max(split_point.byte - byte, 0), size))
            byte += size
            if head:
                yield "train", TextChunk(head, ends=False)
            if tail or chunk.ends:
                yield "validation", TextChunk(tail, chunk.ends)
        if chunk.ends:
            document += 1


def split_by_hash(chunks: Iterable[TextChunk], percentage: float) -> Iterator[tuple[Split, TextChunk]]:
    """Yield each chunk with the split of its document, which a hash of the document's first chunk decides.

    This is for a text that is too long, or too remote, to be read twice to find a split point. A document stays in
    its split whatever comes before it, and copies of a document are in the same split.

    Args:
        chunks: the whole text.
        percentage: share of the documents to hold out.
    """
    split: Split | None = None
    for chunk in chunks:
        if split is None:
            digest = blake2b(chunk.text.encode(), digest_size=8).digest()
            split = "validation" if int.from_bytes(digest, "big") < percentage / 100 * 2**64 else "train"
        yield split, chunk
        if chunk.ends:
            split = None


def _split_text(text: str, byte: int) -> tuple[str, str]:
    """Split a text at a position in its UTF-8 bytes, or before the character that the position is inside of."""
    data = text.encode()
    while 0 < byte < len(data) and data[byte] & 0xC0 == 0x80:
        byte -= 1
    return data[:byte].decode(), data[byte:].decode()
