"""Whole tensors on rank 0 from the parts that all ranks hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llm.distributed.world import World
from llm.training.updaters.base import TensorPart


class _Layout(NamedTuple):
    """Where a part lies in its tensor."""

    rank: int
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    part_shape: tuple[int, ...]
    dtype: torch.dtype


def gather_tensors(world: World, parts: Mapping[str, TensorPart]) -> dict[str, Tensor]:
    """Return whole tensors on rank 0; all ranks call it together.

    Each part that another rank holds is sent to rank 0 in one message. A tensor that rank 0 holds whole is neither sent
    nor copied.

    Args:
        world: the ranks.
        parts: this rank's parts by name, any shape and dtype, on any device; ranks may hold different names. The parts
            of one tensor do not overlap, unless they are the whole tensor.

    Returns:
        On rank 0 every tensor in its own shape and dtype; those that were put together are on the CPU. On other ranks
        nothing.

    Raises:
        ValueError: on all ranks, when the parts of some tensor do not cover it.
    """
    senders = _senders(_all_layouts(world, parts))
    tensors: dict[str, Tensor] = {}
    for name, layouts in senders.items():
        first = layouts[0]
        if first.rank == 0 and first.part_shape == first.shape:
            if world.is_main:
                tensors[name] = parts[name].tensor
            continue
        if world.is_main:
            tensors[name] = torch.empty(first.shape, dtype=first.dtype)
        for layout in layouts:
            if 0 in layout.part_shape:
                continue  # nothing to send
            if world.is_main:
                part = parts[name].tensor if layout.rank == 0 else _receive(world, layout)
                region = zip(layout.offset, layout.part_shape, strict=True)
                tensors[name][tuple(slice(start, start + length) for start, length in region)] = part.cpu()
            elif world.rank == layout.rank:
                dist.send(parts[name].tensor.to(world.device).contiguous(), dst=0)
    return tensors


def _all_layouts(world: World, parts: Mapping[str, TensorPart]) -> list[dict[str, _Layout]]:
    """Return the layouts of every rank's parts, by rank."""
    rank_layouts = {
        name: _Layout(world.rank, part.shape, part.offset, tuple(part.tensor.shape), part.tensor.dtype)
        for name, part in parts.items()
    }
    if world.size == 1:
        return [rank_layouts]
    layouts: list[dict[str, _Layout]] = [{} for _ in range(world.size)]
    dist.all_gather_object(layouts, rank_layouts)
    return layouts


def _senders(layouts: list[dict[str, _Layout]]) -> dict[str, list[_Layout]]:
    """Return the parts that make up each tensor: that of the lowest rank that holds it whole, or those of all ranks."""
    senders: dict[str, list[_Layout]] = {}
    for rank_layouts in layouts:
        for name, layout in rank_layouts.items():
            senders.setdefault(name, []).append(layout)
    for name, candidates in senders.items():
        complete = [layout for layout in candidates if layout.part_shape == layout.shape]
        if complete:
            senders[name] = complete[:1]
            continue
        num_elements = sum(torch.Size(layout.part_shape).numel() for layout in candidates)
        expected = torch.Size(candidates[0].shape).numel()
        if num_elements != expected:
            raise ValueError(f"the ranks hold {num_elements} of the {expected} elements of {name}")
    return senders


def _receive(world: World, layout: _Layout) -> Tensor:
    part = torch.empty(layout.part_shape, dtype=layout.dtype, device=world.device)
    dist.recv(part, src=layout.rank)
    return part
