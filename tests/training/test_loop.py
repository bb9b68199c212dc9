"""The loop: what is due after each update, and how it ends."""

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
    """An updater whose reports say what a script says."""

    def __init__(self, **at: dict[str, bool]) -> None:
        self.at = at

    def update(self, micro_batches: Sequence[Batch], step: int, *, votes: StepVotes) -> StepReport:
        facts: dict[str, Any] = self.at.get(f"step_{step}", {})
        return StepReport(loss=1.0, grad_norm=torch.tensor(1.0), lr=1e-3, **({"votes": VoteResult()} | facts))


def run(updater: Scripted, progress: TrainState, **changes: Any) -> tuple[bool, list[int]]:
    """Whether all 5 updates were made, and after which ones the event came."""
    seen: list[int] = []
    event = Callback(every(1), lambda _: seen.append(progress.step))
    options = {"num_steps": 5, "tokens_per_step": 8, "votes": NO_VOTES} | changes
    return run_updates(updater, repeat([]), progress, [event], **options), seen


def test_loop_when_nothing_stops_it_then_makes_all_updates() -> None:
    progress = TrainState(step=2)
    assert run(Scripted(), progress) == (True, [3, 4, 5])
    assert progress.tokens == 24


def test_loop_when_a_rank_asked_then_ends_behind_that_update_and_its_events() -> None:
    progress = TrainState()
    assert run(Scripted(step_1={"votes": VoteResult(stop=True)}), progress) == (False, [1, 2])
    assert run(Scripted(step_4={"votes": VoteResult(stop=True)}), progress) == (True, [3, 4, 5])


def test_loop_when_updates_exchange_no_votes_then_acts_on_those_that_came() -> None:
    silent = {"votes": None}
    scripted = Scripted(step_0=silent, step_1=silent, step_2={"votes": VoteResult(stop=True)}, step_3=silent)
    assert run(scripted, TrainState()) == (False, [1, 2, 3])
    assert run(Scripted(**{f"step_{step}": silent for step in range(5)}), TrainState()) == (True, [1, 2, 3, 4, 5])


def test_loop_when_an_update_is_abandoned_then_is_as_if_it_had_not_begun() -> None:
    progress = TrainState()
    assert run(Scripted(step_2={"votes": VoteResult(stop=True), "abandoned": True}), progress) == (False, [1, 2])
    assert (progress.step, progress.tokens, progress.window.num_steps) == (2, 16, 2)


def test_loop_when_watched_then_each_update_is_in_the_block_and_the_events_are_not() -> None:
    inside: list[str] = []

    @contextmanager
    def watched() -> Iterator[None]:
        inside.append("in")
        yield
        inside.append("out")

    event = Callback(every(1), lambda _: inside.append("event"))
    run_updates(
        Scripted(), repeat([]), TrainState(), [event],
        num_steps=2, tokens_per_step=8, votes=NO_VOTES, watched=watched,
    )  # fmt: skip
    assert inside == ["in", "out", "event"] * 2
