"""Blocks of tokens, and the ledger of what becomes of every token."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.config.errors import UserError
from llm.data.order import shuffled
from llm.data.shards import Streams
from llm.data.tokens import Tokens

log = logging.getLogger(__name__)


class Blocks:
    """A stream cut into blocks.

    Block i reads the tokens [i * block_size, i * block_size + block_size + 1): it shares its last
    token with the next block, so that every token but the stream's first is predicted exactly once.
    """

    def __init__(self, tokens: NDArray[Any] | Tokens, block_size: int, *, vocabulary_size: int | None = None) -> None:
        """Cuts a stream.

        Args:
            tokens: integers [number of tokens].
            block_size: tokens predicted in a block.
            vocabulary_size: every id that is read must be below it; not checked when None.
        """
        self._tokens = tokens
        self._vocabulary_size = vocabulary_size
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

        Raises:
            IndexError: there is no such block.
            UserError: an id beyond the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * self.block_size
        ids = np.asarray(self._tokens[start : start + self.block_size + 1]).astype(np.int64)
        if self._vocabulary_size is not None and int(ids.max()) >= self._vocabulary_size:
            place = int(np.argmax(ids >= self._vocabulary_size))
            raise UserError(
                f"token {start + place} of the stream has id {ids[place]}, but the vocabulary has"
                f" {self._vocabulary_size} tokens: tokenize again (--overwrite_cache, or llm.prepare)"
            )
        return ids

    @property
    def num_blocks(self) -> int:
        """Blocks of one epoch."""
        return len(self)

    def of_sample(self, sample: int, seed: int) -> NDArray[np.int64]:
        """The block that sample number `sample` of a run reads; samples are counted over the epochs."""
        epoch, place = divmod(sample, len(self))
        return self[shuffled(place, len(self), seed=seed, epoch=epoch)]


@dataclass(frozen=True)
class Ledger:
    """Where the tokens of a text are. Their sum is all of them.

    Attributes:
        train_tokens: in blocks for training.
        validation_tokens: in blocks for validation.
        dropped_train: behind the last block for training, fewer than a block.
        dropped_validation: behind the last block for validation, fewer than a block.
    """

    train_tokens: int
    validation_tokens: int
    dropped_train: int
    dropped_validation: int

    @property
    def total(self) -> int:
        """All tokens of the text, end-of-text tokens included."""
        held_out = self.validation_tokens + self.dropped_validation
        return self.train_tokens + self.dropped_train + held_out


def cut_blocks(streams: Streams, block_size: int) -> tuple[Blocks, Blocks | None]:
    """The blocks for training, and those for validation, None if that text makes not even one.

    Raises:
        UserError: the training text makes not even one block.
    """
    size = streams.vocabulary_size
    train = Blocks(streams.train.tokens, block_size, vocabulary_size=size)
    if len(train) == 0:
        raise UserError(
            f"the training text has {len(streams.train.tokens)} tokens, and a block of"
            f" --block_size {block_size} needs {block_size + 1}: give more text or a smaller block"
        )
    if streams.validation is None:
        return train, None
    validation = Blocks(streams.validation.tokens, block_size, vocabulary_size=size)
    if len(validation) == 0:
        log.warning(
            "no validation: its text has %d tokens, and a block of --block_size %d needs %d (a smaller block or a "
            "larger --validation_split_percentage gives one)",
            *(len(streams.validation.tokens), block_size, block_size + 1),
        )
        return train, None
    return train, validation


def ledger(streams: Streams, block_size: int) -> Ledger:
    """Counts the tokens of a text for a block size."""
    train = Blocks(streams.train.tokens, block_size)
    held_out = streams.validation.tokens if streams.validation is not None else np.zeros(0)
    validation = Blocks(held_out, block_size)
    return Ledger(train.num_tokens, validation.num_tokens, train.num_dropped, validation.num_dropped)
