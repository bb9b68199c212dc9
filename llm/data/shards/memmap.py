"""Many files of token ids as one stream: mapped when first read, sliced across their borders."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# A read maps 64 KiB with many kernels, with others a whole folio of the page cache, up to 2 MiB: so many reads
# map 64 MiB at most.
_READS_BEFORE_RELEASE = 32


class MappedTokens:
    """The ids of one file.

    Attributes:
        ids: integers [number of tokens], in the file's own type; a view, not a copy.
    """

    def __init__(self, ids: NDArray[Any], memory: mmap.mmap | None = None) -> None:
        self.ids = ids
        self._memory = memory

    def part(self, start: int, stop: int) -> MappedTokens:
        """A stretch of it; still a view."""
        return MappedTokens(self.ids[start:stop], self._memory)

    def release(self) -> None:
        """Takes the pages out of this process; they stay in the system's cache, and views stay valid."""
        if self._memory is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)


class TokenSegment(Protocol):
    """Something that holds a number of tokens, known before it is opened."""

    @property
    def num_tokens(self) -> int:
        """Tokens in it."""

    def map(self) -> MappedTokens:
        """Opens it."""


@dataclass(frozen=True)
class TokenFile:
    """Plain ids in a file, behind a header of so many bytes.

    Attributes:
        path: the file.
        dtype: numpy's name of the type, with the byte order, such as `<u2`.
        num_tokens: ids in it.
        header_bytes: bytes in front of the first id.
    """

    path: Path
    dtype: str
    num_tokens: int
    header_bytes: int = 0

    def map(self) -> MappedTokens:
        """Maps the file; an empty one cannot be mapped and needs not."""
        if not self.num_tokens:
            return MappedTokens(np.zeros(0, self.dtype))
        with self.path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ids = np.frombuffer(memory, self.dtype, count=self.num_tokens, offset=self.header_bytes)
        return MappedTokens(ids, memory)


@dataclass(frozen=True)
class SlicedSegment:
    """Some of the tokens of a stretch.

    Attributes:
        stretch: the whole.
        first: its first token that belongs to the part.
        num_tokens: tokens of the part.
    """

    stretch: TokenSegment
    first: int
    num_tokens: int

    def map(self) -> MappedTokens:
        """Opens the whole, and shows the part."""
        return self.stretch.map().part(self.first, self.first + self.num_tokens)


class FileSequence:
    """Files that stand one behind the other, each mapped when it is first read.

    Pickled, it carries names and not content.
    """

    def __init__(self, files: Sequence[TokenSegment], lengths: Sequence[int]) -> None:
        """Puts files in a row.

        Args:
            files: what is mapped.
            lengths: how many places of the row each of them takes.
        """
        self._files = tuple(files)
        self.ends = list(accumulate(lengths))
        self._mapped: dict[int, MappedTokens] = {}
        self._num_reads = 0

    def over(self, start: int, stop: int) -> Iterator[tuple[NDArray[Any], int, int, int]]:
        """What lies at the places from `start` to in front of `stop`.

        Yields:
            Of each file that has some of these places: its content, the first and the end of them counted
            from its own beginning, and the place of that beginning.
        """
        self._count_read()
        number = bisect_right(self.ends, start)
        while start < stop:
            end = self.ends[number]
            begin = self.ends[number - 1] if number else 0
            if start < end:
                yield self._open(number).ids, start - begin, min(stop, end) - begin, begin
                start = end
            number += 1

    def _open(self, number: int) -> MappedTokens:
        mapped = self._mapped.get(number)
        if mapped is None:
            mapped = self._mapped[number] = self._files[number].map()
        return mapped

    def _count_read(self) -> None:
        """Keeps what is resident small, however much of the files has been read."""
        self._num_reads += 1
        if self._num_reads % _READS_BEFORE_RELEASE == 0:
            for mapped in [*self._mapped.values()]:  # another thread may map one more meanwhile
                mapped.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}


class Tokens:
    """A stream of ids that lies in stretches, one behind the other.

    Only slices without a step are read. A slice inside one stretch is a view; one over a border is a
    copy of the slice. Pickled, it carries names and not content.
    """

    def __init__(self, stretches: Sequence[TokenSegment], start: int = 0, stop: int | None = None) -> None:
        """Joins stretches.

        Args:
            stretches: the parts in order.
            start: the first token of theirs that belongs to the stream.
            stop: the first one behind the stream; None for their end.
        """
        self._stretches = tuple(stretches)
        self._row = FileSequence(self._stretches, [stretch.num_tokens for stretch in self._stretches])
        total = self._row.ends[-1] if self._stretches else 0
        self._start, self._stop, _ = slice(start, stop).indices(total)
        # Asked for with every slice.
        self._length = max(self._stop - self._start, 0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, wanted: slice) -> NDArray[Any]:
        """The ids of a slice, in the files' type."""
        start, stop, step = wanted.indices(self._length)
        if step != 1:
            raise ValueError("a stream of tokens is read without a step")
        found = self._row.over(self._start + start, self._start + stop)
        pieces = [ids[first:end] for ids, first, end, _ in found]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)

    def part(self, start: int, stop: int | None = None) -> Tokens:
        """The stream of a slice; nothing is read."""
        first, last, _ = slice(start, stop).indices(len(self))
        return Tokens(self._stretches, self._start + first, self._start + last)

    @classmethod
    def joined(cls, streams: Sequence[Tokens]) -> Tokens:
        """Streams one behind the other; nothing is read."""
        return cls([part for stream in streams for part in stream._parts()])

    def _parts(self) -> Iterator[TokenSegment]:
        for stretch, end in zip(self._stretches, self._row.ends, strict=True):
            begin = end - stretch.num_tokens
            first, last = max(begin, self._start), min(end, self._stop)
            if first < last:
                yield SlicedSegment(stretch, first - begin, last - first)
