"""Tokens that are still arriving: shards that another process writes, read in an order that needs no more of them.

The first epoch goes through the stream in windows of about a shard, in the order of their arrival, and
shuffles the blocks inside each. When the stream has ended, the later epochs are shuffled as a whole, like any
text's. Which block a sample reads depends on its number and the seed alone, not on what was there when.
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

_LOOK_SECONDS = 0.1

EVERYTHING = sys.maxsize
"""More samples than any run has: all of them can be read."""


class AbandonedError(Exception):
    """Nobody waits for the block any more."""


class GrowingTokens(Tokens):
    """The training tokens of a folder of shards that may still grow; as far as they were there at the last look.

    Attributes:
        folder: of the shards.
        shard_size: tokens of every shard but the stream's last.
        is_whole: whether the stream has ended, and all of it is here.
    """

    def __init__(self, folder: Path, *, shard_size: int, tokenizer_hash: str) -> None:
        super().__init__([])
        self.folder, self.shard_size, self.is_whole = folder, shard_size, False
        self._tokenizer_hash = tokenizer_hash
        self._shards: list[Shard] = []
        self._starts = StartsInFiles([])

    def look(self) -> None:
        """Takes in what has arrived since.

        Raises:
            ShardError: a shard is not what its sidecar says.
        """
        if self.is_whole:
            return
        # Read first, so that its number counts shards that were there already.
        due = self._num_due()
        before = len(self._shards)
        while (path := self.path(len(self._shards))).with_suffix(".json").is_file():
            self._shards.append(open_shard(path, tokenizer_hash=self._tokenizer_hash))
        if len(self._shards) > before:
            super().__init__([shard.tokens for shard in self._shards])
            self._starts = StartsInFiles(self._shards)
        self.is_whole = len(self._shards) == due

    def between(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where documents start in what has arrived; see `Starts`."""
        return self._starts.between(start, stop)

    def path(self, number: int) -> Path:
        """The file of ids of a shard, there or not."""
        return shard_path(self.folder, "train", number)

    @property
    def num_complete_tokens(self) -> int:
        """Tokens in shards that are full: those of a short one lie at the stream's end, which is to be heard of."""
        return sum(shard.num_tokens for shard in self._shards if shard.num_tokens == self.shard_size)

    def _num_due(self) -> int | None:
        """Shards of the whole stream; None before its end."""
        try:
            return int(json.loads((self.folder / MANIFEST).read_text())["splits"]["train"]["num_shards"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder / MANIFEST}: cannot be read ({error}); remove {self.folder}") from None


class GrowingBlocks:
    """Blocks of a stream, as an endless sequence of samples; reading one waits until it has arrived.

    Window w holds the blocks [w * window, (w + 1) * window) of the stream, for which its first w + 1 shards
    suffice, and its samples are a shuffle of them.

    Attributes:
        block_size: tokens predicted in a block.
        window: blocks that are shuffled together in the first epoch.
        num_blocks: None, since nobody knows them before the stream's end.
    """

    num_blocks: int | None = None

    def __init__(
        self, tokens: GrowingTokens, block_size: int, *, vocabulary_size: int, document_mask: bool = False
    ) -> None:
        self.block_size = block_size
        self.window = max((tokens.shard_size - 1) // block_size, 1)
        self._tokens = tokens
        starts = tokens if document_mask else None
        self._blocks = Blocks(tokens, block_size, vocabulary_size=vocabulary_size, starts=starts)
        self._num_ready = 0
        # Reaches the threads and the processes that read ahead.
        self._is_abandoned = multiprocessing.Event()

    def __len__(self) -> int:
        """Blocks that have arrived by now."""
        self._tokens.look()
        return len(self._blocks)

    def num_unread(self, num_samples: int) -> int:
        """0: nobody knows how much will have arrived."""
        return 0

    @property
    def is_whole(self) -> bool:
        """Whether the stream has ended, so that its length is the number of blocks of an epoch."""
        return self._tokens.is_whole

    def look(self) -> int:
        """How many samples can be read now: all those below that number.

        Raises:
            UserError: the stream has ended, and makes not even one block.
        """
        self._tokens.look()
        if self._tokens.is_whole:
            if not len(self._blocks):
                raise UserError(
                    f"the stream has {len(self._tokens)} tokens to train on, and a block of --block_size"
                    f" {self.block_size} needs {self.block_size + 1}: give more text or a smaller block"
                )
            self._num_ready = EVERYTHING
        else:
            tokens = max(self._tokens.num_complete_tokens - 1, 0)
            self._num_ready = tokens // (self.window * self.block_size) * self.window
        return self._num_ready

    def num_shards(self, sample: int) -> int:
        """Shards that have to be there to read a sample of the first epoch, unless the stream ends before."""
        last_token = (sample // self.window + 1) * self.window * self.block_size
        return last_token // self._tokens.shard_size + 1

    def block(self, sample: int, seed: int) -> Row:
        """The block that sample number `sample` of a run reads; samples are counted over the epochs.

        Raises:
            AbandonedError: nobody waits for it any more.
            UserError: as `look`.
        """
        self._wait(sample)
        num_blocks = len(self._blocks)
        if self._tokens.is_whole and sample >= num_blocks:
            return self._blocks.block(sample, seed)
        window, place = divmod(sample, self.window)
        first = window * self.window
        size = min(self.window, num_blocks - first)
        return self._blocks[first + shuffled_index(place, size, seed=seed, epoch=window)]

    def abandon(self) -> None:
        """Ends every wait for a block, in this process and in those that read ahead for it."""
        self._is_abandoned.set()

    def _wait(self, sample: int) -> None:
        # A loader's process whose own process was killed is nobody's; this one's parent may end as it likes.
        parent = os.getppid() if multiprocessing.parent_process() is not None else None
        while sample >= self._num_ready and sample >= self.look():
            if self._is_abandoned.wait(_LOOK_SECONDS) or (parent is not None and os.getppid() != parent):
                raise AbandonedError
