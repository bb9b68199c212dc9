"""Mixtures of several texts by weight: the block that a sample reads is a pure function of its number.

A binary tree distributes the samples. Each fork of the tree sends every range of the samples that reach it to its two
sides in exact shares, rounded to whole samples, so that nothing drifts however long the run is. The tree is a Huffman
tree: texts with large weights are near its root, so that few roundings add up for a text with a small weight.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from typing import Protocol

from llm.data.batches.row import Row
from llm.data.batches.shuffle import seed_of_source
from llm.data.shards.document_starts import ConcatenatedStarts, SlicedStarts
from llm.data.shards.format import MixtureSource, SplitTokens, TokenizedText
from llm.data.shards.memmap import Tokens


class SourceBlocks(Protocol):
    """The blocks of one text of a mixture, in an order that depends on the seed only."""

    @property
    def block_size(self) -> int:
        """Tokens predicted in a block."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks of one epoch."""

    def num_unread(self, num_samples: int) -> int:
        """Return the number of blocks that a run of `num_samples` samples of this text does not read."""

    def block(self, sample: int, seed: int) -> Row:
        """Return the block of a sample of this text: a `Row` of [block_size + 1] arrays."""


@dataclass(frozen=True)
class _Fork:
    """Distributes samples to two sides.

    Attributes:
        share: share of the samples that go to the left.
        left: another fork, or the index of a source.
        right: another fork, or the index of a source.
    """

    share: Fraction
    left: _Fork | int
    right: _Fork | int

    def num_left(self, num_samples: int) -> int:
        """Return how many of the first samples go to the left: their share, rounded, halves up."""
        numerator = self.share.numerator
        denominator = self.share.denominator
        return (2 * num_samples * numerator + denominator) // (2 * denominator)


class Mixture:
    """The blocks of several texts, each with a share of the samples.

    Among the first n samples, for every n, the number of a text's samples differs from its share by at most half a
    block if there are two texts, and by less than two blocks for any number of texts. Every block of a text is read
    once before any block of that text is read again. The text of a sample does not depend on the seed; the order
    inside each text does.

    Attributes:
        block_size: tokens predicted in a block.
        num_blocks: blocks of an epoch: the sum over the texts, independent of their shares.
        shares: shares of the texts, which add up to 1.
    """

    def __init__(self, sources: Sequence[SourceBlocks], weights: Sequence[Fraction | None]) -> None:
        """Mix texts.

        Args:
            sources: at least one, each with at least one block.
            weights: one a source, above 0; None: the source's number of blocks.
        """
        self._sources = tuple(sources)
        self.block_size = sources[0].block_size
        self.num_blocks = sum(source.num_blocks for source in sources)
        known_weights = [
            Fraction(source.num_blocks) if weight is None else weight
            for source, weight in zip(sources, weights, strict=True)
        ]
        self.shares = tuple(weight / sum(known_weights) for weight in known_weights)
        self._tree = _huffman_tree(self.shares)

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the source of a sample of the run, and the sample's number among those of that source."""
        node = self._tree
        number = sample
        while isinstance(node, _Fork):
            num_left = node.num_left(number)
            if node.num_left(number + 1) > num_left:
                node = node.left
                number = num_left
            else:
                node = node.right
                number -= num_left
        return node, number

    def block(self, sample: int, seed: int) -> Row:
        """Return the block of a sample of the run, a `Row` of [block_size + 1] arrays; see `BlockSource.block`."""
        source, number = self.locate(sample)
        return self._sources[source].block(number, seed_of_source(seed, source))

    def num_samples(self, num_samples: int) -> list[int]:
        """Return, for each source, how many of the first `num_samples` samples of the run belong to it."""
        counts = [0] * len(self._sources)
        pending: list[tuple[_Fork | int, int]] = [(self._tree, num_samples)]
        while pending:
            node, number = pending.pop()
            if isinstance(node, _Fork):
                num_left = node.num_left(number)
                pending += [(node.left, num_left), (node.right, number - num_left)]
            else:
                counts[node] = number
        return counts

    def num_epochs(self, num_samples: int) -> list[float]:
        """Return, for each source, how many times a run of `num_samples` samples reads it."""
        counts = self.num_samples(num_samples)
        return [count / source.num_blocks for source, count in zip(self._sources, counts, strict=True)]

    def num_unread(self, num_samples: int) -> int:
        """Return the number of blocks that a run of `num_samples` samples does not read."""
        counts = self.num_samples(num_samples)
        return sum(source.num_unread(count) for source, count in zip(self._sources, counts, strict=True))


def _huffman_tree(shares: Sequence[Fraction]) -> _Fork | int:
    """Build the Huffman tree of the shares; it must never change between versions, since runs resume by it."""
    heap: list[tuple[Fraction, int, _Fork | int]] = [(share, number, number) for number, share in enumerate(shares)]
    heapq.heapify(heap)
    # The second entries differ, so that two nodes are never compared.
    for number in range(len(shares), 2 * len(shares) - 1):
        lighter, _, right = heapq.heappop(heap)
        heavier, _, left = heapq.heappop(heap)
        fork = _Fork(heavier / (heavier + lighter), left, right)
        heapq.heappush(heap, (heavier + lighter, number, fork))
    return heap[0][2]


def mix(names: Sequence[str], weights: Sequence[Fraction | None], texts: Sequence[TokenizedText]) -> TokenizedText:
    """Return several texts of one tokenizer as one text; their validation texts are concatenated.

    Args:
        names: names of the texts in messages.
        weights: weights of the texts; see `Mixture`.
        texts: the texts, with the same vocabulary size.
    """
    held_out = [text.validation for text in texts if text.validation is not None]
    digest = blake2b(digest_size=16)
    skipped: Counter[str] = Counter()
    for text, weight in zip(texts, weights, strict=True):
        digest.update(f"{text.data_hash} {weight}\n".encode())
        skipped.update(text.skipped)
    sources = [
        MixtureSource(name, weight, text.train) for name, weight, text in zip(names, weights, texts, strict=True)
    ]
    return TokenizedText(
        train=_concatenated([text.train for text in texts]),
        validation=_concatenated(held_out) if held_out else None,
        skipped=skipped,
        data_hash=digest.hexdigest(),
        vocabulary_size=texts[0].vocabulary_size,
        dir=texts[0].dir,
        name=" + ".join(text.name for text in texts),
        sources=tuple(sources),
    )


def _concatenated(streams: Sequence[SplitTokens]) -> SplitTokens:
    """Concatenate streams; a fact that is unknown of one of them is unknown of the result."""
    starts = [SlicedStarts(stream.starts, 0, len(stream.tokens)) for stream in streams if stream.starts is not None]
    return SplitTokens(
        Tokens.concatenated([stream.tokens for stream in streams if isinstance(stream.tokens, Tokens)]),
        _sum_if_known([stream.num_documents for stream in streams]),
        _sum_if_known([stream.num_bytes for stream in streams]),
        ConcatenatedStarts(starts) if len(starts) == len(streams) else None,
    )


def _sum_if_known(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None
