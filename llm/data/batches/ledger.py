"""The ledger: the blocks or the remainder in which each token of a text lies, as numbers and as console lines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm.data.batches.blocks import Blocks
from llm.data.batches.loader import BlockSource
from llm.data.batches.mixture import Mixture
from llm.data.shards.format import TokenizedText

# The number of masked targets is unknown here: it would take reading the starts of all documents.
DOCUMENT_MASK_NOTE = "; document mask: the first token of a document is read, but never predicted"


@dataclass(frozen=True)
class Ledger:
    """Token counts of a text by what happens to them; they add up to `total`.

    Attributes:
        train_tokens: tokens in training blocks.
        validation_tokens: tokens in validation blocks.
        dropped_train: tokens after the last training block, fewer than a block.
        dropped_validation: tokens after the last validation block, fewer than a block.
    """

    train_tokens: int
    validation_tokens: int
    dropped_train: int
    dropped_validation: int

    @property
    def total(self) -> int:
        """Number of tokens of the text, end-of-text tokens included."""
        held_out = self.validation_tokens + self.dropped_validation
        return self.train_tokens + self.dropped_train + held_out


def ledger(text: TokenizedText, block_size: int) -> Ledger:
    """Count the tokens of a text for a block size; of a mixture, each source drops its own remainder."""
    train_splits = [source.text for source in text.sources] or [text.train]
    train = [Blocks(split.tokens, block_size) for split in train_splits]
    held_out = text.validation.tokens if text.validation is not None else np.zeros(0)
    validation = Blocks(held_out, block_size)
    return Ledger(
        train_tokens=sum(blocks.num_tokens for blocks in train),
        validation_tokens=validation.num_tokens,
        dropped_train=sum(blocks.num_dropped for blocks in train),
        dropped_validation=validation.num_dropped,
    )


def ledger_line(ledger: Ledger, *, document_mask: bool = False) -> str:
    """Return a line such as `tokens: 1,003,854 to train on + 111,540 held out + 37 dropped = 1,115,431`."""
    dropped = ledger.dropped_train + ledger.dropped_validation
    note = DOCUMENT_MASK_NOTE if document_mask else ""
    return (
        f"tokens: {ledger.train_tokens:,} to train on + {ledger.validation_tokens:,} held out "
        f"+ {dropped:,} dropped = {ledger.total:,}{note}"
    )


def mixture_lines(text: TokenizedText, blocks: BlockSource, num_samples: int) -> list[str]:
    """Return a line a source such as `mixture: data/a | 70.00% | 1,003,854 tokens | read 1.43 times`.

    Args:
        text: the text.
        blocks: its training blocks; the list is empty unless they are a `Mixture`.
        num_samples: blocks that the whole run reads.
    """
    if not isinstance(blocks, Mixture):
        return []
    return [
        f"mixture: {source.name} | {float(share):.2%} | {len(source.text.tokens):,} tokens | read {epochs:.2f} times"
        for source, share, epochs in zip(text.sources, blocks.shares, blocks.num_epochs(num_samples), strict=True)
    ]
