"""Whole tensors from the parts of two real ranks over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llm.distributed.world import World
from llm.training.checkpoints.gather import gather_tensors
from llm.training.updaters.base import TensorPart, whole
from tests.ranks import run_ranks

TABLE = torch.arange(35.0).reshape(5, 7)
COUNTS = torch.arange(5) + 2**40
BF16 = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3) / 3
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def part_of(tensor: Tensor, *slices: slice) -> TensorPart:
    """Return the part of a tensor in these slices, one a dimension."""
    return TensorPart(tensor[slices], tuple(tensor.shape), tuple(index.start for index in slices))


# The parts of rank 0 and of rank 1.
PARTS: dict[str, tuple[TensorPart | None, TensorPart | None]] = {
    "on both": (whole(TABLE), whole(TABLE + 100)),
    "on rank 1 alone": (None, whole(TABLE)),
    "whole on rank 1, in part on rank 0": (part_of(TABLE, slice(0, 2), slice(0, 7)), whole(TABLE)),
    "by rows": (part_of(TABLE, slice(0, 2), slice(0, 7)), part_of(TABLE, slice(2, 5), slice(0, 7))),
    "by columns": (part_of(TABLE, slice(0, 5), slice(0, 4)), part_of(TABLE, slice(0, 5), slice(4, 7))),
    "empty on rank 0": (part_of(TABLE, slice(0, 0), slice(0, 7)), part_of(TABLE, slice(0, 5), slice(0, 7))),
    "empty on rank 1": (part_of(TABLE, slice(0, 5), slice(0, 7)), part_of(TABLE, slice(5, 5), slice(0, 7))),
    "three rows and no row": (part_of(COUNTS, slice(0, 5)), part_of(COUNTS, slice(5, 5))),
    "int64": (part_of(COUNTS, slice(0, 3)), part_of(COUNTS, slice(3, 5))),
    "bf16": (part_of(BF16, slice(0, 1), slice(0, 3)), part_of(BF16, slice(1, 2), slice(0, 3))),
    "scalar": (None, whole(torch.tensor(3.5))),
    "without elements": (whole(torch.zeros(0, 4)), whole(torch.zeros(0, 4))),
}
EXPECTED = dict.fromkeys(PARTS, TABLE) | {
    "three rows and no row": COUNTS,
    "int64": COUNTS,
    "bf16": BF16,
    "scalar": torch.tensor(3.5),
    "without elements": torch.zeros(0, 4),
}


def rank_program(world: World) -> dict[str, Any]:
    """Gather all parts, then parts with a gap."""
    parts = {name: part for name, ranks_parts in PARTS.items() if (part := ranks_parts[world.rank]) is not None}
    tensors = gather_tensors(world, parts)
    wrong = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype != EXPECTED[name].dtype or not torch.equal(tensor, EXPECTED[name])
    ]
    row = slice(2 * world.rank, 2 * world.rank + 2)  # the fifth row is missing
    try:
        gather_tensors(world, {"table": part_of(TABLE, row, slice(0, 7))})
        error = None
    except ValueError as failure:
        error = str(failure)
    return {
        "names": sorted(tensors),
        "wrong": wrong,
        "error": error,
        "is_copied": bool(tensors) and tensors["on both"] is not parts["on both"].tensor,
        "after the error": sorted(gather_tensors(world, {"one": whole(torch.ones(1))})),
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return the answers of the two ranks."""
    return run_ranks(rank_program, tmp_path_factory.mktemp("gather"), 2)


def test_gather_when_two_ranks_hold_parts_then_rank_0_has_every_whole_tensor(answers: list[Any]) -> None:
    main, other = answers
    assert main["names"] == sorted(PARTS)
    assert main["wrong"] == []
    assert not main["is_copied"]  # what rank 0 holds whole
    assert other["names"] == []


def test_gather_when_parts_do_not_cover_a_tensor_then_all_ranks_raise_with_its_name(answers: list[Any]) -> None:
    assert ["28 of the 35 elements of table" in answer["error"] for answer in answers] == [True, True]
    assert [answer["after the error"] for answer in answers] == [["one"], []]  # no rank is one message ahead


def test_gather_when_the_world_has_one_process_then_returns_its_tensors() -> None:
    tensors = gather_tensors(ALONE, {"table": whole(TABLE)})
    assert tensors["table"] is TABLE
    with pytest.raises(ValueError, match="14 of the 35 elements of table"):
        gather_tensors(ALONE, {"table": part_of(TABLE, slice(0, 2), slice(0, 7))})
