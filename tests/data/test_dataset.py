"""From options to a tokenizer and tokenized text, and what a run asks of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from llm.config.errors import UserError
from llm.config.options import Options
from llm.config.reader import read_options
from llm.data.batches.blocks import Blocks
from llm.data.batches.mixture import Mixture
from llm.data.dataset import PreparedDataset, bytes_of_ids, hub_names, prepare_dataset
from llm.data.shards.format import SplitTokens, TokenizerMismatchError
from llm.distributed.world import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
NUM_IDS = 257  # of the byte tokenizer


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))


def _options(*arguments: str | Path) -> Options:
    return read_options(Options, [str(argument) for argument in arguments], prog="test", description="")


def _dataset(tokenizer: Path, *arguments: str | Path) -> PreparedDataset:
    return prepare_dataset(_options("--tokenizer_name", tokenizer, *arguments), ALONE)


def _token_file(path: Path, ids: list[int]) -> Path:
    path.parent.mkdir(exist_ok=True)
    np.array(ids, "<u2").tofile(path)
    return path


def test_prepare_dataset_when_text_is_given_then_all_its_tokens_and_the_same_from_the_cache(
    tiny_text: Path, tiny_gpt2_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ("--train_file", tiny_text, "--validation_split_percentage", "10")
    dataset = _dataset(tiny_gpt2_dir, *arguments)
    assert dataset.text.validation is not None
    content = [*dataset.text.train.tokens[:].tolist(), *dataset.text.validation.tokens[:].tolist()]
    assert dataset.tokenizer.decode(content[:-1]) == tiny_text.read_text()
    caplog.set_level("INFO")
    again = _dataset(tiny_gpt2_dir, *arguments)
    assert "from the cache" in caplog.text
    assert again.identity() == dataset.identity()
    assert set(dataset.identity()) == {"data_hash", "tokenizer_hash"}


def test_prepare_dataset_when_not_on_rank_0_then_the_cache_is_not_overwritten(
    tiny_text: Path, tiny_gpt2_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = _options("--tokenizer_name", tiny_gpt2_dir, "--train_file", tiny_text, "--overwrite_cache")
    prepare_dataset(options, ALONE)
    caplog.set_level("INFO")
    prepare_dataset(options, World(rank=1, size=2, local_rank=1, device=torch.device("cpu")))
    assert "from the cache" in caplog.text


def test_prepare_dataset_when_token_files_are_given_then_ids_counted_without_a_second_tokenizing(
    tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    train = _token_file(tmp_path / "a.bin", [7] * 1000)
    validation = _token_file(tmp_path / "b.bin", [8] * 50)
    dataset = _dataset(tiny_gpt2_dir, "--train_file", train, "--validation_file", validation)
    assert dataset.text.vocabulary_size == NUM_IDS
    blocks, held_out = dataset.blocks(16, document_mask=False)
    assert isinstance(blocks, Blocks)
    assert (len(blocks), held_out is not None and len(held_out)) == (62, 3)
    assert blocks[0].ids.tolist() == [7] * 17
    counts = dataset.ledger(16)
    assert (counts.train_tokens, counts.dropped_train) == (993, 7)
    assert (counts.validation_tokens, counts.dropped_validation) == (49, 1)
    assert dataset.opening_lines(blocks, num_samples=10, document_mask=False) == [
        "tokens: 993 to train on + 49 held out + 8 dropped = 1,050"
    ]
    assert dataset.num_unreached_tokens(blocks, 10) == 52 * 16
    assert dataset.num_unreached_tokens(blocks, 100) == 0


def test_prepare_dataset_when_folders_are_mixed_then_a_mixture_and_a_line_for_each(
    tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    for name, number in (("a", 401), ("b", 101)):
        _token_file(tmp_path / name / "train.bin", [5] * number)
    folders = (f"{tmp_path / 'a'}=3", f"{tmp_path / 'b'}=1")
    dataset = _dataset(tiny_gpt2_dir, "--train_dir", *folders, "--validation_split_percentage", "0")
    blocks, held_out = dataset.blocks(10, document_mask=False)
    assert isinstance(blocks, Mixture)
    assert held_out is None
    assert dataset.opening_lines(blocks, num_samples=40, document_mask=False) == [
        "tokens: 502 to train on + 0 held out + 0 dropped = 502",
        f"mixture: {tmp_path / 'a'} | 75.00% | 401 tokens | read 0.75 times",
        f"mixture: {tmp_path / 'b'} | 25.00% | 101 tokens | read 1.00 times",
    ]


def test_prepare_dataset_when_a_validation_folder_is_given_then_nothing_of_the_training_folder_is_held_out(
    tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    _token_file(tmp_path / "a" / "train.bin", [5] * 400)
    _token_file(tmp_path / "b" / "train.bin", [6] * 100)
    plain = _dataset(tiny_gpt2_dir, "--train_dir", tmp_path / "a", "--validation_split_percentage", "0")
    dataset = _dataset(tiny_gpt2_dir, "--train_dir", tmp_path / "a", "--validation_dir", tmp_path / "b")
    assert dataset.text.validation is not None
    assert len(dataset.text.train.tokens) == 400
    assert dataset.text.validation.tokens[:].tolist() == [6] * 100
    assert dataset.identity()["data_hash"] != plain.identity()["data_hash"]


def test_prepare_dataset_when_documents_end_with_the_end_of_text_token_then_rows_have_positions(
    tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    file = _token_file(tmp_path / "a.bin", [1, 2, 256, 3, 4, 5, 256, 6, 7])
    words = ("--train_file", file, "--validation_split_percentage", "0", "--document_mask")
    blocks, _ = _dataset(tiny_gpt2_dir, *words).blocks(8, document_mask=True)
    positions = blocks.block(0, 1).positions
    assert positions is not None
    assert positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]


def test_prepare_dataset_when_ids_are_beyond_the_vocabulary_then_refused_with_the_option(
    tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    file = _token_file(tmp_path / "a.bin", [1, NUM_IDS, 3])
    with pytest.raises(
        TokenizerMismatchError, match=r"hold id 257, but the tokenizer has 257 tokens.*--tokenizer_name"
    ):
        _dataset(tiny_gpt2_dir, "--train_file", file)


def test_prepare_dataset_when_tokens_come_without_a_tokenizer_then_refused_with_the_option(tmp_path: Path) -> None:
    file = _token_file(tmp_path / "a.bin", [1, 2, 3])
    with pytest.raises(UserError, match="--tokenizer_name"):
        prepare_dataset(_options("--train_file", file), ALONE)


def test_bytes_of_ids_when_the_sum_is_the_length_of_the_text_then_the_table_and_its_mean(byte_tokenizer) -> None:  # type: ignore[no-untyped-def]
    ids = np.array([*byte_tokenizer.encode("twelve bytes"), 256], np.uint16)
    table, mean = bytes_of_ids(byte_tokenizer, SplitTokens(ids, 1, 12))
    assert table is not None
    assert (table.dtype, table.shape, int(table[256])) == (torch.int32, (NUM_IDS,), 0)
    assert mean == 12 / 13


def test_bytes_of_ids_when_the_tokenizer_changed_the_text_then_only_the_mean(byte_tokenizer) -> None:  # type: ignore[no-untyped-def]
    ids = np.array(byte_tokenizer.encode("twelve bytes"), np.uint16)
    assert bytes_of_ids(byte_tokenizer, SplitTokens(ids, 1, 24)) == (None, 2.0)


def test_bytes_of_ids_when_the_length_of_the_text_is_unknown_then_the_table_is_trusted(byte_tokenizer) -> None:  # type: ignore[no-untyped-def]
    table, mean = bytes_of_ids(byte_tokenizer, SplitTokens(np.zeros(5, np.uint16), None, None))
    assert table is not None
    assert mean == 1.0


def test_bytes_of_ids_when_there_is_no_validation_text_then_nothing(byte_tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert bytes_of_ids(byte_tokenizer, None) == (None, 0.0)
    assert bytes_of_ids(byte_tokenizer, SplitTokens(np.zeros(0, np.uint16), 0, 0)) == (None, 0.0)


def test_bytes_of_ids_when_an_id_is_beyond_the_vocabulary_then_refused_with_the_option(byte_tokenizer) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r"hold id 300, but the tokenizer has 257 tokens.*--tokenizer_name"):
        bytes_of_ids(byte_tokenizer, SplitTokens(np.array([1, 300], np.uint16), None, None))


def test_require_same_on_all_when_rank_0_has_another_text_then_refused(
    tiny_gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = _dataset(tiny_gpt2_dir, "--train_file", _token_file(tmp_path / "a.bin", [1] * 100))
    dataset.require_same_on_all(ALONE)
    monkeypatch.setattr(World, "broadcast", lambda world, value: value | {"data_hash": "other"})
    with pytest.raises(UserError, match="rank 0 has another text or tokenizer than rank 0"):
        dataset.require_same_on_all(ALONE)


def test_hub_names_when_names_are_paths_or_built_in_then_left_out(tiny_text: Path, tiny_gpt2_dir: Path) -> None:
    local = ("--tokenizer_name", tiny_gpt2_dir, "--config_name", tiny_gpt2_dir)
    assert hub_names(_options("--train_file", tiny_text, *local)) == []
    assert hub_names(_options("--dataset_name", "builtin:python", "--tokenizer_name", "char")) == []
    hub = ("--dataset_name", "some/set", "--tokenizer_name", "some/tokenizer", "--model_name_or_path", "some/model")
    assert hub_names(_options(*hub)) == ["some/set", "some/tokenizer", "some/model"]
