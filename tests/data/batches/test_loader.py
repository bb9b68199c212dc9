"""The same batches for any number of ranks and workers, and any accumulation; the loss mask; integer types."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import TypeAlias

import numpy as np
import pytest
import torch

from llm.data.batches.blocks import Blocks
from llm.data.batches.loader import (
    Batch,
    BlockSource,
    CompactBatch,
    _in_background,
    batch_of,
    evaluation_batches,
    stack_rows,
    training_batches,
)
from llm.data.batches.mixture import Mixture
from llm.data.batches.row import Row
from llm.data.shards.document_starts import StartsAfterEos

BLOCK = 4
BLOCKS = Blocks(np.arange(21 * BLOCK + 1, dtype=np.uint16), BLOCK)


def _numbers(batch: Batch) -> list[int]:
    """Return the numbers of the blocks that a batch holds."""
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    assert batch.ids.shape[1:] == batch.targets.shape[1:] == (BLOCK,)
    assert torch.equal(batch.targets, batch.ids + 1)
    return (batch.ids[:, 0] // BLOCK).tolist()


def _updates(micro_batch, accumulation, num_ranks=1, num_workers=0, first_step=0, num_steps=10):
    """Return the block numbers of each step, in the order of the global batch."""
    ranks = [
        list(
            training_batches(
                BLOCKS,
                seed=3,
                first_step=first_step,
                num_steps=num_steps,
                micro_batch=micro_batch,
                accumulation=accumulation,
                rank=rank,
                num_ranks=num_ranks,
                num_workers=num_workers,
            )
        )
        for rank in range(num_ranks)
    ]
    assert all(len(updates) == num_steps for updates in ranks)
    return [
        [number for place in range(accumulation) for updates in ranks for number in _numbers(updates[step][place])]
        for step in range(num_steps)
    ]


@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "num_ranks"),
    [(1, 8, 1), (2, 4, 1), (4, 2, 1), (1, 4, 2), (2, 2, 2), (4, 1, 2), (2, 1, 4)],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_when_split_in_any_way_then_same_updates(
    micro_batch: int, accumulation: int, num_ranks: int, num_workers: int
) -> None:
    if num_workers and micro_batch == 1:
        pytest.skip("the other splits show the same")
    expected = _updates(8, 1)
    assert _updates(micro_batch, accumulation, num_ranks, num_workers) == expected


def test_training_batches_when_updates_cross_epochs_then_each_epoch_reads_every_block_once() -> None:
    samples = [number for update in _updates(8, 1, num_steps=21) for number in update]
    assert len(samples) == 8 * len(BLOCKS)
    epochs = [samples[start : start + 21] for start in range(0, len(samples), 21)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert samples == [BLOCKS.block(sample, 3).ids[0] // BLOCK for sample in range(len(samples))]


def test_training_batches_when_batch_is_larger_than_the_text_then_full() -> None:
    assert len(_updates(50, 1, num_steps=1)[0]) == 50


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_when_resumed_then_as_if_never_stopped(num_workers: int) -> None:
    assert _updates(2, 2, 2, num_workers, 6, 4) == _updates(8, 1)[6:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_batches_when_read_then_no_random_number_is_drawn(num_workers: int) -> None:
    before = torch.get_rng_state()
    _updates(8, 1, num_workers=num_workers, num_steps=1)
    assert torch.equal(torch.get_rng_state(), before)


MASKED_ROWS = [
    # A document begins at the third token; of the second row the first half is a prompt.
    Row(np.array([5, 6, 7, 8, 9], np.uint16), np.array([0, 1, 0, 1, 2], np.int32)),
    Row(
        np.array([15, 16, 17, 18, 65_535], np.uint16),
        np.arange(5, dtype=np.int32),
        np.array([False, False, False, True, True]),
    ),
]


def test_batch_of_when_rows_have_a_loss_mask_then_masked_targets_are_ignored() -> None:
    batch = batch_of(MASKED_ROWS)
    assert batch.ids.tolist() == [[5, 6, 7, 8], [15, 16, 17, 18]]
    assert batch.targets.tolist() == [[6, -100, 8, 9], [-100, -100, 18, 65_535]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert all(part.dtype == torch.int64 and part.is_contiguous() and part.shape == (2, 4) for part in batch)


def test_batch_of_when_rows_have_a_loss_mask_and_no_positions_then_only_the_mask_counts() -> None:
    ids = np.arange(5, dtype=np.uint32)
    batch = batch_of([Row(ids), Row(ids, loss_mask=np.array([True, False, True, True, False]))])
    assert batch.targets.tolist() == [[1, 2, 3, 4], [-100, 2, 3, -100]]
    assert batch.ids.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.positions is None


def test_batch_of_when_all_tokens_are_in_the_mask_then_as_without_one() -> None:
    row = MASKED_ROWS[0]
    masked = batch_of([row._replace(loss_mask=np.ones(5, np.bool_))])
    for part, expected in zip(masked, batch_of([row]), strict=True):
        assert torch.equal(part, expected)


def test_batch_of_when_only_some_rows_have_positions_then_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 rows have positions"):
        batch_of([MASKED_ROWS[0], Row(np.zeros(5, np.uint16))])


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["<u2", "<u2", "<u2"], torch.uint16),
        (["<u4", "<u4", "<u4"], torch.uint32),
        (["<u2", "<u4", "<u2"], torch.int64),
        (["<i4", "<i4", "<i4"], torch.int64),
        ([">u2", ">u2", ">u2"], torch.int64),
        (["<u8", "<i8", "<u2"], torch.int64),
    ],
)
def test_stack_rows_when_types_are_those_of_shards_then_kept_else_int64(
    dtypes: list[str], expected: torch.dtype
) -> None:
    rows = [Row(np.arange(5 * i, 5 * i + 5).astype(dtype)) for i, dtype in enumerate(dtypes)]
    stacked = stack_rows(iter(rows), 3)
    assert (stacked.ids.dtype, stacked.ids.shape) == (expected, (3, 5))
    batch = stacked.to(torch.device("cpu"))
    assert batch.ids.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12, 13]]
    assert torch.equal(batch.targets, batch.ids + 1)


def test_stack_rows_when_a_row_is_stacked_then_the_next_is_read_only_afterwards() -> None:
    page = np.zeros(5, np.uint16)

    def rows() -> Iterator[Row]:
        for number in range(3):
            page[:] = number  # a row may be a view of memory that the next read replaces
            yield Row(page)

    assert stack_rows(rows(), 3).ids[:, 0].to(torch.int64).tolist() == [0, 1, 2]


@dataclass
class Conversations:
    """Samples of which the first three tokens are a prompt."""

    block_size: int = BLOCK
    num_blocks: int | None = None

    def num_unread(self, num_samples: int) -> int:
        return 0

    def block(self, sample: int, seed: int) -> Row:
        return Row(
            np.arange(10 * sample, 10 * sample + BLOCK + 1, dtype=np.uint32),
            np.arange(BLOCK + 1, dtype=np.int32),
            np.arange(BLOCK + 1) >= 3,
        )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_batches_when_rows_have_a_loss_mask_then_it_reaches_the_targets(num_workers: int) -> None:
    (micro_batches,) = training_batches(
        Conversations(),
        seed=3,
        first_step=2,
        num_steps=1,
        micro_batch=2,
        accumulation=1,
        rank=0,
        num_ranks=1,
        num_workers=num_workers,
    )
    (batch,) = micro_batches
    assert batch.ids.tolist() == [[40, 41, 42, 43], [50, 51, 52, 53]]
    assert batch.targets.tolist() == [[-100, -100, 43, 44], [-100, -100, 53, 54]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 3]] * 2


def test_compact_batch_when_pinned_then_every_part_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # without a CUDA device nothing can be pinned
    batch = stack_rows(MASKED_ROWS, 2)
    pinned = batch.pin_memory()
    assert pinned.ids.dtype == torch.uint16
    for part, copy in zip(batch, pinned, strict=True):
        assert part is not None and copy is not None and copy is not part
        assert torch.equal(part.to(torch.int64), copy.to(torch.int64))
    unmasked = stack_rows([Row(np.zeros(5, np.uint16))], 1).pin_memory()
    assert unmasked.positions is unmasked.loss_mask is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_batches_when_the_device_is_cuda_then_the_same_values_there(num_workers: int) -> None:
    def batches(device: str) -> list[Batch]:
        steps = training_batches(
            Conversations(),
            seed=3,
            first_step=0,
            num_steps=20,
            micro_batch=2,
            accumulation=1,
            rank=0,
            num_ranks=1,
            num_workers=num_workers,
            device=torch.device(device),
        )
        return [batch for step in steps for batch in step]

    for on_cuda, on_cpu in zip(batches("cuda"), batches("cpu"), strict=True):
        for part, expected in zip(on_cuda, on_cpu, strict=True):
            assert part is not None and part.is_cuda and part.is_contiguous() and part.dtype == torch.int64
            assert torch.equal(part.cpu(), expected)


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-blocks"]


def _endless() -> Iterator[CompactBatch]:
    number = 0
    while True:
        yield CompactBatch(torch.tensor([[number]]))
        number += 1


def test_in_background_when_read_then_the_same_batches_and_no_thread_is_left() -> None:
    batches = _in_background(_endless())
    assert [int(next(batches).ids) for _ in range(50)] == list(range(50))
    assert _threads()
    batches.close()
    deadline = time.monotonic() + 10
    while _threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _threads()


def test_in_background_when_reading_fails_then_the_error_is_raised_in_its_place() -> None:
    def broken() -> Iterator[CompactBatch]:
        yield CompactBatch(torch.zeros(1, 1))
        raise OSError("the disk is gone")

    batches = _in_background(broken())
    next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(("max_batches", "num_read"), [(None, 21), (3, 12), (99, 21)])
def test_evaluation_batches_when_on_ranks_then_each_block_once(
    num_ranks: int, max_batches: int | None, num_read: int
) -> None:
    ranks = [
        list(evaluation_batches(BLOCKS, batch_size=4, rank=rank, num_ranks=num_ranks, max_batches=max_batches))
        for rank in range(num_ranks)
    ]
    # A forward pass may be collective, so that no rank may have fewer than another.
    assert len({len(batches) for batches in ranks}) == 1
    num_batches = -(-num_read // 4)
    in_order = [ranks[index % num_ranks][index // num_ranks] for index in range(num_ranks * len(ranks[0]))]
    assert [number for batch in in_order[:num_batches] for number in _numbers(batch)] == list(range(num_read))
    assert all((batch.targets == -100).all() for batch in in_order[num_batches:])


def test_evaluation_batches_when_the_device_is_cuda_then_each_is_pinned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    num_pinned = 0

    def pin(batch: CompactBatch) -> CompactBatch:
        nonlocal num_pinned
        num_pinned += 1
        return batch

    monkeypatch.setattr(CompactBatch, "pin_memory", pin)
    monkeypatch.setattr(CompactBatch, "to", lambda batch, device: batch._batch())  # there may be no such device
    batches = list(evaluation_batches(BLOCKS, batch_size=4, rank=0, num_ranks=1, device=torch.device("cuda")))
    assert [number for batch in batches for number in _numbers(batch)] == list(range(21))
    assert num_pinned == len(batches) == 6


# A run of 201 steps, however it is split and wherever it is resumed.
LONG_BLOCK = 8
GLOBAL_BATCH = 8
NUM_STEPS = 201
RESUMED_AT = 137
EOS = 5
Steps: TypeAlias = list[list[list[int]]]


def _random_blocks(seed: int, number: int, *, masked: bool = False) -> Blocks:
    ids = np.random.default_rng(seed).integers(0, 50, number * LONG_BLOCK + 1)
    return Blocks(ids, LONG_BLOCK, starts=StartsAfterEos(ids, EOS) if masked else None)


def _mixture(*, masked: bool = False) -> Mixture:
    sources = [_random_blocks(seed, number, masked=masked) for seed, number in ((1, 531), (2, 60), (3, 222))]
    return Mixture(sources, [Fraction(weight) for weight in ("0.6", "0.1", "0.3")])


# The run reads more than one epoch of each.
TEXTS: dict[str, BlockSource] = {
    "blocks": _random_blocks(0, 700),
    "blocks, masked": _random_blocks(0, 700, masked=True),
    "mixture": _mixture(),
    "mixture, masked": _mixture(masked=True),
}


def _row_values(batch: Batch) -> list[list[int]]:
    """Return ids, targets and positions of each row, in one list."""
    parts = [batch.ids, batch.targets, *([] if batch.positions is None else [batch.positions])]
    return [[number for part in parts for number in part[i].tolist()] for i in range(len(batch.ids))]


def _run_steps(text: str, num_ranks: int, accumulation: int, num_workers: int, first_step: int = 0) -> Steps:
    """Return the rows of each step, in the order of the global batch."""
    ranks = [
        list(
            training_batches(
                TEXTS[text],
                seed=11,
                first_step=first_step,
                num_steps=NUM_STEPS - first_step,
                micro_batch=GLOBAL_BATCH // num_ranks // accumulation,
                accumulation=accumulation,
                rank=rank,
                num_ranks=num_ranks,
                num_workers=num_workers,
            )
        )
        for rank in range(num_ranks)
    ]
    assert all(len(updates) == NUM_STEPS - first_step for updates in ranks)
    return [
        [row for place in range(accumulation) for updates in ranks for row in _row_values(updates[step][place])]
        for step in range(NUM_STEPS - first_step)
    ]


@cache
def _expected_steps(text: str) -> Steps:
    return _run_steps(text, 1, 1, 0)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("num_ranks", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("text", TEXTS)
def test_training_batches_when_split_over_ranks_and_workers_and_resumed_then_the_same_ids(
    text: str, num_ranks: int, accumulation: int, num_workers: int
) -> None:
    if num_workers and accumulation == 1 and num_ranks > 1:
        pytest.skip("the other splits show the same")
    expected = _expected_steps(text)
    assert {len(update) for update in expected} == {GLOBAL_BATCH}
    assert len(expected[0][0]) == LONG_BLOCK * (3 if "masked" in text else 2)
    if not num_workers:
        assert _run_steps(text, num_ranks, accumulation, num_workers) == expected
    assert _run_steps(text, num_ranks, accumulation, num_workers, RESUMED_AT) == expected[RESUMED_AT:]


@pytest.mark.parametrize("text", TEXTS)
def test_training_batches_when_read_by_workers_from_the_start_then_the_same_ids(text: str) -> None:
    assert _run_steps(text, 2, 2, 2) == _expected_steps(text)


def test_training_batches_when_attention_is_limited_to_documents_then_the_same_blocks() -> None:
    for text in ("blocks", "mixture"):
        plain, masked = _expected_steps(text), _expected_steps(f"{text}, masked")
        assert [[row[:LONG_BLOCK] for row in update] for update in plain] == [
            [row[:LONG_BLOCK] for row in update] for update in masked
        ]
