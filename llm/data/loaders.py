"""Batches: which blocks an update sees is arithmetic, whatever the ranks and workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm.data.blocks import Blocks
from llm.data.order import shuffled


class Batch(NamedTuple):
    """The blocks of one forward pass.

    Attributes:
        ids: int64 [batch, block], on the CPU.
        targets: the token that follows each, int64 [batch, block].
    """

    ids: Tensor
    targets: Tensor


def training_batches(
    blocks: Blocks,
    *,
    seed: int,
    first_step: int,
    num_steps: int,
    micro_batch: int,
    accumulation: int,
    rank: int,
    num_ranks: int,
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches, one list an update.

    Update k takes the samples [k * G, (k + 1) * G) of an endless sequence of epochs, where G is
    micro_batch * accumulation * num_ranks; so an update may run across the end of an epoch, and is
    always full. See `sample_block` for the order.

    Args:
        blocks: the training text.
        seed: of the order.
        first_step: number of the first update, from 0: where a resumed run continues.
        num_steps: how many updates to yield.
        micro_batch: blocks of one forward pass.
        accumulation: forward passes of one update on one rank.
        rank: this process.
        num_ranks: all processes.
        num_workers: processes that read ahead; 0 reads here.
        pin_memory: whether to put batches where a CUDA device can fetch them itself.
    """
    micro_batches = _micro_batches(
        len(blocks),
        seed,
        range(first_step, first_step + num_steps),
        micro_batch,
        slices=range(rank, num_ranks * accumulation, num_ranks),
        num_slices=num_ranks * accumulation,
    )
    if num_workers > 0:
        batches = _read_ahead(blocks, micro_batches, num_workers, pin_memory)
    else:
        batches = _read(blocks, micro_batches, pin_memory)
    for _ in range(num_steps):
        yield list(islice(batches, accumulation))


def evaluation_batches(
    blocks: Blocks,
    *,
    batch_size: int,
    rank: int,
    num_ranks: int,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """This rank's batches of an evaluation, in the order of the text; the very last may be short.

    Args:
        blocks: the validation text.
        batch_size: blocks of one forward pass.
        rank: this process; batch i is that of rank i % num_ranks.
        num_ranks: all processes.
        max_batches: batches over all ranks; the whole text when None.
    """
    num_batches = -(-len(blocks) // batch_size)
    if max_batches is not None:
        num_batches = min(num_batches, max_batches)
    for number in range(rank, num_batches, num_ranks):
        end = min((number + 1) * batch_size, len(blocks))
        yield _batch([blocks[index] for index in range(number * batch_size, end)])


def sample_block(sample: int, num_blocks: int, seed: int) -> int:
    """The block that sample number `sample` of a run reads; samples are counted over the epochs."""
    epoch, place = divmod(sample, num_blocks)
    return shuffled(place, num_blocks, seed=seed, epoch=epoch)


def _micro_batches(
    num_blocks: int, seed: int, steps: range, micro_batch: int, slices: range, num_slices: int
) -> Iterator[list[int]]:
    """The blocks of each micro-batch, `slices` being this rank's of an update's `num_slices`."""
    for step in steps:
        for place in slices:
            first = (step * num_slices + place) * micro_batch
            yield [sample_block(sample, num_blocks, seed) for sample in range(first, first + micro_batch)]


def _read(blocks: Blocks, micro_batches: Iterable[list[int]], pin_memory: bool) -> Iterator[Batch]:
    for numbers in micro_batches:
        batch = _batch([blocks[number] for number in numbers])
        yield Batch(batch.ids.pin_memory(), batch.targets.pin_memory()) if pin_memory else batch


def _read_ahead(
    blocks: Blocks, micro_batches: Iterable[list[int]], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """The same through PyTorch's loader, which keeps the order whatever worker is faster."""
    loader: DataLoader[NDArray[np.int64]] = DataLoader(
        _Rows(blocks),
        batch_sampler=micro_batches,
        collate_fn=_batch,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Its own generator, or it would draw from the one that everything else is seeded by.
        generator=torch.Generator(),
    )
    yield from loader


def _batch(rows: Sequence[NDArray[np.int64]]) -> Batch:
    ids = torch.from_numpy(np.stack(rows))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


class _Rows(Dataset[NDArray[np.int64]]):
    """The blocks as PyTorch's loader wants them."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self._blocks[index]
