"""Reading a stream while another process writes its shards, in an order that needs only the shards that exist.

The first epoch reads the stream in windows of about one shard, in the order of arrival, and shuffles the blocks
inside each window. When the stream has ended, later epochs are shuffled as a whole, like those of any text. The block
that a sample reads depends on its number and the seed only, not on when the shards arrived.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.config.errors import UserError
from llm.data.batches.blocks import Blocks
from llm.data.batches.row import Row
from llm.data.batches.shuffle import shuffled_index
from llm.data.shards.document_starts import StartsInFiles
from llm.data.shards.format import MANIFEST, Shard, open_shard, shard_path
from llm.data.shards.memmap import Tokens

_POLL_SECONDS = 0.1

EVERYTHING = sys.maxsize
"""A number of samples that no run reaches: all samples can be read."""


class AbandonedError(Exception):
    """The run no longer needs the block that was waited for."""


class GrowingTokens(Tokens):
    """The training tokens of a folder of shards that may still grow, as of the last `refresh`.

    Attributes:
        folder: the folder of the shards.
        shard_size: tokens of every shard except the last one of the stream.
        is_complete: whether the stream has ended, and all its tokens are included.
    """

    def __init__(self, folder: Path, *, shard_size: int, tokenizer_hash: str) -> None:
        """Begin without tokens; `refresh` includes the shards that exist.

        Args:
            folder: the folder of the shards, which may not exist yet.
            shard_size: tokens of every shard except the last one of the stream.
            tokenizer_hash: hash of the tokenizer that every shard must be made with.
        """
        super().__init__([])
        self.folder = folder
        self.shard_size = shard_size
        self.is_complete = False
        self._tokenizer_hash = tokenizer_hash
        self._shards: list[Shard] = []
        self._starts = StartsInFiles([])

    def refresh(self) -> None:
        """Include the shards that have arrived since the last call.

        Raises:
            ShardError: the files of a shard do not agree with its sidecar.
        """
        if self.is_complete:
            return
        # The manifest is read first: the shards that it counts then exist already.
        num_shards = self._num_shards_at_end()
        num_before = len(self._shards)
        while (path := self.path(len(self._shards))).with_suffix(".json").is_file():
            self._shards.append(open_shard(path, tokenizer_hash=self._tokenizer_hash))
        if len(self._shards) > num_before:
            super().__init__([shard.tokens for shard in self._shards])
            self._starts = StartsInFiles(self._shards)
        self.is_complete = len(self._shards) == num_shards

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the document starts in [start, stop), int64 [number of them]; see `Starts.between`."""
        return self._starts.between(start, stop)

    def path(self, number: int) -> Path:
        """Return the path of a shard's file of ids, whether it exists or not."""
        return shard_path(self.folder, "train", number)

    @property
    def num_complete_tokens(self) -> int:
        """Number of tokens in full shards. A short shard is the last one; it counts once the stream has ended."""
        return sum(shard.num_tokens for shard in self._shards if shard.num_tokens == self.shard_size)

    def _num_shards_at_end(self) -> int | None:
        """Number of shards of the whole stream; None before its end."""
        try:
            return int(json.loads((self.folder / MANIFEST).read_text())["splits"]["train"]["num_shards"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder / MANIFEST}: cannot be read ({error}); remove {self.folder}") from None


class GrowingBlocks:
    """The blocks of a stream, as an endless sequence of samples; reading a block waits until it has arrived.

    Window w holds the blocks [w * window, (w + 1) * window) of the stream, for which the first w + 1 shards suffice.
    The samples of a window are a shuffle of its blocks.

    Attributes:
        block_size: tokens predicted in a block.
        window: number of blocks that are shuffled together in the first epoch.
        num_blocks: None, since the number is unknown before the stream ends.
    """

    num_blocks: int | None = None

    def __init__(
        self, tokens: GrowingTokens, block_size: int, *, vocabulary_size: int, document_mask: bool = False
    ) -> None:
        """Cut the tokens into blocks; nothing is read yet.

        Args:
            tokens: the training tokens.
            block_size: tokens predicted in a block.
            vocabulary_size: every id must be below it.
            document_mask: whether rows carry positions inside documents.
        """
        self.block_size = block_size
        self.window = max((tokens.shard_size - 1) // block_size, 1)
        self._tokens = tokens
        starts = tokens if document_mask else None
        self._blocks = Blocks(tokens, block_size, vocabulary_size=vocabulary_size, starts=starts)
        self._num_ready = 0
        # This event reaches the threads and the processes that read ahead.
        self._is_abandoned = multiprocessing.Event()

    def __len__(self) -> int:
        """Number of blocks that have arrived by now."""
        self._tokens.refresh()
        return len(self._blocks)

    def num_unread(self, num_samples: int) -> int:
        """Return 0: the number of blocks that will arrive is unknown."""
        return 0

    @property
    def is_complete(self) -> bool:
        """Whether the stream has ended, so that `len` is the number of blocks of an epoch."""
        return self._tokens.is_complete

    def refresh(self) -> int:
        """Include the shards that have arrived, and return how many samples can be read now.

        Returns:
            A number n such that the samples 0 .. n - 1 can be read; `EVERYTHING` after the end of the stream.

        Raises:
            UserError: the stream has ended and does not fill one block.
        """
        self._tokens.refresh()
        if self._tokens.is_complete:
            if not len(self._blocks):
                raise UserError(
                    f"the stream has {len(self._tokens)} tokens to train on, and a block of --block_size"
                    f" {self.block_size} needs {self.block_size + 1}: give more text or a smaller block"
                )
            self._num_ready = EVERYTHING
        else:
            num_targets = max(self._tokens.num_complete_tokens - 1, 0)
            self._num_ready = num_targets // (self.window * self.block_size) * self.window
        return self._num_ready

    def num_shards(self, sample: int) -> int:
        """Return how many shards must exist to read a sample of the first epoch, unless the stream ends before."""
        last_token = (sample // self.window + 1) * self.window * self.block_size
        return last_token // self._tokens.shard_size + 1

    def block(self, sample: int, seed: int) -> Row:
        """Wait for the block of a sample of the run and return it; see `BlockSource.block`.

        Raises:
            AbandonedError: `abandon` was called, or the process that this one reads ahead for has exited.
            UserError: see `refresh`.
        """
        self._wait(sample)
        num_blocks = len(self._blocks)
        if self._tokens.is_complete and sample >= num_blocks:
            return self._blocks.block(sample, seed)
        window, position = divmod(sample, self.window)
        first = window * self.window
        size = min(self.window, num_blocks - first)
        return self._blocks[first + shuffled_index(position, size, seed=seed, epoch=window)]

    def abandon(self) -> None:
        """End every wait for a block, in this process and in those that read ahead for it."""
        self._is_abandoned.set()

    def _wait(self, sample: int) -> None:
        # A loader's worker must end when its parent was killed. The parent of the training process may exit freely.
        parent = os.getppid() if multiprocessing.parent_process() is not None else None
        while sample >= self._num_ready and sample >= self.refresh():
            if self._is_abandoned.wait(_POLL_SECONDS) or (parent is not None and os.getppid() != parent):
                raise AbandonedError
