"""Many files of token ids as one sequence: memory-mapped when first read, sliced across file borders."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

# Many kernels map 64 KiB a read; others map a whole folio of the page cache, up to 2 MiB. 32 reads therefore map
# 64 MiB at most.
_READS_BEFORE_RELEASE = 32


class MappedTokens:
    """The ids of one file in memory.

    Attributes:
        ids: integers [number of tokens], in the file's type; a view, not a copy.
    """

    def __init__(self, ids: NDArray[Any], memory: mmap.mmap | None = None) -> None:
        """Hold a view.

        Args:
            ids: integers [number of tokens].
            memory: the mapped file that `ids` is a view of; None if something else owns the memory.
        """
        self.ids = ids
        self._memory = memory

    def sliced(self, start: int, stop: int) -> MappedTokens:
        """Return the ids [start, stop), still as a view."""
        return MappedTokens(self.ids[start:stop], self._memory)

    def release(self) -> None:
        """Unmap the pages from this process; they stay in the system's page cache, and views stay valid."""
        if self._memory is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)


class TokenSegment(Protocol):
    """A source of ids whose length is known before it is opened."""

    @property
    def num_tokens(self) -> int:
        """Number of ids in the segment."""

    def map(self) -> MappedTokens:
        """Open it and return its ids."""


@dataclass(frozen=True)
class TokenFile:
    """Plain ids in a file, after a header.

    Attributes:
        path: the file.
        dtype: NumPy's name of the type with its byte order, such as `<u2`.
        num_tokens: number of ids in the file.
        header_bytes: bytes before the first id.
    """

    path: Path
    dtype: str
    num_tokens: int
    header_bytes: int = 0

    def map(self) -> MappedTokens:
        """Map the file; an empty file, which cannot be mapped, gives an empty array."""
        if not self.num_tokens:
            return MappedTokens(np.zeros(0, self.dtype))
        with self.path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ids = np.frombuffer(memory, self.dtype, count=self.num_tokens, offset=self.header_bytes)
        return MappedTokens(ids, memory)


@dataclass(frozen=True)
class SlicedSegment:
    """A range of the ids of a segment.

    Attributes:
        segment: the segment that the range is part of.
        first: index of the first id of the range in the segment.
        num_tokens: number of ids of the range.
    """

    segment: TokenSegment
    first: int
    num_tokens: int

    def map(self) -> MappedTokens:
        """Open the segment and return the range."""
        return self.segment.map().sliced(self.first, self.first + self.num_tokens)


class FileSlice(NamedTuple):
    """The part of a range of a `FileSequence` that lies in one file.

    Attributes:
        content: the whole content of the file, an array [number of its entries].
        start: index in `content` where the range starts.
        stop: index in `content` where the range ends, exclusive.
        offset: position in the sequence of the first entry of the file.
    """

    content: NDArray[Any]
    start: int
    stop: int
    offset: int


class FileSequence:
    """Files one after the other, each mapped when it is first read.

    A pickled sequence carries names, not content.

    Attributes:
        ends: position in the sequence at which each file ends, exclusive.
    """

    def __init__(self, files: Sequence[TokenSegment], lengths: Sequence[int]) -> None:
        """Put files in a sequence; nothing is read yet.

        Args:
            files: the segments that are mapped.
            lengths: number of positions that each of them covers.
        """
        self._files = tuple(files)
        self.ends = list(accumulate(lengths))
        self._mapped: dict[int, MappedTokens] = {}
        self._num_reads = 0

    def slices(self, start: int, stop: int) -> Iterator[FileSlice]:
        """Yield, for each file that covers some of the positions [start, stop), its part of them."""
        self._count_read()
        number = bisect_right(self.ends, start)
        while start < stop:
            end = self.ends[number]
            begin = self.ends[number - 1] if number else 0
            if start < end:
                yield FileSlice(self._open(number).ids, start - begin, min(stop, end) - begin, begin)
                start = end
            number += 1

    def _open(self, number: int) -> MappedTokens:
        mapped = self._mapped.get(number)
        if mapped is None:
            mapped = self._mapped[number] = self._files[number].map()
        return mapped

    def _count_read(self) -> None:
        """Release the pages from time to time, so that resident memory stays small however much has been read."""
        self._num_reads += 1
        if self._num_reads % _READS_BEFORE_RELEASE == 0:
            for mapped in [*self._mapped.values()]:  # a copy: another thread may map one more file meanwhile
                mapped.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}


class Tokens:
    """Ids that lie in segments one after the other.

    Only slices without a step can be read. A slice inside one segment is a view; a slice across a border is a copy.
    A pickled object carries names, not content.
    """

    def __init__(self, segments: Sequence[TokenSegment], start: int = 0, stop: int | None = None) -> None:
        """Join segments; nothing is read yet.

        Args:
            segments: the segments in order.
            start: index, among the ids of all segments, of the first id that belongs to the tokens.
            stop: index after the last such id; None: the end of the segments.
        """
        self._segments = tuple(segments)
        self._files = FileSequence(self._segments, [segment.num_tokens for segment in self._segments])
        total = self._files.ends[-1] if self._segments else 0
        self._start, self._stop, _ = slice(start, stop).indices(total)
        # Stored, since every slice needs it.
        self._length = max(self._stop - self._start, 0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice) -> NDArray[Any]:
        """Return the ids of a slice, integers [length of the slice] in the type of the files."""
        start, stop, step = index.indices(self._length)
        if step != 1:
            raise ValueError("tokens are read without a step")
        slices = self._files.slices(self._start + start, self._start + stop)
        pieces = [piece.content[piece.start : piece.stop] for piece in slices]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)

    def sliced(self, start: int, stop: int | None = None) -> Tokens:
        """Return the ids [start, stop) as `Tokens`; nothing is read."""
        first, last, _ = slice(start, stop).indices(len(self))
        return Tokens(self._segments, self._start + first, self._start + last)

    @classmethod
    def concatenated(cls, sequences: Sequence[Tokens]) -> Tokens:
        """Return several sequences of ids as one; nothing is read."""
        return cls([segment for tokens in sequences for segment in tokens._sliced_segments()])

    def _sliced_segments(self) -> Iterator[TokenSegment]:
        for segment, end in zip(self._segments, self._files.ends, strict=True):
            begin = end - segment.num_tokens
            first = max(begin, self._start)
            last = min(end, self._stop)
            if first < last:
                yield SlicedSegment(segment, first - begin, last - first)
