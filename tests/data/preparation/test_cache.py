"""Tokenized once, and whole or absent."""

from __future__ import annotations

import errno
import json
import os
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from llm.config.errors import UserError
from llm.config.options import DataOptions
from llm.data.batches.ledger import ledger
from llm.data.preparation import cache as module
from llm.data.preparation.cache import load_or_tokenize
from llm.data.shards.format import Streams
from llm.data.shards.memmap import Tokens
from llm.data.sources.corpus import open_corpus
from llm.tokenization.encoder import Encoder

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
def make(tmp_path: Path, byte_tokenizer):
    """Tokenizes files with the byte tokenizer."""

    def make(*files: Path, tokenizer=byte_tokenizer, eos_in_single_text=True, **options) -> Streams:
        data = DataOptions(train_file=tuple(map(str, files)), **options)
        return load_or_tokenize(
            open_corpus(data),
            tokenizer,
            tokenizer_hash="bytes",
            options=data,
            cache_dir=tmp_path / "cache",
            eos_in_single_text=eos_in_single_text,
        )

    return make


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tokenize_when_documents_then_each_followed_by_eos(make, rows, byte_tokenizer) -> None:
    streams = make(rows, validation_split_percentage=10)
    expected = [[*_ids(byte_tokenizer, f"document {i} ä\n€"), EOS] for i in range(100)]
    assert streams.train.tokens[:].tolist() == list(chain(*expected[:90]))
    assert streams.validation.tokens[:].tolist() == list(chain(*expected[90:]))
    assert (streams.train.num_documents, streams.validation.num_documents) == (90, 10)
    assert streams.train.num_bytes == len(streams.train.tokens) - 90
    assert streams.skipped == {"empty": 1, "null": 1}
    assert streams.train.tokens[:].dtype == np.dtype("<u2")
    assert isinstance(streams.train.tokens, Tokens)
    assert streams.vocabulary_size == 257


def test_tokenize_when_one_document_is_cut_then_eos_at_its_end_only(make, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    streams = make(tmp_path / "a.txt", validation_split_percentage=10)
    assert len(streams.train.tokens) == 90
    assert len(streams.validation.tokens) == 11
    assert EOS not in streams.train.tokens[:]
    assert streams.validation.tokens[-1:] == EOS


def test_tokenize_when_single_text_takes_no_eos_then_none(make, tmp_path, rows) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    options = {"validation_split_percentage": 10, "eos_in_single_text": False}
    one = make(tmp_path / "a.txt", **options)
    assert (len(one.train.tokens), len(one.validation.tokens)) == (90, 10)
    many = make(rows, **options)
    assert np.count_nonzero(many.train.tokens[:] == EOS) == 90
    assert many.train.tokens[-1:] == EOS


def test_tokenize_when_tokenizer_has_no_eos_then_none_and_said(make, rows, caplog) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    engine = Tokenizer(models.BPE(vocab=letters, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    streams = make(rows, tokenizer=PreTrainedTokenizerFast(tokenizer_object=engine))
    assert len(streams.train.tokens) == streams.train.num_bytes
    assert "no end-of-text token" in caplog.text


def test_tokenize_when_done_before_then_tokenizes_nothing(make, rows, monkeypatch, caplog) -> None:
    first = make(rows)
    caplog.set_level("INFO")
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("tokenized again"))
    monkeypatch.setattr("llm.data.sources.readers.read_text", lambda *_: pytest.fail("read again"))
    second = make(rows, block_size=16)
    assert second.dir == first.dir
    assert second.data_hash == first.data_hash
    assert second.train.tokens[:].tolist() == first.train.tokens[:].tolist()
    assert f"from the cache {first.dir}" in caplog.text


def test_tokenize_when_told_to_overwrite_then_done_again_and_old_map_stays(make, rows) -> None:
    first = make(rows)
    before = first.train.tokens[:].tolist()
    made = (first.dir / "manifest.json").stat().st_ino
    second = make(rows, overwrite_cache=True)
    assert (second.dir / "manifest.json").stat().st_ino != made
    assert first.train.tokens[:].tolist() == before == second.train.tokens[:].tolist()
    assert [path.name for path in first.dir.parent.iterdir()] == [first.dir.name]


def test_tokenize_when_text_or_tokenizer_changes_then_another_folder(
    make, rows, tmp_path, byte_tokenizer, monkeypatch
) -> None:
    first = make(rows)
    rows.write_text(rows.read_text() + '\n{"text": "more"}\n')
    second = make(rows)
    assert second.dir != first.dir
    assert second.data_hash != first.data_hash
    data = DataOptions(train_file=(str(rows),))
    third = load_or_tokenize(
        open_corpus(data), byte_tokenizer, tokenizer_hash="another", options=data, cache_dir=tmp_path
    )
    assert third.dir.name not in (first.dir.name, second.dir.name)
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("tokenized again"))
    assert make(rows).dir == second.dir


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "broken manifest", "no tokens"])
def test_tokenize_when_cache_is_damaged_then_made_again(make, rows, damage: str, caplog) -> None:
    first = make(rows)
    expected = first.train.tokens[:].tolist()
    match damage:
        case "truncated":
            (first.dir / "train_00000.bin").write_bytes(b"12")
        case "no manifest":
            (first.dir / "manifest.json").unlink()
        case "broken manifest":
            (first.dir / "manifest.json").write_text('{"splits": 3}')
        case "no tokens":
            (first.dir / "validation_00000.bin").unlink()
    second = make(rows)
    assert second.train.tokens[:].tolist() == expected
    assert "tokenizing again" in caplog.text


