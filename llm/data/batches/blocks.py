"""Blocks of tokens: the rows that a model reads."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.config.errors import UserError
from llm.data.batches.mixture import Mixture
from llm.data.batches.shuffle import shuffled_index
from llm.data.shards.document_starts import Starts
from llm.data.shards.format import Stream, Streams
from llm.data.shards.memmap import Tokens

log = logging.getLogger(__name__)


class Blocks:
    """A stream cut into blocks.

    Block i reads the tokens [i * block_size, i * block_size + block_size + 1): it shares its last
    token with the next block, so that every token but the stream's first is predicted exactly once.
    """

    def __init__(
        self,
        tokens: NDArray[Any] | Tokens,
        block_size: int,
        *,
        vocabulary_size: int | None = None,
        starts: Starts | None = None,
    ) -> None:
        """Cuts a stream.

        Args:
            tokens: integers [number of tokens].
            block_size: tokens predicted in a block.
            vocabulary_size: every id that is read must be below it; not checked when None.
            starts: where documents start, if blocks are to say it.
        """
        self._tokens = tokens
        self._vocabulary_size = vocabulary_size
        self._starts = starts
        self.block_size = block_size

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self.block_size

    @property
    def num_tokens(self) -> int:
        """Tokens in blocks: those predicted, and the first one."""
        return len(self._tokens) - self.num_dropped

    @property
    def num_dropped(self) -> int:
        """Tokens behind the last block: fewer than `block_size`."""
        return max(len(self._tokens) - 1, 0) % self.block_size

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Block number `index`: int64 [block_size + 1].

        Where document starts are given, int64 [2, block_size + 1]: the ids, and the position of each in its
        document, counted from 0 at the block's beginning and at every start.

        Raises:
            IndexError: there is no such block.
            UserError: an id beyond the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        return self._read(index)

    def _read(self, index: int) -> NDArray[np.int64]:
        start = index * self.block_size
        ids = np.asarray(self._tokens[start : start + self.block_size + 1]).astype(np.int64)
        # As unsigned, a negative id of a signed file is a very large one.
        if self._vocabulary_size is not None and int(ids.view(np.uint64).max()) >= self._vocabulary_size:
            place = int(np.argmax(ids.view(np.uint64) >= self._vocabulary_size))
            raise UserError(
                f"token {start + place} of the stream has id {ids[place]}, but the vocabulary has"
                f" {self._vocabulary_size} tokens: tokenize again (--overwrite_cache, or llm.prepare)"
            )
        return ids if self._starts is None else np.array((ids, self._positions(start)))

    def _positions(self, start: int) -> NDArray[np.int64]:
        assert self._starts is not None
        places = np.arange(self.block_size + 1)
        origins = np.zeros_like(places)
        found = self._starts.between(start, start + self.block_size + 1) - start
        origins[found] = found
        return places - np.maximum.accumulate(origins)

    @property
    def num_blocks(self) -> int:
        """Blocks of one epoch."""
        return len(self)

    def num_unread(self, num_samples: int) -> int:
        """Blocks that a run of so many samples never reads."""
        return max(0, len(self) - num_samples)

    def block(self, sample: int, seed: int) -> NDArray[np.int64]:
        """The block that sample number `sample` of a run reads; samples are counted over the epochs."""
        num_blocks = len(self)
        epoch, place = divmod(sample, num_blocks)
        return self._read(shuffled_index(place, num_blocks, seed=seed, epoch=epoch))


def cut_blocks(
    streams: Streams, block_size: int, *, document_mask: bool = False
) -> tuple[Blocks | Mixture, Blocks | None]:
    """The blocks for training, and those for validation, None if that text makes not even one.

    Args:
        streams: the text.
        block_size: tokens predicted in a block.
        document_mask: whether blocks say where documents start; the streams must know it.

    Raises:
        UserError: the training text, or a source of it, makes not even one block.
    """
    texts = {f"--train_dir {source.name}": source.text for source in streams.sources} or {
        "the training text": streams.train
    }
    cuts = [_cut(text, block_size, streams.vocabulary_size, document_mask) for text in texts.values()]
    for name, text in texts.items():
        if len(text.tokens) <= block_size:
            raise UserError(
                f"{name} has {len(text.tokens)} tokens, and a block of"
                f" --block_size {block_size} needs {block_size + 1}: give more text or a smaller block"
            )
    train = Mixture(cuts, [source.weight for source in streams.sources]) if streams.sources else cuts[0]
    return train, cut_validation(streams, block_size, document_mask=document_mask)


def cut_validation(streams: Streams, block_size: int, *, document_mask: bool = False) -> Blocks | None:
    """The blocks for validation, None if that text makes not even one."""
    if streams.validation is None:
        return None
    validation = _cut(streams.validation, block_size, streams.vocabulary_size, document_mask)
    if len(validation) == 0:
        log.warning(
            "no validation: its text has %d tokens, and a block of --block_size %d needs %d (a smaller block or a "
            "larger --validation_split_percentage gives one)",
            *(len(streams.validation.tokens), block_size, block_size + 1),
        )
        return None
    return validation


def _cut(text: Stream, block_size: int, vocabulary_size: int, document_mask: bool) -> Blocks:
    starts = text.starts if document_mask else None
    assert starts is not None or not document_mask
    return Blocks(text.tokens, block_size, vocabulary_size=vocabulary_size, starts=starts)
