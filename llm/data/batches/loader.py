"""The loader: batches whose content depends on the seed and the step only, not on ranks, workers or accumulation."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm.data.batches.blocks import Blocks
from llm.data.batches.row import Row
from llm.tokenization import IGNORE_INDEX

# Micro-batches that the reading thread is ahead of the device: enough to hide the longest pause of a disk, and
# little memory.
_NUM_AHEAD = 8
_POLL_SECONDS = 1.0
_CPU = torch.device("cpu")
# Types of ids that batches keep. Ids of another type (files of other programs) become int64.
_COMPACT_DTYPES = (np.dtype(np.uint16), np.dtype(np.uint32))


class BlockSource(Protocol):
    """Training blocks as an endless sequence of samples: each is a pure function of the seed and its number.

    Attributes:
        block_size: tokens predicted in a block.
    """

    block_size: int

    @property
    def num_blocks(self) -> int | None:
        """Number of samples of one epoch; None if it is unknown until all have arrived."""

    def num_unread(self, num_samples: int) -> int:
        """Return the number of blocks that a run of `num_samples` samples does not read; 0 if it is unknown."""

    def block(self, sample: int, seed: int) -> Row:
        """Return the block of a sample: a `Row` of [block_size + 1] arrays.

        Args:
            sample: number of the sample in the run, from 0, counted over the epochs.
            seed: the run's seed, which decides the order.
        """


class Batch(NamedTuple):
    """The inputs of one forward pass.

    Attributes:
        ids: int64 [batch, block].
        targets: the token after each, int64 [batch, block]; `IGNORE_INDEX` where it is not predicted.
        positions: position of each token in its document, int64 [batch, block]; None: attention is not limited to
            documents.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; a copy from pinned memory to a CUDA device is asynchronous."""
        # Other devices may read pageable memory after the call has returned.
        is_async = device.type == "cuda"
        positions = None if self.positions is None else self.positions.to(device, non_blocking=is_async)
        return Batch(
            self.ids.to(device, non_blocking=is_async), self.targets.to(device, non_blocking=is_async), positions
        )


class CompactBatch(NamedTuple):
    """The rows of one forward pass on their way to the device: on the CPU, in the integer type of the shards.

    Attributes:
        ids: uint16, uint32 or int64 [batch, block + 1].
        positions: int32 [batch, block + 1], or None; see `Row`.
        loss_mask: bool [batch, block + 1], or None; see `Row`.
    """

    ids: Tensor
    positions: Tensor | None = None
    loss_mask: Tensor | None = None

    def pin_memory(self) -> CompactBatch:
        """Return a copy in page-locked memory, from which a CUDA device copies asynchronously."""
        return CompactBatch(
            self.ids.pin_memory(),
            None if self.positions is None else self.positions.pin_memory(),
            None if self.loss_mask is None else self.loss_mask.pin_memory(),
        )

    def to(self, device: torch.device) -> Batch:
        """Return int64 inputs and targets on a device; a CUDA device gets the compact ids and widens them itself."""
        if device.type != "cuda":
            # Other accelerators may not copy or convert uint16 and uint32.
            return self._batch().to(device)
        return CompactBatch(
            self.ids.to(device, non_blocking=True),
            None if self.positions is None else self.positions.to(device, non_blocking=True),
            None if self.loss_mask is None else self.loss_mask.to(device, non_blocking=True),
        )._batch()

    def _batch(self) -> Batch:
        targets = _int64(self.ids[:, 1:])
        # The tokens before the first token of a document say nothing about it.
        if self.positions is not None:
            targets = targets.masked_fill(self.positions[:, 1:] == 0, IGNORE_INDEX)
        if self.loss_mask is not None:
            targets = targets.masked_fill(~self.loss_mask[:, 1:], IGNORE_INDEX)
        positions = None if self.positions is None else _int64(self.positions[:, :-1])
        return Batch(_int64(self.ids[:, :-1]), targets, positions)


def _int64(ids: Tensor) -> Tensor:
    """Return a contiguous int64 tensor of the same shape."""
    return ids.to(torch.int64).contiguous()


MicroBatches = Generator[list[Batch], None, None]
"""A rank's micro-batches, one list an update; closing it stops what reads them."""


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
    device: torch.device = _CPU,
) -> MicroBatches:
    """Yield this rank's micro-batches, one list a step.

    Step k takes the samples [k * G, (k + 1) * G) of an endless sequence of epochs, where G is
    micro_batch * accumulation * num_ranks. A step may therefore cross the end of an epoch, and is always full.

    Args:
        samples: the training text in its order.
        seed: seed of the order.
        first_step: number of the first step, from 0: the step at which a resumed run continues.
        num_steps: number of steps to yield.
        micro_batch: blocks of one forward pass.
        accumulation: forward passes of one step on one rank.
        rank: number of this process.
        num_ranks: number of processes.
        num_workers: processes that read ahead. With 0 this process reads: in a thread if the device is a CUDA device,
            for which batches are pinned.
        device: device of the yielded batches, int64 [micro_batch, block].
    """
    micro_batches = _micro_batches(
        range(first_step, first_step + num_steps),
        micro_batch,
        slices=range(rank, num_ranks * accumulation, num_ranks),
        num_slices=num_ranks * accumulation,
    )
    rows = _Rows(samples, seed)
    if num_workers > 0:
        batches = _read_by_workers(rows, micro_batches, num_workers, pin_memory=device.type == "cuda")
    else:
        batches = _pinned_for(device, map(rows.__getitems__, micro_batches))
    for _ in range(num_steps):
        yield [batch.to(device) for batch in islice(batches, accumulation)]