def test_tokenize_when_another_process_was_faster_then_its_streams(make, rows, monkeypatch) -> None:
    put = module._put_in_place
    other = []

    def race(temporary: Path, folder: Path, *, replace: bool) -> None:
        if not other:
            other.append(None)
            make(rows)
            other.append((folder / "manifest.json").stat().st_ino)
        put(temporary, folder, replace=replace)

    monkeypatch.setattr(module, "_put_in_place", race)
    streams = make(rows)
    assert (streams.dir / "manifest.json").stat().st_ino == other[1]
    assert [path.name for path in streams.dir.parent.iterdir()] == [streams.dir.name]


def test_tokenize_when_it_fails_then_nothing_is_left(make, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"\n')
    with pytest.raises(UserError, match="line 2"):
        make(path, validation_split_percentage=0)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_tokenize_when_the_disk_is_full_then_said_with_the_mend(make, rows, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llm.data.shards.writer.SplitWriter.flush", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        make(rows)


def test_tokenize_when_a_killed_process_left_files_then_old_ones_go(make, rows) -> None:
    folder = make(rows).dir
    for name, age in [("old", 90_000), ("new", 10)]:
        left = folder.with_name(f".{folder.name}.{name}.tmp")
        left.mkdir()
        (left / "train_00000.bin").write_bytes(b"1")
        for path in (left / "train_00000.bin", left):
            os.utime(path, (time.time() - age,) * 2)
    make(rows, overwrite_cache=True)
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        f".{folder.name}.new.tmp",
        folder.name,
    ]


def test_tokenize_when_validation_file_holds_no_text_then_refused(make, rows, tmp_path) -> None:
    (tmp_path / "v.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"the validation text of rows\.jsonl: holds no text"):
        make(rows, validation_file=(str(tmp_path / "v.jsonl"),))


def test_tokenize_when_no_share_held_out_then_no_validation(make, rows) -> None:
    assert make(rows, validation_split_percentage=0).validation is None


def test_tokenize_when_it_takes_long_then_progress_is_logged(make, rows, monkeypatch, caplog) -> None:
    monkeypatch.setattr("llm.data.preparation.tokenize._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("llm.data.preparation.chunking.BATCH_CHARS", 100)
    caplog.set_level("INFO")
    make(rows)
    assert caplog.text.count("tokenizing rows.jsonl: ") > 5
    assert "100 documents" in caplog.text


def test_tokenize_when_watched_then_shown_how_far_and_no_lines(
    rows, tmp_path, byte_tokenizer, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("llm.data.preparation.tokenize._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("llm.data.preparation.chunking.BATCH_CHARS", 100)
    caplog.set_level("INFO")
    shown = []
    data = DataOptions(train_file=(str(rows),), validation_split_percentage=10)
    streams = load_or_tokenize(
        open_corpus(data), byte_tokenizer, tokenizer_hash="", options=data, cache_dir=tmp_path, on_progress=shown.append
    )
    assert len(shown) > 5
    assert [counts.num_bytes for counts in shown] == sorted(counts.num_bytes for counts in shown)
    last = shown[-1]
    assert last.num_bytes == last.total_bytes == streams.train.num_bytes + streams.validation.num_bytes
    assert last.num_tokens == len(streams.train.tokens) + len(streams.validation.tokens)
    assert last.seconds_left == 0 and last.bytes_per_second > 0
    assert "tokenizing rows.jsonl: " not in caplog.text


def test_tokenize_when_vocabulary_is_large_then_four_bytes_a_token(make, rows, monkeypatch) -> None:
    monkeypatch.setattr("llm.tokenization.encoder.vocabulary_size", lambda _: 65537)
    streams = make(rows)
    assert streams.train.tokens[:].dtype == np.dtype("<u4")
    assert streams.vocabulary_size == 65537


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "wikitext2-valid.txt"])
def test_tokenize_when_real_text_then_ids_of_the_tokenizer(make, name: str) -> None:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    from transformers import AutoTokenizer

    gpt2 = AutoTokenizer.from_pretrained(SHARED / "gpt2-tokenizer")
    streams = make(SHARED / name, tokenizer=gpt2, validation_split_percentage=10)
    data = (SHARED / name).read_bytes()
    cut = int(len(data) * (1 - 10 / 100))
    while data[cut] & 0xC0 == 0x80:
        cut -= 1
    train, validation = (
        gpt2(part.decode(), add_special_tokens=False, verbose=False)["input_ids"] for part in (data[:cut], data[cut:])
    )
    assert streams.train.tokens[:].tolist() == train
    assert streams.validation.tokens[:].tolist() == [*validation, gpt2.eos_token_id]
    for block_size in (64, 1000, 1024):
        book = ledger(streams, block_size)
        assert book.total == len(train) + len(validation) + 1
        assert max(book.dropped_train, book.dropped_validation) < block_size
