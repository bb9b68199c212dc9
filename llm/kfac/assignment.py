"""Assignment of layers to ranks, and the collectives that move results between them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from llm.kfac.layers import Layer

# Numbers that a rank sends in one all-gather.
_BUCKET = 2**23


def assign(layers: Sequence[Layer], num_ranks: int) -> list[int]:
    """Return the rank that owns each layer: the most expensive layer first, each to the rank with the least work.

    The cost of a layer is the sum of the cubes of its factors' rows, which is what their decomposition takes.

    Source: Graham 1969, Bounds on multiprocessing timing anomalies (longest processing time first).
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    owners = [0] * len(layers)
    for index, cost in _by_falling_cost(layers):
        load, owners[index] = heapq.heappop(loads)
        heapq.heappush(loads, (load + cost, owners[index]))
    return owners


def refresh_offsets(layers: Sequence[Layer]) -> list[float]:
    """Return when each layer is refreshed, as a share of the interval, so that every step has about the same work.

    Layers that follow each other in time have different owners, because `assign` takes them in the same order. The
    offsets do not depend on the number of ranks, so that any number of ranks makes the same updates.
    """
    offsets = [0.0] * len(layers)
    total = sum(cost for _, cost in _by_falling_cost(layers))
    before = 0
    for index, cost in _by_falling_cost(layers):
        offsets[index] = before / total
        before += cost
    return offsets


def _by_falling_cost(layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """Return (index, cost) of every layer; layers of equal cost stay in their order."""
    costs = [layer.dim_a**3 + layer.dim_g**3 for layer in layers]
    return sorted(enumerate(costs), key=lambda item: -item[1])


class Ranks:
    """The processes that train one model together; a single process needs no process group.

    Args:
        group: their process group; None: the default one if torch.distributed is initialized.

    Attributes:
        size: number of processes.
        rank: number of this process in the group.

    Raises:
        ValueError: the group does not contain this process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self._group = group
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0
        if self.rank < 0:
            raise ValueError("process_group does not contain this process; pass a group that does")

    def reduce_sum(self, tensor: Tensor, owner: int | None) -> None:
        """Replace the tensor by the sum over all ranks, in place.

        Args:
            tensor: of any shape and floating point dtype, the same on all ranks.
            owner: the rank that gets the sum, while the others are left with undefined values; None: all ranks get it.
        """
        if self.size == 1:
            return
        if owner is None:
            dist.all_reduce(tensor, group=self._group)
        else:
            dist.reduce(tensor, self._global_rank(owner), group=self._group)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Replace the tensor, of any shape and dtype, by the owner's on all ranks, in place."""
        if self.size > 1:
            dist.broadcast(tensor, self._global_rank(owner), group=self._group)

    def all_gather(self, local: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return the vector of every rank, on all ranks; they are sent in buckets of 2^23 numbers.

        Args:
            local: the vector of this rank; [sizes[rank]], of any dtype that all ranks share.
            sizes: lengths of the vectors of all ranks.
        """
        vectors = [local if rank == self.rank else local.new_empty(size) for rank, size in enumerate(sizes)]
        for start in range(0, max(sizes), _BUCKET):
            width = min(_BUCKET, max(sizes) - start)
            sent = local.new_zeros(width)
            piece = local[start : start + width]
            sent[: piece.numel()] = piece
            received = list(local.new_empty(self.size, width))
            dist.all_gather(received, sent, group=self._group)
            for rank, bucket in enumerate(received):
                if rank != self.rank:
                    target = vectors[rank][start : start + width]
                    target.copy_(bucket[: target.numel()])
        return vectors

    def _global_rank(self, rank: int) -> int:
        assert self._group is not None
        return dist.get_global_rank(self._group, rank)
