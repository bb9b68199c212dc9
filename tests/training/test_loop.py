"""The training loop: callbacks after each update, and how the loop ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch

from llm.data.batches.loader import Batch
from llm.training.loop import Callback, run_updates
from llm.training.state import TrainState
from llm.training.triggers import every
from llm.training.updaters.base import NO_VOTES, StepReport, StepVotes, VoteResult


class Scripted:
    """An updater whose reports are given beforehand: `step_K` has the fields of the report of update K."""

    def __init__(self, **reports: dict[str, Any]) -> None:
        self.reports = reports

    def update(self, micro_batches: Sequence[Batch], step: int, *, votes: StepVotes) -> StepReport:
        fields = {"votes": VoteResult()} | self.reports.get(f"step_{step}", {})
        return StepReport(loss=1.0, grad_norm=torch.tensor(1.0), lr=1e-3, **fields)


def run(updater: Scripted, state: TrainState, **changes: Any) -> tuple[bool, list[int]]:
    """Return whether all 5 updates were made, and after which ones the callback ran."""
    seen: list[int] = []
    callback = Callback(every(1), lambda _: seen.append(state.step))
    options = {"num_steps": 5, "tokens_per_step": 8, "votes": NO_VOTES} | changes
    return run_updates(updater, repeat([]), state, [callback], **options), seen


def test_loop_when_nothing_stops_it_then_makes_all_updates() -> None:
    state = TrainState(step=2)
    assert run(Scripted(), state) == (True, [3, 4, 5])
    assert state.tokens == 24


def test_loop_when_the_ranks_agree_to_stop_then_ends_after_that_update_and_its_callbacks() -> None:
    state = TrainState()
    assert run(Scripted(step_1={"votes": VoteResult(stop=True)}), state) == (False, [1, 2])
    assert run(Scripted(step_4={"votes": VoteResult(stop=True)}), state) == (True, [3, 4, 5])


def test_loop_when_some_updates_exchange_no_votes_then_acts_on_the_votes_of_the_others() -> None:
    silent = {"votes": None}
    scripted = Scripted(step_0=silent, step_1=silent, step_2={"votes": VoteResult(stop=True)}, step_3=silent)
    assert run(scripted, TrainState()) == (False, [1, 2, 3])
    assert run(Scripted(**{f"step_{step}": silent for step in range(5)}), TrainState()) == (True, [1, 2, 3, 4, 5])


def test_loop_when_an_update_is_abandoned_then_it_does_not_count() -> None:
    state = TrainState()
    assert run(Scripted(step_2={"votes": VoteResult(stop=True), "abandoned": True}), state) == (False, [1, 2])
    assert (state.step, state.tokens, state.window.num_steps) == (2, 16, 2)


def test_loop_when_watched_then_each_update_is_inside_the_context_and_the_callbacks_are_not() -> None:
    inside: list[str] = []

    @contextmanager
    def watched() -> Iterator[None]:
        inside.append("in")
        yield
        inside.append("out")

    callback = Callback(every(1), lambda _: inside.append("callback"))
    run_updates(
        Scripted(), repeat([]), TrainState(), [callback],
        num_steps=2, tokens_per_step=8, votes=NO_VOTES, watched=watched,
    )  # fmt: skip
    assert inside == ["in", "out", "callback"] * 2


def test_loop_when_the_batches_end_early_then_ends_with_them() -> None:
    state = TrainState()
    batches: Iterator[list[Batch]] = iter([[], []])
    options = {"num_steps": 5, "tokens_per_step": 8, "votes": NO_VOTES}
    assert not run_updates(Scripted(), batches, state, [], **options)  # type: ignore[arg-type]
    assert state.step == 2


def test_loop_when_several_callbacks_are_due_then_run_in_their_order() -> None:
    calls: list[tuple[str, int]] = []
    state = TrainState()
    callbacks = [
        Callback(every(2), lambda _: calls.append(("first", state.step))),
        Callback(every(1), lambda _: calls.append(("second", state.step))),
    ]
    run_updates(Scripted(), repeat([]), state, callbacks, num_steps=2, tokens_per_step=8, votes=NO_VOTES)  # type: ignore[arg-type]
    assert calls == [("second", 1), ("first", 2), ("second", 2)]
