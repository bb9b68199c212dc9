"""A text in shards: its tokens, and the progress of writing them."""

from __future__ import annotations

import json
import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from llm.config.errors import UserError
from llm.config.options import DataOptions
from llm.data.batches.ledger import ledger
from llm.data.preparation.tokenize import ProgressCallback, TokenizeProgress, write_shards
from llm.data.shards.format import TokenizedText, open_folder
from llm.data.shards.memmap import Tokens
from llm.data.sources.corpus import open_corpus

SHARED = Path(os.environ.get("LLM_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
EOS = 256


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [f"document {number} ä\n€" for number in range(100)]
    lines = [json.dumps({"text": text}) for text in [*texts[:50], "", None, *texts[50:]]]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def tokenize(tmp_path: Path, byte_tokenizer):
    """Writes files with the byte tokenizer into a new folder, and opens the folder."""
    folders = iter(range(10))

    def tokenize(
        *files: Path,
        tokenizer=byte_tokenizer,
        eos_in_single_text: bool = True,
        on_progress: ProgressCallback | None = None,
        **options: object,
    ) -> TokenizedText:
        folder = tmp_path / f"shards_{next(folders)}"
        folder.mkdir()
        write_shards(
            open_corpus(DataOptions(train_file=tuple(map(str, files)), **options)),
            tokenizer,
            folder,
            tokenizer_hash="bytes",
            shard_size=1_000_000,
            eos_in_single_text=eos_in_single_text,
            num_workers=1,
            on_progress=on_progress,
        )
        return open_folder(folder)

    return tokenize


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_write_shards_when_text_has_documents_then_each_is_followed_by_eos(tokenize, rows, byte_tokenizer) -> None:
    streams = tokenize(rows, validation_split_percentage=10)
    expected = [[*_ids(byte_tokenizer, f"document {i} ä\n€"), EOS] for i in range(100)]
    assert streams.train.tokens[:].tolist() == list(chain(*expected[:90]))
    assert streams.validation.tokens[:].tolist() == list(chain(*expected[90:]))
    assert (streams.train.num_documents, streams.validation.num_documents) == (90, 10)
    assert streams.train.num_bytes == len(streams.train.tokens) - 90
    assert streams.skipped == {"empty": 1, "null": 1}
    assert streams.train.tokens[:].dtype == np.dtype("<u2")
    assert isinstance(streams.train.tokens, Tokens)
    assert streams.vocabulary_size == 257


def test_write_shards_when_one_document_is_divided_then_eos_at_its_end_only(tokenize, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    streams = tokenize(tmp_path / "a.txt", validation_split_percentage=10)
    assert len(streams.train.tokens) == 90
    assert len(streams.validation.tokens) == 11
    assert EOS not in streams.train.tokens[:]
    assert streams.validation.tokens[-1:] == EOS


def test_write_shards_when_single_text_needs_no_eos_then_none(tokenize, tmp_path, rows) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    options = {"validation_split_percentage": 10, "eos_in_single_text": False}
    one = tokenize(tmp_path / "a.txt", **options)
    assert (len(one.train.tokens), len(one.validation.tokens)) == (90, 10)
    many = tokenize(rows, **options)
    assert np.count_nonzero(many.train.tokens[:] == EOS) == 90
    assert many.train.tokens[-1:] == EOS


def test_write_shards_when_tokenizer_has_no_eos_then_none_and_warning(tokenize, rows, caplog) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    streams = tokenize(rows, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))
    assert len(streams.train.tokens) == streams.train.num_bytes
    assert "no end-of-text token" in caplog.text


def test_write_shards_when_validation_file_holds_no_text_then_error(tokenize, rows, tmp_path) -> None:
    (tmp_path / "v.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"the validation text of rows\.jsonl: holds no text"):
        tokenize(rows, validation_file=(str(tmp_path / "v.jsonl"),))


def test_write_shards_when_nothing_is_held_out_then_no_validation(tokenize, rows) -> None:
    assert tokenize(rows, validation_split_percentage=0).validation is None


def test_write_shards_when_it_takes_long_then_progress_is_logged(tokenize, rows, monkeypatch, caplog) -> None:
    monkeypatch.setattr("llm.data.preparation.tokenize._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("llm.data.preparation.chunking.BATCH_CHARS", 100)
    caplog.set_level("INFO")
    tokenize(rows)
    assert caplog.text.count("tokenizing rows.jsonl: ") > 5
    assert "100 documents" in caplog.text


def test_write_shards_when_given_a_callback_then_it_gets_the_progress_and_no_lines_are_logged(
    tokenize, rows, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("llm.data.preparation.tokenize._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("llm.data.preparation.chunking.BATCH_CHARS", 100)
    caplog.set_level("INFO")
    reports: list[TokenizeProgress] = []
    streams = tokenize(rows, validation_split_percentage=10, on_progress=reports.append)
    assert len(reports) > 5
    assert [progress.num_bytes for progress in reports] == sorted(progress.num_bytes for progress in reports)
    last = reports[-1]
    assert last.num_bytes == last.total_bytes == streams.train.num_bytes + streams.validation.num_bytes
    assert last.num_tokens == len(streams.train.tokens) + len(streams.validation.tokens)
    assert last.seconds_left == 0 and last.bytes_per_second > 0
    assert "tokenizing rows.jsonl: " not in caplog.text


def test_write_shards_when_vocabulary_is_large_then_four_bytes_a_token(tokenize, rows, monkeypatch) -> None:
    monkeypatch.setattr("llm.tokenization.encoder.vocabulary_size", lambda _: 65537)
    streams = tokenize(rows)
    assert streams.train.tokens[:].dtype == np.dtype("<u4")
    assert streams.vocabulary_size == 65537


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "wikitext2-valid.txt"])
def test_write_shards_when_text_is_real_then_ids_of_the_tokenizer(tokenize, name: str) -> None:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    from transformers import AutoTokenizer

    gpt2 = AutoTokenizer.from_pretrained(SHARED / "gpt2-tokenizer")
    streams = tokenize(SHARED / name, tokenizer=gpt2, validation_split_percentage=10)
    data = (SHARED / name).read_bytes()
    split = int(len(data) * (1 - 10 / 100))
    while data[split] & 0xC0 == 0x80:
        split -= 1
    train, validation = (
        gpt2(text.decode(), add_special_tokens=False, verbose=False)["input_ids"]
        for text in (data[:split], data[split:])
    )
    assert streams.train.tokens[:].tolist() == train
    assert streams.validation.tokens[:].tolist() == [*validation, gpt2.eos_token_id]
    for block_size in (64, 1000, 1024):
        counts = ledger(streams, block_size)
        assert counts.total == len(train) + len(validation) + 1
        assert max(counts.dropped_train, counts.dropped_validation) < block_size


def test_progress_when_size_or_speed_is_unknown_then_no_time_left() -> None:
    progress = TokenizeProgress(
        num_bytes=50, num_bytes_resumed=10, total_bytes=90, num_tokens=0, num_documents=1, seconds=2.0
    )
    assert progress.bytes_per_second == 20.0
    assert progress.seconds_left == 2.0
    assert progress._replace(total_bytes=None).seconds_left is None
    assert progress._replace(num_bytes=10).seconds_left is None


def test_write_shards_when_an_attempt_was_stopped_then_continues_to_the_same_bytes(
    rows, tmp_path, byte_tokenizer, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("llm.data.preparation.chunking.BATCH_CHARS", 100)
    corpus = open_corpus(DataOptions(train_file=(str(rows),)))
    arguments = {"tokenizer_hash": "bytes", "shard_size": 500, "eos_in_single_text": True, "num_workers": 1}

    class StoppedError(Exception):
        pass

    num_calls = 0

    def check() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 12:
            raise StoppedError

    for name in ("stopped", "complete"):
        (tmp_path / name).mkdir()
    with pytest.raises(StoppedError):
        write_shards(corpus, byte_tokenizer, tmp_path / "stopped", check=check, **arguments)
    assert (tmp_path / "stopped" / "train_00000.bin").exists()
    caplog.set_level("INFO")
    write_shards(corpus, byte_tokenizer, tmp_path / "stopped", **arguments)
    assert "continuing after" in caplog.text
    write_shards(corpus, byte_tokenizer, tmp_path / "complete", **arguments)
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("stopped", "complete")
    ]
    assert contents[0] == contents[1]
