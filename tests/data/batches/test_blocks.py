"""Blocks of tokens."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from llm.config.errors import UserError
from llm.data.batches.blocks import Blocks, cut_blocks
from llm.data.shards.format import SplitTokens, TokenizedText
from llm.data.shards.memmap import TokenFile, Tokens


def _streams(num_train: int, num_validation: int | None) -> TokenizedText:
    def stream(number: int) -> SplitTokens:
        return SplitTokens(np.arange(number, dtype=np.uint16), 1, number)

    validation = None if num_validation is None else stream(num_validation)
    return TokenizedText(stream(num_train), validation, {}, "hash", 60_000, Path())


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 8, 9, 10, 16, 17, 100])
def test_blocks_when_read_then_every_token_after_the_first_is_predicted_once(num_tokens) -> None:
    blocks = Blocks(np.arange(num_tokens, dtype=np.uint16), 8)
    targets = [token for i in range(len(blocks)) for token in blocks[i].ids[1:].tolist()]
    assert targets == list(range(1, len(blocks) * 8 + 1))
    assert num_tokens - len(blocks) * 8 - 1 == blocks.num_dropped or num_tokens == 0
    assert 0 <= blocks.num_dropped < 8
    assert blocks.num_tokens + blocks.num_dropped == num_tokens


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64])
def test_blocks_when_read_then_of_the_type_of_the_tokens_and_one_longer(dtype: type) -> None:
    row = Blocks(np.arange(100, dtype=dtype), 8, vocabulary_size=100)[3]
    assert row.ids.dtype == dtype
    assert row.ids.tolist() == list(range(24, 33))
    assert row.positions is row.loss_mask is None


def test_blocks_when_index_is_outside_then_index_error() -> None:
    blocks = Blocks(np.arange(17), 8)
    assert len(blocks) == 2
    for index in (-1, 2):
        with pytest.raises(IndexError):
            blocks[index]


def test_blocks_when_id_is_beyond_the_vocabulary_then_position_named() -> None:
    tokens = np.zeros(33, dtype=np.uint16)
    tokens[20] = 50
    blocks = Blocks(tokens, 8, vocabulary_size=50)
    assert blocks[0].ids.max() == 0
    with pytest.raises(UserError, match="token 20 of the stream has id 50"):
        blocks[2]


def test_blocks_when_pickled_then_the_content_of_the_file_is_not(tmp_path: Path) -> None:
    np.arange(10_000, dtype="<u2").tofile(tmp_path / "x.bin")
    blocks = Blocks(Tokens([TokenFile(tmp_path / "x.bin", "<u2", 10_000)]), 8, vocabulary_size=10_000)
    sent = pickle.dumps(blocks)
    assert len(sent) < 1000
    assert pickle.loads(sent)[7].ids.tolist() == blocks[7].ids.tolist()
    assert pickle.loads(pickle.dumps(Blocks(np.arange(20), 8)))[1].ids.tolist() == list(range(8, 17))


def test_cut_blocks_when_training_text_is_short_then_refused_with_the_option() -> None:
    with pytest.raises(UserError, match="8 tokens, and a block of --block_size 8 needs 9"):
        cut_blocks(_streams(8, 100), 8)


def test_cut_blocks_when_validation_is_short_then_none_and_a_warning(caplog) -> None:
    train, validation = cut_blocks(_streams(100, 8), 8)
    assert (len(train), validation) == (12, None)
    assert "no validation" in caplog.text
    assert len(cut_blocks(_streams(100, 9), 8)[1]) == 1
    assert cut_blocks(_streams(100, None), 8)[1] is None


def test_blocks_when_an_id_of_a_signed_file_is_negative_then_position_named() -> None:
    blocks = Blocks(np.array([1, 2, -1, 3, 4], np.int32), 4, vocabulary_size=10)
    with pytest.raises(UserError, match="token 2 of the stream has id -1"):
        blocks[0]
