"""The ledger: every token is counted once, and the console lines that say so."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from llm.data.batches.blocks import cut_blocks
from llm.data.batches.ledger import Ledger, ledger, ledger_line, mixture_lines
from llm.data.batches.mixture import mix
from llm.data.shards.format import SplitTokens, TokenizedText


def _stream(num_tokens: int) -> SplitTokens:
    return SplitTokens(np.arange(num_tokens, dtype=np.uint16), 1, num_tokens)


def _streams(num_train: int, num_validation: int | None) -> TokenizedText:
    validation = None if num_validation is None else _stream(num_validation)
    return TokenizedText(_stream(num_train), validation, {}, "hash", 60_000, Path())


def test_ledger_when_any_sizes_then_tokens_add_up() -> None:
    for num_train in range(0, 40, 3):
        for num_validation in (None, 0, 1, 8, 9, 30):
            counts = ledger(_streams(num_train, num_validation), 8)
            assert counts.total == num_train + (num_validation or 0)
            assert max(counts.dropped_train, counts.dropped_validation) < 8


def test_ledger_when_texts_are_mixed_then_each_drops_its_own_remainder() -> None:
    streams = mix(["a", "b"], [None, None], [_streams(20, 10), _streams(30, None)])
    counts = ledger(streams, 8)
    assert (counts.train_tokens, counts.dropped_train) == (17 + 25, 3 + 5)


def test_ledger_line_when_written_then_adds_up() -> None:
    line = ledger_line(Ledger(1_003_841, 111_489, 33, 31))
    assert line == "tokens: 1,003,841 to train on + 111,489 held out + 64 dropped = 1,115,394"


def test_ledger_line_when_documents_are_kept_apart_then_says_that_some_are_not_predicted() -> None:
    line = ledger_line(Ledger(1_003_841, 111_489, 33, 31), document_mask=True)
    assert line.startswith("tokens: 1,003,841 to train on")
    assert line.endswith("; document mask: the first token of a document is read, but never predicted")


def test_mixture_lines_when_two_texts_are_mixed_then_shares_sizes_and_epochs() -> None:
    streams = mix(["data/a", "data/b"], [Fraction(3), Fraction(1)], [_streams(81, None), _streams(41, None)])
    blocks, _ = cut_blocks(streams, 8)
    assert mixture_lines(streams, blocks, 20) == [
        "mixture: data/a | 75.00% | 81 tokens | read 1.50 times",
        "mixture: data/b | 25.00% | 41 tokens | read 1.00 times",
    ]


def test_mixture_lines_when_there_is_one_text_then_none() -> None:
    streams = _streams(81, None)
    assert mixture_lines(streams, cut_blocks(streams, 8)[0], 20) == []
