"""The format of tokenized text: complete, and checked when it is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm.config.errors import UserError
from llm.data.shards.format import (
    TokenizerMismatchError,
    TruncatedShardError,
    UnfinishedShardsError,
    UnknownFormatError,
    VersionMismatchError,
    open_folder,
    open_shard,
    verify,
)

EOS = 256


@pytest.fixture
def folder(tmp_path: Path, byte_tokenizer) -> Path:  # type: ignore[no-untyped-def]
    """A finished folder of a few shards of ten tokens."""
    from llm.config.options import DataOptions
    from llm.data.preparation.tokenize import write_shards
    from llm.data.sources.corpus import open_corpus

    rows = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(12))
    (tmp_path / "rows.jsonl").write_text(rows)
    corpus = open_corpus(DataOptions(train_file=(str(tmp_path / "rows.jsonl"),), validation_split_percentage=25))
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shards(corpus, byte_tokenizer, shards, tokenizer_hash="hash", shard_size=10, eos_in_single_text=True)
    return shards


def test_open_folder_when_complete_then_all_tokens_and_verify_finds_no_damage(folder: Path, byte_tokenizer) -> None:  # type: ignore[no-untyped-def]
    streams = open_folder(folder, tokenizer_hash="hash")
    expected = [token for number in range(12) for token in (*byte_tokenizer.encode(f"text {number}"), EOS)]
    assert streams.validation is not None
    assert [*streams.train.tokens[:].tolist(), *streams.validation.tokens[:].tolist()] == expected
    assert streams.train.num_documents == 9 and streams.validation.num_documents == 3
    assert len(streams.train.tokens) + len(streams.validation.tokens) == len(expected)
    damage = list(verify(folder))
    assert len(damage) > 5
    assert all(description is None for _, description in damage)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("train_00001.bin", lambda data: data[:-2], TruncatedShardError),
        ("train_00001.bin", None, TruncatedShardError),
        ("train_00001.starts", lambda data: data + b"12345678", TruncatedShardError),
        ("train_00001.json", None, UnfinishedShardsError),
        ("train_00001.json", lambda data: b"{}", UnknownFormatError),
        ("train_00001.json", lambda data: b"\xff\x00", UnknownFormatError),
        ("train_00001.json", lambda data: data.replace(b"num_tokens", b"tokens"), UnknownFormatError),
        ("train_00001.json", lambda data: data.replace(b'"version": 1', b'"version": 2'), VersionMismatchError),
        ("train_00001.json", lambda data: data.replace(b'"hash"', b'"hush"'), TokenizerMismatchError),
        ("train_00001.json", lambda data: data.replace(b": 257", b": 258"), TokenizerMismatchError),
        ("manifest.json", None, UnfinishedShardsError),
        ("manifest.json", lambda data: data.replace(b'"version": 1', b'"version": 0'), VersionMismatchError),
        ("manifest.json", lambda data: data.replace(b"splits", b"spluts"), UnknownFormatError),
    ],
)
def test_open_folder_when_a_file_is_damaged_then_named(folder: Path, name: str, change, error) -> None:  # type: ignore[no-untyped-def]
    path = folder / name
    data = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(data))
    with pytest.raises(error, match=Path(name).stem) as refusal:
        open_folder(folder)
    assert isinstance(refusal.value, UserError)
    assert "\n" not in str(refusal.value)


def test_open_shard_when_another_tokenizer_is_required_then_refused(folder: Path) -> None:
    with pytest.raises(TokenizerMismatchError, match="another tokenizer"):
        open_shard(folder / "train_00000.bin", tokenizer_hash="other")
    with pytest.raises(TokenizerMismatchError, match="another tokenizer"):
        open_folder(folder, tokenizer_hash="other")


@pytest.mark.parametrize(
    ("name", "place", "value", "words"),
    [
        ("train_00001.bin", 4, 65, "other ids"),
        ("train_00001.bin", 5, 7, "has id "),
        ("train_00000.starts", 8, 3, "other document starts"),
    ],
)
def test_verify_when_a_byte_changed_then_the_shard_is_named(
    folder: Path, name: str, place: int, value: int, words: str
) -> None:
    data = bytearray((folder / name).read_bytes())
    data[place] = value
    (folder / name).write_bytes(data)
    open_folder(folder)
    damaged = {shard.path.name: damage for shard, damage in verify(folder) if damage is not None}
    assert list(damaged) == [Path(name).with_suffix(".bin").name]
    assert words in next(iter(damaged.values()))
