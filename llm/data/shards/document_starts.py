"""Document starts in a sequence of tokens: with them attention and loss stay inside a document."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llm.data.shards.memmap import FileSequence, TokenFile, Tokens


class Starts(Protocol):
    """The document starts of a sequence of tokens. A pickled object carries names, not content."""

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the indices in [start, stop) of tokens that begin a document: int64 [number of them], ascending."""


class MarkedSegment(Protocol):
    """A segment of tokens whose document starts lie in a file."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the segment."""

    @property
    def starts(self) -> TokenFile:
        """The file of its document starts: ascending integers, counted from the segment's first token."""


class StartsInFiles:
    """Document starts that lie in files beside the ids, found by bisection."""

    def __init__(self, segments: Sequence[MarkedSegment]) -> None:
        """Take the starts of segments that follow one another; nothing is read yet."""
        self._files = FileSequence(
            [segment.starts for segment in segments], [segment.num_tokens for segment in segments]
        )

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the document starts in [start, stop), int64 [number of them], ascending."""
        pieces = []
        for starts, first, end, offset in self._files.slices(start, stop):
            # The bounds have the type of the file: with another type NumPy would copy the whole file.
            low, high = np.searchsorted(starts, np.array([first, end], starts.dtype))
            pieces.append(starts[low:high].astype(np.int64) + offset)
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


class StartsAfterEos:
    """Document starts of tokens without a file of starts: a document begins after each end-of-text token.

    The shards of this package and those of nanoGPT have the end-of-text token at the end of a document. llm.c,
    modded-nanogpt and build-nanogpt put it at the beginning. Here it counts as the end of the document before it, so
    that the token itself is still predicted, and a model sees the same documents as with the shards of this package.
    """

    def __init__(self, tokens: NDArray[Any] | Tokens, token: int) -> None:
        """Take the tokens; nothing is read yet.

        Args:
            tokens: integers [number of tokens].
            token: id of the end-of-text token.
        """
        self._tokens = tokens
        self._token = token

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the document starts in [start, stop), int64 [number of them], ascending."""
        first = max(start - 1, 0)
        starts = np.flatnonzero(self._tokens[first : max(stop - 1, first)] == self._token) + first + 1
        if start == 0 < stop:
            return np.concatenate([np.zeros(1, np.int64), starts])
        return starts


@dataclass(frozen=True)
class SlicedStarts:
    """The document starts of a range of tokens.

    Attributes:
        starts: the document starts of all tokens.
        first: index of the first token of the range.
        num_tokens: number of tokens of the range.
    """

    starts: Starts
    first: int
    num_tokens: int


class ConcatenatedStarts:
    """Document starts of ranges of tokens that are concatenated.

    The first token of each range begins a document, whatever it is: the tokens before it are not there.
    """

    def __init__(self, ranges: Sequence[SlicedStarts]) -> None:
        """Concatenate ranges in their order."""
        self._ranges = tuple(ranges)
        self._ends = list(accumulate(part.num_tokens for part in self._ranges))

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the document starts in [start, stop), int64 [number of them], ascending."""
        pieces = [np.zeros(0, np.int64)]
        for number in range(bisect_right(self._ends, start), len(self._ranges)):
            part = self._ranges[number]
            begin = self._ends[number] - part.num_tokens
            if stop <= begin:
                break
            low = max(start - begin, 0)
            high = min(stop - begin, part.num_tokens)
            if low == 0 < high:
                pieces.append(np.array([begin]))
                low = 1
            pieces.append(part.starts.between(part.first + low, part.first + high) - part.first + begin)
        return np.concatenate(pieces)