def evaluation_batches(
    blocks: Blocks,
    *,
    batch_size: int,
    rank: int,
    num_ranks: int,
    max_batches: int | None = None,
    device: torch.device = _CPU,
) -> Iterator[Batch]:
    """Yield this rank's batches of an evaluation in the order of the text; the last batch may be short.

    Every rank has equally many batches, because a forward pass may be collective: a rank that has no more text gets a
    batch without targets.

    Args:
        blocks: the validation text.
        batch_size: blocks of one forward pass.
        rank: number of this process; batch i belongs to rank i % num_ranks.
        num_ranks: number of processes.
        max_batches: number of batches over all ranks; None: the whole text.
        device: device of the yielded batches, int64 [batch, block]. For a CUDA device a thread reads ahead and pins.
    """
    num_batches = -(-len(blocks) // batch_size)
    if max_batches is not None:
        num_batches = min(num_batches, max_batches)
    num_rounds = -(-num_batches // num_ranks)
    batches = (
        _evaluation_batch(blocks, range(number * batch_size, min((number + 1) * batch_size, len(blocks))))
        if number < num_batches
        else _batch_without_targets(blocks)
        for number in range(rank, num_rounds * num_ranks, num_ranks)
    )
    for batch in _pinned_for(device, batches):
        yield batch.to(device)


def _evaluation_batch(blocks: Blocks, indices: range) -> CompactBatch:
    return stack_rows((blocks[index] for index in indices), len(indices))


def _batch_without_targets(blocks: Blocks) -> CompactBatch:
    """Return one row with nothing to predict."""
    batch = stack_rows([blocks[0]], 1)
    return batch._replace(loss_mask=torch.zeros(batch.ids.shape, dtype=torch.bool))


def batch_of(rows: Sequence[Row]) -> Batch:
    """Return the batch of some rows on the CPU, int64 [len(rows), block]; all rows have positions, or none has."""
    return stack_rows(rows, len(rows)).to(_CPU)


def stack_rows(rows: Iterable[Row], num_rows: int) -> CompactBatch:
    """Copy rows into one batch, each as soon as it is read, so that views of mapped files do not accumulate.

    Args:
        rows: at least one; all have positions, or none has.
        num_rows: number of rows.

    Returns:
        ids uint16 or uint32 [num_rows, block + 1] if all rows are of that type, else int64; positions int32 and
        loss mask bool of the same shape. A row without a loss mask in a batch with one counts as all True.

    Raises:
        ValueError: some rows have positions and others have none.
    """
    ids: NDArray[Any] | None = None
    positions: list[NDArray[np.int32]] = []
    masks: list[NDArray[np.bool_] | None] = []
    for index, row in enumerate(rows):
        dtype = row.ids.dtype if row.ids.dtype in _COMPACT_DTYPES else np.dtype(np.int64)
        if ids is None:
            ids = np.empty((num_rows, len(row.ids)), dtype)
        elif ids.dtype not in (dtype, np.int64):
            ids = ids.astype(np.int64)
        ids[index] = row.ids
        masks.append(row.loss_mask)
        if row.positions is not None:
            positions.append(row.positions)
    assert ids is not None
    if positions and len(positions) < num_rows:
        raise ValueError(f"{len(positions)} of {num_rows} rows have positions; all must have them, or none")
    return CompactBatch(
        torch.from_numpy(ids),
        torch.from_numpy(np.stack(positions)) if positions else None,
        _stack_masks(masks, ids.shape[1]),
    )


def _stack_masks(masks: Sequence[NDArray[np.bool_] | None], num_tokens: int) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    all_predicted = np.ones(num_tokens, np.bool_)
    return torch.from_numpy(np.stack([all_predicted if mask is None else mask for mask in masks]))


def _micro_batches(steps: range, micro_batch: int, slices: range, num_slices: int) -> Iterator[list[int]]:
    """The samples of each micro-batch; `slices` are this rank's of the `num_slices` of a step."""
    for step in steps:
        for index in slices:
            first = (step * num_slices + index) * micro_batch
            yield list(range(first, first + micro_batch))


def _pinned_for(device: torch.device, batches: Iterator[CompactBatch]) -> Iterator[CompactBatch]:
    """Return the batches; for a CUDA device pinned, and read ahead by a thread."""
    if device.type != "cuda":
        return batches
    return _in_background(batch.pin_memory() for batch in batches)


def _in_background(batches: Iterator[CompactBatch]) -> Iterator[CompactBatch]:
    """Yield the same batches, read ahead by a thread that ends when this iterator is closed."""
    ready: queue.Queue[CompactBatch | BaseException | None] = queue.Queue(_NUM_AHEAD)
    is_closed = threading.Event()

    def put(item: CompactBatch | BaseException | None) -> bool:
        while not is_closed.is_set():
            try:
                ready.put(item, timeout=_POLL_SECONDS)
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
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_closed.set()


def _read_by_workers(
    rows: _Rows, micro_batches: Iterable[list[int]], num_workers: int, *, pin_memory: bool
) -> Iterator[CompactBatch]:
    """Yield the batches through PyTorch's loader, which keeps their order whichever worker is faster."""
    loader: DataLoader[CompactBatch] = DataLoader(
        rows,
        batch_sampler=micro_batches,
        collate_fn=_as_read,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # With a generator of its own the loader does not draw from the global one, which seeds everything else.
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
    )
    yield from loader


def _as_read(batch: Any) -> Any:
    """Collate nothing: `_Rows.__getitems__` returns a whole batch."""
    return batch


def _ignore_signals(_: int) -> None:
    """Leave signals to the parent, which ends this worker; a worker also ends when its parent has exited.

    Launchers signal whole process groups, and a worker killed by that signal would prevent a graceful shutdown.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Rows(Dataset[CompactBatch]):
    """The blocks by the numbers of their samples, a batch at a time, as PyTorch's loader reads them."""

    def __init__(self, samples: BlockSource, seed: int) -> None:
        self._samples = samples
        self._seed = seed

    def __getitems__(self, numbers: Sequence[int]) -> CompactBatch:
        return stack_rows((self._samples.block(number, self._seed) for number in numbers), len(numbers))
