"""The token cache: tokenized once, complete or absent."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from llm.config.errors import UserError
from llm.config.options import DataOptions
from llm.data.preparation import cache
from llm.data.preparation.cache import load_or_tokenize
from llm.data.shards.format import TokenizedText
from llm.data.sources.corpus import open_corpus
from llm.tokenization.encoder import Encoder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [f"document {number} ä\n€" for number in range(100)]
    lines = [json.dumps({"text": text}) for text in [*texts[:50], "", None, *texts[50:]]]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def cached(tmp_path: Path, byte_tokenizer):
    """Tokenizes files with the byte tokenizer into the cache, or opens them there."""

    def cached(*files: Path, tokenizer=byte_tokenizer, eos_in_single_text=True, **options) -> TokenizedText:
        data = DataOptions(train_file=tuple(map(str, files)), **options)
        return load_or_tokenize(
            open_corpus(data),
            tokenizer,
            tokenizer_hash="bytes",
            options=data,
            cache_dir=tmp_path / "cache",
            eos_in_single_text=eos_in_single_text,
        )

    return cached


def test_load_or_tokenize_when_cached_then_reads_no_text(cached, rows, monkeypatch, caplog) -> None:
    first = cached(rows)
    caplog.set_level("INFO")
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("tokenized again"))
    monkeypatch.setattr("llm.data.sources.readers.read_text", lambda *_: pytest.fail("read again"))
    second = cached(rows, block_size=16)
    assert second.dir == first.dir
    assert second.data_hash == first.data_hash
    assert second.train.tokens[:].tolist() == first.train.tokens[:].tolist()
    assert f"from the cache {first.dir}" in caplog.text


def test_load_or_tokenize_when_overwriting_then_tokenized_again_and_mapped_tokens_stay(cached, rows) -> None:
    first = cached(rows)
    before = first.train.tokens[:].tolist()
    inode = (first.dir / "manifest.json").stat().st_ino
    second = cached(rows, overwrite_cache=True)
    assert (second.dir / "manifest.json").stat().st_ino != inode
    assert first.train.tokens[:].tolist() == before == second.train.tokens[:].tolist()
    assert [path.name for path in first.dir.parent.iterdir()] == [first.dir.name]


def test_load_or_tokenize_when_text_or_tokenizer_changes_then_another_folder(
    cached, rows, tmp_path, byte_tokenizer, monkeypatch
) -> None:
    first = cached(rows)
    rows.write_text(rows.read_text() + '\n{"text": "more"}\n')
    second = cached(rows)
    assert second.dir != first.dir
    assert second.data_hash != first.data_hash
    data = DataOptions(train_file=(str(rows),))
    third = load_or_tokenize(
        open_corpus(data), byte_tokenizer, tokenizer_hash="another", options=data, cache_dir=tmp_path
    )
    assert third.dir.name not in (first.dir.name, second.dir.name)
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("tokenized again"))
    assert cached(rows).dir == second.dir


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "broken manifest", "no tokens"])
def test_load_or_tokenize_when_cache_is_damaged_then_tokenized_again(cached, rows, damage: str, caplog) -> None:
    first = cached(rows)
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
    second = cached(rows)
    assert second.train.tokens[:].tolist() == expected
    assert "tokenizing again" in caplog.text


def test_load_or_tokenize_when_another_process_was_faster_then_its_tokens(cached, rows, monkeypatch) -> None:
    put = cache._put_in_place
    other = []

    def race(temporary: Path, folder: Path, *, replace: bool) -> None:
        if not other:
            other.append(None)
            cached(rows)
            other.append((folder / "manifest.json").stat().st_ino)
        put(temporary, folder, replace=replace)

    monkeypatch.setattr(cache, "_put_in_place", race)
    streams = cached(rows)
    assert (streams.dir / "manifest.json").stat().st_ino == other[1]
    assert [path.name for path in streams.dir.parent.iterdir()] == [streams.dir.name]


def test_load_or_tokenize_when_it_fails_then_no_folder_is_left(cached, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"\n')
    with pytest.raises(UserError, match="line 2"):
        cached(path, validation_split_percentage=0)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_load_or_tokenize_when_the_disk_is_full_then_error_names_the_cause(cached, rows, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llm.data.shards.writer.SplitWriter.flush", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        cached(rows)


def test_load_or_tokenize_when_a_killed_process_left_folders_then_old_ones_are_removed(cached, rows) -> None:
    folder = cached(rows).dir
    for name, age in [("old", 90_000), ("new", 10)]:
        left = folder.with_name(f".{folder.name}.{name}.tmp")
        left.mkdir()
        (left / "train_00000.bin").write_bytes(b"1")
        for path in (left / "train_00000.bin", left):
            os.utime(path, (time.time() - age,) * 2)
    cached(rows, overwrite_cache=True)
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        f".{folder.name}.new.tmp",
        folder.name,
    ]
