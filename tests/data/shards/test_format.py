"""The format of tokenized text: whole, checked at open, and read as one stream."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from llm.config.errors import UserError
from llm.data.shards.format import (
    Shard,
    TokenizerMismatchError,
    TruncatedShardError,
    UnfinishedShardsError,
    UnknownFormatError,
    VersionMismatchError,
    finished_shards,
    open_folder,
    open_shard,
    verify,
)
from llm.data.shards.memmap import TokenFile, Tokens
from llm.data.shards.writer import ShardSpec, SplitWriter
from llm.data.sources.documents import Piece, TextChunk
from llm.data.sources.validation_split import split_by_hash

EOS = 256


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of small shards: no test here loses its power."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def _form(shard_size: int = 10, vocabulary_size: int = 257, single: bool = True) -> ShardSpec:
    return ShardSpec(vocabulary_size, "hash", shard_size, EOS if vocabulary_size > EOS else None, single)


def _documents(seed: int = 0, count: int = 30) -> list[list[Piece]]:
    """Documents in one to three pieces, some of which are long, short, or give no ids."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        texts = ["".join(draw.choices("abcdef", k=draw.choice([1, 2, 7, 35]))) for _ in range(draw.randint(1, 3))]
        last = len(texts) - 1
        found.append([Piece("train", text, i == 0, i == last) for i, text in enumerate(texts)])
    return found


def _ids(piece: Piece) -> np.ndarray:
    """Some pieces give nothing, as with a tokenizer that drops characters."""
    kept = piece.text if piece.text[0] != "f" else ""
    return np.frombuffer(kept.encode(), np.uint8).astype(np.uint32)


def _write(
    folder: Path, form: ShardSpec, pieces: list[Piece], *, stop: int | None = None, flush_every: int = 3
) -> None:
    """Gives the pieces to a writer; without the end, as a killed process leaves it, if `stop` is given."""
    folder.mkdir(exist_ok=True)
    writer = SplitWriter(folder, "train", form)
    for number, piece in enumerate(pieces if stop is None else islice(pieces, stop), start=1):
        if not writer.skip(piece):
            writer.add(piece, _ids(piece))
        if number % flush_every == 0:
            writer.flush()
    if stop is None:
        writer.finish()
    # A killed process does not even close.


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


@pytest.fixture
def folder(tmp_path: Path, byte_tokenizer) -> Path:  # type: ignore[no-untyped-def]
    """A finished folder of a few shards of ten tokens."""
    from llm.config.options import DataOptions
    from llm.data.preparation.tokenize import write_shards
    from llm.data.sources.corpus import open_corpus

    rows = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(12))
    (tmp_path / "rows.jsonl").write_text(rows)
    corpus = open_corpus(DataOptions(train_file=(str(tmp_path / "rows.jsonl"),), validation_split_percentage=25))
    made = tmp_path / "shards"
    made.mkdir()
    write_shards(corpus, byte_tokenizer, made, tokenizer_hash="hash", shard_size=10, eos_in_single_text=True)
    return made


def test_writer_when_another_one_writes_the_same_shards_then_they_are_whole_all_the_same(tmp_path: Path) -> None:
    pieces = [piece for document in _documents() for piece in document]
    _write(tmp_path / "alone", _form(64), pieces)
    folder = tmp_path / "both"
    folder.mkdir()
    # Both took the folder for theirs: one of them stood still, and was taken for dead.
    one, other = (SplitWriter(folder, "train", _form(64)) for _ in range(2))
    for piece in pieces:
        for writer in (one, other):
            writer.add(piece, _ids(piece))
            writer.flush()
    assert len(list(folder.glob(".train_*.tmp"))) == 2
    one.close()
    other.finish()
    assert _content(folder) == _content(tmp_path / "alone")
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("shard_size", [1, 7, 64, 10_000])
@pytest.mark.parametrize(("vocabulary_size", "single"), [(257, True), (257, False), (200, True)])
def test_writer_when_killed_anywhere_then_continues_to_the_same_bytes(
    tmp_path: Path, shard_size: int, vocabulary_size: int, single: bool
) -> None:
    pieces = [piece for document in _documents() for piece in document]
    form = _form(shard_size, vocabulary_size, single)
    _write(tmp_path / "whole", form, pieces)
    expected = _content(tmp_path / "whole")
    draw = random.Random(1)
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        for stop in sorted(draw.sample(range(len(pieces) + 1), 3)):
            _write(folder, form, pieces, stop=stop, flush_every=draw.randint(1, 5))
        _write(folder, form, pieces, flush_every=draw.randint(1, 5))
        assert _content(folder) == expected


def test_writer_when_documents_then_shards_are_the_stream_and_say_where_documents_start(tmp_path: Path) -> None:
    documents = _documents()
    _write(tmp_path / "a", _form(10), [piece for document in documents for piece in document])
    shards = finished_shards(tmp_path / "a", "train")
    stream = [np.concatenate([*map(_ids, document), np.array([EOS])]) for document in documents]
    whole = np.concatenate(stream)
    tokens = Tokens([shard.tokens for shard in shards])
    assert tokens[:].tolist() == whole.tolist()
    assert [shard.num_tokens for shard in shards[:-1]] == [10] * (len(shards) - 1)
    starts = np.concatenate([shard.starts.map().ids + 10 * i for i, shard in enumerate(shards)])
    assert starts.tolist() == [0, *np.cumsum([len(ids) for ids in stream])[:-1].tolist()]
    assert [shard.begins for shard in shards[1:]] == [shard.ends for shard in shards[:-1]]


