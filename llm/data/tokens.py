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

# A slice maps up to two stretches of 64 KiB, the kernel's fault-around: so many slices map 32 MiB at most.
_SLICES_BEFORE_RELEASE = 256


class Mapped:
    """The ids of one file.

    Attributes:
        ids: integers [number of tokens], in the file's own type; a view, not a copy.
    """

    def __init__(self, ids: NDArray[Any], memory: mmap.mmap | None = None) -> None:
        self.ids = ids
        self._memory = memory

    def release(self) -> None:
        """Takes the pages out of this process; they stay in the system's cache, and views stay valid."""
        if self._memory is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)


class Stretch(Protocol):
    """Something that holds a number of tokens, known before it is opened."""

    @property
    def num_tokens(self) -> int:
        """Tokens in it."""

    def map(self) -> Mapped:
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

    def map(self) -> Mapped:
        """Maps the file; an empty one cannot be mapped and needs not."""
        if not self.num_tokens:
            return Mapped(np.zeros(0, self.dtype))
        with self.path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ids = np.frombuffer(memory, self.dtype, count=self.num_tokens, offset=self.header_bytes)
        return Mapped(ids, memory)


class Tokens:
    """A stream of ids that lies in stretches, one behind the other.

    Only slices without a step are read. A slice inside one stretch is a view; one over a border is a
    copy of the slice. Pickled, it carries names and not content.
    """

    def __init__(self, stretches: Sequence[Stretch], start: int = 0, stop: int | None = None) -> None:
        """Joins stretches.

        Args:
            stretches: the parts in order.
            start: the first token of theirs that belongs to the stream.
            stop: the first one behind the stream; None for their end.
        """
        self._stretches = tuple(stretches)
        self._ends = list(accumulate(stretch.num_tokens for stretch in self._stretches))
        total = self._ends[-1] if self._ends else 0
        self._start, self._stop, _ = slice(start, stop).indices(total)
        self._mapped: dict[int, Mapped] = {}
        self._num_slices = 0

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

    def __getitem__(self, wanted: slice) -> NDArray[Any]:
        """The ids of a slice, in the files' type."""
        start, stop, step = wanted.indices(len(self))
        if step != 1:
            raise ValueError("a stream of tokens is read without a step")
        self._count_slice()
        pieces = list(self._pieces(self._start + start, self._start + stop))
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)

    def part(self, start: int, stop: int | None = None) -> Tokens:
        """The stream of a slice; nothing is read."""
        first, last, _ = slice(start, stop).indices(len(self))
        return Tokens(self._stretches, self._start + first, self._start + last)

    def _pieces(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        number = bisect_right(self._ends, start)
        while start < stop:
            end = self._ends[number]
            first = end - self._stretches[number].num_tokens
            if start < end:
                yield self._open(number).ids[start - first : min(stop, end) - first]
                start = end
            number += 1

    def _open(self, number: int) -> Mapped:
        mapped = self._mapped.get(number)
        if mapped is None:
            mapped = self._mapped[number] = self._stretches[number].map()
        return mapped

    def _count_slice(self) -> None:
        """Keeps what is resident small, however much of the files has been read."""
        self._num_slices += 1
        if self._num_slices % _SLICES_BEFORE_RELEASE == 0:
            for mapped in self._mapped.values():
                mapped.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}
