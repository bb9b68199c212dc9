"""Where documents start in a stream: what keeps attention and loss inside a document."""

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
    """The document starts of a stream. Pickled, it carries names and not content."""

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """The tokens from `start` to in front of `stop` with which a document begins, ascending."""


class MarkedSegment(Protocol):
    """Tokens whose document starts lie in a file."""

    @property
    def num_tokens(self) -> int:
        """Tokens in it."""

    @property
    def starts(self) -> TokenFile:
        """Ascending integers, counted from its first token."""


class StartsInFiles:
    """Starts that lie in files beside the ids, found by bisection."""

    def __init__(self, stretches: Sequence[MarkedSegment]) -> None:
        """Those of stretches that stand one behind the other; nothing is read."""
        self._row = FileSequence(
            [stretch.starts for stretch in stretches], [stretch.num_tokens for stretch in stretches]
        )

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """As `Starts.between`."""
        found = []
        for starts, first, end, begin in self._row.over(start, stop):
            # Of the same type: numpy would copy the whole file into one that holds both.
            low, high = np.searchsorted(starts, np.array([first, end], starts.dtype))
            found.append(starts[low:high].astype(np.int64) + begin)
        return np.concatenate(found) if found else np.zeros(0, np.int64)


class StartsAfterEos:
    """Starts of a stream that holds no others: a document begins behind each end-of-text token.

    So it is in the streams of this package, and in nanoGPT's. llm.c, modded-nanogpt and build-nanogpt put the
    token in front of each document; counted as the end of the one before it, as here, the token itself is
    still predicted, and a model sees documents as it does with ours.
    """

    def __init__(self, tokens: NDArray[Any] | Tokens, token: int) -> None:
        """Looks for `token` in a stream, whenever asked."""
        self._tokens, self._token = tokens, token

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """As `Starts.between`."""
        first = max(start - 1, 0)
        found = np.flatnonzero(self._tokens[first : max(stop - 1, first)] == self._token) + first + 1
        return np.concatenate([np.zeros(int(start == 0 < stop), np.int64), found])


@dataclass(frozen=True)
class SlicedStarts:
    """Of a stretch of a stream.

    Attributes:
        starts: of the whole stream.
        first: its first token that belongs to the part.
        num_tokens: tokens of the part.
    """

    starts: Starts
    first: int
    num_tokens: int


class ConcatenatedStarts:
    """Starts of parts of streams, one behind the other.

    A part begins a document, whatever it begins with: what was in front of it is not there.
    """

    def __init__(self, parts: Sequence[SlicedStarts]) -> None:
        """Joins parts in their order."""
        self._parts = tuple(parts)
        self._ends = list(accumulate(part.num_tokens for part in self._parts))

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """As `Starts.between`."""
        found = [np.zeros(0, np.int64)]
        for number in range(bisect_right(self._ends, start), len(self._parts)):
            part = self._parts[number]
            begin = self._ends[number] - part.num_tokens
            if stop <= begin:
                break
            low, high = max(start - begin, 0), min(stop - begin, part.num_tokens)
            if low == 0 < high:
                found.append(np.array([begin]))
                low = 1
            found.append(part.starts.between(part.first + low, part.first + high) - part.first + begin)
        return np.concatenate(found)
