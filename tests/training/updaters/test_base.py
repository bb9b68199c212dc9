"""The records of the `Updater` protocol."""

from __future__ import annotations

import torch

from llm.training.updaters.base import NO_VOTES, LoadedState, TensorPart, VoteResult, whole

TABLE = torch.arange(12).reshape(3, 4)


def test_part_when_it_has_the_shape_of_the_tensor_then_is_whole() -> None:
    assert whole(TABLE) == TensorPart(TABLE, (3, 4), (0, 0))
    assert whole(TABLE).is_whole
    assert whole(torch.tensor(1.0)).is_whole
    assert not TensorPart(TABLE[1:], (3, 4), (1, 0)).is_whole


def test_loaded_state_when_a_slice_is_read_then_begins_at_its_offset() -> None:
    state = LoadedState({"table": TABLE, "step": torch.tensor(5.0)}, {"optimizer": "SGD"})
    assert state.shapes == {"table": (3, 4), "step": ()}
    assert state.read("table") is TABLE
    assert torch.equal(state.read("table", (1, 1), (2, 3)), TABLE[1:3, 1:4])
    assert torch.equal(state.read("table", (3, 0), (0, 4)), TABLE[:0])
    assert state.read("step", (), ()).item() == 5.0


def test_votes_when_nothing_is_requested_then_are_no() -> None:
    assert VoteResult(stop=NO_VOTES.stop(), save=NO_VOTES.save()) == VoteResult() == (False, False)
