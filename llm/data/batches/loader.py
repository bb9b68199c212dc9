"""Batches: which blocks an update sees is arithmetic, whatever the ranks and workers."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm.data.batches.blocks import Blocks
from llm.tokenization import IGNORE_INDEX

# Micro-batches that the reading thread is ahead of the device: enough for the longest pause of a disk to
# pass unseen, and little memory.
_AHEAD = 8
_LOOK_SECONDS = 1.0


class BlockSource(Protocol):
    """Blocks to train on, as an endless sequence: each is a pure function of the seed and its number.

    Attributes:
        block_size: tokens predicted in a block.
    """

    block_size: int

    @property
    def num_blocks(self) -> int | None:
        """Samples of one epoch; None where nobody knows before they have arrived."""

    def num_unread(self, num_samples: int) -> int:
        """Blocks that so many samples never read; 0 where nobody knows."""

    def block(self, sample: int, seed: int) -> NDArray[np.int64]:
        """The block of a sample: int64 [block_size + 1], or [2, block_size + 1] with positions in documents."""


class Batch(NamedTuple):
    """The blocks of one forward pass.

    Attributes:
        ids: int64 [batch, block], on the CPU.
        targets: the token that follows each, int64 [batch, block]; -100 where that begins a document.
        positions: of each in its document, int64 [batch, block]; None where documents are not kept apart.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, which fetches it in its own time."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch where a CUDA device can fetch it itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        positions = None if self.positions is None else move(self.positions)
        return Batch(move(self.ids), move(self.targets), positions)


def training_batches(
    samples: BlockSource,
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
    always full.

    Args:
        samples: the training text, in its order.
        seed: of the order.
        first_step: number of the first update, from 0: where a resumed run continues.
        num_steps: how many updates to yield.
        micro_batch: blocks of one forward pass.
        accumulation: forward passes of one update on one rank.
        rank: this process.
        num_ranks: all processes.
        num_workers: processes that read ahead; with 0 this one reads, in a thread if memory is pinned.
        pin_memory: whether to put batches where a CUDA device can fetch them itself.
    """
    micro_batches = _micro_batches(
        range(first_step, first_step + num_steps),
        micro_batch,
        slices=range(rank, num_ranks * accumulation, num_ranks),
        num_slices=num_ranks * accumulation,
    )
    rows = _Rows(samples, seed)
    if num_workers > 0:
        batches = _read_by_workers(rows, micro_batches, num_workers, pin_memory)
    elif pin_memory:
        batches = _in_background(_read(rows, micro_batches, pin_memory))
    else:
        batches = _read(rows, micro_batches, pin_memory)
    for _ in range(num_steps):
        yield list(islice(batches, accumulation))


def evaluation_batches(
    blocks: Blocks,
    *,
    batch_size: int,
    rank: int,
    num_ranks: int,
    max_batches: int | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This rank's batches of an evaluation, in the order of the text; the very last may be short.

    Args:
        blocks: the validation text.
        batch_size: blocks of one forward pass.
        rank: this process; batch i is that of rank i % num_ranks.
        num_ranks: all processes.
        max_batches: batches over all ranks; the whole text when None.
        pin_memory: whether to put batches, read ahead by a thread, where a CUDA device can fetch them itself.
    """
    num_batches = -(-len(blocks) // batch_size)
    if max_batches is not None:
        num_batches = min(num_batches, max_batches)
    batches = (
        batch_of([blocks[index] for index in range(number * batch_size, min((number + 1) * batch_size, len(blocks)))])
        for number in range(rank, num_batches, num_ranks)
    )
    return _in_background(batch.pin_memory() for batch in batches) if pin_memory else batches


def _micro_batches(steps: range, micro_batch: int, slices: range, num_slices: int) -> Iterator[list[int]]:
    """The samples of each micro-batch, `slices` being this rank's of an update's `num_slices`."""
    for step in steps:
        for place in slices:
            first = (step * num_slices + place) * micro_batch
            yield list(range(first, first + micro_batch))


def _read(rows: _Rows, micro_batches: Iterable[list[int]], pin_memory: bool) -> Iterator[Batch]:
    for numbers in micro_batches:
        batch = batch_of([rows[number] for number in numbers])
        yield batch.pin_memory() if pin_memory else batch


def _in_background(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, read ahead by a thread, which ends when nobody reads on."""
    made: queue.Queue[Batch | BaseException | None] = queue.Queue(_AHEAD)
    is_over = threading.Event()

    def put(item: Batch | BaseException | None) -> bool:
        while not is_over.is_set():
            try:
                made.put(item, timeout=_LOOK_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
        except BaseException as error:
            put(error)
        else:
            put(None)

    threading.Thread(target=read, name="read-blocks", daemon=True).start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_over.set()


def _read_by_workers(
    rows: _Rows, micro_batches: Iterable[list[int]], num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """The same through PyTorch's loader, which keeps the order whatever worker is faster."""
    loader: DataLoader[NDArray[np.int64]] = DataLoader(
        rows,
        batch_sampler=micro_batches,
        collate_fn=batch_of,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Its own generator, or it would draw from the one that everything else is seeded by.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_parent,
    )
    yield from loader


def _leave_signals_to_the_parent(_: int) -> None:
    """Launchers signal whole groups of processes; a worker that dies of it takes the polite stop from the run.

    It ends when its parent says so, or is gone.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def batch_of(rows: Sequence[NDArray[np.int64]]) -> Batch:
    """The batch of some rows, which all have positions, or none has."""
    stacked = torch.from_numpy(np.stack(rows))
    if stacked.ndim == 2:
        return Batch(stacked[:, :-1].contiguous(), stacked[:, 1:].contiguous())
    ids, positions = stacked.unbind(1)
    # Nothing in front of a document's first token tells anything about it.
    targets = ids[:, 1:].masked_fill(positions[:, 1:] == 0, IGNORE_INDEX)
    return Batch(ids[:, :-1].contiguous(), targets, positions[:, :-1].contiguous())


class _Rows(Dataset[NDArray[np.int64]]):
    """The blocks by the numbers of their samples, as PyTorch's loader wants them."""

    def __init__(self, samples: BlockSource, seed: int) -> None:
        self._samples, self._seed = samples, seed

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        return self._samples.block(sample, self._seed)
