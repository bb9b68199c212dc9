"""Where a text without validation data is cut: its end is held out."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from llm.data.parts import Part, utf8_length

Split: TypeAlias = Literal["train", "validation"]


class Cut(NamedTuple):
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


def find_cut(parts: Iterable[Part], percentage: float) -> Cut | None:
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
        return Cut(0, int(sizes[0] * (1 - percentage / 100)), 1, percentage, sizes[0])
    tails = np.cumsum(np.array(sizes[:0:-1], dtype=np.int64))
    total = int(tails[-1]) + sizes[0]
    num_held_out = int(np.argmin(np.abs(tails - total * percentage / 100))) + 1
    share = 100 * int(tails[num_held_out - 1]) / max(total, 1)
    return Cut(len(sizes) - num_held_out, 0, len(sizes), share, total)


def divide(parts: Iterable[Part], cut: Cut) -> Iterator[tuple[Split, Part]]:
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
                yield "train", Part(head, ends=False)
            if tail or part.ends:
                yield "validation", Part(tail, part.ends)
        document += part.ends


def divide_by_hash(parts: Iterable[Part], percentage: float) -> Iterator[tuple[Split, Part]]:
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
