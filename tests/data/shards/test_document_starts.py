"""Document starts in any range of tokens."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llm.data.batches.blocks import Blocks
from llm.data.batches.loader import batch_of
from llm.data.shards.document_starts import ConcatenatedStarts, SlicedStarts, Starts, StartsAfterEos, StartsInFiles
from llm.data.shards.external_formats import open_files
from llm.data.shards.format import STARTS_DTYPE
from llm.data.shards.memmap import TokenFile, Tokens

EOS = 9
# Documents of one token, at the borders of shards, over several shards, and over many blocks.
LENGTHS = (1, 1, 9, 11, 1, 43, 3, 7, 24, 1)
ENDS = np.cumsum(LENGTHS)
STARTS = [0, *ENDS[:-1].tolist()]
NUM_TOKENS = int(ENDS[-1])
SHARD = 10


class Written:
    """A shard of some ids and its document starts, written into a folder."""

    def __init__(self, folder: Path, number: int, ids: np.ndarray) -> None:
        first = number * SHARD
        inside = [start - first for start in STARTS if first <= start < first + len(ids)]
        np.array(inside, STARTS_DTYPE).tofile(folder / f"{number}.starts")
        ids.astype("<u2").tofile(folder / f"{number}.bin")
        self.num_tokens = len(ids)
        self.tokens = TokenFile(folder / f"{number}.bin", "<u2", len(ids))
        self.starts = TokenFile(folder / f"{number}.starts", STARTS_DTYPE, len(inside))


def _ids() -> np.ndarray:
    ids = np.arange(NUM_TOKENS) % EOS
    ids[ENDS - 1] = EOS
    return ids


@pytest.fixture
def shards(tmp_path: Path) -> list[Written]:
    ids = _ids()
    return [Written(tmp_path, i, ids[i * SHARD : (i + 1) * SHARD]) for i in range(-(-NUM_TOKENS // SHARD))]


def _check(starts: Starts, expected: list[int], num_tokens: int) -> None:
    """Check the starts in every range of the tokens, also after pickling."""
    for candidate in (starts, pickle.loads(pickle.dumps(starts))):
        for start in range(num_tokens + 1):
            for stop in range(start, num_tokens + 1):
                between = candidate.between(start, stop)
                assert between.dtype == np.int64
                assert between.tolist() == [place for place in expected if start <= place < stop]


def test_starts_in_files_when_any_range_is_requested_then_the_starts_inside(shards: list[Written]) -> None:
    starts = StartsInFiles(shards)
    _check(starts, STARTS, NUM_TOKENS)
    assert len(pickle.dumps(starts)) < 3000


def test_starts_after_eos_when_any_range_is_requested_then_the_starts_inside(shards: list[Written]) -> None:
    _check(StartsAfterEos(_ids(), EOS), STARTS, NUM_TOKENS)
    _check(StartsAfterEos(Tokens([shard.tokens for shard in shards]), EOS), STARTS, NUM_TOKENS)


def test_concatenated_starts_when_ranges_begin_anywhere_then_each_begins_a_document(shards: list[Written]) -> None:
    whole = StartsInFiles(shards)
    # The second part begins inside a document, the third is empty, the fourth is the very beginning again.
    cuts = ((60, 90), (17, 40), (5, 5), (0, 12))
    parts = [SlicedStarts(whole, first, stop - first) for first, stop in cuts]
    expected, place = [], 0
    for first, stop in cuts:
        if stop > first:
            expected += [place, *(place + start - first for start in STARTS if first < start < stop)]
        place += stop - first
    _check(ConcatenatedStarts(parts), expected, place)
    streams = [Tokens([shard.tokens for shard in shards]).sliced(first, stop) for first, stop in cuts]
    joined = Tokens.concatenated(streams)
    assert joined[:].tolist() == np.concatenate([_ids()[first:stop] for first, stop in cuts]).tolist()
    assert pickle.loads(pickle.dumps(joined))[25:60].tolist() == joined[:].tolist()[25:60]
    assert len(joined) == place


@pytest.mark.parametrize("block_size", [2, 3, 8, 50])
def test_blocks_when_document_starts_are_known_then_rows_hold_positions_inside_documents(
    shards: list[Written], block_size: int
) -> None:
    ids = _ids()
    blocks = Blocks(Tokens([shard.tokens for shard in shards]), block_size, starts=StartsInFiles(shards))
    plain = Blocks(ids, block_size)
    assert len(blocks) == len(plain)
    for number in range(len(blocks)):
        row = blocks[number]
        assert row.positions is not None
        assert (row.positions.shape, row.positions.dtype) == ((block_size + 1,), np.int32)
        assert row.ids.tolist() == plain[number].ids.tolist()
        first = number * block_size
        begins = sorted({first, *(start for start in STARTS if first < start <= first + block_size)})
        expected = [place - max(b for b in begins if b <= place) for place in range(first, first + block_size + 1)]
        assert row.positions.tolist() == expected


def test_batch_of_when_a_target_begins_a_document_then_it_is_ignored(shards: list[Written]) -> None:
    blocks = Blocks(Tokens([shard.tokens for shard in shards]), 8, starts=StartsInFiles(shards))
    batch = batch_of([blocks[number] for number in range(len(blocks))])
    plain = batch_of([Blocks(_ids(), 8)[number] for number in range(len(blocks))])
    assert plain.positions is None
    assert batch.positions is not None
    assert batch.ids.tolist() == plain.ids.tolist()
    assert batch.ids.shape == batch.targets.shape == batch.positions.shape
    places = np.arange(1, len(blocks) * 8 + 1).reshape(-1, 8)
    begins = np.isin(places, STARTS)
    assert begins.sum() == len([start for start in STARTS if 0 < start <= len(blocks) * 8])
    assert (batch.targets.numpy() == np.where(begins, -100, plain.targets.numpy())).all()
    # A document that continues in the next block begins at position 0 there: the tokens before it are not there.
    assert (batch.positions[:, 0] == 0).all()


def test_open_files_when_the_end_of_shards_is_held_out_then_document_starts_are_kept(tmp_path: Path) -> None:
    from llm.data.shards.writer import ShardSpec, SplitWriter
    from llm.data.sources.documents import Piece

    writer = SplitWriter(tmp_path, "train", ShardSpec(257, "hash", 16, 256, True))
    for _ in range(12):
        piece = Piece("train", "abcdef", True, True)
        if not writer.skip(piece):
            writer.add(piece, np.frombuffer(piece.text.encode(), np.uint8).astype(np.uint32))
    writer.finish()
    streams = open_files([str(tmp_path / "train_*.bin")], None, 25, 257)
    assert streams.validation is not None and streams.validation.starts is not None
    assert streams.train.starts is not None
    assert streams.train.starts.between(0, 63).tolist() == list(range(0, 63, 7))
    assert streams.validation.starts.between(0, 21).tolist() == [0, 7, 14]
    for one, other in pairwise(streams.train.starts.between(0, 63).tolist()):
        assert streams.train.tokens[other - 1 : other] == 256 and other - one == 7
