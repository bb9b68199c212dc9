"""The writer of one split: the same bytes after any number of killed processes."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from llm.data.shards.format import Shard, finished_shards, open_shard
from llm.data.shards.memmap import Tokens
from llm.data.shards.writer import ShardSpec, SplitWriter
from llm.data.sources.documents import Piece

EOS = 256


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync for hundreds of small shards: no test here simulates a power failure."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def _spec(shard_size: int = 10, vocabulary_size: int = 257, single: bool = True) -> ShardSpec:
    return ShardSpec(vocabulary_size, "hash", shard_size, EOS if vocabulary_size > EOS else None, single)


def _documents(seed: int = 0, count: int = 30) -> list[list[Piece]]:
    """Make documents of one to three pieces, some of which are long, short, or give no ids."""
    draw = random.Random(seed)
    documents = []
    for _ in range(count):
        texts = ["".join(draw.choices("abcdef", k=draw.choice([1, 2, 7, 35]))) for _ in range(draw.randint(1, 3))]
        last = len(texts) - 1
        documents.append([Piece("train", text, i == 0, i == last) for i, text in enumerate(texts)])
    return documents


def _ids(piece: Piece) -> np.ndarray:
    """Return the ids of a piece; some pieces give none, as with a tokenizer that drops characters."""
    kept = piece.text if piece.text[0] != "f" else ""
    return np.frombuffer(kept.encode(), np.uint8).astype(np.uint32)


def _write(
    folder: Path, spec: ShardSpec, pieces: list[Piece], *, stop: int | None = None, flush_every: int = 3
) -> None:
    """Pass the pieces to a writer; with `stop`, leave the folder as a process that is killed there."""
    folder.mkdir(exist_ok=True)
    writer = SplitWriter(folder, "train", spec)
    for number, piece in enumerate(pieces if stop is None else islice(pieces, stop), start=1):
        if not writer.skip(piece):
            writer.add(piece, _ids(piece))
        if number % flush_every == 0:
            writer.flush()
    if stop is None:
        writer.finish()
    # A killed process does not close its files.


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def test_split_writer_when_another_one_writes_the_same_shards_then_they_are_complete(tmp_path: Path) -> None:
    pieces = [piece for document in _documents() for piece in document]
    _write(tmp_path / "alone", _spec(64), pieces)
    folder = tmp_path / "both"
    folder.mkdir()
    # Both processes write: one of them was suspended and believed to be dead.
    one, other = (SplitWriter(folder, "train", _spec(64)) for _ in range(2))
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
def test_split_writer_when_killed_anywhere_then_continues_to_the_same_bytes(
    tmp_path: Path, shard_size: int, vocabulary_size: int, single: bool
) -> None:
    pieces = [piece for document in _documents() for piece in document]
    spec = _spec(shard_size, vocabulary_size, single)
    _write(tmp_path / "whole", spec, pieces)
    expected = _content(tmp_path / "whole")
    draw = random.Random(1)
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        for stop in sorted(draw.sample(range(len(pieces) + 1), 3)):
            _write(folder, spec, pieces, stop=stop, flush_every=draw.randint(1, 5))
        _write(folder, spec, pieces, flush_every=draw.randint(1, 5))
        assert _content(folder) == expected


def test_split_writer_when_finished_then_shards_hold_all_tokens_and_document_starts(tmp_path: Path) -> None:
    documents = _documents()
    _write(tmp_path / "a", _spec(10), [piece for document in documents for piece in document])
    shards = finished_shards(tmp_path / "a", "train")
    stream = [np.concatenate([*map(_ids, document), np.array([EOS])]) for document in documents]
    whole = np.concatenate(stream)
    tokens = Tokens([shard.tokens for shard in shards])
    assert tokens[:].tolist() == whole.tolist()
    assert [shard.num_tokens for shard in shards[:-1]] == [10] * (len(shards) - 1)
    starts = np.concatenate([shard.starts.map().ids + 10 * i for i, shard in enumerate(shards)])
    assert starts.tolist() == [0, *np.cumsum([len(ids) for ids in stream])[:-1].tolist()]
    assert [shard.begins for shard in shards[1:]] == [shard.ends for shard in shards[:-1]]


def test_split_writer_when_vocabulary_is_large_then_ids_have_four_bytes(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", ShardSpec(70_000, "hash", 4, None, True))
    writer.add(Piece("train", "abc", True, True), np.array([1, 69_999, 65_536], np.uint32))
    writer.finish()
    shard: Shard = open_shard(tmp_path / "train_00000.bin", tokenizer_hash="hash", vocabulary_size=70_000)
    assert (shard.dtype, shard.min_id, shard.max_id) == ("uint32", 1, 69_999)
    assert Tokens([shard.tokens])[:].tolist() == [1, 69_999, 65_536]
