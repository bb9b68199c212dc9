"""Blocks of a stream: an order that does not depend on when shards arrive, and waits for blocks that have not."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm.config.errors import UserError
from llm.config.options import DataOptions
from llm.data.batches.loader import training_batches
from llm.data.batches.row import Row
from llm.data.preparation.tokenize import write_shards
from llm.data.shards.format import MANIFEST, open_folder
from llm.data.sources.corpus import open_corpus
from llm.data.streaming.reader import EVERYTHING, AbandonedError, GrowingBlocks, GrowingTokens

SHARD, BLOCK = 100, 16
WINDOW = 6  # (100 - 1) // 16
SEED = 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer) -> Path:  # type: ignore[no-untyped-def]
    """A finished folder: 11 shards, the last one short."""
    folder = tmp_path_factory.mktemp("whole")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"document {number:05d}"}) + "\n" for number in range(70)))
    corpus = open_corpus(DataOptions(train_file=(str(rows),), validation_split_percentage=0))
    write_shards(
        *(corpus, byte_tokenizer, folder),
        tokenizer_hash="bytes",
        shard_size=SHARD,
        eos_in_single_text=True,
        num_workers=1,
    )
    return folder


@pytest.fixture
def arrive(whole: Path, tmp_path: Path) -> Callable[[int | None], Path]:
    """Lets the first n shards arrive, or with None all and the manifest: `arrive(n) -> folder`."""
    folder = tmp_path / "train"
    folder.mkdir()

    def arrive(number: int | None) -> Path:
        names = [f"train_{shard:05d}" for shard in range(11 if number is None else number)]
        # The sidecar last, as the writer does.
        for name in [f"{name}.{ending}" for name in names for ending in ("bin", "starts", "json")]:
            if not (folder / name).exists():
                shutil.copy(whole / name, folder / f"{name}.tmp")
                (folder / f"{name}.tmp").rename(folder / name)
        if number is None:
            shutil.copy(whole / MANIFEST, folder / "tmp")
            (folder / "tmp").rename(folder / MANIFEST)
        return folder

    return arrive


def blocks_of(folder: Path, block_size: int = BLOCK, shard_size: int = SHARD) -> GrowingBlocks:
    tokens = GrowingTokens(folder, shard_size=shard_size, tokenizer_hash="bytes")
    return GrowingBlocks(tokens, block_size, vocabulary_size=257)


def numbers(rows: list[Row], whole: Path) -> list[int]:
    """Return the number of the block of the text that each row holds."""
    text = open_folder(whole).train.tokens[:]
    known = {text[start : start + BLOCK + 1].tobytes(): start // BLOCK for start in range(0, len(text) - BLOCK, BLOCK)}
    return [known[row.ids.tobytes()] for row in rows]


def test_growing_blocks_when_a_window_is_read_then_its_shards_suffice_and_every_block_is_read(
    whole: Path, arrive: Callable[[int | None], Path]
) -> None:
    for window in range(10):
        blocks = blocks_of(arrive(window + 1))
        assert blocks.refresh() == (window + 1) * WINDOW
        samples = range(window * WINDOW, (window + 1) * WINDOW)
        assert {blocks.num_shards(sample) for sample in samples} <= {window, window + 1}
        blocks_read = numbers([blocks.block(sample, SEED) for sample in samples], whole)
        assert sorted(blocks_read) == list(samples)
    blocks = blocks_of(arrive(None))
    assert blocks.refresh() == EVERYTHING
    num_blocks = (len(open_folder(whole).train.tokens) - 1) // BLOCK
    assert len(blocks) == num_blocks == 65
    first, second, third = (
        numbers([blocks.block(epoch * num_blocks + place, SEED) for place in range(num_blocks)], whole)
        for epoch in range(3)
    )
    assert sorted(first) == sorted(second) == sorted(third) == list(range(num_blocks))
    assert [block // WINDOW for block in first] == sorted(block // WINDOW for block in range(num_blocks))
    assert first != second != third
    assert [block // WINDOW for block in second] != sorted(block // WINDOW for block in range(num_blocks))
    other_seed = numbers([blocks.block(place, SEED + 1) for place in range(num_blocks)], whole)
    assert other_seed != first


@pytest.mark.parametrize(("block_size", "window"), [(99, 1), (100, 1), (130, 1), (33, 3)])
def test_growing_blocks_when_blocks_are_about_as_long_as_shards_then_enough_shards_are_required(
    arrive: Callable[[int | None], Path], block_size: int, window: int
) -> None:
    folder = arrive(1)
    for sample in range(6):
        blocks = blocks_of(folder, block_size)
        assert blocks.window == window
        due = blocks.num_shards(sample)
        blocks = blocks_of(arrive(due), block_size)
        assert blocks.refresh() > sample
        assert len(blocks.block(sample, SEED).ids) == block_size + 1


def test_growing_blocks_when_the_last_shard_is_short_then_it_counts_at_the_end_of_the_stream(
    arrive: Callable[[int | None], Path],
) -> None:
    blocks = blocks_of(arrive(11))
    assert blocks.refresh() == 60
    assert not blocks.is_complete
    arrive(None)
    assert blocks.refresh() == EVERYTHING
    assert blocks.is_complete


def updates(blocks: GrowingBlocks, num_ranks: int, num_workers: int, first_step: int = 0) -> list[list[list[int]]]:
    """Return the ids of the global batches of 20 steps of 8 blocks, more than two epochs."""
    ranks = [
        training_batches(
            blocks,
            seed=SEED,
            first_step=first_step,
            num_steps=20 - first_step,
            micro_batch=8 // num_ranks // 2 or 1,
            accumulation=8 // num_ranks // (8 // num_ranks // 2 or 1),
            rank=rank,
            num_ranks=num_ranks,
            num_workers=num_workers,
        )
        for rank in range(num_ranks)
    ]
    steps = []
    for step in zip(*ranks, strict=True):
        turns = zip(*step, strict=True)  # one micro-batch of each rank
        steps.append([row.tolist() for turn in turns for batch in turn for row in batch.ids])
    return steps


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_growing_blocks_when_shards_arrive_late_then_same_batches_for_any_ranks_workers_and_resume(
    whole: Path, arrive: Callable[[int | None], Path], num_ranks: int, num_workers: int
) -> None:
    expected = updates(blocks_of(whole), 1, 0)
    folder = arrive(1)

    def trickle() -> None:
        for number in range(2, 12):
            time.sleep(0.05)
            arrive(number)
        time.sleep(0.2)
        arrive(None)

    thread = threading.Thread(target=trickle)
    thread.start()
    assert updates(blocks_of(folder), num_ranks, num_workers) == expected
    thread.join()
    assert updates(blocks_of(folder), num_ranks, num_workers, first_step=13) == expected[13:]


def test_growing_blocks_when_abandoned_then_waits_end_in_this_process_and_in_workers(
    arrive: Callable[[int | None], Path],
) -> None:
    blocks = blocks_of(arrive(1))
    batches: Iterator = training_batches(
        blocks,
        seed=SEED,
        first_step=0,
        num_steps=99,
        micro_batch=2,
        accumulation=1,
        rank=0,
        num_ranks=1,
        num_workers=2,
    )
    next(batches)  # the workers read on, to what is not there
    time.sleep(0.5)
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            blocks.block(WINDOW, SEED)
        except AbandonedError as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    started = time.monotonic()
    blocks.abandon()
    del batches
    thread.join(5)
    assert len(ended) == 1
    assert time.monotonic() - started < 4  # PyTorch waits five seconds for a worker that hangs


def test_refresh_when_the_whole_stream_is_shorter_than_a_block_then_refused_with_the_option(whole: Path) -> None:
    with pytest.raises(UserError, match=r"1,?\d* tokens to train on, .* --block_size 5000 needs 5001"):
        blocks_of(whole, 5000).refresh()


def test_refresh_when_a_shard_is_of_another_tokenizer_or_truncated_then_refused(
    arrive: Callable[[int | None], Path],
) -> None:
    folder = arrive(2)
    tokens = GrowingTokens(folder, shard_size=SHARD, tokenizer_hash="other")
    with pytest.raises(UserError, match="another tokenizer"):
        tokens.refresh()
    (folder / "train_00001.bin").write_bytes(b"12")
    with pytest.raises(UserError, match="has 2 bytes"):
        blocks_of(folder).refresh()
