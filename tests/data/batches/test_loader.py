"""The same updates for any ranks, accumulation and workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from llm.data.batches.blocks import Blocks
from llm.data.batches.loader import Batch, _in_background, evaluation_batches, training_batches

BLOCK = 4
BLOCKS = Blocks(np.arange(21 * BLOCK + 1, dtype=np.uint16), BLOCK)


def _numbers(batch: Batch) -> list[int]:
    """Which blocks a batch holds."""
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    assert batch.ids.shape[1:] == batch.targets.shape[1:] == (BLOCK,)
    assert torch.equal(batch.targets, batch.ids + 1)
    return (batch.ids[:, 0] // BLOCK).tolist()


def _updates(micro_batch, accumulation, num_ranks=1, num_workers=0, first_step=0, num_steps=10):
    """Blocks of each update, in the order of the global batch."""
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
    assert samples == [BLOCKS.block(sample, 3)[0] // BLOCK for sample in range(len(samples))]


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


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-blocks"]


def _endless() -> Iterator[Batch]:
    number = 0
    while True:
        yield Batch(torch.tensor([[number]]), torch.tensor([[number + 1]]))
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
    def broken() -> Iterator[Batch]:
        yield Batch(torch.zeros(1, 1), torch.zeros(1, 1))
        raise OSError("the disk is gone")

    batches = _in_background(broken())
    next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(("max_batches", "num_read"), [(None, 21), (3, 12), (99, 21)])
@pytest.mark.parametrize("pin_memory", [False, True])
def test_evaluation_batches_when_on_ranks_then_each_block_once(
    num_ranks: int, max_batches: int | None, num_read: int, pin_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_pinned = 0

    def pin(batch: Batch) -> Batch:
        nonlocal num_pinned
        num_pinned += 1
        return batch

    monkeypatch.setattr(Batch, "pin_memory", pin)
    words: dict[str, Any] = {"batch_size": 4, "max_batches": max_batches, "pin_memory": pin_memory}
    ranks = [
        [_numbers(batch) for batch in evaluation_batches(BLOCKS, rank=rank, num_ranks=num_ranks, **words)]
        for rank in range(num_ranks)
    ]
    assert num_pinned == (sum(map(len, ranks)) if pin_memory else 0)
    dealt = [ranks[i % num_ranks][i // num_ranks] for i in range(-(-num_read // 4))]
    assert [number for batch in dealt for number in batch] == list(range(num_read))
    assert sum(map(len, ranks)) == len(dealt)
