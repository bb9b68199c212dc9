"""Who works on which layer, and how results get from one rank to another."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from llm.kfac.layers import Layer

# Numbers that a rank sends at once.
_BUCKET = 2**23


def assign(layers: Sequence[Layer], num_ranks: int) -> list[int]:
    """The owner of each layer: the dearest first, each to whoever has the least to do.

    A layer costs the cubes of its factors' rows, which is what decomposing them takes.
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    owners = [0] * len(layers)
    for index, cost in _dearest_first(layers):
        load, owners[index] = heapq.heappop(loads)
        heapq.heappush(loads, (load + cost, owners[index]))
    return owners


def refresh_offsets(layers: Sequence[Layer]) -> list[float]:
    """When each layer is refreshed, as a share of the interval, so that every update has about the same to do.

    Neighbours in time have different owners, since both are given out in the same order; the delays do not know how
    many there are, so that any number of ranks makes the same updates.
    """
    found = [0.0] * len(layers)
    whole, before = sum(cost for _, cost in _dearest_first(layers)), 0
    for index, cost in _dearest_first(layers):
        found[index] = before / whole
        before += cost
    return found


def _dearest_first(layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """Numbers and costs of the layers."""
    costs = [layer.dim_a**3 + layer.dim_g**3 for layer in layers]
    return sorted(enumerate(costs), key=lambda item: -item[1])


class Ranks:
    """The processes that train one model together; one alone needs no process group.

    Args:
        group: theirs; None: the default one, where torch.distributed was initialised.

    Attributes:
        size: how many.
        rank: which one this is, in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self._group = group
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0
        if self.rank < 0:
            raise ValueError("process_group does not hold this process")

    def sum_to(self, tensor: Tensor, owner: int | None) -> None:
        """Makes the tensor the sum of all ranks' on the owner, undefined on the others; None: on all."""
        if self.size == 1:
            return
        if owner is None:
            dist.all_reduce(tensor, group=self._group)
        else:
            dist.reduce(tensor, self._global(owner), group=self._group)

    def spread(self, tensor: Tensor, owner: int) -> None:
        """Makes the tensor the owner's on all ranks."""
        if self.size > 1:
            dist.broadcast(tensor, self._global(owner), group=self._group)

    def gather(self, mine: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Every rank's vector, on all ranks, in buckets; `sizes` are their lengths."""
        found = [mine if rank == self.rank else mine.new_empty(size) for rank, size in enumerate(sizes)]
        for start in range(0, max(sizes), _BUCKET):
            width = min(_BUCKET, max(sizes) - start)
            sent = mine.new_zeros(width)
            piece = mine[start : start + width]
            sent[: piece.numel()] = piece
            received = list(mine.new_empty(self.size, width))
            dist.all_gather(received, sent, group=self._group)
            for rank, bucket in enumerate(received):
                if rank != self.rank:
                    place = found[rank][start : start + width]
                    place.copy_(bucket[: place.numel()])
        return found

    def _global(self, rank: int) -> int:
        assert self._group is not None
        return dist.get_global_rank(self._group, rank)