def test_open_folder_when_whole_then_its_streams_and_verify_finds_nothing(folder: Path, byte_tokenizer) -> None:  # type: ignore[no-untyped-def]
    streams = open_folder(folder, tokenizer_hash="hash")
    expected = [token for number in range(12) for token in (*byte_tokenizer.encode(f"text {number}"), EOS)]
    assert streams.validation is not None
    assert [*streams.train.tokens[:].tolist(), *streams.validation.tokens[:].tolist()] == expected
    assert streams.train.num_documents == 9 and streams.validation.num_documents == 3
    assert len(streams.train.tokens) + len(streams.validation.tokens) == len(expected)
    damage = list(verify(folder))
    assert len(damage) > 5
    assert all(found is None for _, found in damage)


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
def test_open_folder_when_something_is_wrong_then_named(folder: Path, name: str, change, error) -> None:  # type: ignore[no-untyped-def]
    path = folder / name
    data = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(data))
    with pytest.raises(error, match=Path(name).stem) as refusal:
        open_folder(folder)
    assert isinstance(refusal.value, UserError)
    assert "\n" not in str(refusal.value)


def test_open_shard_when_another_tokenizer_is_asked_for_then_refused(folder: Path) -> None:
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
    found = {shard.path.name: damage for shard, damage in verify(folder) if damage is not None}
    assert list(found) == [Path(name).with_suffix(".bin").name]
    assert words in next(iter(found.values()))


def _files(folder: Path, sizes: list[int], dtype: str = "<u2") -> Iterator[TokenFile]:
    first = 0
    for number, size in enumerate(sizes):
        path = folder / f"{number}.bin"
        path.write_bytes(b"h" * number + np.arange(first, first + size).astype(dtype).tobytes())
        yield TokenFile(path, dtype, size, number)
        first += size


def test_tokens_when_sliced_then_as_one_array(tmp_path: Path) -> None:
    sizes = [5, 0, 1, 13, 0, 2]
    tokens = Tokens(list(_files(tmp_path, sizes)))
    whole = np.arange(sum(sizes))
    assert len(tokens) == len(whole)
    for start in range(-3, len(whole) + 2):
        for stop in (*range(-3, len(whole) + 2), None):
            assert tokens[start:stop].tolist() == whole[start:stop].tolist()
            part = tokens.sliced(start, stop)
            assert part[:].tolist() == whole[start:stop].tolist()
            assert part[1:4].tolist() == whole[start:stop][1:4].tolist()
    with pytest.raises(ValueError, match="without a step"):
        tokens[::2]


def test_tokens_when_inside_one_file_then_nothing_is_copied_and_a_pickle_is_small(tmp_path: Path) -> None:
    tokens = Tokens(list(_files(tmp_path, [5000, 5000])))
    piece = tokens[100:4000]
    assert not piece.flags.owndata and not piece.flags.writeable
    sent = pickle.dumps(tokens)
    assert len(sent) < 1000
    assert pickle.loads(sent)[4990:5010].tolist() == list(range(4990, 5010))


def test_tokens_when_read_often_then_views_stay_valid(tmp_path: Path) -> None:
    tokens = Tokens(list(_files(tmp_path, [3000, 3000])))
    kept = tokens[10:20]
    for start in range(2000):
        assert tokens[start : start + 3].tolist() == [start, start + 1, start + 2]
    assert kept.tolist() == list(range(10, 20))


def test_split_by_hash_when_read_twice_or_in_other_order_then_the_same_documents(tmp_path: Path) -> None:
    documents = [[TextChunk(f"text {i}", False), TextChunk("tail", True)] for i in range(2000)]

    def held_out(order: list[list[TextChunk]]) -> set[str]:
        parts = split_by_hash((part for document in order for part in document), 10)
        found = list(parts)
        assert [part for _, part in found] == [part for document in order for part in document]
        assert all(found[i][0] == found[i + 1][0] for i in range(0, len(found), 2))
        return {part.text for split, part in found if split == "validation" and not part.ends}

    one = held_out(documents)
    assert 140 < len(one) < 260
    assert held_out(documents[::-1]) == one


def test_shard_when_vocabulary_is_large_then_four_bytes(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", ShardSpec(70_000, "hash", 4, None, True))
    writer.add(Piece("train", "abc", True, True), np.array([1, 69_999, 65_536], np.uint32))
    writer.finish()
    shard: Shard = open_shard(tmp_path / "train_00000.bin", tokenizer_hash="hash", vocabulary_size=70_000)
    assert (shard.dtype, shard.min_id, shard.max_id) == ("uint32", 1, 69_999)
    assert Tokens([shard.tokens])[:].tolist() == [1, 69_999, 65_536]
