"""Blocks of tokens: the rows that a model is trained and evaluated on."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.config.errors import UserError
from llm.data.batches.mixture import Mixture
from llm.data.batches.row import Row
from llm.data.batches.shuffle import shuffled_index
from llm.data.shards.document_starts import Starts
from llm.data.shards.format import SplitTokens, TokenizedText
from llm.data.shards.memmap import Tokens

log = logging.getLogger(__name__)


class Blocks:
    """The tokens of one split, cut into blocks of equal length.

    Block i reads the tokens [i * block_size, i * block_size + block_size + 1). It shares its last token with the next
    block, so that every token except the first of the split is predicted exactly once.

    Attributes:
        block_size: tokens predicted in a block.
    """

    def __init__(
        self,
        tokens: NDArray[Any] | Tokens,
        block_size: int,
        *,
        vocabulary_size: int | None = None,
        starts: Starts | None = None,
    ) -> None:
        """Cut the tokens; nothing is read yet.

        Args:
            tokens: integers [number of tokens].
            block_size: tokens predicted in a block.
            vocabulary_size: every id that is read must be below it; None: ids are not checked.
            starts: the document starts, if rows are to carry positions inside documents.
        """
        self._tokens = tokens
        self._vocabulary_size = vocabulary_size
        self._starts = starts
        self.block_size = block_size

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self.block_size

    @property
    def num_tokens(self) -> int:
        """Number of tokens in blocks: those that are predicted, and the first one."""
        return len(self._tokens) - self.num_dropped

    @property
    def num_dropped(self) -> int:
        """Number of tokens after the last block, fewer than `block_size`."""
        return max(len(self._tokens) - 1, 0) % self.block_size

    def __getitem__(self, index: int) -> Row:
        """Return block `index`, with ids [block_size + 1] in the type of the tokens.

        Raises:
            IndexError: there is no such block.
            UserError: the block holds an id outside the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        return self._read(index)

    def _read(self, index: int) -> Row:
        start = index * self.block_size
        ids = np.asarray(self._tokens[start : start + self.block_size + 1])
        if self._vocabulary_size is not None:
            self._check_ids(ids, start, self._vocabulary_size)
        return Row(ids, None if self._starts is None else self._positions(self._starts, start))

    def _check_ids(self, ids: NDArray[Any], start: int, vocabulary_size: int) -> None:
        is_signed = ids.dtype.kind == "i"
        if int(ids.max()) < vocabulary_size and not (is_signed and int(ids.min()) < 0):
            return
        index = int(np.argmax((ids >= vocabulary_size) | (ids < 0)))
        raise UserError(
            f"token {start + index} of the stream has id {ids[index]}, but the vocabulary has"
            f" {vocabulary_size} tokens: tokenize again (--overwrite_cache, or llm.prepare)"
        )

    def _positions(self, starts: Starts, start: int) -> NDArray[np.int32]:
        """Positions inside documents, counted from 0 at the first token and at every document start."""
        positions = np.arange(self.block_size + 1, dtype=np.int32)
        origins = np.zeros_like(positions)
        starts_in_block = starts.between(start, start + self.block_size + 1) - start
        origins[starts_in_block] = starts_in_block
        positions -= np.maximum.accumulate(origins)
        return positions

    @property
    def num_blocks(self) -> int:
        """Number of blocks of one epoch."""
        return len(self)

    def num_unread(self, num_samples: int) -> int:
        """Return the number of blocks that a run of `num_samples` samples does not read."""
        return max(0, len(self) - num_samples)

    def block(self, sample: int, seed: int) -> Row:
        """Return the block of a sample of the run; samples are counted over the epochs. See `BlockSource.block`."""
        num_blocks = len(self)
        epoch, position = divmod(sample, num_blocks)
        return self._read(shuffled_index(position, num_blocks, seed=seed, epoch=epoch))


def cut_blocks(
    text: TokenizedText, block_size: int, *, document_mask: bool = False
) -> tuple[Blocks | Mixture, Blocks | None]:
    """Return the training blocks, and the validation blocks or None if that text does not fill one block.

    Args:
        text: the text.
        block_size: tokens predicted in a block.
        document_mask: whether rows carry positions inside documents; the text must know the document starts.

    Raises:
        UserError: the training text, or one source of a mixture, does not fill one block.
    """
    splits = {f"--train_dir {source.name}": source.text for source in text.sources} or {"the training text": text.train}
    cuts = [_cut(split, block_size, text.vocabulary_size, document_mask) for split in splits.values()]
    for name, split in splits.items():
        if len(split.tokens) <= block_size:
            raise UserError(
                f"{name} has {len(split.tokens)} tokens, and a block of"
                f" --block_size {block_size} needs {block_size + 1}: give more text or a smaller block"
            )
    train = Mixture(cuts, [source.weight for source in text.sources]) if text.sources else cuts[0]
    return train, cut_validation(text, block_size, document_mask=document_mask)


def cut_validation(text: TokenizedText, block_size: int, *, document_mask: bool = False) -> Blocks | None:
    """Return the validation blocks, None if there is no such text or it does not fill one block (a warning)."""
    if text.validation is None:
        return None
    validation = _cut(text.validation, block_size, text.vocabulary_size, document_mask)
    if len(validation) == 0:
        log.warning(
            "no validation: its text has %d tokens, and a block of --block_size %d needs %d (a smaller block or a "
            "larger --validation_split_percentage gives one)",
            len(text.validation.tokens),
            block_size,
            block_size + 1,
        )
        return None
    return validation


def _cut(split: SplitTokens, block_size: int, vocabulary_size: int, document_mask: bool) -> Blocks:
    starts = split.starts if document_mask else None
    assert starts is not None or not document_mask
    return Blocks(split.tokens, block_size, vocabulary_size=vocabulary_size, starts=starts)
