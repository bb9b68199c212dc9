"""Several texts mixed by weights: which block a sample reads is arithmetic here, too.

Samples are dealt by a tree of forks, each of which sends every stretch of the samples that reach it to its two
sides in their shares, exactly, in whole numbers: nothing drifts, however long the run. The tree is Huffman's,
which has the heavy texts near its root, so that few roundings meet in a light one.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llm.data.batches.shuffle import seed_of_source
from llm.data.shards.document_starts import ConcatenatedStarts, SlicedStarts
from llm.data.shards.format import Source, Stream, Streams
from llm.data.shards.memmap import Tokens


class SourceBlocks(Protocol):
    """The blocks of one text, in an order of their own."""

    @property
    def block_size(self) -> int:
        """Tokens predicted in a block."""

    @property
    def num_blocks(self) -> int:
        """Blocks of one epoch."""

    def num_unread(self, num_samples: int) -> int:
        """Blocks that so many samples never read."""

    def block(self, sample: int, seed: int) -> NDArray[np.int64]:
        """The block of a sample."""


@dataclass(frozen=True)
class _Fork:
    """Deals samples to two sides, `share` of them to the left."""

    share: Fraction
    left: _Fork | int
    right: _Fork | int

    def num_left(self, num_samples: int) -> int:
        """How many of the first samples go to the left: the share of them, rounded, halves up."""
        part, whole = self.share.numerator, self.share.denominator
        return (2 * num_samples * part + whole) // (2 * whole)


class Mixture:
    """Blocks of several texts, a share of each.

    In every stretch from the first sample on, a text has its share to within half a block where there are
    two, and to within less than two blocks however many there are. Inside a text every block is read once
    before any is read again. The dealing is the same for every seed; the order inside the texts is not.

    Attributes:
        block_size: tokens predicted in a block.
        num_blocks: blocks of an epoch: as many as all texts have, whatever their shares.
        shares: of each text, adding up to 1.
    """

    def __init__(self, sources: Sequence[SourceBlocks], weights: Sequence[Fraction | None]) -> None:
        """Mixes texts.

        Args:
            sources: at least one, each with a block at least.
            weights: one a source, above 0; of a source without one, its number of blocks.
        """
        self._sources = tuple(sources)
        self.block_size = sources[0].block_size
        self.num_blocks = sum(source.num_blocks for source in sources)
        wanted = [
            Fraction(source.num_blocks) if weight is None else weight
            for source, weight in zip(sources, weights, strict=True)
        ]
        self.shares = tuple(weight / sum(wanted) for weight in wanted)
        self._tree = _tree(self.shares)

    def place(self, sample: int) -> tuple[int, int]:
        """Which text a sample of the run is of, and its number among the samples of that text."""
        node, number = self._tree, sample
        while isinstance(node, _Fork):
            before = node.num_left(number)
            if node.num_left(number + 1) > before:
                node, number = node.left, before
            else:
                node, number = node.right, number - before
        return node, number

    def block(self, sample: int, seed: int) -> NDArray[np.int64]:
        """The block that a sample of a run reads; see `Samples`."""
        source, number = self.place(sample)
        return self._sources[source].block(number, seed_of_source(seed, source))

    def num_samples(self, num_samples: int) -> list[int]:
        """How many of the first samples of a run each text has."""
        counts = [0] * len(self._sources)
        due: list[tuple[_Fork | int, int]] = [(self._tree, num_samples)]
        while due:
            node, number = due.pop()
            if isinstance(node, _Fork):
                left = node.num_left(number)
                due += [(node.left, left), (node.right, number - left)]
            else:
                counts[node] = number
        return counts

    def num_epochs(self, num_samples: int) -> list[float]:
        """How often a run of so many samples reads each text."""
        counts = self.num_samples(num_samples)
        return [count / source.num_blocks for source, count in zip(self._sources, counts, strict=True)]

    def num_unread(self, num_samples: int) -> int:
        """Blocks that a run of so many samples never reads."""
        counts = self.num_samples(num_samples)
        return sum(source.num_unread(count) for source, count in zip(self._sources, counts, strict=True))


def _tree(shares: Sequence[Fraction]) -> _Fork | int:
    """Huffman's tree; it never changes from one version to the next, since runs are resumed by it."""
    heap: list[tuple[Fraction, int, _Fork | int]] = [(share, number, number) for number, share in enumerate(shares)]
    heapq.heapify(heap)
    # The second entries differ, so that no two nodes are compared.
    for number in range(len(shares), 2 * len(shares) - 1):
        lighter, _, right = heapq.heappop(heap)
        heavier, _, left = heapq.heappop(heap)
        fork = _Fork(heavier / (heavier + lighter), left, right)
        heapq.heappush(heap, (heavier + lighter, number, fork))
    return heap[0][2]


def mixed(names: Sequence[str], weights: Sequence[Fraction | None], texts: Sequence[Streams]) -> Streams:
    """Several texts of one tokenizer as one, whose validation text is theirs one behind the other.

    Args:
        names: what each is called in messages.
        weights: of each, as `Mixture` takes them.
        texts: the texts, with the same vocabulary size.
    """
    held_out = [text.validation for text in texts if text.validation is not None]
    digest = blake2b(digest_size=16)
    skipped: Counter[str] = Counter()
    for text, weight in zip(texts, weights, strict=True):
        digest.update(f"{text.data_hash} {weight}\n".encode())
        skipped.update(text.skipped)
    sources = [Source(name, weight, text.train) for name, weight, text in zip(names, weights, texts, strict=True)]
    return Streams(
        train=_joined([text.train for text in texts]),
        validation=_joined(held_out) if held_out else None,
        skipped=skipped,
        data_hash=digest.hexdigest(),
        vocabulary_size=texts[0].vocabulary_size,
        dir=texts[0].dir,
        name=" + ".join(text.name for text in texts),
        sources=tuple(sources),
    )


def _joined(streams: Sequence[Stream]) -> Stream:
    """Streams one behind the other; what one of them does not say is not known."""
    documents = [stream.num_documents for stream in streams]
    sizes = [stream.num_bytes for stream in streams]
    parts = [SlicedStarts(stream.starts, 0, len(stream.tokens)) for stream in streams if stream.starts is not None]
    return Stream(
        Tokens.joined([stream.tokens for stream in streams if isinstance(stream.tokens, Tokens)]),
        _sum(documents),
        _sum(sizes),
        ConcatenatedStarts(parts) if len(parts) == len(streams) else None,
    )


def _sum(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None
